"""Callbacks: called when promised, misspelt hooks refused, and a progress display that fits its terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from bilevel import BilevelError, Callback, Engine, EngineConfig, Problem, SolveInfo, Status, StepResult
from bilevel.callbacks import Progress
from bilevel.errors import UnknownNameError
from bilevel.hooks import check_hooks


class Outer(Problem):
    def loss(self, batch: Any) -> torch.Tensor:
        return (self.inner.module.weight - 1.0).square().sum()

    def evaluate(self) -> Mapping[str, float]:
        return {"distance": 0.5}


class Inner(Problem):
    def loss(self, batch: Any) -> torch.Tensor:
        return (self.module.weight - self.outer.module.weight).square().sum() / 2


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def engine(*callbacks: Callback, **settings: Any) -> Engine:
    torch.manual_seed(0)
    problems = [Outer(nn.Linear(2, 2, bias=False), optimizer=sgd), Inner(nn.Linear(2, 2, bias=False), optimizer=sgd)]
    return Engine(problems, EngineConfig(**{"progress": False, **settings}), callbacks=callbacks)


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_run_start(self, engine: Engine, steps: int) -> None:
        self.calls.append(("start", steps))

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        self.calls.append(("step", result.step))

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        self.calls.append(("evaluate", dict(metrics)))

    def on_run_end(self, engine: Engine) -> None:
        self.calls.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = ["restored", state["calls"]]


def test_hooks_are_called_in_the_order_of_the_run() -> None:
    recorder = Recorder()
    engine(recorder, steps=2, evaluate_every=2).run()
    assert recorder.calls == [("start", 2), ("step", 1), ("step", 2), ("evaluate", {"outer/distance": 0.5}), "end"]


def test_the_end_is_announced_where_a_run_fails_too() -> None:
    class Breaks(Recorder):
        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            raise OSError("disk full")

    callback = Breaks()
    with pytest.raises(BilevelError, match=r"Breaks failed in on_step_end, .*step 1.*: OSError\('disk full'\)"):
        engine(callback, steps=2).run()
    assert callback.calls == [("start", 2), "end"]


def test_a_callbacks_state_is_saved_with_the_engine(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    run = engine(first, steps=3)
    run.run()
    run.save(tmp_path / "state")
    engine(second).load(tmp_path / "state")
    assert second.calls == ["restored", len(first.calls)]


def test_a_misspelt_hook_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(
        UnknownNameError, match=r"hook of Mine 'on_step_ended': did you mean 'on_step_end'\?.*'on_run_end'"
    ):

        class Mine(Callback):
            def on_step_ended(self, engine: Engine) -> None: ...


def test_a_misspelt_hook_of_a_problem_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="hook of Mine 'on_run_strat': did you mean 'on_run_start'"):

        class Mine(Problem):
            def on_run_strat(self) -> None: ...

            def loss(self, batch: Any) -> Any: ...


@pytest.mark.parametrize("wrap", [lambda f: f, staticmethod, classmethod])
def test_a_misspelt_hook_of_a_mix_in_is_refused_however_it_is_wrapped(wrap: Any) -> None:
    mixin = type("Mixin", (), {"on_evaluated": wrap(lambda *arguments: None)})
    with pytest.raises(UnknownNameError, match="hook of Mine 'on_evaluated': did you mean 'on_evaluate'"):
        type("Mine", (mixin, Callback), {})


def test_what_is_no_hook_is_left_alone() -> None:
    class Fine(Callback):
        on_ratio = 0.5  # no method
        one_step = print  # another prefix

        def _on_anything(self) -> None: ...

    class Derived(Fine):
        def on_run_end(self, engine: Engine) -> None: ...

    check_hooks(Derived, Callback)


# --- progress ---------------------------------------------------------------------------------------------------------


def result(step: int, names: list[str], status: Status = Status.CONVERGED, residual: float = 1.2e-3) -> StepResult:
    values = dict.fromkeys(names, -1.2345678e-05)
    info = SolveInfo(status, residual, products=4321, method="conjugate_gradient")
    solves = dict.fromkeys(names[1:], info)
    return StepResult(step, values, {}, values, solves, passes=(123, 4567), seconds=0.1)


def display(
    width: int, names: list[str], results: list[StepResult], *, terminal: bool = True, total: int = 0, reason: str = ""
) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, _environ={})
    progress, watched = Progress(console), SimpleNamespace(problems=dict.fromkeys(names), stop_reason=reason)
    progress.on_run_start(watched, total or len(results))
    for each in results:
        progress.on_step_end(watched, each)
    progress.on_run_end(watched)
    return stream.getvalue()


def plain(text: str) -> list[str]:
    """Returns the lines of all frames, one after the other, without colours and cursor movements."""
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", "\n"))
    return [line for line in bare.splitlines() if line.strip()]


NAMES = ["cleaner", "classifier", "a_problem_with_quite_a_long_name"]


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("width", [50, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int, status: Status) -> None:
    lines = plain(display(width, NAMES, [result(n + 1, NAMES, status) for n in range(3)]))
    assert max(map(cell_len, lines)) <= width
    frame = [line.strip() for line in lines[-6:]]
    assert [line.split()[0][:4] for line in frame] == [
        "step",
        "prob",
        "clea",
        "clas",
        "a_pr",
        "123",
    ]  # one line a problem
    for line in frame[2:5]:
        assert "-1.235e-05" in line  # numbers are never cut, text is


def test_a_terminal_of_80_columns_shows_everything() -> None:
    names = NAMES[:2]
    text = "\n".join(plain(display(80, names, [result(1, names), result(2, names, Status.STOPPED_AT_CAP)]))[-5:])
    for part in (
        "step 2/2",
        "123 + 4567 passes and 4321 products/step",
        "0:00:00 elapsed",
        "0:00:00 left",
        "-1.23e-05",
        "1.2e-03",
    ):
        assert part in text
    assert "conjugate_gradient  stopped at cap" in text


def test_what_is_not_solved_has_no_residual() -> None:
    names = NAMES[:2]
    text = display(80, names, [result(1, names, Status.NOT_APPLICABLE, float("nan"))])
    assert "nan" not in text
    assert "nan" not in display(80, names, [result(1, names, residual=float("nan"))], terminal=False)


def test_a_skipped_step_is_shown() -> None:
    skipped = StepResult(1, {"cleaner": 1.0}, {}, {}, {}, (1, 1), 0.1, skipped="classifier")
    text = "\n".join(plain(display(80, NAMES[:2], [skipped, skipped, result(3, NAMES[:2])])))
    assert "2 skipped so far" in text
    one = "\n".join(plain(display(80, NAMES[:2], [skipped])))
    assert re.search(r"cleaner +1 +– *\nclassifier +– +– +skipped: not finite", one)
    assert "skipped: not finite" in display(80, NAMES[:2], [skipped])
    assert "skipped: classifier not finite" in display(80, NAMES[:2], [skipped], terminal=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_end_says_where_and_why_the_run_was_stopped(terminal: bool) -> None:
    names, reason = NAMES[:2], "outer/accuracy has not improved for 10 looks; it was best, 0.912, at step 250"
    results = [result(n + 1, names) for n in range(13)]
    lines = plain(display(60, names, results, terminal=terminal, total=100, reason=reason))
    assert max(map(cell_len, lines)) <= 60 or not terminal
    text = " ".join(" ".join(lines).split())
    assert text.endswith(f"stopped: {reason}")
    assert "step 13/100" in text


def test_products_of_all_solves_are_added() -> None:
    text = display(100, NAMES, [result(1, NAMES)], terminal=False)
    assert "123 + 4567 passes and 8642 products/step" in text
    nothing = StepResult(1, {}, {}, {}, {}, (1, 2), 0.1)
    assert "1 + 2 passes/step" in display(100, NAMES, [nothing], terminal=False)


def test_elsewhere_a_line_is_printed_at_every_tenth_and_no_control_character() -> None:
    names = NAMES[:2]
    text = display(20, names, [result(n + 1, names) for n in range(50)], terminal=False)
    lines = text.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["1/50", *(f"{n}/50" for n in range(5, 51, 5))]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "conjugate_gradient converged residual 1.2e-03" in lines[-1]


def test_steps_that_somebody_elses_loop_takes_show_nothing() -> None:
    stream = io.StringIO()
    run = engine(Progress(Console(file=stream)))
    run.step()
    assert stream.getvalue() == ""


def test_run_shows_progress_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    engine(steps=2).run()
    assert capsys.readouterr().err == ""
    run = engine(steps=2, progress=True)
    run.run()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 2/2 | loss outer " in captured.err
    assert run.callbacks == ()


def test_a_resumed_run_s_progress_counts_the_steps_taken_before():
    console = Console(file=io.StringIO(), width=200)
    run = engine(Progress(console))
    run.run(2)
    run.run(3)
    shown = console.file.getvalue()
    assert "step 2/2 " in shown
    assert "step 3/5 " in shown
    assert "step 5/5 " in shown
