from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.optim import OPTIMIZERS, Pulled, default_update, pulled_linear, update_of
from bilevel.vector import scale
from tests.bilevel.strategies import DOUBLE, forall

betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.9, 0.999]))
eps = st.sampled_from([1e-8, 1e-3])


def settings(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    common = {"lr": st.floats(1e-3, 1.0), "weight_decay": st.sampled_from([0.0, 0.1]), "maximize": st.booleans()}
    return st.fixed_dictionaries({**common, **fields})


decoupled = {"decoupled_weight_decay": st.booleans()}
SETTINGS: dict[type[torch.optim.Optimizer], st.SearchStrategy[dict[str, Any]]] = {
    torch.optim.SGD: settings(
        momentum=st.sampled_from([0.0, 0.5, 0.9]), dampening=st.sampled_from([0.0, 0.3]), nesterov=st.booleans()
    ).map(lambda kw: {**kw, "dampening": 0.0} if kw["nesterov"] and kw["momentum"] else {**kw, "nesterov": False}),
    torch.optim.Adam: settings(betas=betas, eps=eps, amsgrad=st.booleans()),
    torch.optim.AdamW: settings(betas=betas, eps=eps, amsgrad=st.booleans()),
    torch.optim.RMSprop: settings(
        alpha=st.sampled_from([0.5, 0.99]),
        eps=eps,
        momentum=st.sampled_from([0.0, 0.9]),
        centered=st.booleans(),
    ),
    torch.optim.Adagrad: settings(lr_decay=st.sampled_from([0.0, 0.1]), eps=eps),
    torch.optim.Adadelta: settings(rho=st.sampled_from([0.5, 0.9]), eps=eps),
    torch.optim.Adamax: settings(betas=betas, eps=eps),
    torch.optim.NAdam: settings(betas=betas, eps=eps, momentum_decay=st.sampled_from([4e-3, 0.1]), **decoupled),
    torch.optim.RAdam: settings(betas=betas, eps=eps, **decoupled),
}
optimizers = st.sampled_from(list(SETTINGS)).flatmap(lambda kind: st.tuples(st.just(kind), SETTINGS[kind]))


def parameters(number: int) -> tuple[list[Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_() for shape in ((3,), (2, 2), ())
    ], generator


def gradients(params: list[Tensor], generator: torch.Generator, zeros: bool = False) -> tuple[Tensor, ...]:
    """Random gradients; with ``zeros`` the first tensor's is zero and the second's is zero in places."""
    grads = [torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in params]
    if zeros:
        grads[0] = torch.zeros_like(grads[0])
        grads[1][0] = 0.0
    return tuple(grads)


def step(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: tuple[Tensor, ...]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()


def check_steps(
    optimizer: torch.optim.Optimizer, params: list[Tensor], generator: torch.Generator, steps: int, zeros: bool
) -> None:
    for _ in range(steps):
        grads = gradients(params, generator, zeros)
        update, memory = update_of(optimizer, params)
        before = tuple(p.detach().clone() for p in params)
        new, new_memory = update(before, grads, memory)
        step(optimizer, params, grads)
        for p, expected in zip(params, new, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        _, held = update_of(optimizer, params)
        for one, other in zip(new_memory, held, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@forall(
    250,
    chosen=optimizers,
    number=st.integers(0, 2**31),
    steps=st.integers(1, 7),
    groups=st.booleans(),
    zeros=st.booleans(),
)
def test_updates_are_torchs(
    chosen: tuple[Any, dict[str, Any]], number: int, steps: int, groups: bool, zeros: bool
) -> None:
    kind, fields = chosen
    params, generator = parameters(number)
    first = {"params": params[:1], "lr": fields["lr"] / 2, "weight_decay": 0.2, "maximize": not fields["maximize"]}
    arguments = [first, {"params": params[1:]}] if groups else params
    check_steps(kind(arguments, **fields), params, generator, steps, zeros)


@pytest.mark.parametrize("kind", SETTINGS)
def test_all_of_torchs_implementations_make_the_same_numbers(kind: Any) -> None:
    ways = [{"foreach": True}, {"foreach": False}]
    if kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        ways.append({"fused": True})
    for way in ways:
        params, generator = parameters(1)
        check_steps(kind(params, lr=0.1, weight_decay=0.1, **way), params, generator, 4, zeros=False)


def test_adam_with_decoupled_weight_decay_is_adamw() -> None:
    params, generator = parameters(2)
    optimizer = torch.optim.Adam(params, lr=0.1, weight_decay=0.3)
    if "decoupled_weight_decay" not in optimizer.defaults:
        pytest.skip("this torch has no such option")
    for group in optimizer.param_groups:
        group["decoupled_weight_decay"] = True
    check_steps(optimizer, params, generator, 3, zeros=False)


def test_tensors_as_hyper_parameters_are_taken_at_their_present_values() -> None:
    params, generator = parameters(3)
    rate = torch.tensor(0.1, dtype=DOUBLE)
    optimizer = torch.optim.Adam(params, lr=rate, foreach=False)
    check_steps(optimizer, params, generator, 2, zeros=False)
    rate.fill_(0.5)
    check_steps(optimizer, params, generator, 2, zeros=False)


@forall(80, chosen=optimizers, number=st.integers(0, 2**31), steps=st.integers(0, 6))
def test_derivatives_of_updates_are_right(chosen: tuple[Any, dict[str, Any]], number: int, steps: int) -> None:
    kind, fields = chosen
    if "eps" in fields:
        fields = {**fields, "eps": 0.1}  # differences are no reference where the curvature is that of 1e-8
    params, generator = parameters(number)
    optimizer = kind(params, **fields)
    for _ in range(steps):
        step(optimizer, params, gradients(params, generator))
    update, memory = update_of(optimizer, params)
    grads = [grad + grad.sign() for grad in gradients(params, generator)]  # away from the kinks at zero
    inputs = [*(p.detach().clone() for p in params), *grads, *(m.clone() for m in memory)]
    first, second = len(params), 2 * len(params)
    if fields.get("amsgrad") or kind is torch.optim.Adamax or steps == 0:
        inputs[second:] = [part + 1e-2 for part in inputs[second:]]  # two equal candidates are a kink, and so is √0
    if fields.get("centered"):
        for place in range(second, len(inputs), len(memory) // len(params)):
            inputs[place] = inputs[place] + 1.0  # the variance away from zero

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        new, state = update(tensors[:first], tensors[first:second], tensors[second:])
        return (*new, *state)

    assert torch.autograd.gradcheck(flat, [part.requires_grad_() for part in inputs], atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        *((kind, {}) for kind in SETTINGS),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    ],
)
def test_gradients_that_have_always_been_zero_have_finite_derivatives(kind: Any, extra: dict[str, Any]) -> None:
    # The root of a second moment has an infinite derivative at zero: 0 · ∞ spoilt whole meta-gradients.
    param = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    params = [param]
    optimizer = kind(params, lr=0.1, weight_decay=0.0, **extra)
    for _ in range(3):
        step(optimizer, params, (torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE),))
    for _ in range(2):
        update, memory = update_of(optimizer, params)
        at = param.detach().clone().requires_grad_()
        inputs = [at, torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE), *memory]
        leaves = [part.detach().clone().requires_grad_() for part in inputs]
        (new,), after = update((leaves[0],), (leaves[1],), tuple(leaves[2:]))
        total = torch.stack([part.sum() for part in (new, *after)]).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        assert all(bool(torch.isfinite(part).all()) for part in found)
        torch.testing.assert_close(found[0], torch.ones_like(at))
        step(optimizer, params, (inputs[1],))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_derivative_at_zero_is_the_mean_of_both_sides(kind: Any) -> None:
    """The convention: the update is odd in a first gradient g, −η g / (c |g| + ε), so both sides agree: −η / ε."""
    params = [torch.ones(1, dtype=DOUBLE, requires_grad=True)]
    update, memory = update_of(kind(params, lr=0.1, eps=0.5), params)

    def moved(value: float) -> Tensor:
        (new,), _ = update((torch.ones(1, dtype=DOUBLE),), (torch.full((1,), value, dtype=DOUBLE),), memory)
        return new

    grad = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    (new,), _ = update((torch.ones(1, dtype=DOUBLE),), (grad,), memory)
    (found,) = torch.autograd.grad(new, grad)
    torch.testing.assert_close(found, (moved(1e-7) - moved(-1e-7)) / 2e-7, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_optimisers_are_torchs_with_its_defaults(name: str) -> None:
    params, generator = parameters(4)
    kind, fields = OPTIMIZERS[name]
    optimizer = kind(params, lr=0.05, **fields)  # type: ignore[call-arg]
    inner = tuple(p.detach().clone() for p in params)
    _, memory = default_update(name, 0.05, 0, inner)
    for made in range(4):
        grads = gradients(params, generator)
        update, _ = default_update(name, 0.05, made, inner)
        inner, memory = update(inner, grads, memory)
        step(optimizer, params, grads)
    for p, expected in zip(params, inner, strict=True):
        assert torch.equal(p, expected)


def test_momentum_is_that_of_the_name() -> None:
    assert OPTIMIZERS["momentum"][1] == {"momentum": 0.9}
    assert OPTIMIZERS["nesterov"][1] == {"momentum": 0.9, "nesterov": True}


def test_memory_is_a_copy() -> None:
    params = [torch.ones(2, requires_grad=True)]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    params[0].grad = torch.ones(2)
    optimizer.step()
    _, memory = update_of(optimizer, params)
    kept = memory[0].clone()
    optimizer.step()
    assert torch.equal(memory[0], kept)


def test_learning_rate_is_that_of_the_moment() -> None:
    params = [torch.ones(1, requires_grad=True)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    update, _ = update_of(optimizer, params)
    optimizer.param_groups[0]["lr"] = 100.0
    (new,), _ = update((torch.ones(1),), (torch.ones(1),), ())
    assert float(new) == pytest.approx(0.9)


class _Mine(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor, _Mine])
def test_other_optimisers_are_refused(kind: Any) -> None:
    params = [torch.ones(1, requires_grad=True)]
    with pytest.raises(ConfigError, match=rf"SGD, Adam, AdamW, RMSprop, .*; the inner problem uses {kind.__name__}"):
        update_of(kind(params, lr=0.1), params)


def test_options_that_would_be_lost_are_refused() -> None:
    params = [torch.ones(1, requires_grad=True)]
    rate = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ConfigError, match="option 'lr' of SGD requires gradients.*pass lr.detach"):
        update_of(torch.optim.SGD(params, lr=rate), params)
    with pytest.raises(ConfigError, match="differentiable=True"):
        update_of(torch.optim.Adam(params, differentiable=True), params)
    optimizer = torch.optim.SGD(params, lr=0.1)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="SGD has a step post-hook"):
        update_of(optimizer, params)
    handle.remove()
    update_of(optimizer, params)


def all_of(pulled: Pulled) -> tuple[Tensor, ...]:
    return *pulled.params, *scale(pulled.factor, pulled.grads), *pulled.memory


descents = st.tuples(st.just(torch.optim.SGD), SETTINGS[torch.optim.SGD])


@forall(60, chosen=descents | optimizers, number=st.integers(0, 2**31), steps=st.integers(0, 2))
def test_linear_updates_are_pulled_back_as_autograd_does(
    chosen: tuple[Any, dict[str, Any]], number: int, steps: int
) -> None:
    kind, extra = chosen
    params, generator = parameters(number)
    optimizer = kind(params, **extra)
    for _ in range(steps):
        for p, grad in zip(params, gradients(params, generator), strict=True):
            p.grad = grad
        optimizer.step()
    update, memory = update_of(optimizer, params)
    inputs = [part.detach().requires_grad_() for part in (*params, *gradients(params, generator), *memory)]
    count = len(params)
    new_params, new_memory = update(tuple(inputs[:count]), tuple(inputs[count : 2 * count]), tuple(inputs[2 * count :]))
    bars = [torch.randn(part.shape, generator=generator, dtype=DOUBLE) for part in (*new_params, *new_memory)]
    found = pulled_linear(update, tuple(bars[:count]), tuple(bars[count:]))
    assert (found is not None) == (kind is torch.optim.SGD)
    if found is not None:
        expected = torch.autograd.grad((*new_params, *new_memory), inputs, bars, allow_unused=True)
        for ours, theirs in zip(all_of(found), expected, strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_parameters_share_a_rule_where_group_and_count_are_the_same() -> None:
    """And are pulled back each by its own, in whichever order they come."""
    (first, second, third), generator = parameters(1)
    other = torch.randn(2, generator=generator, dtype=DOUBLE).requires_grad_()
    plain = {"params": [second], "lr": 0.3, "maximize": True, "weight_decay": 0.2}
    optimizer = torch.optim.SGD([{"params": [first, third, other], "momentum": 0.9, "dampening": 0.1}, plain], lr=0.1)
    first.grad, other.grad = torch.ones_like(first), torch.ones_like(other)
    optimizer.step()
    params = [first, second, other, third]
    update, memory = update_of(optimizer, params)
    rules = update.rules  # type: ignore[attr-defined]
    assert rules[0] is rules[2]
    assert len(set(map(id, rules))) == 3  # the third has made no update
    inputs = [part.detach().requires_grad_() for part in (*params, *gradients(params, generator), *memory)]
    results = update(tuple(inputs[:4]), tuple(inputs[4:8]), tuple(inputs[8:]))
    bars = [torch.randn(part.shape, generator=generator, dtype=DOUBLE) for part in (*results[0], *results[1])]
    found = pulled_linear(update, tuple(bars[:4]), tuple(bars[4:]))
    assert found is not None
    expected = torch.autograd.grad((*results[0], *results[1]), inputs, bars, allow_unused=True)
    for ours, theirs in zip(all_of(found), expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_plain_gradient_descent_scales_nothing_on_the_way_back() -> None:
    """The rate waits for what the products are added to."""
    params, generator = parameters(3)
    update, _ = update_of(torch.optim.SGD(params, lr=0.1, maximize=True), params)
    bars = gradients(params, generator)
    found = pulled_linear(update, bars, ())
    assert found is not None
    assert all(one is bar and other is bar for one, other, bar in zip(found.params, found.grads, bars, strict=True))
    assert found.factor == 0.1


def test_a_rule_that_reads_the_state_is_not_shared() -> None:
    (first, second, _), generator = parameters(2)
    optimizer = torch.optim.NAdam([first, second], lr=0.1)
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[second]["mu_product"].mul_(0.5)  # as a loaded state may have it
    grads = gradients([first, second], generator)
    update, memory = update_of(optimizer, [first, second])
    found, _ = update((first.detach().clone(), second.detach().clone()), grads, memory)
    for p, grad in zip((first, second), grads, strict=True):
        p.grad = grad
    optimizer.step()
    for ours, theirs in zip(found, (first, second), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-8)
