"""Data parallelism: every rank holds all parameters and its share of each batch."""

from __future__ import annotations

import torch.distributed as dist

from bilevel.functional import Reduce
from bilevel.vector import Tensors

__all__ = ["least", "mean", "rank", "reducer", "size"]


def rank() -> int:
    """Returns this process's rank; 0 without torch.distributed."""
    return dist.get_rank() if _initialised() else 0


def size() -> int:
    """Returns the number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if _initialised() else 1


def least(value: int) -> int:
    """Returns the smallest of a number over the ranks. Every rank must call it."""
    gathered = [value] * size()
    if size() > 1:
        dist.all_gather_object(gathered, value)
    return min(gathered)


def mean(value: float | None) -> float | None:
    """Returns the mean of a number over the ranks, the same bits on each of them; None where a rank has none.

    Decisions that all ranks must take alike rest on this. Every rank must call it.
    """
    if size() == 1:
        return value
    gathered: list[float | None] = [None] * size()
    dist.all_gather_object(gathered, value)
    known = [one for one in gathered if one is not None]
    return sum(known) / len(known) if len(known) == len(gathered) else None


def reducer() -> Reduce:
    """Returns the mean over ranks of a tuple of tensors, or the identity for a single process.

    Gradients and second-order products are linear in the loss, so that the mean of per-rank ones is that of the
    global batch where ranks hold equally many examples.
    """
    if not _initialised() or dist.get_world_size() == 1:
        return lambda tensors: tensors
    return _mean


def _mean(tensors: Tensors) -> Tensors:
    size = dist.get_world_size()
    reduced = [tensor.detach().clone() for tensor in tensors]
    for tensor in reduced:
        dist.all_reduce(tensor)
        tensor.div_(size)
    return tuple(reduced)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
