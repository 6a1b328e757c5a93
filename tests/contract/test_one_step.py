from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Identity, Status, Unrolled, hypergradient
from bilevel.errors import ConfigError, LossError, NonFiniteError, UnknownNameError
from bilevel.hypergrad.mixed_product import forward_length
from bilevel.hypergrad.one_step import OneStep
from bilevel.products import difference_length
from tests.bilevel.strategies import EPSILON, logarithmic, quadratics, samples
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm
from tests.contract.test_finite_difference import attention_losses, cubic

PASSES = {
    ("old", "exact"): (2, 3),
    ("old", "graph"): (1, 2),
    ("old", "central"): (3, 3),
    ("old", "forward"): (2, 2),
    ("new", "exact"): (1, 2),
    ("new", "central"): (2, 2),
}
"""As a function: the step itself, where one is made, and the product."""


def difference_error(sample: Sample, size: float, difference: str, epsilon: float | str) -> float:
    """A bound of the error of a difference along a direction of this length, with rounding."""
    if difference == "exact":
        return 0.0
    forward = difference == "forward"
    length = forward_length(epsilon, (sample.inner,)) if forward else difference_length(epsilon, (sample.inner,))
    rounding = 100 * EPSILON * size / length * (1 + operator_norm(sample.mixed))
    rounding *= (1 + float(sample.inner.norm()) + length) ** 2 * (1 + float(sample.outer.exp().max()))
    if not forward or sample.kind == "quadratic":
        return rounding  # ∂f/∂λ is at most quadratic in w: central differences are exact
    # ∂f/∂λ = ½ Sᵀ (e ∘ w²) with e = exp(Sλ): a second derivative of at most ‖S‖ max e along any unit vector
    S = sample.data["S"]
    return rounding + size * length / 2 * operator_norm(S) * float((S @ sample.outer).exp().max())


class TestOneStep(EstimatorContract):
    default: OneStep = OneStep(learning_rate=1.0)
    differences = (("old", "exact"), ("old", "graph"), ("new", "exact"))

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(share: float, way: tuple[str, str], epsilon: float | str) -> Estimator:
            center, difference = way
            if difference == "graph":
                return OneStep(share / largest, memory="graph")
            epsilon = "auto" if difference == "exact" else epsilon
            return OneStep(share / largest, center=center, difference=difference, epsilon=epsilon)

        epsilons = st.just("auto") | logarithmic(1e-4, 1.0)
        return st.builds(build, st.floats(0.05, 1.95), st.sampled_from(self.differences), epsilons)

    def stays(self, estimator: Estimator) -> bool:
        assert isinstance(estimator, OneStep)
        return estimator.center == "new"

    def target(self, sample: Sample) -> Tensor:
        assert self.default.learning_rate is not None
        return sample.direct - self.default.learning_rate * sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # η for H⁻¹, and the difference.
        assert isinstance(estimator, OneStep)
        assert estimator.learning_rate is not None
        mixed, size = operator_norm(sample.mixed), float(sample.cotangent.norm())
        distance = float((estimator.learning_rate - 1 / sample.eigenvalues).abs().max())
        direction = estimator.learning_rate * size
        return mixed * size * distance + difference_error(sample, direction, estimator.difference, estimator.epsilon)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, OneStep)
        assert result.info.iterations == 1
        assert result.info.products == {"exact": 1, "central": 2, "forward": 1}[estimator.difference]
        return PASSES[estimator.center, "graph" if estimator.memory == "graph" else estimator.difference]


class TestOneStepByDifferences(TestOneStep):
    default = OneStep(learning_rate=1.0, difference="central", center="new")
    differences = (("old", "central"), ("new", "central"), ("old", "forward"))
    roundoff = 1e-5
    float32_error = 1e-3


def away(sample: Sample, number: int) -> Tensor:
    """A point off the solution."""
    generator = torch.Generator().manual_seed(number)
    return sample.inner + torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)


