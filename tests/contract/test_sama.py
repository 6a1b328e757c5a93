from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Status, Unrolled, hypergradient
from bilevel.errors import ConfigError, LossError, UnknownNameError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem, InnerStep
from bilevel.hypergrad.one_step import OneStep
from bilevel.hypergrad.sama import SAMA
from bilevel.optim import update_of
from bilevel.randomness import Replay
from tests.bilevel.strategies import logarithmic, make_quadratic, samples
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm
from tests.contract.test_finite_difference import attention_losses
from tests.contract.test_one_step import PASSES, away, difference_error

# ∂u/∂g of the first step over the learning rate, where it does not depend on the gradient.
CONSTANT = {"sgd": 1.0, "momentum": 1.0, "nesterov": 1.9}


class TestSAMA(EstimatorContract):
    default: SAMA = SAMA(optimizer="sgd", learning_rate=1.0)
    roundoff = 1e-5
    float32_error = 1e-3

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        # At the solution the gradient is rounding, of which the adaptive optimisers' derivatives would be functions:
        # they are tested elsewhere.
        largest = float(sample.eigenvalues[-1])

        def build(share: float, way: tuple[str, str], epsilon: float | str, optimizer: str) -> Estimator:
            center, difference = way
            return SAMA(
                center=center,
                difference=difference,
                epsilon="auto" if difference == "exact" else epsilon,
                optimizer=optimizer,
                learning_rate=share / largest,
            )

        epsilons = st.just("auto") | logarithmic(1e-4, 1.0)
        ways = st.sampled_from([way for way in PASSES if way[1] != "graph"])
        optimizers = st.sampled_from(list(CONSTANT))
        return st.builds(build, st.floats(0.05, 1.95), ways, epsilons, optimizers)

    def stays(self, estimator: Estimator) -> bool:
        assert isinstance(estimator, SAMA)
        return estimator.center == "new"

    def target(self, sample: Sample) -> Tensor:
        return sample.direct - sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, SAMA)
        assert estimator.optimizer is not None
        assert estimator.learning_rate is not None
        factor = CONSTANT[estimator.optimizer] * estimator.learning_rate
        mixed, size = operator_norm(sample.mixed), float(sample.cotangent.norm())
        distance = float((factor - 1 / sample.eigenvalues).abs().max())
        return mixed * size * distance + difference_error(
            sample, factor * size, estimator.difference, estimator.epsilon
        )

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, SAMA)
        assert result.info.products == {"exact": 1, "central": 2, "forward": 1}[estimator.difference]
        forward, backward = PASSES[estimator.center, estimator.difference]
        return (forward, backward) if estimator.center == "old" else (forward + 1, backward + 1)  # for the gradient


# First steps, written from the optimisers' papers with torch's defaults; the gradient is differentiable.
FIRST_STEPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sgd": lambda w, g, rate: w - rate * g,
    "momentum": lambda w, g, rate: w - rate * g,
    "nesterov": lambda w, g, rate: w - rate * (g + 0.9 * g),
    "rmsprop": lambda w, g, rate: w - rate * g / ((0.01 * g**2).sqrt() + 1e-8),
    # m̂ = g and v̂ = g² with bias correction
    "adam": lambda w, g, rate: w - rate * g / ((g**2).sqrt() + 1e-8),
    "adamw": lambda w, g, rate: w * (1 - rate * 0.01) - rate * g / ((g**2).sqrt() + 1e-8),
}


def quartic(w: Tensor, lam: Tensor) -> Tensor:
    """An inner loss whose mixed derivative depends on w."""
    return ((w - lam) ** 4).sum() / 4 + (w * lam).sin().sum()


