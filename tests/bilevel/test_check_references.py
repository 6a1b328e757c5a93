"""The references of hypergradcheck: each to its stated error, and what they say where they cannot know."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import ConjugateGradient, Engine, EngineConfig, Exact, Problem, Unrolled, hypergradient
from bilevel.check import HypergradientReport, hypergradcheck
from bilevel.check.references.central_difference import ridders
from bilevel.check.references.field import ritz_values
from bilevel.check.references.roots import gmres
from bilevel.errors import ConfigError, NonFiniteError, ParameterError
from bilevel.hypergrad import Estimator, InnerProblem, Pullback, Response, State
from tests.bilevel.strategies import DOUBLE, Sample, forall, make_ridge, samples

REFERENCES = ("exact", "unrolled", "central_difference")


def without_direct(sample: Sample) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The losses of a sample with an outer loss that sees λ through w only: all of the hypergradient is implicit."""
    inner, _ = sample.losses()
    A, t = sample.data["A"], sample.data["t"]
    return inner, lambda w, lam: (A @ w - t).square().sum() / 2


@dataclass(frozen=True)
class Wrong(Estimator):
    """A right method with an error of known relative size: along the answer, or in a random direction across it."""

    size: float = 0.0
    across: bool = False

    name: ClassVar[str] = "wrong"
    summary: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    def respond(self, problem: InnerProblem) -> Response:
        return _WrongResponse(self, Exact().respond(problem))


@dataclass(frozen=True)
class _WrongResponse(Response):
    estimator: Wrong
    right: Response

    @property
    def point(self) -> Any:  # type: ignore[override]
        return self.right.point

    def pullback(self, cotangent: Any, state: State) -> Pullback:
        pulled = self.right.pullback(cotangent, state)
        (value,) = pulled.value
        error = value
        if self.estimator.across:
            error = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype)
            error -= value * (error * value).sum() / value.square().sum()
            error *= value.norm() / error.norm()
        return Pullback((value + self.estimator.size * error,), pulled.info)


@forall(10, sample=samples(max_dimension=6, max_condition=100.0))
def test_all_references_agree_to_what_they_state(sample: Sample) -> None:
    exact = sample.hypergradient()
    for reference in REFERENCES:
        report = hypergradcheck(*sample.losses(), sample.inner, sample.outer, "exact", reference=reference)
        assert report.passed, report
        assert report.reference_error < 1e-6
        rounding = 10 * (sample.rounding() / float(exact.norm()))
        # the method is exact here, so that what differs is the reference
        assert report.relative_error <= report.reference_error + rounding
        assert report.verdict == "passed"


@pytest.mark.parametrize("sample", [make_ridge(4, 6, 0.5, False, 3), make_ridge(5, 3, 0.2, True, 7)])
def test_a_reference_that_is_cut_short_states_what_it_lost(sample: Sample) -> None:
    short = functools.partial(ridders, halvings=2)
    with (
        mock.patch("bilevel.check.references.central_difference.ridders", short),
        mock.patch("bilevel.check.references.central_difference._FIRST_STEP", 0.3),
        mock.patch("bilevel.check.references.unrolled._SMALL", 1e-4),
    ):
        for reference in REFERENCES[1:]:
            report = hypergradcheck(*sample.losses(), sample.inner, sample.outer, "exact", reference=reference)
            assert 1e-8 < report.relative_error <= report.reference_error < 1.0, report


