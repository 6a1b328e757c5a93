"""Arithmetic on tuples of tensors, the vectors of every solver.

A vector is a tuple of tensors of any shapes. Inner products accumulate in float64 over the tensors of the tuple, so
that splitting a tensor in two changes a result by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Tensors",
    "add",
    "axpy",
    "axpy_",
    "dot",
    "is_finite",
    "length",
    "lengths",
    "negative",
    "norm",
    "on_host",
    "promote",
    "read",
    "scale",
    "subtract",
    "zeros_like",
]

Tensors = tuple[Tensor, ...]

_vector_norm = torch.linalg.vector_norm

LARGEST_FUSED = 6e4
"""Torch raises where a factor of ``torch.add`` is no number of the tensors' dtype; this one is in all of them."""


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Returns ``Σᵢ ⟨leftᵢ, rightᵢ⟩`` as a float64 scalar tensor (no synchronisation with the device)."""
    parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    if len(parts) == 1:
        return parts[0].double()
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    device, dtype = parts[0].device, parts[0].dtype
    if not all(part.dtype == dtype and part.device == device for part in parts):
        parts = [part.to(device=device, dtype=torch.float64) for part in parts]
    return torch.stack(parts).sum(dtype=torch.float64)


def norm(vector: Iterable[Tensor]) -> Tensor:
    """Returns the Euclidean norm as a float64 scalar tensor, without overflow or underflow for float32 entries.

    It has no derivative. No synchronisation with a device.
    """
    vector = tuple(vector)
    if vector and not vector[0].is_cpu:
        return _device_norm([part.detach() for part in vector], torch.float64)
    return torch.tensor(_host_length(vector), dtype=torch.float64)


def length(vector: Sequence[Tensor]) -> float:
    """Returns the Euclidean norm as a number (one synchronisation), without overflow or underflow as :func:`norm`."""
    return lengths(vector)[0]


def lengths(*vectors: Sequence[Tensor], also: Sequence[Tensor] = ()) -> list[float]:
    """Returns :func:`length` of several vectors, and then numbers, all in one synchronisation.

    Args:
        vectors: The vectors.
        also: Zero-dimensional tensors to be read with them.
    """
    if all(map(on_host, [*[vector[0] for vector in vectors if len(vector)], *also])):
        return [*map(_host_length, vectors), *[part.item() for part in also]]
    parts = [[part.detach() for part in vector] for vector in vectors]
    quick = [None if all(part.dtype is torch.float32 for part in vector) else torch.float64 for vector in parts]
    found = read([*map(_device_norm, parts, quick), *also])
    for place, vector in enumerate(parts):
        if quick[place] is None and not 1e-12 < found[place] < 1e12:  # squares may have left the range of float32
            found[place] = read([_device_norm(vector, torch.float64)])[0]
    return found


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Returns zero-dimensional tensors as numbers, in one transfer from the device of the first."""
    if len(numbers) == 1 or all(map(on_host, numbers)):
        return [number.item() for number in numbers]
    device = numbers[0].device
    found: list[float] = torch.stack([number.detach().to(device, torch.float64) for number in numbers]).tolist()
    return found


def on_host(part: Tensor) -> bool:
    """Whether its numbers are at hand: to read one of another device is to wait for all that is queued there."""
    return part.is_cpu


def _host_length(vector: Sequence[Tensor]) -> float:
    parts = [part.detach() if part.requires_grad else part for part in vector]
    if {(part.dtype, part.is_cpu) for part in parts} == {(torch.float32, True)}:
        # a third of the time of accumulating in float64; the range is checked
        total = math.hypot(*[size.item() for size in torch._foreach_norm(parts)])
        if 1e-12 < total < 1e12:
            return total
    return math.hypot(*[_vector_norm(part, dtype=torch.float64).item() for part in parts])


def _device_norm(parts: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    norms = [part.to(device) for part in torch._foreach_norm(parts, 2, dtype)]
    total: Tensor = _vector_norm(torch.stack(norms), dtype=torch.float64)
    return total


def axpy(alpha: float | Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensors:
    """Returns ``alpha · x + y``."""
    if isinstance(alpha, Tensor) or not abs(alpha) < LARGEST_FUSED:
        return tuple(b + _scalar(alpha, a) * a for a, b in zip(x, y, strict=True))
    return _joined(x, y, alpha)


def axpy_(alpha: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """Adds ``alpha · x`` to y, in place."""
    if not abs(alpha) < LARGEST_FUSED:
        for a, b in zip(x, y, strict=True):
            b.add_(alpha * a)
    elif _count(x, y):
        torch._foreach_add_(tuple(y), tuple(x), alpha=alpha)


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Returns ``left + right``."""
    return _joined(right, left, 1.0)


def subtract(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Returns ``left − right``."""
    return _joined(right, left, -1.0)


def scale(alpha: float | Tensor, x: Sequence[Tensor]) -> Tensors:
    """Returns ``alpha · x``."""
    if isinstance(alpha, Tensor) or len(x) < 2:
        return tuple([_scalar(alpha, part) * part for part in x])
    return tuple(torch._foreach_mul(tuple(x), alpha))


def negative(x: Sequence[Tensor]) -> Tensors:
    """Returns ``−x``."""
    return tuple(torch._foreach_neg(tuple(x)) if len(x) > 1 else [-part for part in x])


def zeros_like(vector: Sequence[Tensor]) -> Tensors:
    """Returns the zero vector of the same shapes."""
    return tuple(torch.zeros_like(part) for part in vector)


def promote(vector: Sequence[Tensor]) -> Tensors:
    """Returns the vector in float32 or better: half-precision parts are upcast, others are passed through."""
    return tuple(
        [
            part
            if part.dtype in (torch.float32, torch.float64)
            else part.to(torch.promote_types(part.dtype, torch.float32))
            for part in vector
        ]
    )


def is_finite(vector: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite (one synchronisation)."""
    # The sum of a tensor is finite unless an entry is not (or it overflows, which the exact test then decides).
    sums = [part.detach().sum() for part in vector]
    if all(part.is_cpu for part in sums):
        finite = math.isfinite(sum([part.item() for part in sums]))
    else:
        finite = math.isfinite(torch.stack([part.to(sums[0].device, torch.float64) for part in sums]).sum().item())
    return finite or all(bool(torch.isfinite(part).all()) for part in vector)


def _joined(x: Sequence[Tensor], y: Sequence[Tensor], alpha: float) -> Tensors:
    count = _count(x, y)
    if count == 1:
        return (torch.add(y[0], x[0], alpha=alpha),)
    if count == 0:
        return ()
    return tuple(torch._foreach_add(tuple(y), tuple(x), alpha=alpha))


def _count(x: Sequence[Tensor], y: Sequence[Tensor]) -> int:
    if len(x) != len(y):
        raise ValueError(f"vectors of {len(x)} and {len(y)} tensors are to be added")
    return len(x)


def _scalar(alpha: float | Tensor, like: Tensor) -> float | Tensor:
    return alpha.to(device=like.device, dtype=like.dtype) if isinstance(alpha, Tensor) else alpha