@forall(80, sample=samples(), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_is_one_unrolled_step(sample: Sample, share: float, number: int) -> None:
    rate, start = share / float(sample.eigenvalues[-1]), away(sample, number)
    arguments = (*sample.losses(), start, sample.outer)
    found = hypergradient(*arguments, OneStep(rate))
    expected = hypergradient(*arguments, Unrolled(steps=1, learning_rate=rate))
    assert torch.equal(found.inner, expected.inner)
    assert found.value == expected.value
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-13 * (1 + float(expected.grad.norm())))


@forall(60, sample=quadratics(), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31))
def test_is_the_darts_formula_with_the_inner_learning_rate(sample: Sample, share: float, number: int) -> None:
    # w⁺ = w − η (Hw − Cλ − b), and the implicit part η Cᵀ v with v = ∂F/∂w(w⁺) (old) or ∂F/∂w(w) (new)
    d, rate, start = sample.data, share / float(sample.eigenvalues[-1]), away(sample, number)
    for center in ("old", "new"):
        step = rate * (d["H"] @ start - d["C"] @ sample.outer - d["b"]) if center == "old" else 0.0
        v = d["A"].T @ (d["A"] @ (start - step) - d["t"])
        expected = sample.direct + rate * d["C"].T @ v
        for difference in ("exact", "central", "forward"):
            if (center, difference) in PASSES:
                estimator = OneStep(rate, center=center, difference=difference)
                found = hypergradient(*sample.losses(), start, sample.outer, estimator).grad
                size = 1 + float(expected.norm()) + rate * operator_norm(d["C"]) * float(v.norm())
                # differences: rounding of ∂f/∂λ, at most u ‖w‖ ‖C‖ here, over ε, which is of the order of √‖w‖
                rounding = {"exact": 1e-12, "central": 1e-8, "forward": 1e-5}[difference]
                assert float((found - expected).norm()) <= rounding * size * math.sqrt(1 + float(start.norm()))


def test_the_new_point_is_where_the_step_ended() -> None:
    # f = λ w³/3: ∂²f/∂w∂λ = w²
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam * w**3).sum() / 3

    w, lam = torch.tensor([2.0], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)
    old = hypergradient(inner, lambda w, lam: w.sum(), w, lam, OneStep(0.1))
    assert float(old.inner) == pytest.approx(2.0 - 0.1 * 0.5 * 4.0)
    assert float(old.grad) == pytest.approx(-0.1 * 4.0)
    new = hypergradient(inner, lambda w, lam: w.sum(), old.inner, lam, OneStep(0.1, center="new"))
    assert float(new.grad) == pytest.approx(-0.1 * 1.8**2)


@forall(120, number=st.integers(0, 2**31), size=st.integers(1, 8), epsilon=logarithmic(1e-4, 1.0))
def test_errors_of_differences_are_the_second_and_third_derivative_terms(
    number: int, size: int, epsilon: float
) -> None:
    # f = Σ λᵢ (wᵢ³/6 + wᵢ²/2): along q with u = q/‖q‖ the central difference of ∂f/∂λᵢ is off by ‖q‖ ε² uᵢ³/6, the
    # forward one by ‖q‖ ε uᵢ² (wᵢ + 1)/2 as well; M₃ = 1, M₂ = max |wᵢ + 1|.
    w, lam, v, _ = cubic(number, size)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam * (w**3 / 6 + w.square() / 2)).sum()

    def run(estimator: Estimator) -> Tensor:
        result = hypergradient(inner, lambda w, lam: w @ v, w, lam, estimator)
        assert isinstance(result.grad, Tensor)
        return result.grad

    rate = 0.3
    q = -rate * v
    u, length = q / q.norm(), float(q.norm())
    rounding = 50 * EPSILON * length / epsilon * (1 + float(w.norm()) + epsilon) ** 3
    exact = run(OneStep(rate))
    third = length * epsilon**2 * u**3 / 6
    for center in ("old", "new"):
        central = run(OneStep(rate, center=center, difference="central", epsilon=epsilon))
        torch.testing.assert_close(central - exact, third, rtol=0, atol=rounding)
        assert float((central - exact).norm()) <= length * epsilon**2 / 6 + rounding
    forward = run(OneStep(rate, difference="forward", epsilon=epsilon))
    torch.testing.assert_close(forward - exact, length * epsilon * u**2 * (w + 1) / 2 + third, rtol=0, atol=rounding)
    largest = float((w + 1).abs().max()) + epsilon  # of the second derivative, on the way
    assert float((forward - exact).norm()) <= length * epsilon * largest / 2 + rounding


