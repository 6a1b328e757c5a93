from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel.errors import LossError, NonFiniteError
from bilevel.functional import (
    Evaluate,
    FunctionObjective,
    ModuleObjective,
    Objective,
    ParameterSlots,
    PassCount,
    gradient,
    leaves,
    scalar_loss,
)
from bilevel.products import GradientGraph
from bilevel.randomness import Replay, capture, generator_devices, preserved
from tests.bilevel.strategies import DOUBLE, Sample, forall, samples


def objective_of(loss: object, passes: PassCount | None = None) -> FunctionObjective:
    return FunctionObjective(loss, "the inner problem", Replay(("cpu",)), passes or PassCount())  # type: ignore[arg-type]


def with_graph(objective: Objective, inner: tuple[Tensor, ...], outer: tuple[Tensor, ...], use: object) -> object:
    def body(evaluate: Evaluate) -> object:
        return use(GradientGraph(objective, evaluate, inner, outer))  # type: ignore[operator]

    return objective.within(inner, outer, body)


@forall(60, sample=samples(max_condition=1e3), number=st.integers(0, 2**31), count=st.integers(1, 4))
def test_products_are_those_of_the_dense_matrices(sample: Sample, number: int, count: int) -> None:
    generator = torch.Generator().manual_seed(number)
    inner_loss, _ = sample.losses()
    passes = PassCount()
    inner, outer = leaves((sample.inner,)), leaves((sample.outer,))

    def use(graph: GradientGraph) -> None:
        assert (passes.forward, passes.backward) == (1, 1)
        for _ in range(count):
            q = torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
            torch.testing.assert_close(graph.hessian((q,))[0], sample.hessian @ q, rtol=1e-9, atol=1e-9)
        q = torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
        image, mixed = graph.hessian_and_mixed((q,))
        torch.testing.assert_close(image[0], sample.hessian @ q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixed[0], sample.mixed.T @ q, rtol=1e-9, atol=1e-9)

    with_graph(objective_of(lambda w, lam: inner_loss(w[0], lam[0]), passes), inner, outer, use)
    assert (passes.forward, passes.backward) == (1, 1 + count + 1)


def test_pass_counts_are_relative_to_a_snapshot() -> None:
    passes = PassCount(3, 5)
    before = passes.copy()
    passes.forward += 2
    passes.backward += 1
    assert passes.since(before) == (2, 1)


def test_inner_variables_that_do_not_reach_the_loss_are_left_out() -> None:
    w = leaves((torch.ones(2), torch.ones(3), torch.ones(1)))
    lam = leaves((torch.ones(1), torch.ones(4)))

    def use(graph: GradientGraph) -> None:
        assert graph.active == (False, True, False)
        assert [part.shape for part in graph.gradient] == [(3,)]
        assert graph.select(w)[0] is w[1]
        (image,), mixed = graph.hessian_and_mixed((torch.ones(3),))
        torch.testing.assert_close(image, torch.full((3,), 2.0))
        torch.testing.assert_close(mixed[0], torch.full((1,), 6.0))
        assert not mixed[1].any()

    with_graph(objective_of(lambda w, lam: (w[1] ** 2).sum() * lam[0].sum()), w, lam, use)


def test_a_loss_that_is_linear_in_its_inner_variables_has_zero_products() -> None:
    w, lam = leaves((torch.ones(2), torch.ones(2))), leaves((torch.ones(2),))

    def check(loss: object, mixed: float) -> None:
        def use(graph: GradientGraph) -> None:
            image, product = graph.hessian_and_mixed((torch.ones(2), torch.ones(2)))
            assert not any(bool(part.any()) for part in image)
            torch.testing.assert_close(product[0], torch.full((2,), mixed))

        with_graph(objective_of(loss), w, lam, use)

    check(lambda w, lam: (w[0] + w[1]).sum() + lam[0].sum(), 0.0)
    check(lambda w, lam: (w[0] * lam[0] + w[1]).sum(), 1.0)


