from __future__ import annotations

import re

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Status, Unrolled, hypergradient
from bilevel.errors import ConfigError, NonFiniteError
from tests.bilevel.strategies import quadratics, samples
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm


class TestUnrolled(EstimatorContract):
    default = Unrolled(steps=40, learning_rate=1.0)
    bfloat16_error = None  # forty rounded steps

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])
        rates = st.floats(0.05, 1.95).map(lambda share: share / largest)
        return st.builds(Unrolled, steps=st.integers(1, 20), learning_rate=rates)

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # From the solution the iterates stay there, and (I − ηH)ᴷ H⁻¹ v is what the derivative of K steps leaves out.
        assert isinstance(estimator, Unrolled)
        assert estimator.steps is not None
        assert estimator.learning_rate is not None
        rate = float((1 - estimator.learning_rate * sample.eigenvalues).abs().max())
        tail = rate**estimator.steps / float(sample.eigenvalues[0])
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * tail

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Unrolled)
        assert result.info.iterations == result.info.products == estimator.steps
        return 2 * result.info.iterations, 3 * result.info.iterations


def descend(sample: Sample, start: Tensor, steps: int, rate: float, lam: Tensor) -> Tensor:
    """Gradient steps that autograd sees through."""
    inner_loss, _ = sample.losses()
    w = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(inner_loss(w, lam), w, create_graph=True)
        w = w - rate * gradient
    return w


@forall(80, sample=samples(), steps=st.integers(1, 15), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_equals_autograd_through_the_loop(sample: Sample, steps: int, share: float, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    rate = share / float(sample.eigenvalues[-1])
    start = sample.inner + torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    lam = sample.outer.clone().requires_grad_()
    inner_loss, outer_loss = sample.losses()
    end = descend(sample, start, steps, rate, lam)
    (expected,) = torch.autograd.grad(outer_loss(end, lam), lam)
    result = hypergradient(inner_loss, outer_loss, start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
    torch.testing.assert_close(result.inner, end.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=1e-11 * (1 + float(expected.norm())))


@forall(60, sample=quadratics(), steps=st.integers(1, 30), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_equals_the_closed_form_sum(sample: Sample, steps: int, share: float, number: int) -> None:
    # w_K = (I − ηH)ᴷ w₀ + η Σ_{k<K} (I − ηH)ᵏ (Cλ + b)
    generator = torch.Generator().manual_seed(number)
    rate = share / float(sample.eigenvalues[-1])
    start = torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    identity = torch.eye(len(start), dtype=DOUBLE)
    M = identity - rate * sample.hessian
    total = sum((torch.linalg.matrix_power(M, k) for k in range(steps)), torch.zeros_like(M)) * rate
    end = torch.linalg.matrix_power(M, steps) @ start + total @ (sample.data["C"] @ sample.outer + sample.data["b"])
    v = sample.data["A"].T @ (sample.data["A"] @ end - sample.data["t"])
    expected = sample.direct - sample.mixed.T @ (total @ v)
    result = hypergradient(*sample.losses(), start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.norm())))


@forall(15, sample=samples(max_condition=10.0), number=st.integers(0, 2**31))
def test_tends_to_the_implicit_derivative_at_the_contraction_rate(sample: Sample, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    smallest, largest = float(sample.eigenvalues[0]), float(sample.eigenvalues[-1])
    if largest > 50 * smallest:
        return  # too many steps for a test
    start = sample.inner + 0.1 * torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    rate, contraction = 2 / (smallest + largest), (largest - smallest) / (largest + smallest)
    exact = sample.hypergradient()
    size = 1 + float(exact.norm()) + sample.scale()
    for steps in (5, 20, 50):
        result = hypergradient(*sample.losses(), start, sample.outer, Unrolled(steps=steps, learning_rate=rate))
        # The factor K comes from the drift of the iterates, which changes the mixed derivative of the ridge problems.
        error = float((result.grad - exact).norm()) / size
        assert error <= 50 * (1 + steps) * contraction**steps * (1 + largest / smallest) + 1e-10


def test_an_independent_optimiser_makes_the_same_steps() -> None:
    start = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    lam = torch.tensor([0.5, 1.5], dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return ((w - lam) ** 4).sum() / 4 + (w * lam).sin().sum()

    w = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        inner(w, lam).backward()
        optimizer.step()
    result = hypergradient(inner, lambda w, lam: w.sum(), start, lam, Unrolled(steps=7, learning_rate=0.05))
    torch.testing.assert_close(result.inner, w.detach(), rtol=1e-14, atol=0)


def test_steps_that_diverge_name_the_learning_rate() -> None:
    # The overflow was blamed on the outer loss.
    with pytest.raises(NonFiniteError, match=r"500 gradient steps .*inner problem.*lower learning_rate.*\(3\)"):
        hypergradient(
            lambda w, lam: ((w - lam) ** 2).sum() * 10,
            lambda w, lam: w.sum(),
            torch.ones(2),
            torch.zeros(2),
            Unrolled(steps=500, learning_rate=3.0),
        )


def test_needs_its_fields_as_a_function() -> None:
    for estimator in (Unrolled(), Unrolled(steps=3), Unrolled(learning_rate=0.1)):
        with pytest.raises(
            ConfigError, match=r"needs steps and learning_rate.*Unrolled\(steps=10, learning_rate=0\.1\)"
        ):
            hypergradient(
                lambda w, lam: ((w - lam) ** 2).sum(), lambda w, lam: w.sum(), torch.ones(2), torch.ones(2), estimator
            )


def test_status_says_that_nothing_was_solved() -> None:
    result = hypergradient(
        lambda w, lam: ((w - lam) ** 2).sum(),
        lambda w, lam: w.sum(),
        torch.ones(2),
        torch.ones(2),
        Unrolled(steps=2, learning_rate=0.1),
    )
    assert result.info.status is Status.NOT_APPLICABLE
    assert torch.tensor(result.info.residual).isnan()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 0, "an integer of at least 1, not 0"),
        ("learning_rate", 0.0, "a finite number above 0, not 0.0"),
        ("learning_rate", -0.1, "a finite number above 0, not -0.1"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Unrolled.{field} must be {expected}")):
        Unrolled(**{field: value})  # type: ignore[arg-type]
