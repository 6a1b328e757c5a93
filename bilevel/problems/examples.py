"""What problems share that know their training examples one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bilevel.data.indexed import Indexed
from bilevel.errors import DataError, LossError
from bilevel.problems.supervised import Criterion, Training, batch_parts

__all__ = ["check_index_range", "check_indices", "example_losses", "indexed_batch", "per_example"]


def indexed_batch(name: str, batch: Any) -> tuple[Any, Any, Tensor]:
    """Returns inputs, targets and indices.

    Raises:
        DataError: A batch of another form.
    """
    remedy = "wrap its data set in bilevel.problems.Indexed, which adds the indices"
    inputs, targets, indices = batch_parts(name, batch, "inputs", "targets", "indices", remedy=remedy)
    return inputs, targets, indices


def check_indices(name: str, indices: object, size: int) -> None:
    """Raises unless each index is one of ``size`` examples.

    Raises:
        DataError: It is not, or is no integer.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise DataError(f"problem {name!r}: indices of examples must be a tensor of integers, not {kind}")
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise DataError(
            f"problem {name!r} has {size} examples, and a batch has the indices {int(indices.min())} to "
            f"{int(indices.max())}: these are examples that are not in the data set. Count them from 0, and give "
            "num_examples=len(training set)"
        )


def check_index_range(problem: Training, outer: str, size: int, what: str) -> None:
    """Raises unless as many examples have indices as ``size``, where the number is known.

    Args:
        problem: Whose data has the indices.
        outer: The problem that holds something for each example.
        size: For how many.
        what: What that is: ``"weights"``.

    Raises:
        DataError: There are more or fewer.
    """
    dataset = problem.data.dataset if isinstance(problem.data, DataLoader) else None
    while isinstance(dataset, Subset):  # of an indexed data set: its indices are those of the whole
        dataset = dataset.dataset
    if isinstance(dataset, Indexed) and len(dataset) != size:
        wrong = "examples that are not in the data set have some" if size > len(dataset) else "some examples have none"
        raise DataError(
            f"problem {outer!r} has {what} for {size} examples, and the data set of problem {problem.name!r} has "
            f"{len(dataset)}: {wrong}. Make both from the same training set"
        )


def example_losses(name: str, criterion: Criterion, outputs: Any, targets: Any, count: int) -> Tensor:
    """Returns a criterion's value for each of ``count`` examples; raises as :func:`per_example`."""
    return per_example(name, criterion(outputs, targets, reduction="none"), count)


def per_example(name: str, losses: Tensor, count: int) -> Tensor:
    """Returns one value for each of ``count`` examples, ``(count,)``: of several (tokens, pixels), their mean.

    Raises:
        LossError: There are no values for each example: the criterion reduces.
    """
    if losses.ndim == 0 or len(losses) != count:
        raise LossError(
            f"the criterion of problem {name!r} must return values for each of the {count} examples of a batch where "
            f"it is called with reduction='none'; it returned the shape {tuple(losses.shape)}"
        )
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
