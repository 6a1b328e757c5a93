"""Betty's programs in our words, on real data: with only the import changed they learn, and as with Betty."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bilevel import Estimator, FiniteDifference
from bilevel.errors import BilevelWarning
from bilevel.hypergrad import InnerProblem
from bilevel.hypergrad.base import Pullback, Response, State
from bilevel.vector import Tensors

BETTY, OURS = "betty", "bilevel.interop.betty"
FOLDER = Path(__file__).parent / "programs"
NEUMANN = {"type": "neumann", "neumann_iterations": 5, "neumann_alpha": 0.03}


@functools.cache
def program(name: str, root: str) -> dict[str, Any]:
    """Runs a program's text up to its ``main``, with its ``from betty…`` read as ``from <root>…``."""
    file = FOLDER / f"{name}.py"
    text = re.sub(r"^from betty\b", f"from {root}", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names: dict[str, Any] = {"__name__": f"{name}_by_{root}"}
    exec(compile(text, str(file), "exec"), names)
    return names


def run(name: str, root: str, **arguments: Any) -> Any:
    """Returns the engine of a finished run."""
    if root == BETTY:
        pytest.importorskip("betty")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        if root == BETTY:  # ours has to run without
            warnings.simplefilter("ignore")
        return program(name, root)["main"](**arguments)


def told(case: Case, root: str, **arguments: Any) -> Any:
    """Returns the engine of a finished run, once ours has said what there is to say of the method's solves."""
    if root == BETTY or not case.says:
        return run(case.name, root, **arguments, **case.arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BilevelWarning)
        engine = run(case.name, root, **arguments, **case.arguments)
    assert any(case.says in str(warning.message) for warning in caught)
    assert all(issubclass(warning.category, BilevelWarning) for warning in caught)
    return engine


def state(engine: Any) -> dict[str, Tensor]:
    """Returns all parameters, of all problems, in float64."""
    return {
        f"{problem.name}.{key}": value.double()
        for problem in sorted(engine.problems, key=lambda problem: problem.name)
        for key, value in problem.module.state_dict().items()
    }


def apart(engine: Any, other: Any) -> float:
    """Returns the largest relative difference between parameters of two runs."""
    found, expected = state(engine), state(other)
    assert found.keys() == expected.keys()
    return max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())


# What a program must have learned, beside a run whose hypergradient is zero.


def quick_start_learned(root: str, engine: Any, plain: Any) -> None:
    assert engine.history[-1]["accuracy"] > plain.history[-1]["accuracy"] + 0.05
    names = program("quick_start", root)
    (_, labels), *_ = (part.tensors for part in names["long_tailed_digits"](0))
    known = torch.cat([torch.ones(10, 1), torch.eye(10)], 1).to(torch.get_default_dtype())
    with torch.no_grad():
        weights = engine.reweight(known).squeeze(1)[labels.bincount().argsort()]
    assert float(weights[:3].mean()) > 1.5 * float(weights[-3:].mean())  # the rarest digits count more


def weight_decay_learned(root: str, engine: Any, plain: Any) -> None:
    assert engine.history[-1]["loss"] < 0.95 * plain.history[-1]["loss"]
    decay = engine.outer().detach()
    assert float(decay[30:].mean()) > 2 * float(decay[:30].mean())  # shuffled columns are shut out, measured ones not
    assert float(decay.min()) == pytest.approx(1e-8, rel=1e-5)  # where the callback holds them


def learning_to_reweight_learned(root: str, engine: Any, plain: Any) -> None:
    assert engine.history[-1]["accuracy"] > plain.history[-1]["accuracy"] + 0.05
    assert engine.history[-1]["right_first"] > 0.85  # a right label is trusted more than a wrong one
    assert engine.history[-1]["best"] == max(entry["accuracy"] for entry in engine.history)


def implicit_maml_learned(root: str, engine: Any, plain: Any) -> None:
    assert engine.history[-1]["after"] > plain.history[-1]["after"] + 0.3
    assert engine.history[-1]["after"] > engine.history[-1]["before"] + 0.2


@dataclass(frozen=True)
class Case:
    """A program, and how far to run it."""

    name: str
    learned: Callable[[str, Any, Any], None]
    short: dict[str, Any]  # for a comparison of trajectories
    counts: dict[str, int]  # of the short run
    tolerance: float = 1e-12
    arguments: dict[str, Any] = field(default_factory=dict)
    says: str = ""  # a warning where Betty is silent

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for value in list(self.arguments.values())[:1])])