@pytest.mark.parametrize(("difference", "order"), [("central", 2.0), ("forward", 1.0)])
def test_errors_fall_with_their_power_of_epsilon(difference: str, order: float) -> None:
    w, lam, v, _ = cubic(0, 6)

    def error(epsilon: float) -> float:
        arguments = (lambda w, lam: (lam * w.sin()).sum() + (lam * w**4).sum(), lambda w, lam: w @ v, w, lam)
        found = hypergradient(*arguments, OneStep(0.2, difference=difference, epsilon=epsilon)).grad
        return float((found - hypergradient(*arguments, OneStep(0.2)).grad).norm())

    for epsilon in (0.05, 0.0125, 0.003):
        assert math.log2(error(epsilon) / error(epsilon / 2)) == pytest.approx(order, abs=0.1)


def test_forward_differences_reuse_the_gradient_of_the_step() -> None:
    seen: list[Tensor] = []

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        seen.append(w.detach().clone())
        return (w * lam).square().sum() / 2

    w, v = torch.ones(4, dtype=DOUBLE), torch.tensor([3.0, 0.0, -4.0, 0.0], dtype=DOUBLE)
    estimator = OneStep(0.1, difference="forward", epsilon=0.25)
    result = hypergradient(inner, lambda w, lam: w @ v, w, torch.ones(4, dtype=DOUBLE), estimator)
    assert len(seen) == 2
    assert torch.equal(seen[0], w)
    torch.testing.assert_close(seen[1] - w, -0.25 * v / 5)
    assert "epsilon 0.25" in result.info.message


def test_automatic_epsilon_balances_truncation_and_rounding() -> None:
    # An ε ten times smaller or larger is worse by rounding or by truncation.
    w, lam, v, _ = cubic(3, 200)
    for dtype in (DOUBLE, torch.float32):

        def run(estimator: Estimator, kind: torch.dtype) -> Tensor:
            result = hypergradient(
                lambda w, lam: (lam * w.sin()).sum(), lambda w, lam: w @ v.to(kind), w.to(kind), lam.to(kind), estimator
            )
            return result.grad.to(DOUBLE)

        exact = run(OneStep(0.5), DOUBLE)
        for difference in ("central", "forward"):
            rate = OneStep(0.5, difference=difference)
            length = forward_length("auto", (w.to(dtype),)) if difference == "forward" else None
            length = length or difference_length("auto", (w.to(dtype),))
            errors = [
                float((run(estimator, dtype) - exact).norm() / exact.norm())
                for estimator in (
                    rate,
                    OneStep(0.5, difference=difference, epsilon=length / 100),
                    OneStep(0.5, difference=difference, epsilon=length * 100),
                )
            ]
            assert errors[0] < min(errors[1:])


@pytest.mark.parametrize(("center", "difference"), [("old", "central"), ("old", "forward"), ("new", "central")])
def test_differences_need_no_double_backward(center: str, difference: str) -> None:
    inner, outer, w, lam = attention_losses()
    estimator = OneStep(0.1, center=center, difference=difference)
    found = hypergradient(inner, outer, w, lam, estimator)  # type: ignore[arg-type]
    assert found.info.status is Status.NOT_APPLICABLE
    assert float((found.grad - found.direct).norm()) > 0
    with pytest.raises(LossError, match=r"cannot be differentiated twice.*'finite_difference'"):
        hypergradient(inner, outer, w, lam, OneStep(0.1, center=center))  # type: ignore[arg-type]


