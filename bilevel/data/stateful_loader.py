"""A StatefulDataLoader of torchdata as a source: it goes on in the middle of an epoch without drawing what came before.

torchdata is not imported: whoever made such a loader has imported it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    IterDataPipe,
    MapDataPipe,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from bilevel.data.generators import Generators
from bilevel.data.loader import LoaderSource
from bilevel.data.tracked import TrackedIterable, TrackedMap

__all__ = ["StatefulLoaderSource", "can_resume"]

# torchdata makes an iterator more than once where it restores one, passes over what was taken while it restores (with
# its own batch sampler) or when the first index is asked for (with any other), and asks samplers that have a state for
# it before they have begun. These give the same indices again with any batch sampler, for they draw from a seed of
# their own,
_SEEDED = (SequentialSampler, DistributedSampler)
# and these with torchdata's, for they draw when the first index is asked for.
_LAZY = (*_SEEDED, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class _Loader(Protocol):
    """What is used of a ``StatefulDataLoader``."""

    dataset: Any
    generator: torch.Generator | None
    next_iter_state: dict[str, Any] | None

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class StatefulLoaderSource(LoaderSource):
    """A ``StatefulDataLoader``, iterated through a copy whose data set also keeps its workers' generators."""

    keeps_state = True

    def __init__(self, batches: DataLoader[Any]) -> None:
        super().__init__(batches)
        self._copy: _Loader | None = None
        # An iterable data set whose iterator is a generator has the state of the end of the epoch before until it is
        # asked for an example.
        self.keeps_state_at_start = not isinstance(batches.dataset, IterableDataset)

    def begin(self, epoch: int, generators: Generators, state: dict[str, Any] | None = None) -> Iterator[Any]:
        """Returns an iterator over an epoch, or over the rest of it after ``state``."""
        self._prepare(epoch, generators)
        if self._copy is None:
            self._copy = _tracked(self.batches)
        # The workers' seed comes from here, and not from where samplers draw: it is not drawn again on restoring.
        self._copy.generator = torch.Generator().manual_seed(generators.seed())
        if state is not None:
            # a copy, which the loader may go on to change
            self._copy.load_state_dict(copy.deepcopy(state))
        with generators.installed(self.own_generators):
            return iter(self._copy)

    def state(self) -> dict[str, Any]:
        """Returns where the present iterator stands."""
        assert self._copy is not None
        return copy.deepcopy(self._copy.state_dict())

    def abandon(self) -> None:
        """Forgets the present iterator, and its workers."""
        self._copy = None

    def caveat(self, epoch: int) -> str:
        """Returns why batches may differ; see :meth:`Source.caveat`."""
        return self._out_of_order()


def can_resume(loader: DataLoader[Any]) -> bool:
    """Returns whether a loader is a ``StatefulDataLoader`` whose order it can restore itself.

    It can with the samplers of torch and torchdata. Any other may draw random numbers as often as it is iterated,
    and is then restored wrongly: the epoch is drawn again instead.
    """
    module = sys.modules.get("torchdata.stateful_dataloader")
    if module is None or not isinstance(loader, module.StatefulDataLoader):
        return False
    if isinstance(loader.dataset, (IterDataPipe, MapDataPipe)):
        return False
    if isinstance(loader.dataset, IterableDataset):
        return True
    torchdata_samplers = sys.modules["torchdata.stateful_dataloader.sampler"]
    batching: Any = loader.batch_sampler
    if batching is None:
        return type(loader.sampler) in (*_SEEDED, torchdata_samplers.RandomSampler)
    if type(batching) is torchdata_samplers.BatchSampler:
        return type(batching.sampler) in (*_LAZY, torchdata_samplers.RandomSampler)
    return type(batching) is BatchSampler and type(batching.sampler) in _SEEDED


def _tracked(loader: DataLoader[Any]) -> _Loader:
    """Returns the same loader as if nobody had iterated it yet, over a data set with a state."""
    fresh: Any = copy.copy(loader)
    fresh._iterator = None
    fresh._initial_iter_for_state_dict = False
    fresh.next_iter_state = None
    kind = TrackedIterable if isinstance(loader.dataset, IterableDataset) else TrackedMap
    # A loader refuses to be given another data set once it is made, for its sampler would be that of the first one;
    # here it is the same data set.
    vars(fresh)["dataset"] = kind(loader.dataset)
    tracked: _Loader = fresh
    return tracked
