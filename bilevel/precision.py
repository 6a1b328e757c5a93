"""Running a user's function in float64, although it closes over data and modules in lower precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DoublePrecision"]

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS: Mapping[Any, Any] = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.half: torch.Tensor.double,
    torch.Tensor.bfloat16: torch.Tensor.double,
}
_AS_THEY_ARE = (torch.autograd.grad, torch.Tensor.backward, torch.Tensor.requires_grad_, torch.Tensor.view)
_RANDOM = frozenset(
    {"bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randn", "randn_like"}
    | {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "uniform_"}
)


class DoublePrecision(TorchFunctionMode):
    """A context in which torch functions compute in float64.

    Floating arguments are upcast, requested dtypes replaced; gradients flow through the casts. Tensors that exist
    outside keep their dtype: an operation that works in place on one of them does so in its precision. Random numbers
    are drawn in the precision of the original, so that they are the same numbers. A backward pass may run outside.

    Args:
        original: The dtype in which the function normally runs.

    Attributes:
        forced: Names of the functions that computed in lower precision nonetheless.
    """

    def __init__(self, original: torch.dtype) -> None:
        super().__init__()
        self._original = original
        self.forced: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one torch function."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _AS_THEY_ARE or name in ("__set__", "__delete__"):
            return func(*args, **kwargs)
        if name in _RANDOM and (args or not name.endswith("_")):  # torch.nn.init passes names
            return self._draw(func, name, args, kwargs)
        if _in_place(name) or kwargs.get("out") is not None:
            return self._in_place(func, name, args, kwargs)
        args, kwargs = _map(args, _precise), _map(kwargs, _precise)
        result = _CASTS.get(func, func)(*args, **kwargs)
        if name != "__get__" and _any_low(result) and _any_floating((args, kwargs)):
            self.forced[name] = None
        return _map(result, _precise)

    def _draw(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def original(leaf: Any) -> Any:
            return leaf.to(self._original) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64 else leaf

        if not name.endswith("_"):
            if name.endswith("_like") and "dtype" not in kwargs and args[0].dtype == torch.float64:
                kwargs = {**kwargs, "dtype": self._original}
            return _map(func(*_map(args, original), **_map(kwargs, original)), _precise)
        target = args[0]
        if target.dtype != torch.float64:
            return func(*args, **kwargs)
        drawn = torch.empty_like(target, dtype=self._original)
        func(drawn, *_map(args[1:], original), **_map(kwargs, original))
        return target.copy_(drawn)

    def _in_place(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = kwargs.get("out", args[0] if args else None)
        if isinstance(target, Tensor) and target.dtype in _LOW:
            self.forced[name] = None
            return func(*args, **kwargs)
        out = {} if kwargs.get("out") is None else {"out": kwargs["out"]}
        rest = {key: _map(value, _precise) for key, value in kwargs.items() if key != "out"}
        return func(*_map(args, _precise), **rest, **out)


def _in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _precise(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(torch.float64) if leaf.dtype in _LOW else leaf
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _LOW else leaf


def _map(node: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to the leaves of nested lists, tuples and dictionaries."""
    if isinstance(node, dict):
        return {key: _map(value, function) for key, value in node.items()}
    if isinstance(node, list):
        return [_map(value, function) for value in node]
    if isinstance(node, tuple) and not isinstance(node, torch.Size):
        values = [_map(value, function) for value in node]
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    return function(node)


def _any_low(node: Any) -> bool:
    return _found(node, lambda leaf: isinstance(leaf, Tensor) and leaf.dtype in _LOW)


def _any_floating(node: Any) -> bool:
    return _found(node, lambda leaf: isinstance(leaf, Tensor) and leaf.dtype.is_floating_point)


def _found(node: Any, condition: Callable[[Any], bool]) -> bool:
    found = False

    def look(leaf: Any) -> Any:
        nonlocal found
        found = found or condition(leaf)
        return leaf

    _map(node, look)
    return found
