from __future__ import annotations

import re

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.nystrom import Nystrom
from bilevel.linear import dense_matrix, nystrom
from tests.bilevel.strategies import EPSILON, logarithmic, make_quadratic, quadratics, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of


def left_out(H: Tensor, rank: int) -> Tensor:
    """``H − Ĥ`` of the approximation that the method makes."""
    like = (torch.zeros(len(H), dtype=DOUBLE),)
    return H - dense_matrix(nystrom(lambda q: (H @ q[0],), like, rank=rank).product, like)


class TestNystrom(EstimatorContract):
    default = Nystrom(rank=20, damping=1e-10)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(Nystrom, rank=st.integers(1, 10), damping=logarithmic(1e-3, 10.0))

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Nystrom)
        smallest, damping, v = float(sample.eigenvalues[0]), estimator.damping, sample.cotangent
        damped = torch.linalg.solve(sample.hessian + damping * torch.eye(len(v), dtype=DOUBLE), v)
        missing = operator_norm(left_out(sample.hessian, estimator.rank)) / damping * float(damped.norm())
        shift = float(v.norm()) * damping / (smallest * (smallest + damping))
        # Rounding, relative to the largest eigenvalue, is what the damping divides.
        rounding = 100 * len(v) * EPSILON * float(sample.eigenvalues[-1]) / damping * float(v.norm()) / damping
        return operator_norm(sample.mixed) * (missing + shift + rounding)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Nystrom)
        assert result.info.iterations <= estimator.rank
        assert result.info.products == result.info.iterations + 1
        return 1, 1 + result.info.products

    @forall(20, sample=samples(max_condition=100.0), number=st.integers(0, 2**31), more=st.integers(0, 3))
    def test_permuting_coordinates_changes_rounding_only(self, sample: Sample, number: int, more: int) -> None:
        """Only at full rank: the random vectors are not permuted along."""
        estimator = Nystrom(rank=len(sample.inner) + more, damping=0.01)
        inner_loss, outer_loss = sample.losses()
        order = torch.randperm(len(sample.inner), generator=torch.Generator().manual_seed(number))
        back = order.argsort()
        result = hypergradient(
            lambda w, lam: inner_loss(w[back], lam),
            lambda w, lam: outer_loss(w[back], lam),
            sample.inner[order],
            sample.outer,
            estimator,
        )
        self._close_on(sample, result.grad, solve(sample, estimator).grad)


@forall(80, sample=quadratics(max_condition=1e4, scale=False), damping=logarithmic(1e-3, 10.0), more=st.integers(0, 3))
def test_full_rank_is_the_damped_solution(sample: Sample, damping: float, more: int) -> None:
    size = len(sample.inner)
    result = solve(sample, Nystrom(rank=size + more, damping=damping))
    expected = sample.hypergradient(damping=damping)
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=1e-9 * (1 + sample.scale(damping)))
    assert result.info.status in (Status.CONVERGED, Status.STOPPED_AT_CAP)
    assert result.info.residual < 1e-10
    assert result.info.iterations == size


@forall(80, sample=samples(max_condition=1e4), rank=st.integers(1, 8), damping=logarithmic(1e-2, 10.0))
def test_residual_is_what_the_approximation_leaves_out(sample: Sample, rank: int, damping: float) -> None:
    # (H + δI) q − v = (H − Ĥ) q, an equality.
    q, result = status_of(sample.hessian, Nystrom(rank=rank, damping=damping), sample.cotangent)
    v = sample.cotangent
    missing = float((left_out(sample.hessian, rank) @ q).norm() / v.norm())
    rounding = 1e-12 * float(sample.eigenvalues[-1]) / damping
    assert result.info.residual == pytest.approx(missing, rel=1e-6, abs=1e-12 + rounding)
    assert result.info.iterations == min(rank, len(v))
    expected = Status.DIVERGED if missing > 1 else Status.STOPPED_AT_CAP
    if abs(missing - 1) > 1e-6 and missing > 1e-10 + rounding:
        assert result.info.status is expected


