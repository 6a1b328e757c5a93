from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import Estimator, FiniteDifference, Hypergradient, Identity, Status, hypergradient
from bilevel.errors import ConfigError, LossError
from bilevel.products import difference_length
from tests.bilevel.strategies import EPSILON, logarithmic
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm


class TestFiniteDifference(EstimatorContract):
    default = FiniteDifference()
    roundoff = 1e-6
    float32_error = 1e-3

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(FiniteDifference, epsilon=st.just("auto") | logarithmic(1e-4, 1.0))

    def target(self, sample: Sample) -> Tensor:
        return sample.direct - sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # ∂f/∂λ is at most quadratic in w for these samples: central differences are exact but for rounding.
        assert isinstance(estimator, FiniteDifference)
        epsilon = difference_length(estimator.epsilon, (sample.inner,))
        mixed, size = operator_norm(sample.mixed), float(sample.cotangent.norm())
        distance = float((1 - 1 / sample.eigenvalues).abs().max())
        rounding = 100 * EPSILON * size / epsilon * (1 + mixed) * (1 + float(sample.inner.norm()) + epsilon) ** 2
        return mixed * size * distance + rounding * (1 + float(sample.outer.exp().max()))

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert result.info.products == 2
        return 2, 2


def cubic(number: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randn(size, generator=generator, dtype=DOUBLE) for _ in range(4))  # type: ignore[return-value]


@forall(120, number=st.integers(0, 2**31), size=st.integers(1, 8), epsilon=logarithmic(1e-4, 1.0))
def test_error_is_the_third_derivative_term(number: int, size: int, epsilon: float) -> None:
    # f = Σ λᵢ (wᵢ³/6 + wᵢ²/2): ∂f/∂λᵢ has the third derivative 1 along wᵢ, so that with u = v/‖v‖ the difference
    # quotient is vᵢ (wᵢ²/2 + wᵢ) + ‖v‖ ε² uᵢ³ / 6, exactly.
    w, lam, v, _ = cubic(number, size)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam * (w**3 / 6 + w.square() / 2)).sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return w @ v

    found = hypergradient(inner, outer, w, lam, FiniteDifference(epsilon=epsilon)).grad
    unit = v / v.norm()
    term = v.norm() * epsilon**2 * unit**3 / 6
    exact = hypergradient(inner, outer, w, lam, Identity()).grad
    rounding = 50 * EPSILON * float(v.norm()) / epsilon * (1 + float(w.norm()) + epsilon) ** 3
    torch.testing.assert_close(found - exact, -term, rtol=0, atol=rounding)
    assert float((found - exact).norm()) <= epsilon**2 / 6 * float(v.norm()) + rounding  # M = 1 here


def test_error_falls_with_the_square_of_epsilon() -> None:
    w, lam, v, _ = cubic(0, 6)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam * w.sin()).sum() + (lam * w**4).sum()

    def error(epsilon: float) -> float:
        arguments = (inner, lambda w, lam: w @ v, w, lam)
        difference = hypergradient(*arguments, FiniteDifference(epsilon=epsilon)).grad
        return float((difference - hypergradient(*arguments, Identity()).grad).norm())

    for epsilon in (0.2, 0.05, 0.0125):
        order = math.log2(error(epsilon) / error(epsilon / 2))
        assert order == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_automatic_epsilon_suits_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(8, 8, generator=generator, dtype=DOUBLE) / 3 for _ in range(2)]
    X, y = torch.randn(20, 8, generator=generator, dtype=DOUBLE), torch.randint(0, 8, (20,), generator=generator)
    lam = torch.zeros(20, dtype=DOUBLE)

    def run(dtype: torch.dtype, method: Estimator) -> Tensor:
        def inner(w: list[Tensor], lam: Tensor) -> Tensor:
            return (lam.exp() * F.cross_entropy((X.to(dtype) @ w[0]).tanh() @ w[1], y, reduction="none")).mean()

        def outer(w: list[Tensor], lam: Tensor) -> Tensor:
            return F.cross_entropy((X.to(dtype) @ w[0]).tanh() @ w[1], y.flip(0))

        return hypergradient(inner, outer, [part.to(dtype) for part in layers], lam.to(dtype), method).grad.to(DOUBLE)

    exact = run(DOUBLE, Identity())
    assert float((run(dtype, FiniteDifference()) - exact).norm() / exact.norm()) < tolerance


