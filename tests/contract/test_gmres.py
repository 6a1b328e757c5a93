from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.gmres import GMRES
from tests.bilevel.strategies import logarithmic, make_quadratic, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of
from tests.contract.test_conjugate_gradient import chebyshev


class TestGMRES(EstimatorContract):
    default = GMRES(rtol=0.0)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(
            GMRES,
            max_iterations=st.integers(1, 20),
            rtol=st.just(0.0) | logarithmic(1e-12, 0.5),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
            restart=st.none() | st.integers(1, 10),
            warm_start=st.booleans(),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, GMRES)
        smallest, damping, taken = float(sample.eigenvalues[0]), estimator.damping, result.info.iterations
        cycles, rest = (0, taken) if estimator.restart is None else divmod(taken, estimator.restart + 1)
        share = chebyshev(sample, damping, rest)
        if cycles:
            share *= chebyshev(sample, damping, int(estimator.restart or 0)) ** cycles
        shift = damping / (smallest * (smallest + damping))
        size = operator_norm(sample.mixed) * float(sample.cotangent.norm())
        return size * (share / (smallest + damping) + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, GMRES)
        restarts = 0 if estimator.restart is None else estimator.max_iterations // estimator.restart
        assert result.info.iterations <= estimator.max_iterations + restarts
        assert result.info.products == result.info.iterations + 1
        return 1, 1 + result.info.products


def field_of(J: torch.Tensor, v: torch.Tensor, estimator: Estimator) -> Hypergradient:
    """The hypergradient ``J⁻ᵀv`` of an inner gradient field ``Jw − λ`` that a custom backward pass makes."""
    zero = torch.zeros_like(v)
    return hypergradient(
        lambda w, lam: Field.apply(w, J) - w @ lam, lambda w, lam: w @ v, zero, zero.clone(), estimator
    )


