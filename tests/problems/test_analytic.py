"""Analytic problems: their closed forms against derivatives and differences, and methods against their closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Engine, EngineConfig, hypergradcheck, hypergradient
from bilevel.errors import ConfigError, ParameterError
from bilevel.hypergrad import available_methods
from bilevel.problems.analytic import Analytic, NestedQuadratic, Quadratic, Ridge
from tests.bilevel.strategies import DOUBLE, Sample, forall, samples

QUIET = EngineConfig(progress=False)
NUMBERS = st.integers(0, 10**6)
METHODS = ["conjugate_gradient", "exact", {"method": "neumann", "terms": 300}, "gmres"]
QUADRATICS = st.builds(
    Quadratic.random,
    st.integers(1, 8),
    st.integers(1, 4),
    conditioning=st.sampled_from([1.0, 10.0, 1e3]),
    largest=st.sampled_from([0.1, 1.0, 10.0]),
    seed=NUMBERS,
)
RIDGES = st.builds(Ridge.random, st.integers(1, 6), st.integers(1, 9), per_feature=st.booleans(), seed=NUMBERS)


def gaussian(number: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(number), dtype=DOUBLE)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / (1 + expected.detach().norm()))


@forall(40, problem=st.one_of(QUADRATICS, RIDGES), number=NUMBERS)
def test_closed_forms_are_those_of_the_losses(problem: Analytic, number: int) -> None:
    lam = problem.start + gaussian(number, len(problem.start))
    w = problem.solution(lam)
    f, F = (lambda a, b: problem.inner_loss(a, b)), (lambda a, b: problem.outer_loss(a, b))
    slope, _ = torch.autograd.functional.jacobian(f, (w, lam))
    assert float(slope.norm()) < 1e-8 * (1 + float(problem.hessian(lam).norm() * w.norm()))
    (H, mixed), _ = torch.autograd.functional.hessian(f, (w, lam))
    assert distance(problem.hessian(lam), H) < 1e-12
    assert distance(problem.mixed(lam), mixed) < 1e-12
    cotangent, direct = torch.autograd.functional.jacobian(F, (w, lam))
    assert distance(problem.cotangent(lam), cotangent) < 1e-12
    assert distance(problem.direct(lam), direct) < 1e-12
    through = torch.autograd.functional.jacobian(problem.value, lam)
    assert distance(problem.hypergradient(lam), through) < 1e-8


@forall(20, problem=st.one_of(QUADRATICS, RIDGES), number=NUMBERS)
def test_the_exact_method_gives_the_closed_form(problem: Analytic, number: int) -> None:
    lam = problem.start + gaussian(number, len(problem.start))
    w = problem.solution(lam)
    exact = hypergradient(problem.inner_loss, problem.outer_loss, w, lam, "exact")
    assert distance(exact.grad, problem.hypergradient(lam)) < 1e-7
    identity = hypergradient(problem.inner_loss, problem.outer_loss, w, lam, "identity")
    assert distance(identity.grad, problem.hypergradient(lam, torch.eye(len(w), dtype=DOUBLE))) < 1e-12


@forall(20, sample=samples(6, 1e3))
def test_the_closed_forms_are_those_that_the_other_tests_have(sample: Sample) -> None:
    d = sample.data
    if sample.kind == "quadratic":
        problem: Analytic = Quadratic(
            d["H"], d["C"], d["b"], d["A"], d["t"], d["D"], torch.zeros(len(d["D"])).to(d["D"])
        )
        assert distance(problem.hypergradient(sample.outer), sample.hypergradient()) < 1e-9
    else:  # there the validation loss is a sum, and reads λ too
        problem = Ridge(d["X"], d["y"], d["A"], d["t"], per_feature=d["S"].shape[1] > 1 or len(d["S"]) == 1)
        expected = (sample.hypergradient() - sample.direct) / len(d["t"])
        assert distance(problem.hypergradient(sample.outer), expected) < 1e-9
    assert distance(problem.solution(sample.outer), sample.inner) < 1e-9


@forall(20, problem=QUADRATICS)
def test_the_optimum_of_a_quadratic_has_no_slope_and_a_lower_value_than_its_surroundings(problem: Quadratic) -> None:
    best = problem.optimum()
    scale = float(problem.outer_hessian().norm()) * (1 + float(best.norm()))
    assert float(problem.hypergradient(best).norm()) < 1e-9 * scale
    for number in range(3):
        assert float(problem.value(best + gaussian(number, len(best)))) > float(problem.value(best))
    H = torch.autograd.functional.hessian(problem.value, best)
    assert distance(problem.outer_hessian(), H) < 1e-8


@pytest.mark.parametrize("per_feature", [False, True])
def test_the_optimum_of_a_ridge_regression_is_a_minimum(per_feature: bool) -> None:
    problem = Ridge.random(6, 15, per_feature=per_feature, seed=1)
    best = problem.optimum()
    assert len(best) == (6 if per_feature else 1)
    assert float(problem.hypergradient(best).norm()) < 1e-8
    assert float(problem.value(best)) < float(problem.value(problem.start)) - 1e-3
    if per_feature:  # which costs nothing against one for all
        shared = Ridge(problem.X, problem.y, problem.U, problem.z)
        assert float(problem.value(best)) < float(shared.value(shared.optimum()))


@forall(15, inner=st.integers(1, 12), conditioning=st.sampled_from([1.0, 7.0, 1e5]), number=NUMBERS)
def test_spectra_are_as_asked_for(inner: int, conditioning: float, number: int) -> None:
    problem = Quadratic.random(inner, 2, conditioning=conditioning, largest=3.0, seed=number)
    eigenvalues = torch.linalg.eigvalsh(problem.H)
    assert float(eigenvalues[-1]) == pytest.approx(3.0)
    if inner > 1:
        assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(conditioning, rel=1e-6)
    asked = torch.arange(1.0, inner + 1)
    found = torch.linalg.eigvalsh(Quadratic.random(inner, 2, spectrum=asked, seed=number).H)
    assert torch.allclose(found, asked.double())


def test_a_draw_is_the_same_in_every_dtype() -> None:
    makers: list[Any] = [Quadratic.random, Ridge.random, lambda **more: NestedQuadratic.random([2, 3], **more)]
    for make in makers:
        single, double, other = make(seed=3, dtype=torch.float32), make(seed=3), make(seed=4)
        for name, value in vars(single).items():
            parts, wide = (part if isinstance(part, tuple) else (part,) for part in (value, vars(double)[name]))
            assert all(part.dtype == torch.float32 for part in parts if isinstance(part, Tensor))
            for part, source in zip(parts, wide, strict=True):
                assert torch.equal(torch.as_tensor(part), torch.as_tensor(source).to(torch.as_tensor(part).dtype))
        first = next(iter(vars(double)))
        assert not torch.equal(torch.as_tensor(vars(double)[first][0]), torch.as_tensor(vars(other)[first][0]))


@forall(15, sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), number=NUMBERS)
def test_nested_quadratics_are_solved_level_by_level(sizes: list[int], number: int) -> None:
    problem = NestedQuadratic.random(sizes, seed=number)
    losses, x0 = problem.losses(), gaussian(number + 1, sizes[0])

    def solved(level: int, above: list[Tensor]) -> list[Tensor]:
        """Newton's step from zero, on the level's total loss by autograd: a solution that knows no formula."""
        if level == len(sizes):
            return []

        def total(x: Tensor) -> Tensor:
            values = [*above, x]
            return losses[level](*values, *solved(level + 1, values))

        start = torch.zeros(sizes[level], dtype=DOUBLE)
        slope = torch.autograd.functional.jacobian(total, start, create_graph=True)
        H = torch.autograd.functional.hessian(total, start, create_graph=True)
        x = -torch.linalg.solve(H, slope)
        return [x, *solved(level + 1, [*above, x])]

    if len(sizes) <= 3:  # derivatives of derivatives of derivatives
        for mine, other in zip(problem.solution(x0)[1:], solved(1, [x0]), strict=True):
            assert distance(mine, other) < 1e-8

    def value(x: Tensor) -> Tensor:
        return losses[0](*problem.solution(x))

    assert distance(problem.hypergradient(x0), torch.autograd.functional.jacobian(value, x0)) < 1e-9
    assert float(problem.hypergradient(problem.optimum()).norm()) < 1e-8 * (1 + float(problem.optimum().norm()))


@pytest.mark.parametrize("sizes", [[2, 3], [2, 3, 4], [1, 2, 2, 2]], ids=str)
def test_engines_give_the_nested_closed_form(sizes: list[int]) -> None:
    problem = NestedQuadratic.random(sizes, seed=1)
    x0 = gaussian(5, sizes[0])
    engine = Engine(problem.problems(x0), QUIET, hypergradient="conjugate_gradient")
    assert distance(engine.hypergradient().grad["value"], problem.hypergradient(x0)) < 1e-8
    report = hypergradcheck(engine, rtol=1e-6)
    assert report.passed, report


def test_engines_reach_the_optimum() -> None:
    quadratic = Quadratic.random(6, 2, conditioning=3.0, seed=2)
    engine = Engine(quadratic.problems(steps=15), QUIET, hypergradient="exact")
    engine.run(200)
    assert distance(engine.problems["outer"].module["value"], quadratic.optimum()) < 1e-4
    nested = NestedQuadratic.random([2, 3, 3], conditioning=3.0, seed=2)
    engine = Engine(nested.problems(steps=8), QUIET, hypergradient="exact")
    engine.run(12)
    assert distance(engine.problems["level_0"].module["value"], nested.optimum()) < 1e-2
    ridge = Ridge.random(8, 10, noise=2.0, seed=1)
    engine = Engine(ridge.problems(steps=20), QUIET, hypergradient="exact")
    engine.run(120)
    assert distance(engine.problems["outer"].module["value"], ridge.optimum()) < 1e-2


@pytest.mark.parametrize(
    "problem", [Quadratic.random(5, 2), Ridge.random(5, per_feature=True)], ids=["quadratic", "ridge"]
)
@pytest.mark.parametrize(
    "method", ["conjugate_gradient", "exact", {"method": "neumann", "terms": 300}, "gmres"], ids=str
)
def test_engines_agree_with_the_closed_form(problem: Analytic, method: Any) -> None:
    lam = problem.start + gaussian(1, len(problem.start))
    engine = Engine(problem.problems(lam), QUIET, hypergradient=method)
    assert distance(engine.hypergradient().grad["value"], problem.hypergradient(lam)) < 1e-5
    report = hypergradcheck(engine, rtol=1e-4)
    assert report.passed, report
    unrolled = Engine(problem.problems(lam, steps=300), QUIET, hypergradient="unrolled")
    unrolled.problems["outer"].optimizer.param_groups[0]["lr"] = 0.0  # type: ignore[union-attr]
    unrolled.step()
    assert distance(unrolled.hypergradient().grad["value"], problem.hypergradient(lam)) < 1e-6


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", [name for name in available_methods() if not name.startswith("betty")])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_method_runs(method: str, dtype: torch.dtype) -> None:
    problem = Quadratic.random(4, 2, conditioning=2.0, dtype=dtype)
    small = lambda p: torch.optim.SGD(p, lr=1e-3)  # noqa: E731
    engine = Engine(problem.problems(steps=5, outer_optimizer=small), QUIET, hypergradient=method)
    before = float(problem.value(problem.start))
    engine.run(5)
    lam = engine.problems["outer"].module["value"].detach()
    assert lam.dtype == dtype
    assert float(problem.value(lam)) < before  # a hypergradient at all: a small step along it goes down


SHAPES: dict[str, tuple[int, ...]] = {
    "H": (3, 3),
    "C": (3, 2),
    "b": (3,),
    "A": (4, 3),
    "t": (4,),
    "D": (2, 2),
    "s": (2,),
}


def with_field(name: str, value: Tensor) -> Callable[[], Any]:
    tensors = {key: torch.eye(*shape) if len(shape) > 1 else torch.zeros(shape) for key, shape in SHAPES.items()}
    return lambda: Quadratic(**{**tensors, name: value})


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (with_field("A", torch.zeros(4, 2)), ParameterError, r"Quadratic\.A must have shape \(4, 3\).*not \(4, 2\)"),
        (with_field("H", torch.eye(2)), ParameterError, r"Quadratic\.H must have shape \(3, 3\)"),
        (with_field("H", -torch.eye(3)), ParameterError, r"Quadratic\.H must be symmetric positive definite"),
        (with_field("H", torch.eye(3).cumsum(0)), ParameterError, r"symmetric positive definite"),
        (lambda: Quadratic.random(0), ConfigError, r"Quadratic\.inner must be an integer of at least 1"),
        (lambda: Quadratic.random(conditioning=0.5), ConfigError, r"Quadratic\.conditioning .* at least 1"),
        (lambda: Quadratic.random(3, spectrum=torch.ones(2)), ConfigError, r"spectrum must be 3 positive eigenvalues"),
        (lambda: Quadratic.random(2, spectrum=torch.tensor([1.0, 0.0])), ConfigError, r"smallest element 0"),
        (lambda: Ridge.random(noise=-1.0), ConfigError, r"Ridge\.noise"),
        (
            lambda: Ridge(torch.zeros(4, 2), torch.zeros(3), torch.zeros(1, 2), torch.zeros(1)),
            ParameterError,
            r"Ridge\.X must have shape \(3, 2\)",
        ),
        (lambda: NestedQuadratic.random([3]), ParameterError, r"has 1 matrices H: at least 2 are needed"),
        (lambda: NestedQuadratic.random([3, 0]), ConfigError, r"NestedQuadratic\.sizes"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
