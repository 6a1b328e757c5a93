from __future__ import annotations

import re

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.minres import MINRES
from tests.bilevel.strategies import logarithmic, make_quadratic, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of
from tests.contract.test_conjugate_gradient import chebyshev


class TestMINRES(EstimatorContract):
    default = MINRES(rtol=0.0)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(
            MINRES,
            max_iterations=st.integers(1, 20),
            rtol=st.just(0.0) | logarithmic(1e-12, 0.5),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
            warm_start=st.booleans(),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, MINRES)
        smallest, damping = float(sample.eigenvalues[0]), estimator.damping
        # The residual's bound; one or two of the products may have been looks at it.
        iterations = max(0, result.info.iterations - 2) if result.info.iterations > 2 else result.info.iterations
        krylov = chebyshev(sample, damping, iterations) / (smallest + damping)
        shift = damping / (smallest * (smallest + damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * (krylov + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, MINRES)
        assert result.info.iterations <= estimator.max_iterations + 3
        assert result.info.products == result.info.iterations + 1
        return 1, 1 + result.info.products


def saddle(number: int, size: int, condition: float) -> torch.Tensor:
    """A symmetric matrix with eigenvalues of both signs, of absolute values in [1 / condition, 1]."""
    generator = torch.Generator().manual_seed(number)
    exponents = torch.rand(size, generator=generator, dtype=DOUBLE)
    exponents[0], exponents[-1] = 0.0, 1.0
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0).to(DOUBLE)
    signs[0], signs[-1] = -1.0, 1.0
    return spectrum_matrix(condition ** (exponents - 1) * signs, generator)


@forall(80, number=st.integers(0, 2**31), size=st.integers(2, 10), condition=logarithmic(1.0, 1e3))
def test_saddles_are_solved_and_named(number: int, size: int, condition: float) -> None:
    # Conjugate gradients return NEGATIVE_CURVATURE here, and no solution.
    H = saddle(number, size, condition)
    v = torch.randn(size, generator=torch.Generator().manual_seed(number + 1), dtype=DOUBLE)
    q, result = status_of(H, MINRES(rtol=1e-9, max_iterations=200), v)
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q, torch.linalg.solve(H, v), rtol=0, atol=2e-9 * condition * float(v.norm()))
    assert "the Hessian has an eigenvalue of -" in result.info.message


@forall(
    60, number=st.integers(0, 2**31), size=st.integers(2, 10), condition=logarithmic(1.0, 1e3), k=st.integers(1, 20)
)
def test_residual_at_a_saddle_is_within_the_two_interval_bound(
    number: int, size: int, condition: float, k: int
) -> None:
    H = saddle(number, size, condition)
    v = torch.randn(size, generator=torch.Generator().manual_seed(number + 1), dtype=DOUBLE)
    q, result = status_of(H, MINRES(rtol=0.0, max_iterations=k), v)
    true = float((H @ q - v).norm() / v.norm())
    assert result.info.residual == pytest.approx(true, rel=1e-6, abs=1e-12)
    assert true <= min(1.0, 2 * ((condition - 1) / (condition + 1)) ** (min(k, result.info.iterations) // 2)) + 1e-9


@forall(100, sample=samples(), data=st.data())
def test_stops_by_the_residual_and_reports_the_true_one(sample: Sample, data: st.DataObject) -> None:
    estimator = data.draw(TestMINRES().estimators(sample))
    H = sample.hessian + estimator.damping * torch.eye(len(sample.inner), dtype=DOUBLE)
    q, result = status_of(sample.hessian, estimator, sample.cotangent)
    true = float((H @ q - sample.cotangent).norm() / sample.cotangent.norm())
    condition = float(torch.linalg.cond(H))
    assert result.info.residual == pytest.approx(true, rel=1e-6, abs=1e-14 * condition)
    if result.info.status is Status.CONVERGED:
        assert true <= max(2 * estimator.rtol, 1e-13)
    else:
        assert result.info.status is Status.STOPPED_AT_CAP
        assert result.info.iterations >= estimator.max_iterations or true <= 1e-14 * condition**2


@forall(60, size=st.integers(2, 20), number=st.integers(0, 2**31), single=st.booleans())
def test_singular_hessians_are_reported(size: int, number: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[1::2] *= -1
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    v = torch.randn(size, generator=generator, dtype=DOUBLE)
    null = torch.linalg.svd(H)[0][:, -1]
    outside = v + (v.norm() - v @ null) * null
    dtype = torch.float32 if single else DOUBLE
    estimator = MINRES(max_iterations=200, rtol=1e-5)
    _, result = status_of(H.to(dtype), estimator, outside.to(dtype))
    assert result.info.status is Status.SINGULAR
    assert "null space" in result.info.explain()
    inside = H @ v
    q, result = status_of(H.to(dtype), estimator, inside.to(dtype))
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q.double(), torch.linalg.pinv(H, rtol=1e-10) @ inside, rtol=1e-3, atol=1e-3)
    q, result = status_of(H, MINRES(rtol=1e-10, damping=0.25), outside)
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q, torch.linalg.solve(H + 0.25 * torch.eye(size, dtype=DOUBLE), outside))


def test_going_on_after_convergence_in_float32_gives_no_nan() -> None:
    sample = make_quadratic(5, 3, 10.0, 1.0, 4)
    for rtol in (0.0, 1e-12):
        result = solve(sample, MINRES(max_iterations=500, rtol=rtol), torch.float32)
        assert not result.info.status.failed
        assert result.info.iterations < 50
        torch.testing.assert_close(result.grad.double(), sample.hypergradient(), rtol=1e-4, atol=1e-4)


@forall(40, size=st.integers(2, 8), number=st.integers(0, 2**31))
def test_a_jacobian_that_is_not_symmetric_is_reported(size: int, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    H = spectrum_matrix(torch.linspace(1.0, 2.0, size, dtype=DOUBLE), generator)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    v = torch.randn(size, generator=generator, dtype=DOUBLE)
    zero = torch.zeros(size, dtype=DOUBLE)
    result = hypergradient(
        lambda w, lam: w @ H @ w / 2 + Field.apply(w, N) - w @ lam,
        lambda w, lam: w @ v,
        zero,
        zero.clone(),
        MINRES(rtol=1e-10),
    )
    residual = float(((H + N).T @ result.grad - v).norm() / v.norm())
    assert result.info.status.failed or residual < 1e-9
    assert not result.info.status.failed or residual > 1e-10
    if result.info.status is Status.NOT_SYMMETRIC:
        assert "asymmetry" in result.info.message


def test_products_that_are_not_finite_are_reported() -> None:
    result = hypergradient(
        lambda w, lam: (w - lam).square().sum() + w[:1].abs().sqrt().sum(),  # infinite second derivative at zero
        lambda w, lam: w.sum(),
        torch.zeros(2),
        torch.zeros(2),
        MINRES(),
    )
    assert result.info.status is Status.DIVERGED


def test_gauss_newton_curvature_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MINRES\(curvature='gauss_newton'\): .*semi-definite.*ConjugateGradient"):
        MINRES(curvature="gauss_newton")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_iterations", 0, "an integer of at least 1, not 0"),
        ("rtol", -1e-9, "a finite number at least 0, not -1e-09"),
        ("damping", float("inf"), "a finite number at least 0, not inf"),
        ("warm_start", 1, "True, False, 'linear' or 'quadratic', not 1"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"MINRES.{field} must be {expected}")):
        MINRES(**{field: value})  # type: ignore[arg-type]
