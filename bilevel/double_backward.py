"""What cannot be differentiated twice, and the error that says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from bilevel.errors import LossError
from bilevel.vector import Tensors

__all__ = ["refuse_once_differentiable", "second_derivative_errors"]


@contextmanager
def second_derivative_errors(name: str) -> Iterator[None]:
    """Names the operation that has no second derivative, and the way out."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(sign in text for sign in _REENTRANT):
            raise LossError(
                f"the loss of {name} cannot be differentiated: reentrant activation checkpointing works with "
                ".backward() only. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) "
                f"({text.splitlines()[0]})"
            ) from error
        for sign, reason in _NO_SECOND_DERIVATIVE.items():
            if sign in text:
                raise _no_second_derivative(name, f"{reason} ({text.splitlines()[0]})") from error
        raise


def _no_second_derivative(name: str, reason: str) -> LossError:
    return LossError(
        f"the loss of {name} cannot be differentiated twice: {reason}. Give the method products='finite_difference', "
        "or use method 'finite_difference': both need first derivatives only. Or replace the operation (for "
        "attention: the math back end, torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or eager attention)."
    )


def refuse_once_differentiable(value: Tensor, inputs: Tensors, name: str) -> None:
    """Raises for a custom function marked ``once_differentiable`` on the way to an input.

    Asked for particular inputs, autograd finds no path through what such a function returns and leaves its part of the
    second derivative out, without a word. Walks the forward graph: about a microsecond a node.
    """
    nodes = _reachable(value.grad_fn)
    for node in nodes:
        if not _is_once_differentiable(node):
            continue
        leaves_below = {id(getattr(below, "variable", None)) for below in _reachable(node)}
        if any(id(part) in leaves_below for part in inputs):
            function = type(node).__name__.removesuffix("Backward")
            raise _no_second_derivative(name, f"the custom function {function} is marked once_differentiable")


def _is_once_differentiable(node: Node) -> bool:
    backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
    # The decorator's wrapper carries the user's name; its globals are those of the module that defines the decorator.
    module = getattr(backward, "__globals__", {}).get("__name__")
    return hasattr(backward, "__wrapped__") and module == once_differentiable.__module__


def _reachable(root: Node | None) -> set[Node]:
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return seen


_REENTRANT = (
    "Checkpointing is not compatible with .grad()",
    "When use_reentrant=True, torch.utils.checkpoint is incompatible",
)

_NO_SECOND_DERIVATIVE: Mapping[str, str] = {
    "derivative for aten::": "an operation has no second derivative",
    "derivative for '": "an operation has no second derivative",
    "does not currently support double backward": "compiled graphs have no second derivative",
}