@forall(
    12,
    sample=samples(max_dimension=6, max_condition=30.0),
    reference=st.sampled_from(REFERENCES),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_an_error_of_one_percent_is_always_caught(sample: Sample, reference: str, sign: float) -> None:
    inner, outer = without_direct(sample)
    right = hypergradient(inner, outer, sample.inner, sample.outer, "exact").grad
    if float(right.norm()) < 1e-9 * sample.scale():
        return  # a hypergradient that is zero but for rounding has no relative error
    report = hypergradcheck(inner, outer, sample.inner, sample.outer, Wrong(sign * 1e-2), reference=reference)
    assert report.verdict == "FAILED"
    assert report.relative_error == pytest.approx(1e-2, rel=1e-2)
    assert hypergradcheck(inner, outer, sample.inner, sample.outer, Wrong(0.0), reference=reference).passed


# Many outer variables


@functools.cache
def many(size: int = 150) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, Tensor]:
    """A weight for every row of a ridge regression, at its solution."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(size, 4, generator=generator, dtype=DOUBLE), torch.randn(size, generator=generator, dtype=DOUBLE)
    V, u = torch.randn(20, 4, generator=generator, dtype=DOUBLE), torch.randn(20, generator=generator, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam.sigmoid() * (X @ w - y).square()).mean() + 0.1 * w.square().sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (V @ w - u).square().mean()

    lam = torch.randn(size, generator=generator, dtype=DOUBLE)
    weights = lam.sigmoid() / size
    w = torch.linalg.solve(X.T @ (weights[:, None] * X) + 0.1 * torch.eye(4, dtype=DOUBLE), X.T @ (weights * y))
    return inner, outer, w, lam


@pytest.mark.parametrize("across", [False, True])
def test_directions_find_errors_wherever_they_lie(across: bool) -> None:
    assert hypergradcheck(*many(), "exact", reference="central_difference").relative_error < 1e-6
    report = hypergradcheck(*many(), Wrong(0.1, across), reference="central_difference")
    assert "24 directions of 150" in report.reference_details
    assert report.verdict == "FAILED"
    # The part across is an estimate from 23 random directions.
    assert report.relative_error == pytest.approx(0.1, rel=0.4 if across else 0.1)
    assert report.cosine == pytest.approx(1 / math.hypot(1, 0.1) if across else 1.0, abs=2e-3)


def test_directions_see_a_method_that_returns_zero() -> None:
    report = hypergradcheck(*many(), Wrong(-1.0), reference="central_difference")
    exact = hypergradcheck(*many(), Wrong(-1.0), reference="exact")
    assert report.verdict == exact.verdict == "FAILED"
    (name,) = report.per_parameter
    assert report.per_parameter[name].norm == pytest.approx(exact.per_parameter[name].norm, rel=0.4)


def test_every_parameter_tensor_has_its_own_directions() -> None:
    inner, outer, w, lam = many()
    parts = {"scale": torch.ones((), dtype=DOUBLE), "weights": [lam[:100], lam[100:].clone()]}

    def joined(w: Tensor, lam: Any) -> Tensor:
        return inner(w, lam["scale"] * torch.cat(lam["weights"]))

    report = hypergradcheck(joined, outer, w, parts, "exact", reference="central_difference")
    assert report.passed
    assert list(report.per_parameter) == ["scale", "weights[0]", "weights[1]"]
    assert all(part.relative_error < 1e-6 for part in report.per_parameter.values())


# Solving the inner problem


def logistic(start: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X, y = (
        torch.randn(40, 3, generator=generator, dtype=DOUBLE),
        torch.rand(40, generator=generator, dtype=DOUBLE) < 0.5,
    )

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(X @ w, y.to(w.dtype))
        return loss + (lam.exp() * w.square()).sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (X[:9] @ w - 1).square().mean()

    return inner, outer, torch.full((3,), start, dtype=DOUBLE), torch.full((3,), -3.0, dtype=DOUBLE)


@pytest.mark.parametrize("start", [1.0, 30.0])
def test_solving_starts_anywhere(start: float) -> None:
    # From w = 30 Newton's method without safeguards overshoots: the logistic loss is flat there.
    near, far = (
        hypergradcheck(*logistic(start), "exact", reference=reference, rtol=1e-8)
        for reference in ("central_difference", "unrolled")
    )
    for report in (near, far):
        assert report.reference_error < 1e-7
        assert report.inner_distance > 0.9
        assert not report.passed  # the method does not stand at the solution
        assert report.local_error < 1e-9
    assert near.per_parameter["outer"].norm == pytest.approx(far.per_parameter["outer"].norm, rel=1e-7)
    unrolled = hypergradcheck(*logistic(start), Unrolled(steps=300, learning_rate=1.0), reference="central_difference")
    assert unrolled.relative_error < 1e-6
    assert unrolled.inner_distance < 1e-6  # of the end of its steps


def test_solving_leaves_a_maximum_for_the_minimum_below_it() -> None:
    def well(w: Tensor, lam: Tensor) -> Tensor:
        return (w.square() - 1).square().sum() / 4 - (lam * w).sum()

    lam = torch.tensor([0.01], dtype=DOUBLE)
    report = hypergradcheck(
        well, lambda w, lam: w.sum(), torch.zeros(1, dtype=DOUBLE), lam, "exact", reference="central_difference"
    )
    # dw/dλ = 1 / (3 w² − 1) at the minimum near 1; at the maximum near 0 it is about −1
    assert report.reference_error < 1e-6
    assert report.per_parameter["outer"].norm == pytest.approx(0.5, abs=0.02)
    assert report.verdict == "FAILED"


@pytest.mark.parametrize(
    ("reference", "reason"), [("unrolled", "gradient steps on"), ("central_difference", "could not be brought to zero")]
)
def test_an_inner_problem_without_solution_is_said(reference: str, reason: str) -> None:
    def runaway(w: Tensor, lam: Tensor) -> Tensor:
        return -(w - lam).square().sum() + w.square().square().sum() * 0

    report = hypergradcheck(
        runaway,
        lambda w, lam: w.sum(),
        *(torch.ones(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)),
        "exact",
        reference=reference,
    )
    assert report.verdict == "UNDECIDED"
    assert not report.passed
    assert math.isinf(report.reference_error)
    assert re.search(f"not to be trusted: .*{reason}", re.sub(r"\s+", " ", str(report)))


def test_an_ill_conditioned_inner_problem_is_not_unrolled_to_the_end() -> None:
    H = torch.tensor([1.0, 1e-9], dtype=DOUBLE)
    losses = (lambda w, lam: (H * w.square()).sum() / 2 - lam @ w), (lambda w, lam: w.sum())
    w, lam = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    with mock.patch("bilevel.check.references.unrolled.LARGEST_NUM_STEPS", 200):
        report = hypergradcheck(*losses, w, lam, "exact", reference="unrolled")
    assert report.verdict == "UNDECIDED"
    assert "has not come to an end" in report.reference_failure
    assert hypergradcheck(*losses, w, lam, "exact").passed


@pytest.mark.parametrize("condition", [1e5, 1e7])
@pytest.mark.parametrize("away", [0.0, 1e-6])
def test_an_ill_conditioned_inner_problem_is_solved_as_far_as_rounding_lets(condition: float, away: float) -> None:
    """A Newton step is κ times as inexact as the gradient: that it does not shrink there is no lack of a solution."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=DOUBLE))[0]
    H = Q * torch.logspace(0, -math.log10(condition), 12, dtype=DOUBLE) @ Q.T
    C, lam, t = (torch.randn(*size, generator=generator, dtype=DOUBLE) for size in ((12, 5), (5,), (12,)))
    solution = torch.linalg.solve(H, C @ lam)
    losses = (lambda w, lam: w @ H @ w / 2 - w @ (C @ lam)), (lambda w, lam: (w - t).square().sum())
    report = hypergradcheck(*losses, solution * (1 + away), lam, "exact", reference="central_difference")
    assert report.passed, str(report)
    assert report.inner_distance == pytest.approx(away, abs=1e-7)


