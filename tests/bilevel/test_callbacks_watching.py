"""Early stopping and best-model keeping: the right step, any metric, exact on resume, alike on every rank."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

from bilevel import BilevelError, Callback, Engine, EngineConfig, Problem, StepResult
from bilevel.callbacks import BestModel, EarlyStopping
from bilevel.errors import BilevelWarning, ConfigError, UnknownNameError
from tests.bilevel.test_callbacks import Inner, sgd
from tests.bilevel.test_callbacks_logs import Saves
from tests.ranks import free_port


class Scripted(Problem):
    """Returns metrics from a list: ``script`` beside its loss, ``score`` from ``evaluate()``."""

    values: Sequence[float] = ()
    taken = 0

    def loss(self, batch: Any) -> Mapping[str, Any]:
        return {"loss": (self.inner.module.weight - 1.0).square().sum(), "script": self.at(self.taken)}

    def evaluate(self) -> Mapping[str, float]:
        return {"score": self.at(self.taken - 1)}

    def at(self, place: int) -> float:
        return self.values[place] if 0 <= place < len(self.values) else 0.0

    def on_step_end(self, result: StepResult) -> None:
        self.taken = result.step


def scripted(values: Sequence[float], *callbacks: Callback, **settings: Any) -> Engine:
    torch.manual_seed(0)
    outer = Scripted(nn.Linear(2, 2, bias=False), optimizer=sgd, name="outer")
    outer.values = values
    inner = Inner(nn.Sequential(nn.Linear(2, 2, bias=False)), optimizer=sgd)
    inner.module.register_buffer("seen", torch.zeros(()))
    inner.module.weight = inner.module[0].weight
    return Engine([outer, inner], EngineConfig(progress=False, **settings), "identity", callbacks=callbacks)


def last_step(values: Sequence[float], stopping: EarlyStopping, **settings: Any) -> int:
    run = scripted(values, stopping, **settings)
    run.run(len(values))
    return run.step_count


@pytest.mark.parametrize(
    ("values", "options", "stops_after", "best", "best_step"),
    [
        ([5, 4, 3, 2, 1, 0], {"patience": 1}, 6, 0, 6),
        ([5, 4, 4, 4, 9, 9], {"patience": 2}, 4, 4, 2),  # equal is no improvement
        ([5, 4, 6, 3, 9, 9, 9], {"patience": 3}, 7, 3, 4),  # an improvement starts the count again
        ([1, 2, 3, 2, 2, 2], {"patience": 2, "mode": "max"}, 5, 3, 3),
        ([5.0, 4.9, 4.8, 4.7, 4.0], {"patience": 2, "min_delta": 0.25}, 3, 5, 1),
        (
            [5.0, 4.9, 4.7, 4.6, 4.4],
            {"patience": 2, "min_delta": 0.25},
            5,
            4.4,
            5,
        ),
        ([0, 5, 4, 5, 5, 5], {"patience": 2, "start": 2}, 5, 4, 3),
        ([math.nan, math.nan, 1, 1], {"patience": 2}, 2, math.nan, 0),
        ([2, math.nan, 1, math.nan, math.nan], {"patience": 2}, 5, 1, 3),
        ([-math.inf, 1, 1], {"patience": 2}, 3, -math.inf, 1),
    ],
)
def test_the_run_ends_at_the_step_that_exhausts_the_patience(
    values: list[float], options: dict[str, Any], stops_after: int, best: float, best_step: int
) -> None:
    stopping = EarlyStopping("outer/script", **options)
    assert last_step(values, stopping) == stops_after
    assert stopping.best == pytest.approx(best, nan_ok=True)
    assert stopping.best_step == best_step


def test_the_reason_names_metric_count_and_best_step() -> None:
    run = scripted([3, 1, 2, 2, 2], EarlyStopping("outer/script", patience=2))
    run.run(5)
    assert run.stop_reason == "outer/script has not improved for 2 looks; it was best, 1, at step 2"


def test_an_evaluated_metric_is_looked_at_when_it_is_evaluated() -> None:
    values = [9, 5, 9, 4, 9, 4, 9, 4, 9, 9]  # 5, 4, 4, 4 where evaluated
    assert last_step(values, EarlyStopping("outer/score", patience=2), evaluate_every=2) == 8


@pytest.mark.parametrize("name", ["outer", "inner"])
def test_the_loss_of_any_problem_is_a_metric(name: str) -> None:
    losses: list[float] = []

    class Losses(Callback):
        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            losses.append(result.losses[name])

    stopping = EarlyStopping(name, patience=100)
    scripted([], Losses(), stopping).run(30)
    assert stopping.best == min(losses)
    assert losses[stopping.best_step - 1] == stopping.best


@pytest.mark.parametrize("kind", [EarlyStopping, BestModel])
@pytest.mark.parametrize(
    ("name", "settings", "step", "listed"),
    [
        ("outer/skript", {}, 1, "did you mean 'outer/script'.*'inner', 'outer', 'outer/script'.*evaluate_every"),
        ("outr", {}, 1, "did you mean 'outer'"),
        ("outer/score", {}, 1, "set EngineConfig.evaluate_every"),  # nothing will evaluate it
        ("outr/score", {"evaluate_every": 2}, 1, "'outer/script'"),
        ("outer/scor", {"evaluate_every": 2}, 2, "did you mean 'outer/score'.*'outer', 'outer/score', 'outer/script'"),
    ],
)
def test_an_unknown_metric_is_an_error_as_soon_as_it_can_be_known(
    kind: Any, name: str, settings: dict[str, Any], step: int, listed: str
) -> None:
    run = scripted([1, 1, 1, 1], kind(name), **settings)
    with pytest.raises(UnknownNameError, match=listed):
        run.run(4)
    assert run.step_count == step


def test_one_name_for_a_metric_of_the_loss_and_of_evaluate_is_an_error() -> None:
    class Both(Scripted):
        def evaluate(self) -> Mapping[str, float]:
            return {"script": 1.0}

    outer = Both(nn.Linear(2, 2, bias=False), optimizer=sgd, name="outer")
    inner = Inner(nn.Linear(2, 2, bias=False), optimizer=sgd)
    stopping = EarlyStopping("outer/script")
    run = Engine([outer, inner], EngineConfig(progress=False, evaluate_every=2), "identity", callbacks=[stopping])
    with pytest.raises(BilevelError, match="which both the problem's loss and its evaluate"):
        run.run(3)


def test_a_skipped_step_is_not_looked_at() -> None:
    class Fails(Inner):
        def loss(self, batch: Any) -> torch.Tensor:
            value = super().loss(batch)
            return value * math.nan if self.outer.taken in (1, 2, 3) else value

    outer = Scripted(nn.Linear(2, 2, bias=False), optimizer=sgd, name="outer")
    outer.values = [1.0] * 10
    inner = Fails(nn.Linear(2, 2, bias=False), optimizer=sgd, name="inner")
    stopping = EarlyStopping("outer/script", patience=2)
    config = EngineConfig(progress=False, on_non_finite="skip")
    run = Engine([outer, inner], config, "identity", callbacks=[stopping])
    run.run(10)
    assert (run.skipped_steps, run.step_count) == (3, 6)  # looks at steps 1, 5 and 6


def test_a_value_of_a_step_that_another_problem_made_fail_is_not_looked_at() -> None:
    stopping = EarlyStopping("inner")
    run = scripted([], stopping)
    best = run.step().losses["inner"]
    stopping.on_step_end(run, StepResult(2, {"inner": best - 1.0}, {}, {}, {}, (1, 1), 0.1, skipped="outer"))
    assert (stopping.best, stopping.best_step, stopping.waited) == (best, 1, 0)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resumed_run_stops_at_the_same_step(stop: int, tmp_path: Path) -> None:
    values = [5, 4, 6, 6, 6, 6, 6, 6]
    whole = EarlyStopping("outer/script", patience=4)
    assert last_step(values, whole) == 6
    scripted(values, EarlyStopping("outer/script", patience=4), Saves(tmp_path / "state", stop)).run(5)
    stopping = EarlyStopping("outer/script", patience=4)
    resumed = scripted(values, stopping, Saves(tmp_path / "state", stop))
    resumed.load(tmp_path / "state")
    resumed.problems["outer"].taken = stop
    resumed.run(8)
    assert (resumed.step_count, stopping.best, stopping.best_step) == (6, 4, 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EarlyStopping, {"patience": 0}, "EarlyStopping.patience must be an integer of at least 1"),
        (EarlyStopping, {"mode": "least"}, "EarlyStopping.mode 'least'"),
        (EarlyStopping, {"min_delta": -1.0}, "EarlyStopping.min_delta must be a finite number at least 0"),
        (BestModel, {"start": -1}, "BestModel.start must be an integer of at least 0"),
    ],
)
def test_settings_are_checked_when_made(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind("outer", **options)


# --- best model -------------------------------------------------------------------------------------------------------


class Trace(Callback):
    """Copies of everything after every step."""

    def __init__(self) -> None:
        self.copies: dict[int, list[torch.Tensor]] = {}

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        engine.problems["inner"].module.seen.add_(1)
        self.copies[result.step] = parameters(engine)


def parameters(engine: Engine) -> list[torch.Tensor]:
    tensors = [p for problem in engine.problems.values() for p in (*problem.parameters, *problem.module.buffers())]
    return [tensor.detach().clone() for tensor in tensors]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


VALUES = [3, 1, 2, 0, 5, 6]  # best at step 4, and at step 2 among the first three


def test_the_best_parameters_and_buffers_are_put_back_at_the_end() -> None:
    trace, best = Trace(), BestModel("outer/script")
    run = scripted(VALUES, trace, best)
    run.run(6)
    assert (best.best, best.best_step) == (0, 4)
    assert same(parameters(run), trace.copies[4])
    assert not same(trace.copies[4], trace.copies[6])


def test_the_best_of_an_evaluated_metric_is_what_was_evaluated() -> None:
    trace, best = Trace(), BestModel("outer/score", mode="max")
    run = scripted([9, 1, 9, 3, 9, 2], trace, best, evaluate_every=2)
    run.run(6)
    assert (best.best, best.best_step) == (3, 4)
    assert same(parameters(run), trace.copies[4])


def test_without_restore_it_is_put_back_on_demand_only() -> None:
    trace, best = Trace(), BestModel("outer/script", restore=False)
    run = scripted(VALUES, trace, best)
    with pytest.raises(ConfigError, match="has kept nothing yet: no value of 'outer/script'"):
        best.restore(run)
    run.run(6)
    assert same(parameters(run), trace.copies[6])
    best.restore(run)
    assert same(parameters(run), trace.copies[4])


def test_two_runs_are_one_although_the_best_was_put_back_between() -> None:
    trace, parts = Trace(), Trace()
    scripted(VALUES, trace, BestModel("outer/script")).run(6)
    run = scripted(VALUES, parts, BestModel("outer/script"))
    run.run(3)
    assert same(parameters(run), trace.copies[2])
    run.run(3)
    assert same(parts.copies[6], trace.copies[6])
    assert same(parameters(run), trace.copies[4])


def test_parameters_that_the_user_changed_between_runs_are_left_alone() -> None:
    class Start(Callback):
        found: Sequence[torch.Tensor] = ()

        def on_run_start(self, engine: Engine, steps: int) -> None:
            self.found = parameters(engine)

    start = Start()
    run = scripted(VALUES, BestModel("outer/script"), start)
    run.run(3)
    with torch.no_grad():
        run.problems["outer"].parameters[0].fill_(7.0)
    changed = parameters(run)
    run.run(1)
    assert same(list(start.found), changed)


@pytest.mark.parametrize("saved_at_end", [True, False])
def test_a_resumed_run_keeps_the_best_and_goes_on_from_the_last(saved_at_end: bool, tmp_path: Path) -> None:
    whole = Trace()
    finished = scripted(VALUES, whole, BestModel("outer/script"))
    finished.run(6)
    first = scripted(VALUES, Trace(), BestModel("outer/script"))
    first.run(3)  # the best, of step 2, is put back
    if not saved_at_end:
        first.callbacks[1].on_run_start(first, 1)  # as within a run: the last parameters are in place
    first.save(tmp_path / "state")
    trace, best = Trace(), BestModel("outer/script")
    resumed = scripted([9, 9, 9, *VALUES[3:]], trace, best)
    resumed.load(tmp_path / "state")
    resumed.problems["outer"].taken = 3
    resumed.run(3)
    assert same(trace.copies[6], whole.copies[6])
    assert same(parameters(resumed), whole.copies[4])
    assert (best.best, best.best_step) == (0, 4)


def test_a_run_that_ends_by_an_exception_keeps_its_last_parameters() -> None:
    class Breaks(Callback):
        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            if result.step == 5:
                raise OSError("no")

    trace = Trace()
    run = scripted(VALUES, trace, BestModel("outer/script"), Breaks())
    with pytest.raises(BilevelError):
        run.run(6)
    assert same(parameters(run), trace.copies[5])


def test_a_run_that_was_asked_to_stop_has_the_best_put_back() -> None:
    trace = Trace()
    run = scripted(VALUES, trace, BestModel("outer/script"), EarlyStopping("outer/script", patience=1))
    run.run(6)
    assert run.step_count == 3
    assert same(parameters(run), trace.copies[2])


def test_the_file_holds_the_best(tmp_path: Path) -> None:
    trace = Trace()
    run = scripted(VALUES, trace, BestModel("outer/script", path=tmp_path / "new" / "best.safetensors"))
    run.run(6)
    found = load_file(tmp_path / "new" / "best.safetensors")
    assert list(found) == ["inner.0.weight", "inner.seen", "outer.weight"]
    assert same([found["outer.weight"], found["inner.0.weight"], found["inner.seen"]], trace.copies[4])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["best.safetensors"]


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trace = Trace()
    run = scripted(VALUES, trace, BestModel("outer/script", path=tmp_path / "file" / "best.safetensors"))
    with pytest.warns(BilevelWarning, match="BestModel cannot write") as said:
        run.run(6)
    assert len(said) == 1
    assert same(parameters(run), trace.copies[4])


# --- data parallelism -------------------------------------------------------------------------------------------------

PER_RANK = ([4.0, 1.0, 5.0, 5.0, 0.0, 0.0], [4.0, 5.0, 3.0, 5.0, 8.0, 8.0])  # means 4, 3, 4, 5, 4, 4


def worker(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = []
        for name, every in (("outer/script", 0), ("outer/score", 1)):
            best = BestModel(name, path=os.path.join(folder, f"{rank}.safetensors"))
            run = scripted(PER_RANK[rank], EarlyStopping(name, patience=3), best, evaluate_every=every)
            run.run(6)
            found.append((run.step_count, best.best, best.best_step))
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()  # gloo's threads do not like a peer that has gone
    finally:
        dist.destroy_process_group()
    os._exit(0)  # what was found is saved, and gloo's threads can abort an interpreter that is coming to its end


@pytest.mark.timeout(120)
def test_every_rank_decides_by_the_mean_over_ranks(tmp_path: Path) -> None:
    port = free_port()
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == [(5, 3.0, 2)] * 2
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["0.safetensors"]
