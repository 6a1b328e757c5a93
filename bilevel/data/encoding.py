"""What a loader says of its state, in the types that a checkpoint can hold, and back without loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import CheckpointError

__all__ = ["decode", "encode"]

_PLAIN = (type(None), bool, int, float, str)


def encode(value: Any, where: str) -> Any:
    """Returns ``value`` as nested tuples of a kind and its content; None, numbers and strings stand for themselves.

    Args:
        value: None, numbers, strings, bytes, tensors, NumPy scalars and arrays; tuples, lists, sets and dictionaries
            of these.
        where: What is encoded, for messages.

    Raises:
        CheckpointError: ``value`` holds something else; subclasses included, since they would not come back.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return ("tensor", value.detach().clone())
    if kind in (bytes, bytearray):
        return (kind.__name__, _from_bytes(bytes(value)))
    if kind in (list, tuple, set, frozenset):
        return (kind.__name__, [encode(item, f"{where}[{place}]") for place, item in enumerate(value)])
    if kind is dict:
        return ("dict", [[encode(key, where), encode(item, f"{where}.{key}")] for key, item in value.items()])
    if isinstance(value, np.generic) or kind is np.ndarray:
        array = np.asarray(value)
        if not array.dtype.hasobject and array.dtype.names is None:
            name = "scalar" if isinstance(value, np.generic) else "array"
            return (name, [array.dtype.str, list(array.shape), _from_bytes(array.tobytes())])
    raise CheckpointError(
        f"{where} is a {kind.__name__}, which a checkpoint cannot hold: let state_dict() return None, numbers, "
        "strings, bytes, tensors and NumPy arrays in tuples, lists, sets and dictionaries"
    )


def decode(value: Any) -> Any:
    """Returns what :func:`encode` was given.

    Raises:
        ValueError: ``value`` is none of its results.
    """
    if type(value) in _PLAIN:
        return value
    kind, content = value
    if kind == "tensor":
        return content
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray)(_to_bytes(content))
    if kind in ("scalar", "array"):
        name, shape, raw = content
        array = np.frombuffer(_to_bytes(raw), dtype=np.dtype(name)).reshape(shape).copy()
        return array[()] if kind == "scalar" else array
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    containers: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind in containers:
        return containers[kind](decode(item) for item in content)
    raise ValueError(f"unknown entry {kind!r}")


def _from_bytes(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