def test_the_identity_is_one_step_with_learning_rate_one() -> None:
    w, lam, v, _ = cubic(1, 5)
    arguments = (lambda w, lam: (lam * w.cos()).sum(), lambda w, lam: w @ v + lam.sum(), w, lam)
    one = hypergradient(*arguments, OneStep(1.0, center="new")).grad
    torch.testing.assert_close(one, hypergradient(*arguments, Identity()).grad, rtol=1e-15, atol=0)


def test_a_displacement_that_rounding_swallows_is_reported() -> None:
    w = torch.linspace(0.5, 2.0, 20)
    for difference, epsilon in (("central", 1e-9), ("forward", 1e-9)):
        estimator = OneStep(0.1, difference=difference, epsilon=epsilon)
        info = hypergradient(
            lambda w, lam: (lam * w**2).sum(), lambda w, lam: w.sum(), w, torch.ones(20), estimator
        ).info
        assert info.status is Status.INACCURATE
        assert "raise epsilon" in info.explain()


def test_a_step_that_overflows_names_the_learning_rate() -> None:
    with pytest.raises(NonFiniteError, match=r"one step .*inner problem.*lower learning_rate"):
        hypergradient(
            lambda w, lam: ((w - lam) ** 2).sum(), lambda w, lam: w.sum(), torch.ones(2), torch.zeros(2), OneStep(3e38)
        )


def test_needs_a_learning_rate_as_a_function() -> None:
    for estimator in (OneStep(), OneStep(center="new")):
        with pytest.raises(ConfigError, match=r"needs learning_rate.*OneStep\(learning_rate=0\.1\).*engine"):
            hypergradient(
                lambda w, lam: ((w - lam) ** 2).sum(), lambda w, lam: w.sum(), torch.ones(2), torch.ones(2), estimator
            )


def test_says_what_its_fields_need() -> None:
    assert OneStep().needs_trajectory
    assert OneStep(0.1).needs_trajectory
    assert OneStep(center="new").needs_trajectory  # for the optimiser's learning rates
    assert not OneStep(0.1, center="new").needs_trajectory
    assert OneStep().needs_double_backward
    assert not OneStep(difference="central").needs_double_backward
    assert OneStep(difference="forward").needs_outer_gradient
    assert not OneStep(difference="central").needs_outer_gradient
    assert OneStep().recorded_steps == 1


@pytest.mark.parametrize("difference", ["exact", "central"])
def test_a_rate_of_zero_leaves_the_direct_derivative(difference: str) -> None:
    lam = torch.tensor([3.0, -1.0])
    losses = (lambda w, l: ((w - l) ** 2).sum()), (lambda w, l: (w**2 * l).sum())  # noqa: E741
    method = OneStep(0.0, difference=difference, center="new")
    result = hypergradient(*losses, torch.tensor([2.0, 1.0]), lam, method)
    assert torch.equal(result.grad, torch.tensor([4.0, 1.0]))


@pytest.mark.parametrize(
    ("fields", "error", "expected"),
    [
        ({"learning_rate": -0.1}, ConfigError, "OneStep.learning_rate must be a finite number at least 0, not -0.1"),
        ({"learning_rate": math.nan}, ConfigError, "OneStep.learning_rate must be a finite number"),
        ({"center": "middle"}, UnknownNameError, "value of OneStep.center"),
        ({"difference": "backward"}, UnknownNameError, "value of OneStep.difference"),
        ({"difference": "central", "epsilon": 0.0}, ConfigError, "OneStep.epsilon must be a finite number above 0"),
        ({"epsilon": 0.1}, ConfigError, "OneStep.epsilon belongs to difference='central' or 'forward'"),
        ({"memory": "disk"}, UnknownNameError, "value of OneStep.memory"),
        ({"memory": "graph", "center": "new"}, ConfigError, "memory='graph' keeps the graph of the step's own"),
        ({"memory": "graph", "difference": "central"}, ConfigError, "set both, or leave memory out"),
        ({"difference": "forward", "center": "new"}, ConfigError, "use difference='central', which costs no more"),
    ],
)
def test_fields_are_validated(fields: dict[str, object], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=re.escape(expected)):
        OneStep(**fields)  # type: ignore[arg-type]