def test_many_inner_variables_need_no_dense_jacobian() -> None:
    expected = {reference: hypergradcheck(*many(), "exact", reference=reference) for reference in REFERENCES[1:]}
    with (
        mock.patch("bilevel.check.comparison.DENSE_DIMENSION", 2),
        mock.patch("bilevel.check.references.roots.DENSE_DIMENSION", 2),
        mock.patch("bilevel.check.references.exact.torch.linalg.lu_factor", side_effect=AssertionError),
    ):
        for reference, dense in expected.items():
            report = hypergradcheck(*many(), "cg", reference=reference)
            assert report.passed
            assert report.reference_error < 1e-6
            assert report.curvature == pytest.approx(dense.curvature, rel=1e-6)
            assert report.asymmetry < 1e-6
            assert report.inner_distance < 1e-8
            assert math.isnan(report.local_error)


def test_steps_are_plain_where_the_field_rotates() -> None:
    # A game's field: momentum would not converge on it, and the step must be shorter than one over ‖J‖ suggests.
    from tests.contract.contract import Field

    J = torch.tensor([[0.5, 3.0], [-3.0, 0.5]], dtype=DOUBLE)
    lam = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    v = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    losses = (lambda w, lam: Field.apply(w, J) - w @ lam), (lambda w, lam: w @ v)
    for reference in REFERENCES:
        for start in (torch.linalg.solve(J, lam), torch.zeros(2, dtype=DOUBLE)):
            report = hypergradcheck(*losses, start, lam, "exact", reference=reference, rtol=1e-7)
            assert report.passed, report