def test_reduction_is_applied_to_every_gradient_and_product() -> None:
    doubled = FunctionObjective(
        lambda w, lam: (w[0] ** 2 * lam[0]).sum(),
        "the inner problem",
        Replay(("cpu",)),
        PassCount(),
        reduce=lambda parts: tuple(2 * part for part in parts),
    )
    w, lam = leaves((torch.ones(2),)), leaves((torch.ones(2),))
    with_graph(
        doubled,
        w,
        lam,
        lambda graph: torch.testing.assert_close(graph.hessian((torch.ones(2),))[0], torch.full((2,), 4.0)),
    )
    with_graph(
        doubled,
        w,
        lam,
        lambda graph: torch.testing.assert_close(graph.mixed((torch.ones(2),))[0], torch.full((2,), 4.0)),
    )
    plain = doubled.within(w, lam, lambda evaluate: gradient(evaluate(), w, doubled))
    torch.testing.assert_close(plain[0], torch.full((2,), 4.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, "must be a scalar tensor; it is a float"),
        (None, "must be a scalar tensor; it is a NoneType"),
        (torch.ones(2, 1), r"must be a scalar; it has shape \(2, 1\)\. Reduce it with \.mean\(\) or \.sum\(\)"),
        (torch.ones(0), r"must be a scalar; it has shape \(0,\)"),
        (torch.tensor(3), "must be real floating point; it has dtype torch.int64"),
        (torch.tensor(3j), "must be real floating point; it has dtype torch.complex64"),
    ],
)
def test_losses_are_scalars(value: object, message: str) -> None:
    with pytest.raises(LossError, match="the loss of problem 'x' " + message):
        scalar_loss(value, "problem 'x'")


def test_a_loss_of_one_element_is_a_scalar() -> None:
    assert scalar_loss(torch.ones(1, 1), "x").shape == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    w = leaves((torch.ones(1),))
    with pytest.raises(NonFiniteError, match="the inner problem is"):
        with_graph(objective_of(lambda w, lam: (w[0] * value).sum()), w, w, lambda graph: None)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * cotangent


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: F.multi_margin_loss(w, torch.arange(4)),
        lambda w: _Once.apply(w),  # autograd leaves its part of the second derivative out, without a word
        lambda w: F.scaled_dot_product_attention(w[None, None], w[None, None], w[None, None]),
    ],
)
def test_operations_without_second_derivative_name_the_way_out(operation: object) -> None:
    w, lam = leaves((torch.rand(4, 4),)), leaves((torch.ones(()),))
    with pytest.raises(LossError, match=r"inner problem cannot be differentiated twice.*products='finite_difference'"):
        with_graph(
            objective_of(lambda w, lam: operation(w[0]).square().sum() * lam[0]),  # type: ignore[operator]
            w,
            lam,
            lambda graph: graph.hessian((torch.ones(4, 4),)),
        )


def test_a_function_that_is_differentiable_once_may_stand_beside_the_inner_variables() -> None:
    # On the way to other parameters only, it has no part in second derivatives; finite differences need none.
    backbone = torch.ones(2, requires_grad=True)
    w, lam = leaves((torch.ones(2),)), leaves((torch.ones(2),))
    beside = objective_of(lambda w, lam: (w[0] ** 2 * lam[0] * _Once.apply(backbone)).sum())
    with_graph(
        beside, w, lam, lambda g: torch.testing.assert_close(g.hessian((torch.ones(2),))[0], torch.full((2,), 2.0))
    )
    through = objective_of(lambda w, lam: (_Once.apply(w[0]) * lam[0]).sum())
    (found,) = through.within(w, lam, lambda evaluate: gradient(evaluate(), lam, through))
    assert found is not None
    torch.testing.assert_close(found, torch.ones(2))
    with pytest.raises(LossError, match="the custom function _Once is marked once_differentiable"):
        with_graph(objective_of(lambda w, lam: _Once.apply(w[0]).sum()), w, lam, lambda graph: None)


def test_errors_of_user_code_pass_unchanged() -> None:
    w = leaves((torch.ones(2),))
    with pytest.raises(RuntimeError, match="size of tensor a"):
        with_graph(objective_of(lambda w, lam: (w[0] + torch.ones(3)).sum()), w, w, lambda graph: None)


