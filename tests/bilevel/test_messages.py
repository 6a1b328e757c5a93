"""What somebody reads who has mistyped or misread something: the thing by its name, and the choices."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bilevel import (
    Callback,
    Certificate,
    Engine,
    EngineConfig,
    Problem,
    SolveInfo,
    Status,
    callbacks,
    hypergradcheck,
    problems,
)
from bilevel import single_loop as single
from bilevel.callbacks import Progress
from bilevel.errors import (
    BilevelWarning,
    ConfigError,
    DataError,
    GraphError,
    LossError,
    ParameterError,
    UnknownNameError,
)
from bilevel.hypergrad import available_methods
from bilevel.validation import NamedArguments


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


class Outer(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.inner.module.weight - 1.0).square().sum()


class Inner(Problem):
    def loss(self, batch: Any) -> Tensor:
        x = torch.ones(1, 2) if batch is None else batch[0]
        return (self(x).sum() - self.outer.module.weight.sum()).square() + self.module.weight.square().sum()


def two(data: Any = None, **settings: Any) -> Engine:
    torch.manual_seed(0)
    problems = [
        Outer(nn.Linear(2, 1, bias=False), optimizer=sgd),
        Inner(nn.Linear(2, 1, bias=False), optimizer=sgd, data=data),
    ]
    return Engine(problems, EngineConfig(progress=False), **settings)


MISSPELT: dict[str, tuple[Callable[[], Any], str]] = {
    "engine's settings": (lambda: EngineConfig(step=3), "EngineConfig 'step': did you mean 'steps'"),
    "problem": (lambda: Outer(nn.Linear(1, 1), optimiser=sgd), "Outer 'optimiser': did you mean 'optimizer'"),
    "callback": (
        lambda: callbacks.EarlyStopping("outer", patiance=3),
        "EarlyStopping 'patiance': did you mean 'patience'",
    ),
    "certificate": (lambda: Certificate(strong_convex=1.0), "Certificate 'strong_convex': did you mean 'strong_"),
    "ready-made problem": (
        lambda: problems.Reweighted(nn.Linear(1, 1), wieght_decay=0.1),
        "Reweighted 'wieght_decay': did you mean 'weight_decay'",
    ),
    "ready-made problem, of its base": (
        lambda: problems.ExampleWeights(3, optimiser=sgd),
        "ExampleWeights 'optimiser': did you mean 'optimizer'",
    ),
    "single loop": (lambda: single.SOBA(inner_steps=0.1), "SOBA 'inner_steps': did you mean 'inner_step'"),
}


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_argument_is_named_with_those_that_exist(what: str) -> None:
    make, message = MISSPELT[what]
    with pytest.raises(UnknownNameError, match=f"unknown argument of {message}.*Choices: ") as caught:
        make()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", available_methods())
def test_a_misspelt_field_of_a_method_lists_all_of_its_fields(name: str) -> None:
    cls = available_methods()[name]
    with pytest.raises(UnknownNameError, match=f"unknown argument of {cls.__name__} 'no_such_field'") as caught:
        cls(no_such_field=1)  # type: ignore[call-arg]
    for field in dataclasses.fields(cls):
        assert repr(field.name) in str(caught.value)


def test_arguments_that_are_passed_on_are_asked_further_up() -> None:
    class Passing(Outer):
        def __init__(self, module: nn.Module, *, extra: int = 0, **settings: Any) -> None:
            self.extra = extra + settings.pop("popped", 0)
            super().__init__(module, **settings)

    assert Passing(nn.Linear(1, 1), optimizer=sgd, extra=1, popped=2).extra == 3
    with pytest.raises(TypeError, match="optimiser"):
        Passing(nn.Linear(1, 1), optimiser=sgd)


def test_what_a_decorator_of_the_constructor_takes_is_let_through() -> None:
    def renamed(init: Any) -> Any:
        @functools.wraps(init)
        def wrapper(self: Any, *arguments: Any, former: int | None = None, **named: Any) -> None:
            init(self, *arguments, **(named if former is None else {**named, "extra": former}))

        return wrapper

    class Decorated(NamedArguments):
        @renamed
        def __init__(self, *, extra: int = 0) -> None:
            self.extra = extra

    assert Decorated(former=3).extra == 3  # type: ignore[call-arg]


def test_a_class_without_a_constructor_still_takes_no_arguments() -> None:
    class Plain(Callback):
        pass

    Plain()
    for arguments, named in (((1,), {}), ((), {"path": 1})):
        with pytest.raises(TypeError, match=r"Plain\(\) takes no arguments"):
            Plain(*arguments, **named)


def test_what_names_its_arguments_can_be_copied() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings(NamedArguments):
        steps: int = 1

    assert dataclasses.replace(Settings(3), steps=4) == copy.deepcopy(Settings(4)) == copy.copy(Settings(steps=4))


@pytest.mark.parametrize(
    ("module", "selection", "message"),
    [
        (nn.ReLU(), None, "its module, a ReLU, has no parameters"),
        (nn.Linear(2, 1).requires_grad_(False), None, r"none of the 2 in its module has requires_grad \('weight'"),
        (nn.Linear(2, 1), lambda name, parameter: False, "params= took none of the 2 in its module: 'weight', 'bias'"),
    ],
)
def test_why_a_problem_owns_nothing(module: nn.Module, selection: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=f"problem 'outer' owns no trainable parameter: {message}"):
        Outer(module, optimizer=sgd, params=selection)


def test_the_two_parts_of_a_batch_are_no_batches() -> None:
    x, y = torch.ones(4, 2), torch.ones(4)
    with pytest.raises(DataError, match=r"'inner' is a tuple of 2 tensors of one length.*pass \[\(x, y\)\]"):
        two((x, y))
    for data in ([(x, y)], ((x, y),), ((x, y), (x[:2], y[:2])), (torch.ones(1, 2)[None], torch.ones(2, 1, 2))):
        assert two(data).step().step == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_error_in_the_first_evaluation_says_whose_loss_it_was() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        two([(torch.ones(4, 3),)]).step()
    note = "In the loss of problem 'inner', evaluated once to see which parameters reach it."
    assert note in caught.value.__notes__


@pytest.mark.parametrize("planned", [False, True])
def test_a_step_in_inference_mode_is_no_step_without_gradients(planned: bool) -> None:
    engine = two()
    if planned:
        engine.step()
    with torch.inference_mode(), pytest.raises(LossError, match=r"inside torch\.inference_mode\(\)"):
        engine.step()
    passes = engine.passes.backward
    engine.step()  # nothing that was found there is kept
    assert engine.passes.backward > passes
    with torch.inference_mode(), torch.inference_mode(False):
        engine.step()


@pytest.mark.parametrize(
    ("info", "line"),
    [
        (SolveInfo(Status.NOT_APPLICABLE, method="identity"), "identity: no system to solve"),
        (SolveInfo(Status.NOT_APPLICABLE, iterations=1, method="sama"), "sama: 1 step, no system to solve"),
        (SolveInfo(Status.NOT_APPLICABLE, iterations=5, method="unrolled"), "unrolled: 5 steps, no system to solve"),
        (
            SolveInfo(Status.CONVERGED, 0.5, 1, method="cg"),
            "cg: converged after 1 iteration, relative residual 5.00e-01",
        ),
        (
            SolveInfo(Status.CONVERGED, 0.0, 0, method="cg"),
            "cg: converged after 0 iterations, relative residual 0.00e+00",
        ),
    ],
)
def test_a_report_reads_like_a_sentence(info: SolveInfo, line: str) -> None:
    assert info.explain() == line


@pytest.mark.parametrize("terminal", [False, True])
def test_a_display_does_not_call_a_method_without_a_solve_inapplicable(terminal: bool) -> None:
    written = io.StringIO()
    progress = Progress(Console(file=written, force_terminal=terminal, width=120))
    two(hypergradient="identity", callbacks=[progress]).run(2)
    assert "identity" in written.getvalue()
    assert "not applicable" not in written.getvalue()


def test_a_middle_level_that_the_top_reads_through_another_counts() -> None:
    class Top(Problem):
        def loss(self, batch: Any) -> Tensor:
            return (self.low.module.weight - 1.0).square().sum()

    class Middle(Problem):
        def loss(self, batch: Any) -> Tensor:
            distance = self.module.weight - self.top.module.weight
            return distance.square().sum() + self.low.module.weight.square().sum()

    class Low(Problem):
        def loss(self, batch: Any) -> Tensor:
            return (self.module.weight - self.middle.module.weight).square().sum()

    torch.manual_seed(0)
    problems = [kind(nn.Linear(2, 1, bias=False).double(), optimizer=sgd) for kind in (Top, Middle, Low)]
    report = hypergradcheck(Engine(problems, EngineConfig(progress=False), "conjugate_gradient"))
    assert report.passed
    assert "does not depend on the inner parameter" not in " ".join(str(report).split())


def test_a_warning_is_shown_at_the_users_own_line() -> None:
    class Saddle(Inner):
        def loss(self, batch: Any) -> Tensor:
            return (self.outer.module.weight * self.module.weight).sum() - self.module.weight.square().sum()

    problems = [Outer(nn.Linear(2, 1), optimizer=sgd), Saddle(nn.Linear(2, 1), name="inner", optimizer=sgd)]
    engine = Engine(problems, EngineConfig(progress=False), "conjugate_gradient")
    with pytest.warns(BilevelWarning, match="negative curvature") as caught:
        engine.step()
    assert [warning.filename for warning in caught] == [__file__]
    shown = Path(__file__).read_text(encoding="utf-8").splitlines()[caught[0].lineno - 1]
    assert shown.strip() == "engine.step()"


def test_a_warning_without_a_line_of_the_users_is_shown_all_the_same() -> None:
    code = "import bilevel.errors as e; e._INSIDE = ('',); e.warn('heard')"  # every file counts as the library's
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "BilevelWarning: heard" in run.stderr


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Engine([nn.Linear(1, 1), nn.Linear(1, 1)]), GraphError, "must be Problem instances.*got a Linear"),
        (lambda: Engine(Outer(nn.Linear(1, 1), optimizer=sgd)), GraphError, "must be a list.*got the Outer alone"),
        (lambda: two(confg=EngineConfig()), UnknownNameError, "argument of Engine 'confg': did you mean 'config'"),
        (lambda: two().run("3"), ConfigError, "run\\(steps\\) must be an integer of at least 1, not '3'"),
        (lambda: two().run(0), ConfigError, "run\\(steps\\) must be an integer of at least 1, not 0"),
    ],
)
def test_what_an_engine_is_made_of(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_problems_in_the_wrong_order_are_told_what_the_order_is() -> None:
    problems = [Inner(nn.Linear(2, 1), optimizer=sgd), Outer(nn.Linear(2, 1), optimizer=sgd)]
    with pytest.raises(LossError, match="the order of its problems: top level first"):
        Engine(problems, EngineConfig(progress=False), "conjugate_gradient").step()
