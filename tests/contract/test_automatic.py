from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Automatic, Estimator, FiniteDifference, Hypergradient, Identity, argmin, hypergradient
from bilevel.errors import BilevelWarning, ConfigError, LossError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem
from bilevel.randomness import Replay
from tests.bilevel.strategies import logarithmic
from tests.contract.contract import EstimatorContract, Sample, operator_norm
from tests.contract.test_finite_difference import attention_losses


class TestAutomatic(EstimatorContract):
    default = Automatic()

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(Automatic, epsilon=st.just("auto") | logarithmic(1e-4, 1.0))

    def target(self, sample: Sample) -> Tensor:
        return sample.direct - sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        distance = float((1 - 1 / sample.eigenvalues).abs().max())
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * distance

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert result.info.message == "exact mixed product"
        return 1, 2


class Squared(torch.autograd.Function):
    """x², with a backward pass that autograd cannot differentiate and would pass over in silence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


def marked(w: Tensor, lam: Tensor) -> Tensor:
    value: Tensor = Squared.apply(w)  # type: ignore[no-untyped-call]
    return (value * lam).sum()


def outer(w: Tensor, lam: Tensor) -> Tensor:
    return w.sum() + lam.sum()


ONCE = {
    "fused attention": (attention_losses(), "derivative for aten::"),
    "once_differentiable": ((marked, outer, torch.ones(3), torch.ones(3)), "Squared is marked once_differentiable"),
}


@pytest.mark.parametrize("case", ONCE)
def test_where_no_second_derivative_exists_differences_answer_and_it_is_said(case: str) -> None:
    losses, reason = ONCE[case]
    with pytest.raises(LossError):
        hypergradient(*losses, Identity())
    with pytest.warns(BilevelWarning, match=f"'auto' takes central differences.*inner problem.*{reason}.*said once"):
        found = hypergradient(*losses, Automatic(epsilon=0.01))
    expected = hypergradient(*losses, FiniteDifference(epsilon=0.01))
    assert torch.equal(found.grad, expected.grad)
    assert found.info.method == "auto"
    assert found.info.message.startswith("central differences; epsilon 0.01")
    assert found.info.products == 2


def problem_of(inner_loss: Any, w: Tensor, lam: Tensor) -> tuple[InnerProblem, PassCount]:
    passes = PassCount()
    objective = FunctionObjective(lambda w, lam: inner_loss(w[0], lam[0]), "f", Replay(("cpu",)), passes)
    return InnerProblem(objective, leaves((w,)), leaves((lam,))), passes


def smooth(w: Tensor, lam: Tensor) -> Tensor:
    return (w**2 * lam).sum()


def test_the_choice_is_made_once() -> None:
    problem, passes = problem_of(marked, torch.ones(3), torch.ones(3))
    cotangent = (torch.ones(3),)
    with pytest.warns(BilevelWarning, match="said once"):
        first = Automatic().respond(problem).pullback(cotangent, {})
    assert (passes.forward, passes.backward) == (3, 2)  # the mark is seen before a derivative is taken
    before = passes.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = Automatic().respond(problem).pullback(cotangent, first.state)
    assert passes.since(before) == (2, 2)
    assert second.state.keys() == first.state.keys()
    assert torch.equal(first.value[0], second.value[0])
    # and where there is a product, nothing has to be remembered
    problem, _ = problem_of(smooth, torch.ones(3), torch.ones(3))
    assert Automatic().respond(problem).pullback(cotangent, {}).state == {}


class Detached(torch.autograd.Function):
    """x², with a backward pass whose second derivative autograd takes for zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * cotangent


def detached(w: Tensor, lam: Tensor) -> Tensor:
    value: Tensor = Detached.apply(w - lam)  # type: ignore[no-untyped-call]
    return value.sum()


def pulled(inner_loss: Any, state: Any, start: Tensor, method: Automatic | FiniteDifference) -> tuple[Any, Any]:
    problem, passes = problem_of(inner_loss, start, torch.linspace(1, 2, 3, dtype=start.dtype))
    return method.respond(problem).pullback((torch.ones(3, dtype=start.dtype),), state), passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_product_that_a_custom_backward_pass_hides_is_seen_and_differences_answer(
    size: float, dtype: torch.dtype
) -> None:
    start = torch.full((3,), size, dtype=dtype)
    with pytest.warns(BilevelWarning, match="mixed product of zero for autograd and another one by.*said once"):
        found, passes = pulled(detached, {}, start, Automatic())
    expected, _ = pulled(detached, {}, start, FiniteDifference())
    assert torch.equal(found.value[0], expected.value[0])
    assert float(found.value[0].norm()) > 0.0
    assert found.info.message.startswith("central differences; epsilon")
    # the gradient, which has no graph; differences; and the size of what they are taken of
    assert (passes.forward, passes.backward) == (1 + 2 + 1, 1 + 2 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, passes = pulled(detached, found.state, start, Automatic())
    assert torch.equal(again.value[0], found.value[0])
    assert (passes.forward, passes.backward) == (2, 2)


ZERO = {
    "no dependence": lambda w, lam: w.square().sum() + lam.exp().sum(),
    "no dependence but by rounding": lambda w, lam: w.square().sum() + (lam * (w.cos() ** 2 + w.sin() ** 2)).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ZERO)
def test_a_product_that_is_zero_is_left_at_that(case: str, dtype: torch.dtype) -> None:
    start = torch.linspace(0.1, 2.0, 3, dtype=dtype)
    by_differences, _ = pulled(ZERO[case], {}, start, FiniteDifference())
    assert bool(by_differences.value[0].any()) == ("rounding" in case)
    state: Any = {}
    for _ in range(2):
        found, passes = pulled(ZERO[case], state, start, Automatic())  # and nothing is said
        assert not found.value[0].any()
        assert found.info.message == "exact mixed product"
        assert (passes.forward, passes.backward) == (1 + 3, 2 + 3)
        state = found.state


def test_nothing_more_is_taken_where_the_outer_loss_is_flat() -> None:
    problem, passes = problem_of(smooth, torch.ones(3), torch.ones(3))
    Automatic().respond(problem).pullback((torch.zeros(3),), {})
    assert (passes.forward, passes.backward) == (1, 2)


def test_other_errors_are_not_taken_for_a_missing_second_derivative() -> None:
    with pytest.raises(LossError, match="does not depend on its inner parameters"):
        hypergradient(lambda w, lam: lam.sum(), outer, torch.ones(3), torch.ones(3), Automatic())


def test_a_solver_can_be_differentiated_by_it() -> None:
    fit = argmin(lambda w, lam: (w - lam).square().sum() / 2, Automatic())(lambda lam: lam.clone())
    lam = torch.ones(3, requires_grad=True)
    (fit(lam) * torch.arange(3.0)).sum().backward()
    torch.testing.assert_close(lam.grad, torch.arange(3.0))
    with pytest.warns(BilevelWarning, match="'auto' takes central differences"):
        (argmin(marked, Automatic())(lambda lam: torch.ones(3))(lam)).sum().backward()


def test_the_field_is_validated() -> None:
    with pytest.raises(ConfigError, match=r"Automatic\.epsilon must be a finite number above 0 or 'auto', not -1"):
        Automatic(epsilon=-1.0)
