"""A run's folder: periodic, last and best checkpoints, what stays, who may write, and what a run goes on from."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import BilevelError, Callback, Engine, EngineConfig, Problem
from bilevel.callbacks import Checkpoints
from bilevel.checkpoint import entries, read_state
from bilevel.engine_state import resume_engine
from bilevel.errors import BilevelWarning, ConfigError, UnknownNameError


class Outer(Problem):
    """Its loss, metric and evaluation are those of a table, step by step."""

    table: tuple[float, ...] = ()

    def loss(self, batch: Any) -> Any:
        value = (self.inner.module.weight - 1.0).square().sum()
        return {"loss": value, "distance": value.detach().sqrt()}

    def evaluate(self) -> Mapping[str, float]:
        step = int(self.module.counter)
        return {"score": self.table[step - 1]} if 0 < step <= len(self.table) else {}

    def on_step_end(self, result: Any) -> None:
        self.module.counter += 1


class Inner(Problem):
    def loss(self, batch: Any) -> torch.Tensor:
        return (self.module.weight - self.outer.module.weight).square().sum() / 2


def made(*callbacks: Callback, table: tuple[float, ...] = (), width: int = 2, **settings: Any) -> Engine:
    torch.manual_seed(0)
    module = nn.Linear(width, 2, bias=False)
    module.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    outer, inner = Outer(module, optimizer=sgd), Inner(nn.Linear(width, 2, bias=False), optimizer=sgd)
    outer.table = table
    return Engine(
        [outer, inner], EngineConfig(**{"progress": False, **settings}), hypergradient="identity", callbacks=callbacks
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def step_of(path: Path) -> int:
    return int(read_state(path)["counts"]["steps"])


# --- what is written, and what stays ----------------------------------------------------------------------------------


def test_periodic_checkpoints_stay_by_number_and_the_last_state_is_written(tmp_path: Path) -> None:
    engine = made(Checkpoints(tmp_path, every=2, keep=2))
    engine.run(7)
    assert names(tmp_path) == ["step-00000006.safetensors", "step-00000007.safetensors"]
    assert [step_of(tmp_path / name) for name in names(tmp_path)] == [6, 7]


def test_the_last_state_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, written = made(Checkpoints(tmp_path, every=2)), []
    save = engine.save
    monkeypatch.setattr(engine, "save", lambda path: (written.append(Path(path).name), save(path)))
    engine.run(4)
    assert written == ["step-00000002.safetensors", "step-00000004.safetensors"]


def test_all_stay_where_keep_is_none_and_others_files_always(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "step-1.safetensors.bak").touch()
    made(Checkpoints(tmp_path, every=1, keep=None)).run(5)
    assert len(names(tmp_path)) == 7
    made(Checkpoints(tmp_path / "one", every=1, keep=1)).run(5)
    assert names(tmp_path / "one") == ["step-00000005.safetensors"]


def test_numbers_decide_what_is_newest_also_past_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / f"step-{step:08d}.safetensors").touch()
    assert [entry.step for entry in entries(tmp_path)] == [100_000_000, 99_999_999, 7]


@pytest.mark.parametrize(("mode", "best"), [("min", 4), ("max", 3)])
def test_the_best_of_an_evaluated_metric_stays(mode: str, best: int, tmp_path: Path) -> None:
    table = (0.5, 0.4, 0.9, 0.1, float("nan"), 0.2)
    checkpoints = Checkpoints(tmp_path, every=100, keep=1, best="outer/score", mode=mode)
    made(checkpoints, table=table, evaluate_every=1).run(6)
    assert names(tmp_path) == [f"best-0000000{best}.safetensors", "step-00000006.safetensors"]
    assert checkpoints.best_path == tmp_path / names(tmp_path)[0]
    assert (checkpoints.best, checkpoints.best_step) == (table[best - 1], best)
    engine = made(Checkpoints(tmp_path, best="outer/score", mode=mode), table=table)
    engine.load(checkpoints.best_path)
    assert engine.step_count == best
    assert engine.evaluate() == {"outer/score": table[best - 1]}


@pytest.mark.parametrize("metric", ["outer", "outer/distance"])
def test_a_loss_and_its_metrics_can_be_what_is_best(metric: str, tmp_path: Path) -> None:
    engine = made(Checkpoints(tmp_path, every=100, best=metric))
    losses = [engine.step().losses["outer"] for _ in range(5)]
    assert names(tmp_path) == [f"best-{1 + losses.index(min(losses)):08d}.safetensors"]
    assert losses == sorted(losses, reverse=True)  # so that it is the last


def test_a_best_and_a_periodic_checkpoint_of_one_step_are_one_file(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, every=1, keep=1, best="outer")).run(3)
    best, step = (tmp_path / name for name in names(tmp_path))
    assert best.samefile(step)
    assert step_of(step) == 3


def test_without_links_it_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("bilevel.checkpoint.folder.os.link", none)
    made(Checkpoints(tmp_path, every=1, keep=1, best="outer")).run(2)
    best, step = (tmp_path / name for name in names(tmp_path))
    assert not best.samefile(step)
    assert best.read_bytes() == step.read_bytes()


def test_what_is_best_survives_a_restart(tmp_path: Path) -> None:
    table = (0.5, 0.1, 0.3, 0.2, 0.05)

    def fresh() -> tuple[Checkpoints, Engine]:
        checkpoints = Checkpoints(tmp_path, every=1, best="outer/score")
        return checkpoints, made(checkpoints, table=table, evaluate_every=1)

    fresh()[1].run(3)
    checkpoints, engine = fresh()
    assert resume_engine(engine, tmp_path) == 3
    assert (checkpoints.best, checkpoints.best_step) == (0.1, 2)
    engine.run(1)
    assert names(tmp_path)[0] == "best-00000002.safetensors"
    engine.run(1)
    assert names(tmp_path)[0] == "best-00000005.safetensors"


def test_another_metric_is_looked_for_afresh(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, best="outer")).run(2)
    checkpoints = Checkpoints(tmp_path, best="outer/distance")
    with pytest.warns(BilevelWarning, match="knows the best 'outer'; that of 'outer/distance' is looked for afresh"):
        resume_engine(made(checkpoints), tmp_path)
    assert checkpoints.best_path is None


def test_steps_that_somebody_else_drives_are_saved_too(tmp_path: Path) -> None:
    engine = made(Checkpoints(tmp_path, every=2))
    for _ in range(5):
        engine.step()
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000004.safetensors"]


class Breaks(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, engine: Engine, result: Any) -> None:
        if result.step == self.step:
            raise OSError("broken")


def test_a_step_after_which_a_callback_fails_is_complete_and_saved(tmp_path: Path) -> None:
    engine = made(Breaks(3), Checkpoints(tmp_path, every=100))
    with pytest.raises(BilevelError, match="broken"):
        engine.run(5)
    assert names(tmp_path) == ["step-00000003.safetensors"]


@pytest.mark.parametrize("restore", [True, False])
def test_a_run_that_fails_saves_the_state_before_the_step_where_that_is_known(restore: bool, tmp_path: Path) -> None:
    engine = made(Checkpoints(tmp_path, every=100), restore_on_error=restore)
    calls: list[int] = []
    loss = engine.problems["inner"].loss

    def failing(batch: Any) -> Any:
        calls.append(1)
        if engine.step_count == 3:
            raise ValueError("a user's error")
        return loss(batch)

    engine.problems["inner"].loss = failing
    with pytest.raises(Exception, match="a user's error"):
        engine.run(5)
    assert names(tmp_path) == (["step-00000003.safetensors"] if restore else [])


def test_a_run_that_is_stopped_saves_its_last_state(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_step_end(self, engine: Engine, result: Any) -> None:
            if result.step == 2:
                engine.stop("enough")

    made(Stops(), Checkpoints(tmp_path, every=100), restore_on_error=False).run(5)
    assert names(tmp_path) == ["step-00000002.safetensors"]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"every": 0}, {"every": 1.5}, {"keep": 0}, {"mode": "best"}, {"on_failure": "pass"}, {"best": ""}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Checkpoints(tmp_path, **settings)


@pytest.mark.parametrize("metric", ["other", "other/score", "outer/scoer"])
def test_a_metric_that_does_not_exist_is_an_error(metric: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown metric of Checkpoints '{metric}'"):
        made(Checkpoints(tmp_path, best=metric), table=(1.0, 1.0), evaluate_every=1).run(2)


def test_a_callback_that_remembers_must_not_come_after(tmp_path: Path) -> None:
    class Remembers(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

    with pytest.raises(BilevelError, match="Checkpoints comes before Remembers"):
        made(Checkpoints(tmp_path), Remembers()).run(1)
    made(Remembers(), Checkpoints(tmp_path), Breaks(9)).run(1)