QUICK_START = Case(
    "quick_start", quick_start_learned, {"train_iters": 60}, {"reweight": 60, "classifier": 60}, tolerance=1e-9
)
WEIGHT_DECAY = Case("weight_decay", weight_decay_learned, {"outer_steps": 10}, {"outer": 10, "inner": 500})
REWEIGHT = Case(
    "learning_to_reweight",
    learning_to_reweight_learned,
    {"train_iters": 60},
    {"outer": 60, "inner": 60},
    tolerance=1e-8,
)
MAML = Case("implicit_maml", implicit_maml_learned, {"num_tasks": 20}, {"outer": 20, "inner": 100}, tolerance=1e-10)
CASES = [
    QUICK_START,
    WEIGHT_DECAY,
    replace(WEIGHT_DECAY, arguments=NEUMANN),
    replace(WEIGHT_DECAY, arguments={"type": "cg"}),
    REWEIGHT,
    replace(REWEIGHT, arguments=NEUMANN),
    replace(REWEIGHT, arguments={"roll_back": True}),
    MAML,
    replace(MAML, arguments=NEUMANN, says="negative curvature"),
]
PROGRAMS = [QUICK_START, WEIGHT_DECAY, REWEIGHT, MAML]


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def without_hypergradient(name: str, root: str) -> Any:
    return run(name, root, outer_lr=0.0)


def test_the_programs_are_bettys() -> None:
    assert {case.name for case in PROGRAMS} == {path.stem for path in FOLDER.glob("*.py")} - {"conftest"}
    for case in PROGRAMS:
        text = (FOLDER / f"{case.name}.py").read_text(encoding="utf-8")
        imports = [line for line in text.splitlines() if "betty" in line]
        assert len(imports) >= 3
        assert all(re.fullmatch(r"from betty\.\w+ import [\w, ]+", line) for line in imports)
        assert "bilevel" not in text


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_path_is_bettys(case: Case) -> None:
    theirs, ours = (told(case, root, **case.short) for root in (BETTY, OURS))
    for engine in (theirs, ours):
        assert {problem.name: problem.count for problem in engine.problems} == case.counts
    assert apart(ours, theirs) <= case.tolerance
    assert ours.history == theirs.history or all(
        entry == pytest.approx(other, rel=case.tolerance)
        for entry, other in zip(ours.history, theirs.history, strict=True)
    )


@pytest.mark.usefixtures("double")
def test_one_step_of_cg_along_negative_curvature_is_left_out() -> None:
    """The inner losses of few-shot tasks are not convex after five steps: the fifth task curves downwards along v.

    Betty goes there by a step of negative length, towards a maximum, without a word.
    """
    convex, not_convex = {"num_tasks": 4, "type": "cg"}, {"num_tasks": 8, "type": "cg"}
    assert apart(run("implicit_maml", OURS, **convex), run("implicit_maml", BETTY, **convex)) < 1e-10
    theirs = run("implicit_maml", BETTY, **not_convex)
    with pytest.warns(BilevelWarning, match="negative curvature"):
        ours = run("implicit_maml", OURS, **not_convex)
    assert apart(ours, theirs) > 1e-3
    assert apart(run("implicit_maml", OURS, **{**not_convex, "type": "betty:cg"}), theirs) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("root", [BETTY, OURS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_learns(case: Case, root: str) -> None:
    case.learned(root, told(case, root), without_hypergradient(case.name, root))


@dataclass(frozen=True)
class Scaled(Estimator):
    """A defect: the hypergradient times a number."""

    factor: float

    name: ClassVar[str] = "scaled"

    def respond(self, problem: InnerProblem) -> Response:
        return ScaledResponse(self.factor, FiniteDifference(0.01).respond(problem))


@dataclass(frozen=True)
class ScaledResponse(Response):
    factor: float
    response: Response

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.response.point

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        found = self.response.pullback(cotangent, state)
        return replace(found, value=tuple(self.factor * part for part in found.value))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, -1.0])
@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_it_learns_by_the_hypergradient(case: Case, factor: float) -> None:
    engine = run(case.name, OURS, type=Scaled(factor))
    with pytest.raises(AssertionError):
        case.learned(OURS, engine, without_hypergradient(case.name, OURS))


def test_training_without_weights_is_a_program_of_its_own() -> None:
    """The tutorial's baseline: one problem, which depends on no other."""
    theirs, ours = (run("quick_start", root, baseline=True, train_iters=60) for root in (BETTY, OURS))
    assert [problem.name for problem in ours.problems] == ["classifier"]
    torch.testing.assert_close(state(ours), state(theirs))
    assert ours.history == theirs.history