def test_epsilon_is_the_length_of_the_displacement() -> None:
    seen: list[Tensor] = []

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        seen.append(w.detach().clone())
        return (w * lam).square().sum()

    w, v = torch.ones(4, dtype=DOUBLE), torch.tensor([30.0, 0.0, -40.0, 0.0], dtype=DOUBLE)
    result = hypergradient(inner, lambda w, lam: w @ v, w, torch.ones(4, dtype=DOUBLE), FiniteDifference(epsilon=0.25))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0] - w, 0.25 * v / 50)
    torch.testing.assert_close(seen[1] - w, -0.25 * v / 50)
    assert "epsilon 0.25" in result.info.message
    assert "norm of direction 50" in result.info.message


def test_a_displacement_that_rounding_swallows_is_reported() -> None:
    # The difference was zero, and so was the answer, without a word.
    def run(epsilon: float | str, dtype: torch.dtype) -> Hypergradient:
        w = torch.linspace(0.5, 2.0, 20, dtype=dtype)
        return hypergradient(
            lambda w, lam: (lam * w.square()).sum(),
            lambda w, lam: w.sum(),
            w,
            torch.ones(20, dtype=dtype),
            FiniteDifference(epsilon=epsilon),
        )

    for epsilon, dtype in ((1e-9, torch.float32), (1e-3, torch.bfloat16)):
        info = run(epsilon, dtype).info
        assert info.status is Status.INACCURATE
        assert "raise epsilon" in info.explain()
    for dtype in (DOUBLE, torch.float32, torch.bfloat16):
        assert run("auto", dtype).info.status is Status.NOT_APPLICABLE


def attention_losses() -> tuple[object, object, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 8, 4, generator=generator)

    def attend(w: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x @ w, x, x)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return ((attend(w) * lam.exp()).square()).mean() + w.square().mean()

    return inner, lambda w, lam: attend(w).mean(), torch.eye(4), torch.zeros(8, 4)


@pytest.mark.parametrize(
    "method", ["identity", "neumann", "cg", "exact", {"method": "unrolled", "steps": 2, "learning_rate": 0.1}]
)
def test_attention_without_double_backward_names_the_way_out(method: object) -> None:
    with pytest.raises(LossError, match=r"cannot be differentiated twice.*'finite_difference'.*SDPBackend\.MATH"):
        hypergradient(*attention_losses(), method)  # type: ignore[arg-type]


def test_works_with_attention_that_has_no_double_backward() -> None:
    inner, outer, w, lam = attention_losses()
    found = hypergradient(inner, outer, w, lam, "finite_difference").grad  # type: ignore[arg-type]
    x = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))

    def attend(w: Tensor) -> Tensor:
        scores = (x @ w) @ x.mT / 2.0
        return scores.softmax(-1) @ x

    expected = hypergradient(
        lambda w, lam: ((attend(w) * lam.exp()).square()).mean() + w.square().mean(),
        lambda w, lam: attend(w).mean(),
        w,
        lam,
        "identity",
    ).grad
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_a_forward_difference_needs_the_point_whose_gradient_is_known() -> None:
    with pytest.raises(ConfigError, match=r"difference='forward' reuses.*center='old'.*use difference='central'"):
        FiniteDifference(difference="forward")
    with pytest.raises(ConfigError, match=r"FiniteDifference\.difference 'exact'\. Choices: 'central', 'forward'"):
        FiniteDifference(difference="exact")
    with pytest.raises(ConfigError, match=r"unknown value of FiniteDifference\.center 'there'"):
        FiniteDifference(center="there")


@pytest.mark.parametrize("epsilon", [0.0, -1.0, "small", float("inf"), True])
def test_epsilon_is_validated(epsilon: object) -> None:
    expected = re.escape(f"FiniteDifference.epsilon must be a finite number above 0 or 'auto', not {epsilon!r}")
    with pytest.raises(ConfigError, match=expected):
        FiniteDifference(epsilon=epsilon)  # type: ignore[arg-type]