class Net(nn.Module):
    """A small network with everything that makes swapping delicate: batch norm, dropout, a tied and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.norm(self.first(x)), 0.5))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def module_objective(net: Net, x: Tensor, *, live: tuple[Tensor, ...], recompute: bool = False) -> ModuleObjective:
    def loss() -> Tensor:
        out = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        return out.square().mean()

    return ModuleObjective(loss, ParameterSlots([net]), live, (), "the inner problem", Replay(("cpu",)), PassCount())


@pytest.mark.parametrize("recompute", [False, True])
def test_module_losses_are_functions_of_their_parameters(net: Net, recompute: bool) -> None:
    # Checkpointing evaluates again during the backward pass, with the parameters that are in place then.
    x = torch.randn(8, 3, dtype=DOUBLE)
    live = (net.first.weight, net.norm.bias)
    objective = module_objective(net, x, live=live, recompute=recompute)
    elsewhere = leaves([part + 0.3 for part in live])
    torch.manual_seed(5)
    found = objective.within(elsewhere, (), lambda evaluate: gradient(evaluate(), elsewhere, objective))
    kept = [part.detach().clone() for part in live]
    with torch.no_grad():
        for part, value in zip(live, elsewhere, strict=True):
            part.copy_(value)
    torch.manual_seed(5)
    expected = torch.autograd.grad(net(x).square().mean(), live)
    with torch.no_grad():
        for part, value in zip(live, kept, strict=True):
            part.copy_(value)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_changes_neither_parameters_nor_buffers_nor_gradients(net: Net) -> None:
    x = torch.randn(8, 3, dtype=DOUBLE)
    live = tuple(net.parameters())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    objective = module_objective(net, x, live=live)
    moved = leaves([part + 1 for part in live])
    with_graph(objective, moved, (), lambda graph: graph.hessian(graph.gradient))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(part.grad is None for part in live)
    assert net.second.weight is net.first.weight
    assert isinstance(net.first.weight, nn.Parameter)


def test_an_error_in_the_loss_leaves_everything_in_place(net: Net) -> None:
    live = (net.first.weight,)

    def loss() -> Tensor:
        net.norm(torch.ones(4, 3, dtype=DOUBLE))
        raise KeyError("broken")

    objective = ModuleObjective(loss, ParameterSlots([net]), live, (), "x", Replay(("cpu",)), PassCount())
    mean = net.norm.running_mean
    with pytest.raises(KeyError):
        objective.within(leaves([live[0] + 1]), (), lambda evaluate: evaluate())
    assert net.first.weight is net.second.weight is live[0]
    assert net.norm.running_mean is mean
    assert not mean.any()


def test_live_parameters_are_not_swapped(net: Net) -> None:
    slots = ParameterSlots([net])
    assert slots.holds(net.first.weight)
    assert not slots.holds(torch.ones(1))
    before = net.first._parameters["weight"]
    with slots.swapped((net.first.weight,), (net.first.weight,)):
        assert net.first._parameters["weight"] is before
    new = torch.zeros(3, 3, dtype=DOUBLE)
    with slots.swapped((net.first.weight,), (new,)):
        assert net.first.weight is net.second.weight is new


def test_autocast_does_not_reach_an_objective() -> None:
    w = leaves((torch.randn(4, 4),))
    objective = objective_of(lambda w, lam: (w[0] @ w[0]).sum())
    plain = objective.within(w, (), lambda evaluate: evaluate())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (w[0] @ w[0]).dtype == torch.bfloat16
        assert torch.equal(objective.within(w, (), lambda evaluate: evaluate()), plain)
        assert torch.is_autocast_enabled("cpu")


def test_gradients_flow_without_gradient_mode() -> None:
    # The loss was made a scalar outside of the gradient mode that it was evaluated in.
    w = leaves((torch.ones(2),))
    objective = objective_of(lambda w, lam: (w[0] ** 3).sum())
    with torch.no_grad():
        with_graph(
            objective,
            w,
            (),
            lambda graph: torch.testing.assert_close(graph.hessian((torch.ones(2),))[0], torch.full((2,), 6.0)),
        )
        (first,) = objective.within(w, (), lambda evaluate: gradient(evaluate(), w, objective))
        assert first is not None
        torch.testing.assert_close(first, torch.full((2,), 3.0))


@contextlib.contextmanager
def seeded(number: int) -> Iterator[None]:
    with preserved(("cpu",)):
        torch.manual_seed(number)
        yield


@forall(30, number=st.integers(0, 2**31), passes=st.integers(1, 5))
def test_replay_draws_once_and_repeats(number: int, passes: int) -> None:
    with seeded(number):
        replay = Replay(("cpu",))
        drawn = []
        for _ in range(passes):
            with replay():
                drawn.append(torch.rand(3))
        after = torch.rand(3)
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    with seeded(number):
        assert torch.equal(torch.rand(3), drawn[0])
        assert torch.equal(torch.rand(3), after)


def test_replay_of_a_given_state_never_advances_the_generators() -> None:
    with seeded(1):
        states = capture(("cpu",))
        expected = torch.rand(3)
    with seeded(2):
        before = torch.get_rng_state()
        replay = Replay(("cpu",), states)
        for _ in range(2):
            with replay():
                assert torch.equal(torch.rand(3), expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_replay_restores_after_an_error() -> None:
    with seeded(1):
        replay = Replay(("cpu",))
        with replay():
            torch.rand(1)
        before = torch.get_rng_state()

        def interrupted() -> None:
            with replay():
                torch.rand(1)
                raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            interrupted()
        assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_the_tensors_devices_are_replayed() -> None:
    assert generator_devices([torch.ones(1), torch.ones(1, device="meta")]) == ("cpu",)
