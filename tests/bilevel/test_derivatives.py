"""Derivatives that go to autograd's engine directly are those of ``torch.autograd.grad``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.errors import LossError
from bilevel.functional import derivatives, pulled_through


def variables() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes: tuple[tuple[int, ...], ...] = ((3, 2), (), (4,))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def loss(w: tuple[Tensor, ...]) -> Tensor:
    return (w[0].sin().sum() * w[1]).square()  # the third reaches nothing


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_the_derivatives_of_a_scalar_are_those_of_torch() -> None:
    w = variables()
    found = derivatives(loss(w), w)
    expected = torch.autograd.grad(loss(w), w, allow_unused=True)
    assert found[2] is None
    assert expected[2] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))  # type: ignore[arg-type]


def test_the_graph_is_kept_where_it_is_asked_for() -> None:
    w = variables()
    value = loss(w)
    grads = derivatives(value, w, create_graph=True)[:2]
    bars = tuple(torch.full_like(part, 2.0).double() for part in w[:2])  # of another dtype than the gradient
    product = pulled_through(grads, bars, w, "x", retain_graph=True)  # type: ignore[arg-type]
    again = pulled_through(grads, bars, w, "x", retain_graph=False)  # type: ignore[arg-type]
    total = sum((2.0 * grad).sum() for grad in derivatives(loss(w), w, create_graph=True)[:2])  # type: ignore[operator, misc]
    expected = torch.autograd.grad(total, w, allow_unused=True)  # type: ignore[call-overload]
    assert product is not None
    assert again is not None
    assert product[2] is None
    for a, b, c in zip(product[:2], again[:2], expected[:2], strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, c)
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        pulled_through(grads, bars, w, "x", retain_graph=False)  # type: ignore[arg-type]


def test_a_product_that_vanishes_is_none() -> None:
    w = variables()
    assert pulled_through((torch.ones(3),), (torch.ones(3),), w, "x", retain_graph=False) is None
    assert pulled_through((w[0] * 2,), (torch.ones(3, 2),), (), "x", retain_graph=False) is None


def test_who_overrides_functions_of_torch_sees_this_one() -> None:
    w = variables()
    value = loss(w)
    with Seen() as seen:
        derivatives(value, w)
    assert torch.autograd.grad in seen.functions


def test_an_operation_without_a_derivative_is_named() -> None:
    query = torch.randn(1, 1, 4, 2, requires_grad=True)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    value = attend(query, query, query)[0].square().sum()
    grads = derivatives(value, (query,), create_graph=True)
    with pytest.raises(LossError, match="the loss of problem 'x' cannot be differentiated twice"):
        pulled_through(grads, (torch.ones_like(query),), (query,), "problem 'x'", retain_graph=False)  # type: ignore[arg-type]


def test_a_torch_without_the_engine_s_name_returns_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    w = variables()
    direct, grad = derivatives(loss(w), w), torch.autograd.grad
    calls: list[int] = []

    def public(*arguments: Any, **how: Any) -> Any:
        calls.append(1)
        with monkeypatch.context() as whole:  # which torch's own function goes to
            whole.setattr(torch.autograd, "_engine_run_backward", engine, raising=False)
            return grad(*arguments, **how)

    engine = torch.autograd._engine_run_backward
    monkeypatch.delattr(torch.autograd, "_engine_run_backward")
    monkeypatch.setattr(torch.autograd, "grad", public)
    found = derivatives(loss(w), w)
    assert calls == [1]
    assert found[2] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:2], direct[:2], strict=True))  # type: ignore[arg-type]
