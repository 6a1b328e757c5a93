"""A DataLoader as a source: its samplers' epochs, its generators, and workers that outlive an epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from bilevel.data.generators import Generators
from bilevel.data.source import Source
from bilevel.data.tracked import Stateful

__all__ = ["LoaderSource"]


class LoaderSource(Source):
    """A ``DataLoader``, whose position is found again by drawing the epoch's first batches again."""

    batches: DataLoader[Any]

    def __init__(self, batches: DataLoader[Any]) -> None:
        super().__init__(batches)
        self.num_workers = batches.num_workers
        self._persistent = batches.persistent_workers and batches.num_workers > 0
        self._live: DataLoader[Any] | None = None

    def begin(self, epoch: int, generators: Generators, state: dict[str, Any] | None = None) -> Iterator[Any]:
        """Returns an iterator over an epoch; see :meth:`Source.begin`."""
        self._prepare(epoch, generators)
        if not self._persistent:
            with generators.installed(self.own_generators):
                return iter(self.batches)
        if self._live is None:
            # A copy, since a loader hands out one iterator as long as its workers live: one that broke could not be
            # got rid of, and one that somebody else iterates would be torn away.
            self._live = _untouched(self.batches)
            if epoch:
                # The workers lived through earlier epochs. Making them draws random numbers, which this epoch did not.
                with generators.copy().installed(self.own_generators):
                    iter(self._live)
        with generators.installed(self.own_generators):
            return iter(self._live)

    def abandon(self) -> None:
        """Forgets the present iterator, and its workers."""
        self._live = None

    def caveat(self, epoch: int) -> str:
        """Returns why batches may differ; see :meth:`Source.caveat`."""
        if reason := self._out_of_order():
            return reason
        data: Any = self.batches.dataset
        if isinstance(data, Stateful) and not isinstance(data, IterableDataset):
            return (
                "the data set has a state of its own, which drawing the epoch again does not restore: use torchdata's "
                "StatefulDataLoader with a sampler of torch's"
            )
        if self._persistent and epoch:
            return (
                "the random numbers that persistent workers draw themselves (augmentation) went on from earlier epochs "
                "and now start anew; the order is right. If the data set draws random numbers, set "
                "persistent_workers=False, or use torchdata's StatefulDataLoader with a sampler of torch's"
            )
        return ""

    def _out_of_order(self) -> str:
        if self.num_workers and not self.batches.in_order:
            return "workers deliver batches as they come (in_order=False): set in_order=True"
        return ""

    def _prepare(self, epoch: int, generators: Generators) -> None:
        """Makes the order of an epoch follow from its number and ``generators`` alone."""
        loader = self.batches
        inner = getattr(loader.batch_sampler, "sampler", None)
        for sampler in (loader.sampler, inner):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch + 1)
        holders = (loader, loader.sampler, loader.batch_sampler, inner)
        own = {id(g): g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)}
        self.own_generators = tuple(own.values())
        generators.seed_own(self.own_generators)


def _untouched(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns the same loader as if nobody had iterated it yet."""
    fresh = copy.copy(loader)
    fresh._iterator = None
    return fresh
