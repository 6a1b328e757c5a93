from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import strategies as st

from bilevel import ConjugateGradient, Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.linear import LOST
from tests.bilevel.strategies import logarithmic, make_quadratic, quadratics, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of


class TestConjugateGradient(EstimatorContract):
    default = ConjugateGradient(rtol=0.0)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(
            ConjugateGradient,
            max_iterations=st.integers(1, 20),
            rtol=st.just(0.0) | logarithmic(1e-12, 0.5),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, ConjugateGradient)
        smallest, damping = float(sample.eigenvalues[0]), estimator.damping
        v = sample.cotangent
        H = sample.hessian + damping * torch.eye(len(v), dtype=DOUBLE)
        energy = math.sqrt(float(v @ torch.linalg.solve(H, v)))
        krylov = chebyshev(sample, damping, result.info.iterations) * energy / math.sqrt(smallest + damping)
        shift = float(v.norm()) * damping / (smallest * (smallest + damping))
        return operator_norm(sample.mixed) * (krylov + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, ConjugateGradient)
        assert result.info.iterations <= estimator.max_iterations
        assert result.info.products == result.info.iterations + 1
        return 1, 1 + result.info.products


def chebyshev(sample: Sample, damping: float, iterations: int) -> float:
    """Bound of the error in the energy norm, relative to the start's."""
    largest, smallest = float(sample.eigenvalues[-1]) + damping, float(sample.eigenvalues[0]) + damping
    root = math.sqrt(largest / smallest)
    return min(1.0, 2 * ((root - 1) / (root + 1)) ** iterations)


@forall(100, sample=samples(), data=st.data())
def test_stops_by_the_residual_and_reports_the_true_one(sample: Sample, data: st.DataObject) -> None:
    estimator = data.draw(TestConjugateGradient().estimators(sample))
    H = sample.hessian + estimator.damping * torch.eye(len(sample.inner), dtype=DOUBLE)
    q, result = status_of(sample.hessian, estimator, sample.cotangent)
    true = float((H @ q - sample.cotangent).norm() / sample.cotangent.norm())
    condition = float(torch.linalg.cond(H))
    assert result.info.residual == pytest.approx(true, rel=1e-6, abs=1e-14 * condition)
    if result.info.status is Status.CONVERGED:
        assert true <= max(2 * estimator.rtol, 1e-13)
    else:
        assert result.info.status is Status.STOPPED_AT_CAP
        # At the cap, or where rounding keeps the true residual above what the recursion believes.
        assert result.info.iterations == estimator.max_iterations or true <= 1e-13 * condition**1.5


@forall(60, sample=quadratics(max_condition=100.0), copies=st.integers(1, 4), number=st.integers(0, 2**31))
def test_terminates_after_as_many_iterations_as_there_are_distinct_eigenvalues(
    sample: Sample, copies: int, number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    distinct = 1.0 + torch.arange(1, copies + 1, dtype=DOUBLE)
    H = spectrum_matrix(distinct.repeat(3), generator)
    v = torch.randn(3 * copies, generator=generator, dtype=DOUBLE)
    q, result = status_of(H, ConjugateGradient(max_iterations=copies, rtol=1e-9), v)
    torch.testing.assert_close(q, torch.linalg.solve(H, v), rtol=1e-9, atol=1e-9)
    assert result.info.status is Status.CONVERGED
    assert result.info.iterations == copies


def test_twenty_iterations_are_better_than_one() -> None:
    # Betty's released conjugate gradient updates its direction with the old residual: right after one iteration,
    # 20 % off after 20 on a softmax regression.
    sample = make_quadratic(8, 3, 1e3, 1.0, 3)
    exact = sample.hypergradient()
    errors = [
        float((solve(sample, ConjugateGradient(max_iterations=k, rtol=0.0)).grad - exact).norm() / exact.norm())
        for k in (1, 2, 4, 8, 20)
    ]
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-10


def test_identity_hessian_keeps_its_implicit_part() -> None:
    # hypertorch returns the iterate before the last update when it converges: for H = I the implicit part is lost.
    v = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)
    for rtol in (0.0, 1e-6):
        q, result = status_of(torch.eye(3, dtype=DOUBLE), ConjugateGradient(rtol=rtol), v)
        torch.testing.assert_close(q, v, rtol=1e-15, atol=0)
        assert result.info.status is Status.CONVERGED
        assert result.info.iterations == 1


def test_going_on_after_convergence_in_float32_gives_no_nan() -> None:
    # Betty has no residual stop and divides zero by zero once converged in float32.
    sample = make_quadratic(5, 3, 10.0, 1.0, 4)
    for rtol in (0.0, 1e-12):
        estimator = ConjugateGradient(max_iterations=500, rtol=rtol)
        result = solve(sample, estimator, torch.float32)
        assert result.info.status is Status.CONVERGED
        assert result.info.iterations < 50
        torch.testing.assert_close(result.grad.double(), sample.hypergradient(), rtol=1e-4, atol=1e-4)


def test_rounding_that_limits_the_residual_is_said() -> None:
    sample = make_quadratic(30, 3, 1e5, 1.0, 4)
    for dtype, rounded in ((torch.float32, True), (DOUBLE, False)):
        info = solve(sample, ConjugateGradient(max_iterations=500, rtol=1e-6), dtype).info
        assert info.iterations < 500
        assert (info.status is Status.STOPPED_AT_CAP) is rounded
        assert ("more precision" in info.explain()) is rounded