@pytest.mark.parametrize("optimizer", FIRST_STEPS)
@pytest.mark.parametrize("difference", ["exact", "central", "forward"])
def test_is_autograd_through_the_optimisers_step(optimizer: str, difference: str) -> None:
    # Gradients near ε = 10⁻⁸, where the adaptive optimisers' derivatives are neither 0 nor 1/ε.
    w, x = torch.linspace(0.5, 2.0, 5, dtype=DOUBLE), torch.linspace(-0.7, 1.2, 5, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return quartic(w, lam) * 1e-8

    lam = x.clone().requires_grad_()
    place = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(inner(place, lam), place, create_graph=True)
    end = FIRST_STEPS[optimizer](w, g, 1e-3)

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (w * torch.arange(1.0, 6.0, dtype=DOUBLE)).sum() + 0 * lam.sum()

    (expected,) = torch.autograd.grad(outer(end, lam), lam)
    estimator = SAMA(center="old", difference=difference, optimizer=optimizer, learning_rate=1e-3)
    found = hypergradient(inner, outer, w, x, estimator)
    torch.testing.assert_close(found.inner, end.detach(), rtol=1e-12, atol=0)
    assert float(found.direct.norm()) == 0  # it would drown the implicit part
    rounding = {"exact": 1e-11, "central": 1e-8, "forward": 1e-6}[difference]
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found.grad, expected, rtol=rounding, atol=rounding * float(expected.norm()))


@forall(40, sample=samples(), share=st.floats(0.05, 1.95), number=st.integers(0, 2**31), data=st.data())
def test_is_one_unrolled_step_of_the_optimiser(sample: Sample, share: float, number: int, data: st.DataObject) -> None:
    optimizer, start = data.draw(st.sampled_from(list(FIRST_STEPS))), away(sample, number)
    rate = share / float(sample.eigenvalues[-1])
    arguments = (*sample.losses(), start, sample.outer)
    found = hypergradient(*arguments, SAMA(center="old", difference="exact", optimizer=optimizer, learning_rate=rate))
    expected = hypergradient(*arguments, Unrolled(steps=1, learning_rate=rate, optimizer=optimizer))
    assert torch.equal(found.inner, expected.inner)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-13 * (1 + float(expected.grad.norm())))


def test_new_is_the_gradient_and_the_mixed_derivative_of_the_given_point() -> None:
    w, lam = torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.tensor([0.5, -0.3], dtype=DOUBLE)
    settings = {"optimizer": "sgd", "learning_rate": 0.1}
    for difference in ("central", "exact"):
        found = hypergradient(quartic, lambda w, lam: w.sum(), w, lam, SAMA(difference=difference, **settings))
        expected = hypergradient(quartic, lambda w, lam: w.sum(), w, lam, OneStep(0.1, center="new"))
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=0)
        assert torch.equal(found.inner, w)


def after_updates(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], gradients: list[Tensor], loss: Any, lam: Tensor
) -> InnerProblem:
    """An inner problem whose optimiser has made updates with these gradients, the last of them recorded."""
    w = torch.ones_like(gradients[0]).requires_grad_()
    optimizer = make([w])
    for place, gradient in enumerate(gradients):
        if place == len(gradients) - 1:
            before = (w.detach().clone(),)
            update, memory = update_of(optimizer, [w])
        w.grad = gradient.clone()
        optimizer.step()
    objective = FunctionObjective(lambda w, lam: loss(w[0], lam[0]), "the inner problem", Replay(("cpu",)), PassCount())
    step = InnerStep(objective, before, memory, update, (gradients[-1],))
    return InnerProblem(objective, leaves((w,)), leaves((lam,)), [step])


