"""A data set whose examples say which ones they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from bilevel.errors import DataError

__all__ = ["Indexed", "View"]


class View(Dataset[Any]):
    """A data set whose example i is that of another one, with something added or changed.

    So that :func:`~bilevel.data.shared_indices` looks through it.
    """

    dataset: Any
    """The other one."""


class Indexed(View):
    """A map-style data set whose examples ``(input, target, …)`` become ``(input, target, …, index)``.

    So that what is learned for each example can be found, however batches are drawn. Of a ``Subset``, the indices are
    those within the subset, from 0 to its length.

    Args:
        dataset: The data set; its examples are tuples or lists.

    Raises:
        DataError: It has no length or cannot be indexed; on access, an example that is no tuple.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = Indexed(TensorDataset(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 1, 0])))
        >>> next(iter(DataLoader(data, batch_size=2)))
        [tensor([5., 6.]), tensor([0, 1]), tensor([0, 1])]
    """

    def __init__(self, dataset: Any) -> None:
        for needed in ("__len__", "__getitem__"):
            if not hasattr(dataset, needed):
                raise DataError(
                    f"Indexed needs a map-style data set, which a {type(dataset).__name__} is not: it has no {needed}. "
                    "What is only iterated has no indices; let its examples bring their own"
                )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = int(index) + (len(self) if index < 0 else 0)
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """Returns the examples of a batch, which loaders ask for together where they can."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        places = [int(index) + (len(self) if index < 0 else 0) for index in indices]
        examples = self.dataset.__getitems__(places)
        return [self._with_index(example, index) for example, index in zip(examples, places, strict=True)]

    def _with_index(self, example: Any, index: int) -> tuple[Any, ...]:
        if not isinstance(example, (tuple, list)):
            raise DataError(
                f"example {index} of the data set is a {type(example).__name__}, not a tuple (input, target): Indexed "
                "has no place for its index"
            )
        return (*example, index)
