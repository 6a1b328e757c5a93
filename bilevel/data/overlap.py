"""Which examples two problems both draw: the outer one then judges what the inner one was fitted to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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

from bilevel.data.indexed import Indexed

__all__ = ["shared_indices"]

_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
# By data set: which of its examples may be drawn. The data set is held, since its identity is the key.
_Examples = dict[int, tuple[Any, set[int]]]


def shared_indices(first: object, second: object) -> list[int] | None:
    """Returns which examples two sources of data both draw from; nothing is iterated.

    A source is a ``DataLoader`` or a map-style data set. ``Subset``, ``ConcatDataset`` and
    :class:`~bilevel.data.Indexed` are looked through, torch's own samplers are known. Two sources have examples in
    common where both lead to the *same* data set object: whether different objects hold equal examples, nothing says.

    Args:
        first: Where one problem's batches come from.
        second: Where the other one's come from.

    Returns:
        The indices in the data set that both lead to, sorted; ``[]`` where they are apart. Where they lead to several
        such data sets, the indices are of the first that has any. None where it cannot be known: iterables, samplers of
        the user's own, different data sets.

    Cost: O(number of indices); no example is read.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, Subset, TensorDataset
        >>> data = TensorDataset(torch.arange(10))
        >>> train, validation = DataLoader(Subset(data, range(8))), DataLoader(Subset(data, range(7, 10)))
        >>> shared_indices(train, validation)
        [7]
    """
    one, other = _examples_of(first), _examples_of(second)
    if one is None or other is None:
        return None
    common = [key for key in one if key in other]
    if not common:
        return None
    return next((sorted(shared) for key in common if (shared := one[key][1] & other[key][1])), [])


def _examples_of(source: object) -> _Examples | None:
    if isinstance(source, DataLoader):
        drawn = _drawn(source)
        return None if drawn is None else _located(source.dataset, drawn)
    if isinstance(source, (IterableDataset, list, tuple, str, bytes)) or not _is_map_style(source):
        return None  # a list is one of batches, as problems take it
    return _located(source, _every(source))


def _drawn(loader: DataLoader[Any]) -> set[int] | None:
    """Returns the indices that a loader's sampler may draw, where that is known."""
    if isinstance(loader.dataset, IterableDataset) or not _is_map_style(loader.dataset):
        return None
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        sampler = loader.batch_sampler.sampler
    elif loader.batch_sampler is not None:
        return None  # the user's own
    if isinstance(sampler, SubsetRandomSampler):
        return _integers(sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return {place for place, weight in enumerate(sampler.weights.tolist()) if weight > 0}
    return _every(loader.dataset) if isinstance(sampler, _WHOLE) else None


def _located(dataset: Any, drawn: set[int] | None) -> _Examples | None:
    """Follows indices through views of data sets to those that hold the examples."""
    if drawn is None:
        return None
    if isinstance(dataset, Indexed):
        return _located(dataset.dataset, drawn)
    if isinstance(dataset, Subset):
        places = dataset.indices
        if any(not -len(places) <= index < len(places) for index in drawn):
            return None
        return _located(dataset.dataset, _integers(places[index] for index in drawn))
    if not _is_map_style(dataset):
        return None
    size = len(dataset)
    drawn = {index + size if index < 0 else index for index in drawn}
    if not isinstance(dataset, ConcatDataset):
        return {id(dataset): (dataset, drawn)}
    found: _Examples = {}
    start = 0
    for part in dataset.datasets:
        end = start + len(part)  # type: ignore[arg-type]  # ConcatDataset has asked for it
        inside = {index - start for index in drawn if start <= index < end}
        located = _located(part, inside)
        if located is None:
            return None
        for key, (base, inner) in located.items():
            found[key] = (base, inner | found[key][1] if key in found else inner)
        start = end
    return found


def _is_map_style(dataset: object) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def _every(dataset: Any) -> set[int]:
    return set(range(len(dataset)))


def _integers(indices: Iterable[Any]) -> set[int] | None:
    """Returns indices as integers; None where some are not (a data set with keys)."""
    try:
        return {int(index) for index in indices}
    except (TypeError, ValueError):
        return None