def test_few_large_eigenvalues_need_few_products() -> None:
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.cat([torch.linspace(1.0, 5.0, 5, dtype=DOUBLE), torch.full((55,), 1e-6, dtype=DOUBLE)])
    H = spectrum_matrix(eigenvalues, generator)
    v = torch.randn(60, generator=generator, dtype=DOUBLE)
    exact = torch.linalg.solve(H + 0.01 * torch.eye(60, dtype=DOUBLE), v)
    q, result = status_of(H, Nystrom(rank=10), v)
    assert float((q - exact).norm() / exact.norm()) < 1e-3
    assert result.info.products == 11
    q, result = status_of(H, Nystrom(rank=3), v)  # two of the large ones are left out, and 500 times the damping
    assert result.info.status is Status.DIVERGED
    assert result.info.residual > 10


@forall(40, size=st.integers(2, 12), number=st.integers(0, 2**31), single=st.booleans())
def test_indefinite_hessians_are_reported(size: int, number: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.1 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[: size // 2 + 1] *= -1
    H = spectrum_matrix(eigenvalues, generator).to(torch.float32 if single else DOUBLE)
    v = torch.randn(size, generator=generator, dtype=DOUBLE).to(H)
    q, result = status_of(H, Nystrom(rank=size), v)
    assert result.info.status is Status.NEGATIVE_CURVATURE
    assert "eigenvalue of -" in result.info.message
    assert bool(torch.isfinite(q).all())


def test_other_failures_are_reported() -> None:
    v, zero = torch.ones(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    J = torch.eye(3, dtype=DOUBLE)
    J[0, 2] = 0.5
    result = hypergradient(
        lambda w, lam: Field.apply(w, J) - w @ lam, lambda w, lam: w @ v, zero, zero.clone(), Nystrom()
    )
    assert result.info.status is Status.NOT_SYMMETRIC
    result = hypergradient(
        lambda w, lam: (w - lam).square().sum() + w[:1].abs().sqrt().sum(),  # infinite second derivative at zero
        lambda w, lam: w.sum(),
        zero,
        zero.clone(),
        Nystrom(),
    )
    assert result.info.status is Status.DIVERGED
    q, result = status_of(torch.zeros(3, 3, dtype=DOUBLE), Nystrom(damping=0.5), v)
    torch.testing.assert_close(q, 2 * v)  # (0 + δI)⁻¹ v
    assert result.info.status is Status.CONVERGED


def test_gauss_newton_curvature_is_semi_definite_where_the_hessian_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(6, 4, generator=generator, dtype=DOUBLE)
    w, lam, v = (torch.randn(size, generator=generator, dtype=DOUBLE) for size in (4, 6, 4))

    def inner(w: Tensor, lam: Tensor) -> dict[str, Tensor]:
        outputs = torch.tanh(X @ w)
        return {"loss": (outputs - lam).square().sum() / 2, "outputs": outputs}

    statuses = {
        curvature: hypergradient(
            inner, lambda w, lam: w @ v, w, lam, Nystrom(rank=4, damping=1.0, curvature=curvature)
        ).info.status
        for curvature in ("hessian", "gauss_newton")
    }
    assert statuses["hessian"] is Status.NEGATIVE_CURVATURE
    assert not statuses["gauss_newton"].failed


def test_seeds_are_fixed_and_generators_left_alone() -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 3)
    torch.manual_seed(1)
    first = solve(sample, Nystrom(rank=3)).grad
    torch.manual_seed(2)
    assert torch.equal(solve(sample, Nystrom(rank=3)).grad, first)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rank", 0, "an integer of at least 1, not 0"),
        ("rank", 2.0, "an integer of at least 1, not 2.0"),
        ("damping", 0.0, "a finite number above 0, not 0.0"),
        ("damping", float("nan"), "a finite number above 0, not nan"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Nystrom.{field} must be {expected}")):
        Nystrom(**{field: value})  # type: ignore[arg-type]
