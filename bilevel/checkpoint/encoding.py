"""Nested states as JSON and numbered tensors, and back."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import CheckpointError

__all__ = ["decode", "encode"]

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(state: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """Returns a state as JSON values that refer to tensors by their place in a list, and that list.

    The tensors share memory with the state's; they are contiguous where the state's are dense, whatever the order of
    their dimensions.

    Raises:
        CheckpointError: Something in the state is neither a tensor, a number, text, bytes, None nor a container; the
            message says where.
    """
    tensors: list[Tensor] = []
    try:
        return _encode(state, tensors, "state"), tensors
    except RecursionError:
        raise CheckpointError("the state is nested too deeply, or contains itself") from None


def decode(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Returns the state that :func:`encode` was given.

    Raises:
        ValueError: The JSON is no encoded state, or does not use every tensor once.
        RecursionError: It is nested too deeply.
    """
    unused = dict(enumerate(tensors))
    state = _decode(value, unused)
    if unused:
        raise ValueError(f"{len(unused)} tensors belong to nothing")
    return state


def _encode(value: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, tensors, where)
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        # a scheduler's milestones are a Counter, and are asked for what only a Counter has
        kind = "counter" if isinstance(value, Counter) else "items"
        return {kind: [[_encode_key(k, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, f"{where}[{place}]") for place, item in enumerate(value)]}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold (tensors, numbers, text, bytes, "
        "containers): convert it in state_dict()"
    )


def _encode_key(key: Any, where: str) -> Any:
    if key is None or isinstance(key, (bool, int, str)) or (isinstance(key, float) and math.isfinite(key)):
        return key
    raise CheckpointError(f"{where} has the key {key!r:.80}: a checkpoint's keys are text and numbers")


def _encode_tensor(value: Tensor, tensors: list[Tensor], where: str) -> Any:
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        raise CheckpointError(
            f"{where} is a tensor with layout {value.layout} on {value.device}: a checkpoint holds dense ones with data"
        )
    entry: dict[str, Any] = {"tensor": len(tensors)}
    if value.is_complex():
        entry = {"complex": len(tensors)}
        value = torch.view_as_real(value.resolve_conj())
    value = value.resolve_neg()
    if not value.is_contiguous():
        # The order of dimensions in memory decides in which order sums are taken, and so their last bits.
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        if value.permute(order).is_contiguous():
            value, entry = value.permute(order), {**entry, "order": order}
    tensors.append(value)
    return entry


def _decode(value: Any, unused: dict[int, Tensor]) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a bare list")
        return value
    if "tensor" in value or "complex" in value:
        return _decode_tensor(value, unused)
    ((kind, content),) = value.items()
    if kind in ("float", "bytes"):
        if not isinstance(content, str):
            raise ValueError(f"a {kind} that is {content!r:.40}")
        return _NOT_FINITE[content] if kind == "float" else base64.b64decode(content, validate=True)
    if kind not in ("items", "counter", "list", "tuple") or not isinstance(content, list):
        raise ValueError(f"unknown entry {kind!r:.40}")
    if kind in ("list", "tuple"):
        items = [_decode(item, unused) for item in content]
        return tuple(items) if kind == "tuple" else items
    found: dict[Any, Any] = Counter() if kind == "counter" else {}
    for pair in content:
        key, item = pair if isinstance(pair, list) else (None, None)
        if isinstance(key, (dict, list)) or not isinstance(pair, list) or key in found:
            raise ValueError(f"the key {key!r:.40} occurs twice or is none")
        found[key] = _decode(item, unused)
    return found


def _decode_tensor(entry: dict[str, Any], unused: dict[int, Tensor]) -> Tensor:
    kind = "complex" if "complex" in entry else "tensor"
    place, order = entry[kind], entry.get("order")
    if set(entry) - {kind, "order"} or type(place) is not int or place not in unused:
        raise ValueError(f"an entry that names no tensor, or one twice: {entry!r:.60}")
    value = unused.pop(place)
    if order is not None:
        if not isinstance(order, list) or sorted(order) != list(range(value.dim())):
            raise ValueError(f"no order of dimensions: {order!r:.40}")
        value = value.permute([order.index(dimension) for dimension in range(value.dim())])
    return torch.view_as_complex(value) if kind == "complex" else value