# Engines


class Target(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.second.module["w"] - 1.0).square().sum() + self.first.module["w"].sum()


class First(Problem):
    def loss(self, batch: Any) -> Tensor:
        w, lam = self.module["w"], self.target.module["w"]
        return (w - lam.sin()).square().sum() + 0.1 * (w**4).sum()


class Second(Problem):
    def loss(self, batch: Any) -> Tensor:
        w, first, lam = self.module["w"], self.first.module["w"], self.target.module["w"]
        return 2 * (w - first * lam).square().sum() + 0.1 * (w**4).sum()


def nested_engine(method: Any) -> Engine:
    def held(value: float) -> nn.ParameterDict:
        return nn.ParameterDict({"w": nn.Parameter(torch.full((2,), value))})

    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    problems = [
        Target(held(0.7), optimizer=still),
        First(held(0.0), optimizer=sgd, steps=100),
        Second(held(0.0), optimizer=sgd, steps=200),
    ]
    running = Engine(problems, EngineConfig(progress=False), hypergradient=method)
    for _ in range(2):  # the second problem is updated before the first, to which it responds
        running.step()
    return running


@pytest.mark.parametrize("reference", REFERENCES)
def test_inner_problems_that_respond_to_one_another_are_solved_in_order(reference: str) -> None:
    running = nested_engine("exact")
    report = hypergradcheck(running, reference=reference)
    assert report.passed
    assert report.relative_error < 1e-5
    assert not hypergradcheck(nested_engine("identity"), reference=reference).passed


class Dropped(Problem):
    def loss(self, batch: Any) -> Tensor:
        w = self.module["w"]
        return (nn.functional.dropout(w, 0.5) - self.above.module["w"]).square().sum() + w.square().sum()