def test_indefinite_hessians_are_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 20):
        eigenvalues = torch.linspace(0.5, 2.0, size, dtype=DOUBLE)
        eigenvalues[0] = -0.3
        H = spectrum_matrix(eigenvalues, generator)
        v = torch.randn(size, generator=generator, dtype=DOUBLE)
        _, result = status_of(H, ConjugateGradient(), v)
        assert result.info.status is Status.NEGATIVE_CURVATURE
        assert "no strict minimum" in result.info.explain()
        q, result = status_of(H, ConjugateGradient(damping=0.5, rtol=1e-10), v)
        assert result.info.status is Status.CONVERGED
        torch.testing.assert_close(q, torch.linalg.solve(H + 0.5 * torch.eye(size, dtype=DOUBLE), v))
    # A direction with zero curvature and a product that does not vanish: indefinite, not singular.
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE))
    _, result = status_of(H, ConjugateGradient(), torch.ones(2, dtype=DOUBLE))
    assert result.info.status is Status.NEGATIVE_CURVATURE


@forall(60, size=st.integers(2, 30), number=st.integers(0, 2**31), single=st.booleans())
def test_singular_hessians_are_reported(size: int, number: int, single: bool) -> None:
    # Products with the null vector are rounding, of either sign: taken for curvature they made steps of 10¹⁶.
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    dtype = torch.float32 if single else DOUBLE
    v = torch.randn(size, generator=generator, dtype=DOUBLE)
    outside = v + torch.linalg.eigh(H)[1][:, 0]
    _, result = status_of(H.to(dtype), ConjugateGradient(max_iterations=100, rtol=1e-5), outside.to(dtype))
    assert result.info.status is Status.SINGULAR
    inside = H @ v
    q, result = status_of(H.to(dtype), ConjugateGradient(max_iterations=100, rtol=1e-5), inside.to(dtype))
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q.double(), torch.linalg.pinv(H, rtol=1e-10) @ inside, rtol=1e-3, atol=1e-3)


@forall(100, number=st.integers(0, 2**31), size=st.integers(2, 5), offset=logarithmic(1e-6, 1e-2))
def test_a_right_hand_side_close_to_the_null_space_is_no_success(number: int, size: int, offset: float) -> None:
    # The recursion converges while rounding of the answer, as large as 1 / offset², makes it no solution.
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    v = torch.linalg.eigh(H)[1][:, 0] + offset * torch.randn(size, generator=generator, dtype=DOUBLE)
    _, result = status_of(H, ConjugateGradient(rtol=1e-5), v)
    assert result.info.status is not Status.CONVERGED
    assert result.info.status.failed or 1e-5 < result.info.residual < LOST  # at least the residual tells


def test_zero_hessian_is_singular() -> None:
    _, result = status_of(torch.zeros(3, 3, dtype=DOUBLE), ConjugateGradient(), torch.ones(3, dtype=DOUBLE))
    assert result.info.status is Status.SINGULAR


def test_products_that_are_not_finite_are_reported() -> None:
    result = hypergradient(
        lambda w, lam: (w - lam).square().sum() + w[:1].abs().sqrt().sum(),  # infinite second derivative at zero
        lambda w, lam: w.sum(),
        torch.zeros(2),
        torch.zeros(2),
        ConjugateGradient(),
    )
    assert result.info.status is Status.DIVERGED


@forall(40, size=st.integers(2, 8), number=st.integers(0, 2**31))
def test_a_jacobian_that_is_not_symmetric_is_reported(size: int, number: int) -> None:
    # The residual of the recursion is the true one whatever H is, and says whether the answer can be used nonetheless.
    generator = torch.Generator().manual_seed(number)
    H = spectrum_matrix(torch.linspace(1.0, 2.0, size, dtype=DOUBLE), generator)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    v = torch.randn(size, generator=generator, dtype=DOUBLE)
    zero = torch.zeros(size, dtype=DOUBLE)

    def field(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return w @ H @ w / 2 + Field.apply(w, N) - w @ lam

    result = hypergradient(field, lambda w, lam: w @ v, zero, zero.clone(), ConjugateGradient(rtol=1e-10))
    J = H + N
    solved = float((J.T @ result.grad - v).norm() / v.norm()) < 1e-9
    assert result.info.status.failed != solved
    if result.info.status is Status.NOT_SYMMETRIC:
        assert "custom backward" in result.info.explain()
        assert "asymmetry" in result.info.message


def test_an_asymmetry_is_named_and_not_taken_for_something_else() -> None:
    H = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE))
    N = torch.zeros(3, 3, dtype=DOUBLE)
    N[0, 2] = 0.05  # a few per cent, as in a detached norm
    zero, v = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    for iterations, status in ((3, Status.NOT_SYMMETRIC), (50, Status.CONVERGED)):
        result = hypergradient(
            lambda w, lam: w @ H @ w / 2 + Field.apply(w, N) - w @ lam,
            lambda w, lam: w @ v,
            zero,
            zero.clone(),
            ConjugateGradient(max_iterations=iterations),
        )
        assert result.info.status is status
        assert "asymmetry" in result.info.message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_iterations", 0, "an integer of at least 1, not 0"),
        ("rtol", -1e-9, "a finite number at least 0, not -1e-09"),
        ("rtol", "small", "a finite number at least 0, not 'small'"),
        ("damping", float("inf"), "a finite number at least 0, not inf"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"ConjugateGradient.{field} must be {expected}")):
        ConjugateGradient(**{field: value})  # type: ignore[arg-type]
