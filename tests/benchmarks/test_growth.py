"""How cost grows: the fits, what is called wrong, and where lines end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth import worker
from benchmarks.growth.axes import AXES, Line, Run
from benchmarks.growth.report import STYLES, fit, lines_of, short
from benchmarks.peers.memory import peak_bytes
from benchmarks.peers.side import Reference

SMALL = Run("small", "cpu")


# The fit


@given(st.floats(-1, 3), st.floats(-3, 3), st.floats(0, 2))
def test_the_exponent_is_that_of_the_upper_half(exponent: float, size: float, floor: float) -> None:
    """What lies below the middle of the range, and is bent there, does not count."""
    points = [(10.0**k, 10.0**size * (10.0**k) ** exponent) for k in range(7)]
    bent = [(x, y + floor if x < 1e3 else y) for x, y in points]
    found = fit(bent)
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-6)
    assert (found.low, found.high) == (1e3, 1e6)


def test_three_points_are_the_least() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (100.0, 100.0)]
    assert fit(points[:2]) is None
    assert fit([(x, 0.0) for x, _ in points]) is None, "no memory at all has no exponent"
    found = fit(points)
    assert found is not None
    assert (found.low, found.high, found.exponent) == (1.0, 100.0, pytest.approx(1.0))


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (2000, "2,000"), (10**6, "10⁶"), (3 * 10**4, "3·10⁴")])
def test_sizes_as_text(value: int, text: str) -> None:
    assert short(value) == text


# Lines


def tiny(name: str, *values: int) -> Any:
    lines = [dataclasses.replace(line, values=()) for line in AXES[name].lines]
    return dataclasses.replace(AXES[name], values={"small": values}, lines=lines)


def test_every_line_has_a_key_and_a_style_of_its_own() -> None:
    for axis in AXES.values():
        keys = [line.key for line in axis.lines]
        assert len(set(keys)) == len(keys)
        assert {line.key.removeprefix(f"{line.library}-") for line in axis.lines} <= set(STYLES)
        assert all(list(values) == sorted(set(values)) for values in axis.values.values())
        assert set(axis.problem) == set(axis.values)
    full = {name: (axis.values["full"][0], axis.values["full"][-1]) for name, axis in AXES.items()}
    assert full["steps"] == full["products"] == (1, 100)
    assert full["outer"] == (1, 10**6)
    assert full["tasks"] == (1, 256)
    assert AXES["inner"].values["cuda"][-1] == 10**8


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("inner", "hand-conjugate_gradient"),
        ("inner", "bilevel-exact"),
        ("inner", "bilevel-unrolled-least_memory"),
        ("outer", "bilevel-forward"),
        ("steps", "bilevel-identity"),
    ],
)
def test_a_line_is_right_and_measured(name: str, key: str) -> None:
    axis = tiny(name, 200 if name == "inner" else 2)
    said, *points = worker.measure(axis, axis.line(key), SMALL, seconds=0.05)
    assert said["wrong"] == ""
    assert said["error"] < 1e-4
    assert len(points) == 1
    assert points[0]["seconds"] > 0
    assert points[0]["bytes"] > 0


def test_what_a_row_of_inner_parameters_takes_is_what_it_says() -> None:
    """Conjugate gradients hold a fixed number of vectors: ten times the parameters, ten times the memory."""
    line = AXES["inner"].line("hand-conjugate_gradient")
    small, large = (peak_bytes(AXES["inner"].build(line, size, SMALL).step) for size in (30_000, 300_000))
    assert large == pytest.approx(10 * small, rel=0.05)
    assert 5 < large / 1_200_000 < 20


def test_a_wrong_line_is_told_and_not_drawn() -> None:
    axis = tiny("inner", 1000)

    def doubled(line: Line) -> tuple[int, Reference]:
        value, reference = AXES["inner"].check(line)
        return value, Reference(2 * reference.own)

    wrong = dataclasses.replace(axis, check=doubled)
    said, *points = worker.measure(wrong, axis.line("hand-conjugate_gradient"), SMALL, seconds=0.05)
    assert "0.5 × the right value" in said["wrong"]
    row = {"key": "hand-conjugate_gradient", "library": "hand", "failed": "", "stopped": "", "at": 0, **said}
    row["points"] = [[p["x"], p["seconds"], p["bytes"]] for p in points]
    about = {"size": "small", "command": "", "date": "", "machine": "", "threads": 1, "clock": "", "torch": ""}
    result = {"axis": "inner", "device": "cpu", "rows": [row], "about": about, "versions": {}, "absent": {}}
    lines = lines_of(result)
    assert not any(line.startswith("| by hand") for line in lines)
    assert any("Not drawn: by hand, conjugate gradients: wrong" in line for line in lines)


def test_where_a_line_ends() -> None:
    at = {"x": 10, "seconds": 0.1, "bytes": 1000}
    assert worker.too_much(at, 100, SMALL, seconds=1.0) == ""
    assert "0.5 s at 10" in worker.too_much({**at, "seconds": 0.5}, 100, SMALL, seconds=1.0)
    assert "took 3 s" in worker.too_much({**at, "seconds": 3.0}, 11, SMALL, seconds=1.0)
    assert "MiB at 10" in worker.too_much({**at, "bytes": 2**40}, 100, SMALL, seconds=1.0)
