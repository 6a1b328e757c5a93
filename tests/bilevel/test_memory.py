"""Steps leave nothing behind: no tensor, no graph, nothing for the cyclic collector. And the instrument sees leaks."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.reliability import memory_probe
from benchmarks.reliability.memory import CASES, control, main, measure
from benchmarks.reliability.memory_cases import batches, configured, make_engine
from benchmarks.reliability.memory_probe import follow, judge
from bilevel import Engine, Unrolled
from bilevel.callbacks import Callback
from bilevel.hypergrad import available_methods

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")

BY_NAME = {case.name: case for case in CASES}
FAST = [
    *available_methods(),
    "unrolled, graphs kept",
    "conjugate_gradient, warm start",
    "conjugate_gradient, finite differences",
    "checkpoints and loading, soba",
    "NaN in every second step, skipped",
    "NaN in every second step, refused, unrolled with graphs",
    "an exception in every second step",
    "a callback that raises",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread; what torch allocates at its first passes is there; the collector need not look at what exists."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    follow(lambda: make_engine().step, warm_up=0, steps=40, every=40)
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def verdict_of(make: Callable[[], Callable[[], object]], steps: int = 60):
    return judge(follow(make, warm_up=20, steps=steps, every=20))


@pytest.mark.parametrize("name", FAST)
def test_a_hundred_steps_leave_nothing_behind(name):
    assert measure(BY_NAME[name], 100, readings=4).verdict.faults == ()


@pytest.mark.long
@pytest.mark.parametrize("name", BY_NAME)
def test_two_thousand_steps_leave_nothing_behind(name):
    assert measure(BY_NAME[name], 2000).verdict.faults == ()


class Keeping(Callback):
    """Keeps something of each step, as a careless callback does."""

    def __init__(self, what: Callable[[Engine], object]) -> None:
        self.what = what
        self.kept: list[object] = []

    def on_step_end(self, engine, result):
        self.kept.append(self.what(engine))


def outer_loss(engine: Engine) -> torch.Tensor:
    return engine.problems["decay"].evaluate_loss(batches(1, 1)[0])[0]


LEAKS = {
    "copies of parameters": (
        lambda engine: [p.detach().clone() for p in engine.problems["decay"].parameters],
        {"tensors", "tensor_bytes"},
    ),
    "a loss with its graph": (outer_loss, {"tensors", "tensor_bytes", "nodes", "heap"}),
    "a graph without its loss": (lambda engine: outer_loss(engine).grad_fn, {"nodes", "heap"}),
    "memory that is no tensor": (lambda engine: bytes(2000), {"heap"}),
    "a Python object": (lambda engine: [object() for _ in range(10)], {"Python"}),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_callback_that_keeps_things_is_seen(leak):
    what, expected = LEAKS[leak]
    faults = " ".join(verdict_of(lambda: make_engine(callbacks=(Keeping(what),)).step).faults)
    missing = {word for word in expected if word not in faults}
    assert not missing, faults


class Hoarding(Unrolled):
    """Unrolling that holds on to the updates that it was handed, and to the gradients with their graphs."""

    name = "hoarding"
    kept: list[object] = []  # noqa: RUF012 (a leak, on purpose)

    def respond(self, problem):
        self.kept += [(step, step.graph.gradient) for step in problem.trajectory]
        return super().respond(problem)


def test_an_engine_whose_records_keep_their_graphs_is_seen():
    try:
        faults = " ".join(verdict_of(lambda: make_engine(Hoarding(memory="graph")).step).faults)
    finally:
        Hoarding.kept.clear()
    assert {"tensors", "nodes", "heap"} <= set(faults.replace(",", " ").split()), faults


def test_tensors_in_reference_cycles_are_seen_though_the_collector_frees_them():
    def make():
        def step():
            cycle: list[object] = [torch.zeros(100)]
            cycle.append(cycle)

        return step

    verdict = verdict_of(make)
    assert verdict.cyclic_tensors == 1.0
    assert any("reference cycles" in fault for fault in verdict.faults)


def test_a_leak_of_one_small_block_a_step_is_seen_in_a_long_run():
    kept = []

    def make():
        step = control()
        return lambda: [step(), kept.append(bytes(600))]

    verdict = judge(follow(make, warm_up=100, steps=1000, every=100))
    assert verdict.heap_slope == pytest.approx(650, abs=60)
    assert any("C heap" in fault for fault in verdict.faults)


def test_the_resident_memory_is_judged_in_long_runs_only():
    def readings(steps: int):
        make = lambda number: memory_probe.Reading(number, 1, 1, 0, 0, 0, 0, 0, 100 * number)  # noqa: E731
        return [make(0), make(steps // 2), make(steps)]

    assert judge(readings(999)).faults == ()
    assert judge(readings(1000)).faults == ("the resident memory grows by 100 bytes a step",)


def test_the_collector_is_as_it_was_after_following():
    for frozen in (True, False):
        if not frozen:
            gc.unfreeze()
        with pytest.raises(ZeroDivisionError):
            follow(lambda: lambda: 1 / 0, warm_up=0, steps=1, every=1)
        assert gc.isenabled()
        assert (gc.get_freeze_count() > 0) == frozen
    gc.freeze()


def test_the_command_prints_a_row_a_case_and_fails_where_memory_grows(tmp_path: Path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    arguments = ["--steps", "20", "--only", "argmin", "--output", str(path)]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())
    assert [row["name"] for row in rows] == ["a plain torch loop (control)", "argmin, differentiated"]
    assert "| argmin, differentiated | 20 |" in capsys.readouterr().out
    monkeypatch.setattr(memory_probe, "HEAP_SLACK", -1e9)
    assert main(arguments) == 1
    assert "the C heap grows" in capsys.readouterr().out


def test_every_method_is_a_case():
    assert set(available_methods()) <= BY_NAME.keys()
    assert len(BY_NAME) == len(CASES)
    assert all(configured(name)["method"] == name for name in available_methods())
