"""Arithmetic on tuples of tensors, the vectors of every solver.

A vector is a tuple of tensors of any shapes. Inner products accumulate in float64 over the tensors of the tuple, so
that splitting a tensor in two changes a result by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Tensors", "add", "axpy", "axpy_", "dot", "is_finite", "norm", "promote", "scale", "subtract", "zeros_like"]

Tensors = tuple[Tensor, ...]

LARGEST_FUSED = 6e4
"""Torch raises where a factor of ``torch.add`` is no number of the tensors' dtype; this one is in all of them."""


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Returns ``Σᵢ ⟨leftᵢ, rightᵢ⟩`` as a float64 scalar tensor (no synchronisation with the device)."""
    parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    total: Tensor = torch.stack([part.to(device=device, dtype=torch.float64) for part in parts]).sum()
    return total


def norm(vector: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm as a float64 scalar tensor, without overflow or underflow for float32 entries."""
    if not vector:
        return torch.zeros((), dtype=torch.float64)
    if all(part.device.type == "cpu" and part.dtype == torch.float32 for part in vector):
        # A third of the time of accumulating in float64; the range is checked, which costs nothing on a CPU.
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(vector))).double())
        if 1e-12 < float(total.detach()) < 1e12:
            return total
    device = vector[0].device
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64).to(device) for part in vector]
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total


def axpy(alpha: float | Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensors:
    """Returns ``alpha · x + y``."""
    if isinstance(alpha, Tensor) or not abs(alpha) < LARGEST_FUSED:
        return tuple(b + _scalar(alpha, a) * a for a, b in zip(x, y, strict=True))
    return tuple(torch.add(b, a, alpha=alpha) for a, b in zip(x, y, strict=True))


def axpy_(alpha: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """Adds ``alpha · x`` to y, in place."""
    for a, b in zip(x, y, strict=True):
        b.add_(a, alpha=alpha) if abs(alpha) < LARGEST_FUSED else b.add_(alpha * a)


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Returns ``left + right``."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


def subtract(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Returns ``left − right``."""
    return tuple(a - b for a, b in zip(left, right, strict=True))


def scale(alpha: float | Tensor, x: Sequence[Tensor]) -> Tensors:
    """Returns ``alpha · x``."""
    return tuple(_scalar(alpha, part) * part for part in x)


def zeros_like(vector: Sequence[Tensor]) -> Tensors:
    """Returns the zero vector of the same shapes."""
    return tuple(torch.zeros_like(part) for part in vector)


def promote(vector: Sequence[Tensor]) -> Tensors:
    """Returns the vector in float32 or better: half-precision parts are upcast, others are passed through."""
    return tuple(part.to(torch.promote_types(part.dtype, torch.float32)) for part in vector)


def is_finite(vector: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite (one synchronisation)."""
    if not vector:
        return True
    device = vector[0].device
    # The sum of a tensor is finite unless an entry is not (or it overflows, which the exact test then decides).
    sums = torch.stack([part.detach().sum(dtype=torch.float64).to(device) for part in vector])
    if bool(torch.isfinite(sums).all()):
        return True
    return all(bool(torch.isfinite(part).all()) for part in vector)


def _scalar(alpha: float | Tensor, like: Tensor) -> float | Tensor:
    return alpha.to(device=like.device, dtype=like.dtype) if isinstance(alpha, Tensor) else alpha
