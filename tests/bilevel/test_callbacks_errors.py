"""A callback that raises names itself, its hook and the step, and leaves a state that goes on as if it had not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import BilevelError, Callback, Engine, Hypergradient, StepResult
from bilevel.callbacks import BestModel, CSVLog, EarlyStopping, HypergradientMonitor, JSONLinesLog
from bilevel.errors import CheckpointError
from tests.bilevel.test_callbacks import engine

AFTER_A_STEP = ["on_step_end", "on_evaluate", "on_step_complete"]
WITHIN_A_STEP = ["on_hypergradient"]
AROUND_A_RUN = ["on_run_start", "on_run_end"]


class Breaks(Callback):
    """Raises in one hook: in the second step, or once before or after a run."""

    def __init__(self, hook: str) -> None:
        self.hook, self.step, self.broke = hook, 0, False

    def check(self, hook: str) -> None:
        self.step += hook == "on_hypergradient"
        if hook == self.hook and not self.broke and (self.step == 2 or hook in AROUND_A_RUN):
            self.broke = True
            raise OSError("no space")

    def on_run_start(self, engine: Engine, steps: int) -> None:
        self.check("on_run_start")

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Hypergradient) -> None:
        self.check("on_hypergradient")

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        self.check("on_step_end")

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        self.check("on_evaluate")

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        self.check("on_step_complete")

    def on_run_end(self, engine: Engine) -> None:
        self.check("on_run_end")


def watched(folder: Path, name: str, hook: str) -> Engine:
    """An engine whose second callback breaks between others that must see everything all the same."""
    before = [JSONLinesLog(folder / f"{name}.jsonl"), EarlyStopping("outer", patience=9)]
    after = [HypergradientMonitor(), CSVLog(folder / f"{name}.csv"), BestModel("inner", restore=False)]
    return engine(*before, Breaks(hook), *after, evaluate_every=1)


def states(run: Engine) -> list[Any]:
    return [callback.state_dict() for callback in run.callbacks if not isinstance(callback, Breaks)]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left.nan_to_num(-1), right.nan_to_num(-1))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or (left != left and right != right)


@pytest.mark.parametrize("hook", [*AFTER_A_STEP, *WITHIN_A_STEP, *AROUND_A_RUN])
@pytest.mark.parametrize("in_another_process", [False, True])
def test_the_run_goes_on_as_if_nothing_had_happened(hook: str, in_another_process: bool, tmp_path: Path) -> None:
    whole = watched(tmp_path, "whole", "")
    whole.run(4)
    run = watched(tmp_path, "broken", hook)
    step = "step 2" if hook in AFTER_A_STEP + WITHIN_A_STEP else ""
    message = rf"callback Breaks failed in {hook}.*{step}.*OSError\('no space'\)"
    with pytest.raises(BilevelError, match=message) as caught:
        run.run(4)
    assert isinstance(caught.value.__cause__, OSError)
    taken = {"on_run_start": 0, "on_hypergradient": 1, "on_run_end": 4}.get(hook, 2)
    assert run.step_count == taken
    if in_another_process:
        run.save(tmp_path / "state")
        run = watched(tmp_path, "broken", "")
        run.load(tmp_path / "state")
    if taken < 4:
        run.run(4 - taken)
    assert same(states(run), states(whole))
    for problem, other in zip(run.problems.values(), whole.problems.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(problem.parameters, other.parameters, strict=True))
    for suffix in ("jsonl", "csv"):
        assert (tmp_path / f"broken.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_a_callback_s_own_error_in_an_external_loop_comes_after_the_step() -> None:
    run = engine(Breaks("on_step_end"))
    run.step()
    with pytest.raises(BilevelError, match=r"Breaks failed in on_step_end.*step 2"):
        run.step()
    assert run.step_count == 2
    assert run.step().step == 3


def test_two_that_fail_are_both_named() -> None:
    class Also(Breaks):
        pass

    run = engine(Breaks("on_step_end"), Also("on_step_end"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(BilevelError, match="callback Breaks failed in on_step_end") as caught:
            run.run(3)
    said = [*getattr(caught.value, "__notes__", []), *(str(warning.message) for warning in warned)]
    assert any("callback Also failed in on_step_end" in text for text in said)


def test_a_state_that_no_file_can_hold_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    class Holds(Callback):
        held: object = 1

        def state_dict(self) -> dict[str, Any]:
            return {"held": self.held}

    holds = Holds()
    run = engine(holds)
    run.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    holds.held = object()
    with pytest.raises(CheckpointError, match="callbacks.*held is a object"):
        run.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before


def test_asking_for_the_state_changes_nothing(tmp_path: Path) -> None:
    asked, left_alone = watched(tmp_path, "asked", ""), watched(tmp_path, "alone", "")
    for _ in range(3):
        asked.step()
        left_alone.step()
        kept = copy.deepcopy(states(asked))
        assert same(states(asked), kept)
    assert same(states(asked), states(left_alone))
    assert (tmp_path / "asked.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
