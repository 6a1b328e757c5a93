"""Data sets whose state includes the random generators of the worker that reads them.

torchdata keeps the state of a data set in each worker, but not the worker's generators, so that augmentation would
repeat itself after resuming.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

__all__ = ["Stateful", "TrackedIterable", "TrackedMap"]


@runtime_checkable
class Stateful(Protocol):
    """Something that says where it stands, and goes there."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes where it stood."""
        ...


class _Transparent:
    """Attributes are those of the data set, for ``worker_init_fn`` reads and sets them through ``get_worker_info``."""

    _inner: Any

    def __init__(self, inner: Any) -> None:
        object.__setattr__(self, "_inner", inner)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # while it is being made
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner,)


class TrackedMap(_Transparent, Dataset[Any]):
    """A map-style data set with a state."""

    def __getitem__(self, index: Any) -> Any:
        return self._inner[index]

    def __len__(self) -> int:
        return len(self._inner)

    def state_dict(self) -> dict[str, Any]:
        """Returns the data set's state, if it has one, and the worker's generators."""
        inner = self._inner.state_dict() if isinstance(self._inner, Stateful) else None
        return {"dataset": inner, "generators": _worker_generators()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        if state_dict["dataset"] is not None:
            self._inner.load_state_dict(state_dict["dataset"])
        _install(state_dict["generators"])


class TrackedIterable(_Transparent, IterableDataset[Any]):
    """An iterable data set with a state."""

    _latest: _TrackedIterator | None = None
    _begun_before = False

    def __iter__(self) -> Iterator[Any]:
        # past the data set's own attributes
        object.__setattr__(self, "_begun_before", self._begun_before or self._has_begun())
        object.__setattr__(self, "_latest", _TrackedIterator(self._inner))
        assert self._latest is not None
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Returns the data set's state, if it has one and is not its own iterator, whose state is kept by itself."""
        itself = self._latest is not None and self._latest.iterates_itself
        # One that was never asked for an example is as it was made, which its state may not express.
        known = isinstance(self._inner, Stateful) and not itself and (self._has_begun() or self._begun_before)
        return {"dataset": self._inner.state_dict() if known else None, "begun": self._has_begun()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        if state_dict["dataset"] is None:
            return
        self._inner.load_state_dict(state_dict["dataset"])
        object.__setattr__(self, "_begun_before", True)
        if not state_dict["begun"]:
            # It is the state of the end of the last epoch: that epoch's iterator takes it, and ends.
            next(iter(self._inner), None)

    def _has_begun(self) -> bool:
        return self._latest is not None and self._latest.begun


class _TrackedIterator(Iterator[Any]):
    """An iterator that goes on from its own state, from its data set's, or by passing over what it has yielded."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._start = _worker_generators()
        self._iterator = iter(dataset)
        self._yielded = 0
        self._ended = False

    @property
    def iterates_itself(self) -> bool:
        return self._iterator is self._dataset

    @property
    def begun(self) -> bool:
        return self._yielded > 0 or self._ended

    def __next__(self) -> Any:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        self._yielded += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        return {
            "iterator": self._iterator.state_dict() if isinstance(self._iterator, Stateful) else None,
            "yielded": self._yielded,
            "ended": self._ended,
            "start": self._start,
            "generators": _worker_generators(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["start"]
        if state_dict["iterator"] is not None and isinstance(self._iterator, Stateful):
            self._iterator.load_state_dict(state_dict["iterator"])
        elif not isinstance(self._dataset, Stateful):
            self._pass_over(state_dict["yielded"])
        elif state_dict["ended"]:
            # torchdata knows and does not ask again, but a generator takes its data set's state only once it is asked:
            # the next epoch's would take it.
            next(self._iterator, None)
        self._yielded, self._ended = state_dict["yielded"], state_dict["ended"]
        # last, for all of the above may have drawn
        _install(state_dict["generators"])

    def _pass_over(self, count: int) -> None:
        if self._start is not None:
            # Workers that live on begin an epoch with the generators that the last one left.
            _install(self._start)
            self._iterator = iter(self._dataset)
        for _ in islice(self._iterator, count):
            pass


def _worker_generators() -> list[Any] | None:
    """Returns the states of the worker's generators; None in the main process, where the stream keeps its own."""
    if get_worker_info() is None:
        return None
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    version, internal, gauss_next = random.getstate()
    python = [version, np.array(internal, dtype=np.uint32).tobytes(), gauss_next]
    return [torch.get_rng_state().numpy().tobytes(), [kind, keys.tobytes(), *rest], python]


def _install(states: list[Any] | None) -> None:
    if states is None or get_worker_info() is None:
        return
    torch_state, (kind, keys, *rest), (version, internal, gauss_next) = states
    torch.set_rng_state(torch.frombuffer(bytearray(torch_state), dtype=torch.uint8))
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    random.setstate((version, tuple(np.frombuffer(internal, dtype=np.uint32).tolist()), gauss_next))
