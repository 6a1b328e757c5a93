from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Exact, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from tests.bilevel.strategies import EPSILON, logarithmic, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of


class TestExact(EstimatorContract):
    default = Exact()

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(Exact, damping=st.just(0.0) | logarithmic(1e-6, 10.0))

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Exact)
        smallest, damping = float(sample.eigenvalues[0]), estimator.damping
        shift = damping / (smallest * (smallest + damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * shift

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert result.info.products == result.info.iterations + 1
        return 1, 2 + result.info.iterations


@forall(150, sample=samples())
def test_equals_the_derivative_of_the_closed_form_solution(sample: Sample) -> None:
    # Independent of the implicit function theorem: autograd through the solution itself.
    lam = sample.outer.clone().requires_grad_()
    _, outer_loss = sample.losses()
    (expected,) = torch.autograd.grad(outer_loss(sample.solution(lam), lam), lam)
    assert float((solve(sample, Exact()).grad - expected).norm()) <= 10 * sample.rounding()


@forall(100, sample=samples(), damping=logarithmic(1e-6, 1e3))
def test_damping_adds_a_multiple_of_the_identity(sample: Sample, damping: float) -> None:
    result = solve(sample, Exact(damping=damping))
    assert float((result.grad - sample.hypergradient(damping=damping)).norm()) <= sample.rounding(damping)
    # ‖Hq − v‖ / ‖v‖ is at most about ε κ for a solve that is backward stable.
    condition = float((sample.eigenvalues[-1] + damping) / (sample.eigenvalues[0] + damping))
    assert result.info.residual <= max(1e4, condition) * EPSILON
    assert result.info.status is Status.CONVERGED


@forall(60, sample=samples())
def test_residual_is_at_rounding(sample: Sample) -> None:
    result = solve(sample, Exact())
    assert result.info.residual <= 1e3 * EPSILON * float(sample.eigenvalues[-1] / sample.eigenvalues[0]) ** 0.5
    assert result.info.iterations == len(sample.inner)


@forall(60, size=st.integers(1, 8), number=st.integers(0, 2**31))
def test_transposed_products_are_right_for_a_jacobian_that_is_not_symmetric(size: int, number: int) -> None:
    # The response of the zero of a field g is −J⁻¹ ∂g/∂λ, whatever J's symmetry.
    generator = torch.Generator().manual_seed(number)
    H = spectrum_matrix(torch.linspace(1.0, 2.0, size, dtype=DOUBLE), generator)
    N = 0.3 * torch.randn(size, size, generator=generator, dtype=DOUBLE)
    C = torch.randn(size, 3, generator=generator, dtype=DOUBLE)
    v, lam = torch.randn(size, generator=generator, dtype=DOUBLE), torch.randn(3, generator=generator, dtype=DOUBLE)
    J = H + N
    w = torch.linalg.solve(J, C @ lam)
    result = hypergradient(
        lambda w, lam: w @ H @ w / 2 + Field.apply(w, N) - w @ (C @ lam), lambda w, lam: w @ v, w, lam, Exact()
    )
    expected = C.T @ torch.linalg.solve(J.T, v)
    torch.testing.assert_close(result.grad, expected, rtol=1e-8, atol=1e-8)
    asymmetry = float((J - J.T).abs().max() / J.abs().max())
    assert ("not symmetric" in result.info.message) == (asymmetry > 1e-12)


def test_status_of_indefinite_and_singular_hessians() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, generator=generator, dtype=DOUBLE)
    H = spectrum_matrix(torch.tensor([-1.0, 0.5, 1.0, 2.0], dtype=DOUBLE), generator)
    q, result = status_of(H, Exact(), v)
    assert result.info.status is Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(q, torch.linalg.solve(H, v))
    H = spectrum_matrix(torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=DOUBLE), generator)
    q, result = status_of(H, Exact(), v)
    assert result.info.status is Status.SINGULAR
    torch.testing.assert_close(q, torch.linalg.pinv(H, rtol=1e-12) @ v)
    assert "damping" in result.info.explain()
    _, result = status_of(torch.zeros(4, 4, dtype=DOUBLE), Exact(), v)
    assert result.info.status is Status.SINGULAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_low_precision_is_not_taken_for_asymmetry(dtype: torch.dtype) -> None:
    # The tolerance came from the promoted cotangent's dtype, and bfloat16 Hessians passed for asymmetric ones.
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(30, 6, generator=generator).to(dtype)
    w, lam = torch.randn(6, generator=generator).to(dtype), torch.zeros(6, dtype=dtype)

    def inner(w: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(X @ w).mean() + (lam.exp() * w.square()).sum()

    result = hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, Exact())
    assert result.info.message == ""
    assert result.info.status is Status.CONVERGED
    assert not hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, "cg").info.status.failed


def test_too_many_variables_are_refused_before_any_product() -> None:
    with mock.patch("bilevel.linear.dense.LARGEST_DIMENSION", 10), pytest.raises(ConfigError) as caught:
        status_of(torch.eye(11, dtype=DOUBLE), Exact(), torch.ones(11, dtype=DOUBLE))
    assert re.search(r"11 inner variables .*limit 10.*Use 'conjugate_gradient'", str(caught.value))


def test_damping_is_validated() -> None:
    with pytest.raises(ConfigError, match=r"Exact\.damping must be a finite number at least 0, not -1"):
        Exact(damping=-1)
