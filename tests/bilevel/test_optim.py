from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.optim import GradientDescent, update_of
from tests.bilevel.strategies import DOUBLE, forall

sgd = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1.0),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
    }
).map(lambda kw: {**kw, "dampening": 0.0} if kw["nesterov"] and kw["momentum"] else {**kw, "nesterov": False})

adam = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-3, 1.0),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)

optimizers = st.one_of(
    st.tuples(st.just(torch.optim.SGD), sgd),
    st.tuples(st.just(torch.optim.Adam), adam),
    st.tuples(st.just(torch.optim.AdamW), adam),
)


def parameters(number: int) -> tuple[list[Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_() for shape in ((3,), (2, 2), ())
    ], generator


@forall(150, chosen=optimizers, number=st.integers(0, 2**31), steps=st.integers(1, 6), groups=st.booleans())
def test_updates_are_torchs(chosen: tuple[Any, dict[str, Any]], number: int, steps: int, groups: bool) -> None:
    kind, settings = chosen
    params, generator = parameters(number)
    arguments = [{"params": params[:1], "lr": settings["lr"] / 2}, {"params": params[1:]}] if groups else params
    optimizer = kind(arguments, **settings)
    for _ in range(steps):
        grads = tuple(torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in params)
        update, memory = update_of(optimizer, params)
        before = tuple(p.detach().clone() for p in params)
        new, new_memory = update(before, grads, memory)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        for p, expected in zip(params, new, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        _, held = update_of(optimizer, params)
        for one, other in zip(new_memory, held, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.3, "maximize": True}),
        (torch.optim.Adam, {"eps": 0.1, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"eps": 0.1, "betas": (0.5, 0.9)}),
    ],
)
def test_derivatives_of_updates_are_right(kind: Any, settings: dict[str, Any]) -> None:
    params, generator = parameters(0)
    optimizer = kind(params, lr=0.1, **settings)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=DOUBLE)
    optimizer.step()  # from zero memory, Adam's root would stand on its kink
    update, memory = update_of(optimizer, params)
    grads = [torch.randn(p.shape, generator=generator, dtype=DOUBLE).requires_grad_() for p in params]
    inputs = [*(p.detach().clone() for p in params), *grads, *(m.clone() for m in memory)]
    first, second = len(params), 2 * len(params)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        new, state = update(tensors[:first], tensors[first:second], tensors[second:])
        return (*new, *state)

    assert torch.autograd.gradcheck(flat, [part.requires_grad_() for part in inputs], fast_mode=True)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_at_a_zero_gradient_has_a_finite_derivative(kind: Any) -> None:
    # The root of Adam's second moment has an infinite derivative at zero: 0 · ∞ spoilt whole meta-gradients.
    params = [torch.ones(3, dtype=DOUBLE, requires_grad=True)]
    update, memory = update_of(kind(params, lr=0.1), params)
    grads = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE, requires_grad=True)
    (new,), _ = update((params[0],), (grads,), memory)
    found = torch.autograd.grad(new.sum(), (params[0], grads))
    assert all(bool(torch.isfinite(part).all()) for part in found)


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


def test_gradient_descent() -> None:
    (new,), memory = GradientDescent(0.5)((torch.ones(2),), (torch.tensor([1.0, -1.0]),), ())
    assert torch.equal(new, torch.tensor([0.5, 1.5]))
    assert memory == ()


class _Mine(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, _Mine])
def test_other_optimisers_are_refused(kind: Any) -> None:
    params = [torch.ones(1, requires_grad=True)]
    with pytest.raises(ConfigError, match=rf"knows SGD, Adam, AdamW; the inner problem uses {kind.__name__}"):
        update_of(kind(params, lr=0.1), params)


def test_amsgrad_is_refused() -> None:
    params = [torch.ones(1, requires_grad=True)]
    with pytest.raises(ConfigError, match="amsgrad=True: set it to False"):
        update_of(torch.optim.Adam(params, amsgrad=True), params)
