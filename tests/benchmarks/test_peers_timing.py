"""What a table says of times: who is timed, from where, and what is divided by what."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import precision, run, timing
from benchmarks.peers.reference import implicit
from benchmarks.peers.report import conditions, lines_of
from benchmarks.peers.side import Method
from benchmarks.peers.sides.bilevel.implicit import build
from benchmarks.peers.sides.hand.implicit import Loop
from benchmarks.peers.verdict import error
from benchmarks.peers.worker import Worker
from tests.benchmarks.test_peers import METHODS, quadratic

ABOUT = {"command": "x", "date": "today", "machine": "m", "threads": 2, "clock": "wall clock", "torch": "2"}


@pytest.mark.parametrize(("cpu_time", "seconds"), [(False, 5.0), (True, 0.5)])
def test_a_time_is_the_mean_of_steps_by_the_clock_that_is_asked_for(
    cpu_time: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was started before does not count, and what a step has started does."""
    now, queue = {"wall": 0.0}, ["before"]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(timing.time, "process_time", lambda: now["wall"] / 10)

    def wait() -> None:
        now["wall"] += 5.0 * len(queue)
        queue.clear()

    assert timing.timed(lambda: queue.append("step"), wait, 4, cpu_time=cpu_time) == pytest.approx(seconds)


@pytest.mark.usefixtures("local", "few")
def test_all_are_timed_from_the_start_in_every_turn_and_divided_by_the_loop_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("benchmarks.peers.sides.jaxopt.regularisation")
    module.build = Loop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    takes = {"hand": iter([2.0, 2.0, 2.0, 20.0, 4.0]), "bilevel": iter([9.0, 9.0, 3.0, 40.0, 8.0])}
    takes["jaxopt"] = iter([1.0, 1.0, 0.22, 0.2, 0.2])
    did: list[tuple[str, str]] = []
    restart = Worker.restart

    def restarted(self: Worker, key: str) -> bool:
        did.append((self.library, "restart"))
        return restart(self, key)

    def seconds(self: Worker, key: str, steps: int = 1, cpu_time: bool = False) -> float:
        did.append((self.library, f"{steps} steps, {cpu_time}"))
        return next(takes[self.library])

    monkeypatch.setattr(Worker, "restart", restarted)
    monkeypatch.setattr(Worker, "time", seconds)
    monkeypatch.setattr(run, "SECONDS", 5.0)
    pythons = dict.fromkeys(takes, Path(sys.executable))
    found = run.measure("regularisation", pythons, {}, run.Settings(size="small", rounds=3, cpu_time=True))
    rows = {row.library: row for row in found.rows}
    assert {name: row.seconds for name, row in rows.items()} == {"hand": 4.0, "bilevel": 8.0, "jaxopt": 0.2}
    ratios = {name: row.ratio.median for name, row in rows.items() if row.ratio is not None}
    assert ratios == pytest.approx({"hand": 1.0, "bilevel": 2.0, "jaxopt": 0.05})
    turns = did[2 * len(takes) :]  # after two steps of each to warm up
    assert turns[1::2] == [(library, "3 steps, True") for library, _ in turns[::2]]  # 5 s of 2 s a step
    assert {what for _, what in turns[::2]} == {"restart"}
    table = lines_of({"about": ABOUT, **found.as_json()})
    cells = [[cell.strip() for cell in line.split("|")[2:6]] for line in table[2:5]]
    assert [(library, time, ratio) for library, _, time, ratio in cells] == [
        ("by hand", "4000", ""),
        ("JAXopt", "200", "0.05 (0.03–0.08)"),
        ("bilevel", "**8000**", "2.00 (1.75–2.00)"),  # the shortest, JAXopt and the loop by hand apart
    ]


# Runs of an accuracy


@pytest.mark.parametrize("side", [Loop, build])
def test_every_step_of_a_run_starts_from_its_point(side: Callable[[Any, Method], Any], tmp_path: Path) -> None:
    """And not from where the step before has ended."""
    task, method = quadratic(), METHODS["conjugate_gradient"]
    run_ = precision.path(task, 0.05, 4)
    run_.write(tmp_path / "path.npz")
    worker = Worker("hand")
    worker.sides["k"] = side(task, method)
    told = worker.timed_path("k", str(tmp_path / "path.npz"), str(tmp_path / "found.npz"))
    with np.load(tmp_path / "found.npz") as arrays:
        found = arrays["gradients"]
    for step, gradient in enumerate(found):
        assert error(gradient, implicit(run_.task(task, step), method).own) < 1e-6
    assert len(told["seconds"]) == 4
    assert told["backward"] == 4 * (3 + method.products + 1)


class Answering:
    """A worker that says what a run took."""

    def ask(self, command: str, **fields: Any) -> Any:
        if command != "timed_path":
            return None
        with np.load(fields["file"]) as arrays:
            count = len(arrays["inner0000"])
        np.savez(fields["found"], gradients=np.ones((count, 1)))
        return {"seconds": [0.5] * count, "backward": count * 10}


def test_what_a_part_of_a_run_takes_is_scaled_to_all_of_it(tmp_path: Path) -> None:
    run_ = precision.Path50([np.zeros((50, 1))], [np.zeros((50, 1))], np.ones((50, 1)))
    field = precision.Field("a workload", {}, run_, {}, run.Settings("small", 1), tmp_path)
    field.remotes["boat"] = Answering()  # type: ignore[assignment]
    for part in ((), (0, 25, 49)):
        contender = precision.Contender("boat", "a method", Method("conjugate_gradient", 3), part=part)
        field.take(contender)
        assert contender.seconds == [25.0]
        assert contender.products == 10 - 3
        assert contender.errors == [0.0] * (len(part) or 50)


def test_the_best_peer_is_the_fastest_right_one_in_torch_that_is_not_this_library() -> None:
    def contender(library: str, *seconds: float, worst: float = 1e-4) -> precision.Contender:
        return precision.Contender(library, "m", Method("neumann"), [worst], [99.0, *seconds], 5.0)

    found = [contender("hand", 1.0, 1.0), contender("bilevel", 2.0, 5.0), contender("jaxopt", 0.5, 0.5)]
    found += [contender("torchopt", 4.0, 20.0), contender("boat", 30.0, 30.0), contender("betty", 0.1, 0.1, worst=0.2)]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in precision.lines(found)[2:]]
    assert [(row[0], row[-1]) for row in table] == [
        ("JAXopt", "0.07"),
        ("by hand", "0.15"),
        ("bilevel", "0.38"),
        ("TorchOpt", "1.00"),
        ("BOAT", "4.50"),
        ("Betty", ""),
    ]
    assert "never within 0.001" in table[-1][-2]
    assert precision.lines(found[:1])[-1].endswith("| 1 | – |")


# How it was measured


def test_conditions_leave_out_what_is_not_known() -> None:
    assert conditions(ABOUT) == "`x`, today, m, 2 threads, wall clock; torch 2"
    assert conditions({"machine": "m", "threads": 1, "torch": "2"}) == "m, 1 thread; torch 2"
    assert conditions({"torch": "2"}) == "torch 2"


def test_tables_of_every_form_end_with_the_conditions() -> None:
    result = {"about": ABOUT, "source": "digits", "lines": ["| a |"], "versions": {"boat": {"boat-torch": "1"}}}
    assert lines_of(result) == ["| a |", "", f"digits. {conditions(ABOUT)}, boat-torch 1."]
    assert lines_of({"about": ABOUT, "lines": ["| a |"]})[-1] == f"{conditions(ABOUT)}."
