"""Betty's batches: what ``training_step`` is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from bilevel.data import BatchStream
from bilevel.errors import DataError

__all__ = ["Together", "converted", "share"]

Device = str | torch.device


def converted(batch: Any, device: Device, name: str) -> Any:
    """Returns a loader's batch as Betty hands it on: a mapping, or a tuple of what it yields, tensors on the device.

    Args:
        batch: The batch.
        device: Where tensors go.
        name: The problem's name, for messages.

    Raises:
        DataError: It is neither a mapping nor something to iterate over.
    """
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if not isinstance(batch, Iterable) or (isinstance(batch, Tensor) and not batch.dim()):
        raise DataError(
            f"a batch of problem {name!r} must be a mapping or a tuple or list of parts, not {batch!r}. Let the loader "
            "yield (x, y), (x,) or {'x': x}; batches of another form come from your own get_batch()"
        )
    return tuple(_moved(value, device) for value in batch)


class Together:
    """One batch of every loader at a time, each loader with epochs of its own.

    Args:
        loaders: The loaders.
        name: The problem's name, for messages.
    """

    def __init__(self, loaders: Sequence[Iterable[Any]], name: str) -> None:
        self._loaders = tuple(loaders)
        self._name = name

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
        """Yields without end: how often every loader has ended, and a batch of each.

        The order of all follows from one number of torch's generator.
        """
        seed = int(torch.empty((), dtype=torch.int64).random_())
        streams = [
            BatchStream(loader, f"{self._name} (loader {place})", seed % 2**32)
            for place, loader in enumerate(self._loaders)
        ]
        while True:
            batches = tuple(stream.next() for stream in streams)
            yield tuple(stream.epoch for stream in streams), batches


def share(loader: Iterable[Any], rank: int, size: int) -> Iterable[Any]:
    """Returns every ``size``-th batch of a loader, from the ``rank``-th on; the last incomplete round is left out.

    Args:
        loader: A ``DataLoader`` over a data set with indices, or a list or tuple of batches.
        rank: This process.
        size: All processes.

    Raises:
        DataError: Something else, which cannot be told apart by batches.
    """
    if isinstance(loader, (list, tuple)):
        return loader[: len(loader) // size * size][rank::size]
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not isinstance(loader, DataLoader) or not indexed or loader.batch_sampler is None:
        raise DataError(
            f"strategy='distributed' gives each process its share of the batches, which a {type(loader).__name__} does "
            "not allow: use a DataLoader with batches over a data set with indices, or get_batch()"
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=_Share(loader.batch_sampler, rank, size),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _Share(Sampler[list[int]]):
    def __init__(self, batches: Iterable[list[int]], rank: int, size: int) -> None:
        self._batches = batches
        self.sampler = getattr(batches, "sampler", None)
        """Where a generator may be that decides on the order."""
        self._rank = rank
        self._size = size

    def __iter__(self) -> Iterator[list[int]]:
        kept = None
        for place, batch in enumerate(self._batches):
            if place % self._size == self._rank:
                kept = batch
            if place % self._size == self._size - 1:
                assert kept is not None
                yield kept

    def __len__(self) -> int:
        return len(self._batches) // self._size  # type: ignore[arg-type]


def _moved(value: Any, device: Device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