def test_adams_bias_correction_is_not_left_out() -> None:
    # A peer's preconditioner is 5.8 times too large at the fifth step, (1 − β₁⁵) / sqrt(1 − β₂⁵) with the defaults.
    g = torch.tensor([0.5, -2.0, 1e-3], dtype=DOUBLE)
    rate, first, second = 0.01, 0.9, 0.999
    # f = ⟨w, λ⟩: ∂²f/∂w∂λ is the identity, and the answer the direction itself.
    problem = after_updates(
        lambda params: torch.optim.Adam(params, lr=rate, betas=(first, second)),
        [g] * 5,
        lambda w, lam: w @ lam,
        torch.zeros(3, dtype=DOUBLE),
    )
    v = torch.tensor([1.0, -1.0, 3.0], dtype=DOUBLE)
    mean, square = (1 - first**4) * g, (1 - second**4) * g**2  # the moments before the fifth step
    for corrected in (True, False):
        x = g.clone().requires_grad_()
        m, s = first * mean + (1 - first) * x, second * square + (1 - second) * x**2
        if corrected:
            m, s = m / (1 - first**5), s / (1 - second**5)
        (pulled,) = torch.autograd.grad(-rate * m / (s.sqrt() + 1e-8), x, v)
        for center in ("old", "new"):
            (found,) = SAMA(center=center, difference="exact").respond(problem).pullback((v,), {}).value
            if corrected:
                torch.testing.assert_close(found, pulled, rtol=1e-9, atol=0)
            else:
                torch.testing.assert_close(pulled / found, torch.full_like(g, 5.797), rtol=1e-3, atol=0)


def test_everything_of_the_optimiser_counts() -> None:
    # Against central differences of torch's own update, two steps in, in the gradient of the last step alone.
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, generator=generator, dtype=DOUBLE) for _ in range(3)]
    v = torch.randn(4, generator=generator, dtype=DOUBLE)
    for make in (
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
        lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.5, 0.9), weight_decay=0.3),
        lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True, momentum=0.5),
    ):

        def end(change: Tensor, make: Any = make) -> Tensor:
            changed = [*gradients[:-1], gradients[-1] + change]
            return after_updates(make, changed, quartic, torch.zeros(4, dtype=DOUBLE)).inner[0].detach()

        steps = 1e-6 * torch.eye(4, dtype=DOUBLE)
        expected = torch.stack([(end(step) - end(-step)) @ v / 2e-6 for step in steps])
        problem = after_updates(make, gradients, lambda w, lam: w @ lam, torch.zeros(4, dtype=DOUBLE))
        (found,) = SAMA(difference="exact").respond(problem).pullback((v,), {}).value
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("difference", ["exact", "central", "forward"])
def test_zero_gradients_give_finite_and_right_answers(optimizer: str, difference: str) -> None:
    # Rows of an embedding that did not occur: g = 0, and ∂u/∂g is 1/ε times the rate there. As a single direction their
    # coordinates would be all that moves, and the difference in the others all rounding.
    w, lam = torch.linspace(0.5, 2.0, 8, dtype=DOUBLE), torch.linspace(-1.0, 1.0, 4, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam.exp() * w[:4].square()).sum() / 2 + (w[:4] * lam).sin().sum() + 0 * w[4:].sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return w.square().sum()

    def run(difference: str) -> Hypergradient:
        estimator = SAMA(center="old", difference=difference, optimizer=optimizer, learning_rate=0.1)
        return hypergradient(inner, outer, w, lam, estimator)

    def only_living(difference: str) -> Hypergradient:
        estimator = SAMA(center="old", difference=difference, optimizer=optimizer, learning_rate=0.1)
        dead = w[4:]
        return hypergradient(
            lambda w, lam: inner(torch.cat([w, dead]), lam),
            lambda w, lam: outer(torch.cat([w, dead]), lam),
            w[:4],
            lam,
            estimator,
        )

    found, expected = run(difference), only_living("exact")
    assert torch.isfinite(found.grad).all()
    assert found.info.status is Status.NOT_APPLICABLE
    rounding = {"exact": 1e-12, "central": 1e-7, "forward": 1e-4}[difference]
    size = float((expected.grad - expected.direct).norm())
    assert float((found.grad - expected.grad).norm()) <= rounding * size
    assert ("coordinates with zero gradient apart" in found.info.message) == (difference != "exact")