def random_field(number: int, size: int, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A Jacobian with a positive definite symmetric part of eigenvalues in [1, 2], and a cotangent."""
    generator = torch.Generator().manual_seed(number)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    M = spectrum_matrix(torch.linspace(1.0, 2.0, size, dtype=DOUBLE), generator)
    return M + skew * (N - N.T), torch.randn(size, generator=generator, dtype=DOUBLE)


@forall(80, size=st.integers(1, 10), number=st.integers(0, 2**31), skew=logarithmic(1e-3, 3.0))
def test_a_jacobian_that_is_not_symmetric_is_solved_with_its_transpose(size: int, number: int, skew: float) -> None:
    # A custom backward pass, or a norm that is detached: conjugate gradients and MINRES have no answer here.
    J, v = random_field(number, size, skew)
    result = field_of(J, v, GMRES(rtol=1e-11))
    assert result.info.status is Status.CONVERGED
    assert result.info.iterations <= size
    torch.testing.assert_close(result.grad, torch.linalg.solve(J.T, v), rtol=1e-8, atol=1e-9)


@forall(
    60,
    size=st.integers(1, 10),
    number=st.integers(0, 2**31),
    skew=logarithmic(1e-3, 3.0),
    iterations=st.integers(1, 20),
    restart=st.none() | st.integers(1, 5),
)
def test_residual_falls_as_the_symmetric_part_demands(
    size: int, number: int, skew: float, iterations: int, restart: int | None
) -> None:
    J, v = random_field(number, size, skew)
    result = field_of(J, v, GMRES(rtol=0.0, max_iterations=iterations, restart=restart))
    rate = 1 - (1.0 / operator_norm(J)) ** 2 if size > 1 else 0.0
    true = float((J.T @ result.grad - v).norm() / v.norm())
    assert result.info.residual == pytest.approx(true, rel=1e-6, abs=1e-12)
    assert true <= rate ** (iterations / 2) + 1e-12


@forall(60, sample=samples(), data=st.data())
def test_stops_by_the_residual_and_reports_the_true_one(sample: Sample, data: st.DataObject) -> None:
    estimator = data.draw(TestGMRES().estimators(sample))
    H = sample.hessian + estimator.damping * torch.eye(len(sample.inner), dtype=DOUBLE)
    q, result = status_of(sample.hessian, estimator, sample.cotangent)
    true = float((H @ q - sample.cotangent).norm() / sample.cotangent.norm())
    condition = float(torch.linalg.cond(H))
    assert result.info.residual == pytest.approx(true, rel=1e-6, abs=1e-14 * condition)
    if result.info.status is Status.CONVERGED:
        assert true <= max(2 * estimator.rtol, 1e-13)
    else:
        assert result.info.status is Status.STOPPED_AT_CAP
        stagnated = "left the residual as it was" in result.info.message
        assert result.info.iterations >= estimator.max_iterations or stagnated or true <= 1e-14 * condition


def test_a_restart_that_is_too_short_is_named() -> None:
    shift = torch.roll(torch.eye(5, dtype=DOUBLE), 1, dims=0)
    v = torch.eye(5, dtype=DOUBLE)[0]
    result = field_of(shift, v, GMRES(restart=3))
    assert result.info.status is Status.STOPPED_AT_CAP
    assert result.info.residual == pytest.approx(1.0)
    assert "raise restart" in result.info.explain()
    whole = field_of(shift, v, GMRES(rtol=1e-12))
    assert whole.info.status is Status.CONVERGED
    torch.testing.assert_close(whole.grad, torch.linalg.solve(shift.T, v))


@forall(40, size=st.integers(2, 8), number=st.integers(0, 2**31), skew=logarithmic(1e-2, 1.0))
def test_products_by_differences_need_a_symmetric_jacobian(size: int, number: int, skew: float) -> None:
    # They are products with J, not with its transpose: the small residual would be that of the wrong system.
    J, v = random_field(number, size, skew)
    result = field_of(J, v, GMRES(rtol=1e-6, products="finite_difference"))
    assert result.info.residual < 1e-5
    assert result.info.status is Status.NOT_SYMMETRIC
    symmetric = field_of((J + J.T) / 2, v, GMRES(rtol=1e-6, products="finite_difference"))
    assert symmetric.info.status is Status.CONVERGED
    torch.testing.assert_close(symmetric.grad, torch.linalg.solve((J + J.T) / 2, v), rtol=1e-4, atol=1e-4)


@forall(40, size=st.integers(2, 12), number=st.integers(0, 2**31), single=st.booleans())
def test_singular_jacobians_are_reported(size: int, number: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    v = torch.randn(size, generator=generator, dtype=DOUBLE)
    null = torch.linalg.eigh(H)[1][:, 0]
    outside = v + (v.norm() - v @ null) * null
    dtype = torch.float32 if single else DOUBLE
    _, result = status_of(H.to(dtype), GMRES(rtol=1e-5), outside.to(dtype))
    assert result.info.status is Status.SINGULAR
    assert result.info.residual <= 1.001
    inside = H @ v
    q, result = status_of(H.to(dtype), GMRES(rtol=1e-5), inside.to(dtype))
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q.double(), torch.linalg.pinv(H, rtol=1e-10) @ inside, rtol=1e-3, atol=1e-3)


def test_going_on_after_convergence_in_float32_gives_no_nan() -> None:
    sample = make_quadratic(5, 3, 10.0, 1.0, 4)
    for restart in (None, 2, 20):
        result = solve(sample, GMRES(max_iterations=500, rtol=0.0, restart=restart), torch.float32)
        assert not result.info.status.failed
        torch.testing.assert_close(result.grad.double(), sample.hypergradient(), rtol=1e-4, atol=1e-4)


def test_products_that_are_not_finite_are_reported() -> None:
    result = hypergradient(
        lambda w, lam: (w - lam).square().sum() + w[:1].abs().sqrt().sum(),  # infinite second derivative at zero
        lambda w, lam: w.sum(),
        torch.zeros(2),
        torch.zeros(2),
        GMRES(),
    )
    assert result.info.status is Status.DIVERGED


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_iterations", 0, "an integer of at least 1, not 0"),
        ("rtol", math.nan, "a finite number at least 0, not nan"),
        ("damping", -1.0, "a finite number at least 0, not -1.0"),
        ("restart", 0, "an integer of at least 1, not 0"),
        ("restart", 2.0, "an integer of at least 1, not 2.0"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"GMRES.{field} must be {expected}")):
        GMRES(**{field: value})  # type: ignore[arg-type]