class Above(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (nn.functional.dropout(self.dropped.module["w"], 0.5) - 1).square().sum()


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("steps", [0, 1])
def test_engines_are_compared_on_the_same_masks(reference: str, steps: int) -> None:
    torch.manual_seed(0)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    problems = [
        Above(nn.ParameterDict({"w": nn.Parameter(torch.full((8,), 0.5))}), optimizer=sgd),
        Dropped(nn.ParameterDict({"w": nn.Parameter(torch.full((8,), 0.3))}), optimizer=sgd, steps=1),
    ]
    running = Engine(problems, EngineConfig(progress=False), hypergradient="exact")
    for _ in range(steps):
        running.step()
    generators = torch.get_rng_state()
    report = hypergradcheck(running, reference=reference)
    # the reference's masks are the method's: the formula agrees where the method stands, and solved problems differ
    error = report.relative_error if reference == "exact" else report.local_error
    assert error < 1e-5
    assert report.reference_error < 1e-6
    assert torch.equal(torch.get_rng_state(), generators)


# Parameters of all kinds


@pytest.mark.parametrize("reference", REFERENCES)
def test_scalars_frozen_and_shared_parameters(reference: str) -> None:
    frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    shared = torch.tensor([0.5, 1.0])
    inner_params = {"w": torch.tensor(1.0), "frozen": frozen}
    outer_params = {"a": torch.tensor(0.5), "twice": (shared, shared), "frozen": frozen, "none": torch.zeros(0)}

    def inner(w: Any, lam: Any) -> Tensor:
        target = lam["a"] + lam["twice"][0].sum() * lam["twice"][1].prod()
        return w["frozen"] * (w["w"] - target).square() + w["w"] ** 4 / 4 + lam["none"].sum()

    def outer(w: Any, lam: Any) -> Tensor:
        return (w["w"] - 3 * lam["a"] * lam["frozen"]).square()

    start = hypergradient(inner, outer, inner_params, outer_params, Unrolled(steps=300, learning_rate=0.1)).inner
    report = hypergradcheck(inner, outer, start, outer_params, "exact", reference=reference)
    assert report.passed, report
    assert list(report.per_parameter) == ["a", "twice[0]", "none"]


@pytest.mark.parametrize("reference", REFERENCES[1:])
def test_references_that_solve_need_float64(reference: str) -> None:
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        if w.dtype != torch.float32:
            raise TypeError("only float32")
        return (w - lam).square().sum()

    with pytest.raises(ConfigError, match=r"needs losses that can be run in float64: only float32.*reference='exact'"):
        hypergradcheck(inner, lambda w, lam: w.sum(), torch.zeros(2), torch.zeros(2), "cg", reference=reference)


@pytest.mark.parametrize("reference", REFERENCES)
def test_bad_parameters_and_losses_have_clear_errors(reference: str) -> None:
    def check(inner: Any, w: Tensor, lam: Tensor) -> HypergradientReport:
        return hypergradcheck(inner, lambda w, lam: w.real.sum(), w, lam, "cg", reference=reference)

    def square(w: Tensor, lam: Tensor) -> Tensor:
        return (w - lam).square().sum()

    with pytest.raises(ParameterError, match=r"int64.*real floating point is needed"):
        check(square, torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(ParameterError, match=r"complex64.*real floating point is needed"):
        check(square, torch.zeros(2), torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(NonFiniteError, match=r"loss of the inner problem is nan"):
        check(lambda w, lam: square(w, lam) / 0 * 0, torch.zeros(2), torch.zeros(2))


# Their parts


@forall(40, order=st.integers(1, 6), scale=st.floats(0.1, 10), number=st.integers(0, 2**31 - 1))
def test_extrapolated_differences_know_their_error(order: int, scale: float, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    a, b, c = (float(torch.randn((), generator=generator, dtype=DOUBLE)) for _ in range(3))

    def function(t: float) -> tuple[float, float]:
        value = math.exp(a * t) + math.sin(order * b * t) + c * t**order
        return scale * value, 4e-16 * scale * (1 + abs(value))

    slope, error = ridders(function, 0.1, 1e-9)
    truth = scale * (a + order * b + (c if order == 1 else 0.0))
    assert abs(slope - truth) <= error
    assert error < 1e-5 * scale * (1 + abs(a) + order * abs(b) + abs(c))


def test_extrapolation_removes_even_powers_of_the_step() -> None:
    # Five differences with steps down to 1/160 have the error 7e-6 at best, extrapolated 1e-13.
    slope, error = ridders(lambda t: (math.exp(t), 1e-16), 0.1, 0.0, halvings=5)
    assert abs(slope - 1) <= error < 1e-11


def test_extrapolated_differences_shorten_steps_and_give_up() -> None:
    inside = ridders(lambda t: (math.log(1e-4 + t), 1e-16) if t > -1e-4 else None, 0.1, 1e-6)
    assert inside[0] == pytest.approx(1e4, rel=1e-6)
    assert math.isinf(ridders(lambda t: None, 0.1, 1e-6)[1])
    slope, error = ridders(lambda t: (abs(t - 1e-3), 1e-16), 0.1, 1e-9)  # a kink within the first steps
    assert abs(slope - -1) <= error


@forall(20, size=st.integers(1, 8), number=st.integers(0, 2**31 - 1))
def test_systems_and_spectra_from_products(size: int, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    J = torch.eye(size, dtype=DOUBLE) + 0.2 * torch.randn(size, size, generator=generator, dtype=DOUBLE)
    right = torch.randn(size, generator=generator, dtype=DOUBLE)
    found = gmres(lambda v: J @ v, right, products=size, rtol=1e-12)
    assert float((J @ found - right).norm()) <= 1e-9 * float(right.norm())
    H = J + J.T
    low, high = ritz_values(lambda v: H @ v, right, size)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert low == pytest.approx(float(eigenvalues[0]), abs=1e-6)
    assert high == pytest.approx(float(eigenvalues[-1]), abs=1e-6)


def test_a_report_says_how_its_reference_was_computed() -> None:
    for reference, sign in zip(REFERENCES, ("dense Jacobian", "accelerated steps", "solved again"), strict=True):
        report = hypergradcheck(*many(40), ConjugateGradient(rtol=1e-8), reference=reference)
        assert report.reference == reference
        assert sign in report.reference_details
        assert "inner gradient norm" in report.reference_details or reference == "exact"
        assert re.search(r"known to \de-\d\d", str(report))
