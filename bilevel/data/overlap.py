"""Which examples two problems both draw: the outer one then judges what the inner one was fitted to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from bilevel.data.indexed import View

__all__ = ["DrawsAll", "shared_examples", "shared_indices"]

_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
# Of a whole data set, however large, a range: nothing is written out that need not be.
_Indices = range | NDArray[np.int64]
_Examples = dict[int, _Indices]  # by the identity of a data set: which of its examples may be drawn


class DrawsAll:
    """Marks a batch sampler that draws every example of its data set, sooner or later."""


def shared_indices(first: object, second: object) -> list[int] | None:
    """Returns which examples two sources of data both draw from; nothing is iterated.

    A source is a ``DataLoader`` or a map-style data set. ``Subset``, ``ConcatDataset``,
    :class:`~bilevel.data.Indexed` and :class:`~bilevel.problems.Sources` are looked through, torch's own samplers are
    known. Two sources have examples in common where both lead to the *same* data set object: whether different objects
    hold equal examples, nothing says.

    Args:
        first: Where one problem's batches come from.
        second: Where the other one's come from.

    Returns:
        The indices in the data set that both lead to, sorted; ``[]`` where they are apart. Where they lead to several
        such data sets, the indices are of the first that has any. None where it cannot be known: iterables, samplers of
        the user's own, different data sets.

    Cost: O(number of indices) where the data sets are the same; no example is read.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, Subset, TensorDataset
        >>> data = TensorDataset(torch.arange(10))
        >>> train, validation = DataLoader(Subset(data, range(8))), DataLoader(Subset(data, range(7, 10)))
        >>> shared_indices(train, validation)
        [7]
    """
    found = shared_examples(first, second)
    return None if found is None else [int(index) for index in found]


def shared_examples(first: object, second: object) -> _Indices | None:
    """Returns what :func:`shared_indices` does, as a range where it is one."""
    if not _bases(first) & _bases(second):
        return None
    one, other = _examples_of(first), _examples_of(second)
    if one is None or other is None:
        return None
    shared = (_intersection(one[key], other[key]) for key in one if key in other)
    return next((indices for indices in shared if len(indices)), range(0))


def _bases(source: object) -> set[int]:
    """Returns the identities of the data sets that a source leads to."""
    if isinstance(source, (DataLoader, View, Subset)):
        return _bases(source.dataset)
    if isinstance(source, ConcatDataset):
        return set().union(*map(_bases, source.datasets))
    return {id(source)}


def _examples_of(source: object) -> _Examples | None:
    if isinstance(source, DataLoader):
        drawn = _drawn(source)
        return None if drawn is None else _located(source.dataset, drawn)
    if isinstance(source, (IterableDataset, list, tuple, str, bytes)) or not _is_map_style(source):
        return None  # a list is one of batches, as problems take it
    return _located(source, _every(source))


def _drawn(loader: DataLoader[Any]) -> _Indices | None:
    """Returns the indices that a loader's sampler may draw, where that is known."""
    if isinstance(loader.dataset, IterableDataset) or not _is_map_style(loader.dataset):
        return None
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler:
        sampler = batches.sampler
    elif isinstance(batches, DrawsAll):
        return _every(loader.dataset)
    elif batches is not None:
        return None  # the user's own
    if isinstance(sampler, SubsetRandomSampler):
        return _integers(sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return np.flatnonzero(sampler.weights.cpu().numpy() > 0)
    return _every(loader.dataset) if isinstance(sampler, _WHOLE) else None


def _located(dataset: Any, drawn: _Indices | None) -> _Examples | None:
    """Follows indices through views of data sets to those that hold the examples."""
    if drawn is None:
        return None
    if isinstance(dataset, View):
        return _located(dataset.dataset, drawn)
    if isinstance(dataset, Subset):
        places = _integers(dataset.indices)
        return None if places is None else _located(dataset.dataset, _chosen(places, drawn))
    if not _is_map_style(dataset):
        return None
    size = len(dataset)
    if not isinstance(drawn, range):
        drawn = np.where(drawn < 0, drawn + size, drawn)
    if not isinstance(dataset, ConcatDataset):
        return {id(dataset): drawn}
    found: _Examples = {}
    start = 0
    for part in dataset.datasets:
        end = start + len(part)  # type: ignore[arg-type]  # ConcatDataset has asked for it
        located = _located(part, _shifted(_intersection(drawn, range(start, end)), -start))
        if located is None:
            return None
        for key, inner in located.items():
            found[key] = _union(inner, found[key]) if key in found else inner
        start = end
    return found


def _is_map_style(dataset: object) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def _every(dataset: Any) -> range:
    return range(len(dataset))


def _integers(indices: Iterable[Any]) -> _Indices | None:
    """Returns indices as integers; None where some are not (a data set with keys)."""
    if isinstance(indices, range) and indices.step == 1 and indices.start >= 0:
        return indices
    try:
        found = np.asarray(indices)
        if found.dtype.kind not in "iu":
            found = np.array([int(index) for index in indices], dtype=np.int64)
    except (TypeError, ValueError):
        return None
    return found.astype(np.int64)


def _chosen(places: _Indices, drawn: _Indices) -> _Indices | None:
    """Returns the places with the given indices; None where there are none of some."""
    if isinstance(drawn, range) and drawn == range(len(places)):
        return places
    wanted = np.asarray(drawn, dtype=np.int64)
    if len(wanted) and not -len(places) <= wanted.min() <= wanted.max() < len(places):
        return None
    if isinstance(places, range):
        return places.start + np.where(wanted < 0, wanted + len(places), wanted)
    found: NDArray[np.int64] = places[wanted]
    return found


def _intersection(one: _Indices, other: _Indices) -> _Indices:
    if isinstance(one, range) and isinstance(other, range):
        return range(max(one.start, other.start), min(one.stop, other.stop))
    if isinstance(one, range):
        return _intersection(other, one)
    if isinstance(other, range):
        return _sorted(one[(one >= other.start) & (one < other.stop)])
    few, many = sorted((one, other), key=len)
    return _sorted(few[np.isin(few, many)])


def _union(one: _Indices, other: _Indices) -> _Indices:
    if isinstance(one, range) and isinstance(other, range) and one == other:
        return one
    return _sorted(np.concatenate([np.asarray(part, dtype=np.int64) for part in (one, other)]))


def _sorted(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns each index once, in order; np.unique takes a hundred times as long."""
    found = np.sort(indices)
    return found[np.diff(found, prepend=-1) > 0]  # none is below 0


def _shifted(indices: _Indices, by: int) -> _Indices:
    return range(indices.start + by, indices.stop + by) if isinstance(indices, range) else indices + by