def test_zero_gradients_that_the_outer_parameters_would_change_count() -> None:
    # f = Σ λᵢ wᵢ at λ = 0 for the last four: g = 0, and yet ∂²f/∂w∂λ is the identity, with ∂u/∂g = η/ε.
    w, lam = torch.linspace(0.5, 2.0, 8, dtype=DOUBLE), torch.tensor([0.5, -1.0, 1.5, 2.0] + 4 * [0.0], dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return 1e-8 * (lam[:4].exp() * w[:4].square()).sum() + 1e-8 * w[4:] @ lam[4:]

    settings = {"optimizer": "adam", "learning_rate": 0.1}
    exact, central = (
        hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, SAMA(difference=difference, **settings)).grad
        for difference in ("exact", "central")
    )
    torch.testing.assert_close(exact[4:], -0.1 * 2 * w[4:], rtol=1e-9, atol=0)
    torch.testing.assert_close(central, exact, rtol=1e-5, atol=0)

    def mixed(w: Tensor, lam: Tensor) -> Tensor:
        return inner(w, lam) + 1e-3 * lam[:4] @ w[:4]

    exact, central = (
        hypergradient(mixed, lambda w, lam: w.square().sum(), w, lam, SAMA(difference=difference, **settings))
        for difference in ("exact", "central")
    )
    assert "coordinates with zero gradient apart" in central.info.message
    torch.testing.assert_close(central.grad[4:], -0.1 * 2 * w[4:], rtol=1e-5, atol=0)
    torch.testing.assert_close(central.grad, exact.grad, rtol=1e-4, atol=0)


def test_differences_need_no_double_backward() -> None:
    inner, outer, w, lam = attention_losses()
    settings = {"optimizer": "adam", "learning_rate": 0.1}
    for estimator in (SAMA(**settings), SAMA(center="old", difference="forward", **settings)):
        found = hypergradient(inner, outer, w, lam, estimator)  # type: ignore[arg-type]
        assert float((found.grad - found.direct).norm()) > 0
    with pytest.raises(LossError, match=r"cannot be differentiated twice"):
        hypergradient(inner, outer, w, lam, SAMA(difference="exact", **settings))  # type: ignore[arg-type]


def test_says_what_its_fields_need() -> None:
    assert SAMA().needs_trajectory
    assert not SAMA().needs_double_backward
    assert SAMA(difference="exact").needs_double_backward
    assert SAMA(center="old", difference="forward").needs_outer_gradient
    assert SAMA().recorded_steps == 1


def test_as_a_function_it_needs_an_optimiser() -> None:
    sample = make_quadratic(3, 2, 2.0, 1.0, 0)
    with pytest.raises(ConfigError, match=r"which an engine records.*SAMA\(optimizer='adam', learning_rate=0\.001\)"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, SAMA())


def test_a_recorded_step_excludes_the_functions_fields() -> None:
    problem = after_updates(
        lambda params: torch.optim.SGD(params, lr=0.1), [torch.ones(2)], lambda w, lam: w @ lam, torch.zeros(2)
    )
    with pytest.raises(ConfigError, match="in an engine the inner problem's own optimizer made the step"):
        SAMA(optimizer="adam", learning_rate=0.1).respond(problem)


@pytest.mark.parametrize(
    ("fields", "error", "expected"),
    [
        ({"center": "middle"}, UnknownNameError, "value of SAMA.center"),
        ({"difference": "none"}, UnknownNameError, "value of SAMA.difference"),
        ({"epsilon": math.nan}, ConfigError, "SAMA.epsilon must be a finite number above 0 or 'auto', not nan"),
        ({"difference": "exact", "epsilon": 0.1}, ConfigError, "SAMA.epsilon belongs to difference="),
        ({"difference": "forward"}, ConfigError, "difference='forward' reuses what the step's own backward pass found"),
        ({"optimizer": "adam"}, ConfigError, "belong together: learning_rate is missing"),
        ({"learning_rate": 0.1}, ConfigError, "belong together: optimizer is missing"),
        ({"optimizer": "lion", "learning_rate": 0.1}, UnknownNameError, "value of SAMA.optimizer"),
        ({"optimizer": "sgd", "learning_rate": -0.1}, ConfigError, "SAMA.learning_rate must be a finite number above"),
    ],
)
def test_fields_are_validated(fields: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=re.escape(expected)):
        SAMA(**fields)
