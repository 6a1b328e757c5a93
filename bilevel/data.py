"""Endless batches with a position that can be saved and restored, drawn with random numbers of their own."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from bilevel.errors import CheckpointError, DataError

__all__ = ["BatchStream"]


class BatchStream:
    """Batches of one problem, epoch after epoch.

    Batches are drawn with generators of the stream's own (torch's, NumPy's and Python's global ones are swapped for the
    duration of a draw), so that their order depends on the seed alone: neither on what the losses draw nor on a batch
    that was looked at early.

    Args:
        source: A ``DataLoader`` or another iterable that can be iterated again; None for a problem without data,
            whose batch is None.
        name: The problem's name, for messages and the seed.
        seed: Seed of the order.

    Raises:
        DataError: ``source`` is not iterable.
    """

    def __init__(self, source: Iterable[Any] | None, name: str, seed: int) -> None:
        if source is not None and not isinstance(source, Iterable):
            raise DataError(
                f"data of problem {name!r} must be a DataLoader or another iterable of batches, not "
                f"{type(source).__name__}"
            )
        self.name = name
        self._source = source
        self._random = _Generators.seeded(zlib.crc32(name.encode()) ^ seed)
        self._epoch = 0
        self._taken = 0
        self.drawn = 0
        self._iterator: Iterator[Any] | None = None
        self._epoch_start: _Generators | None = None
        self._ahead: list[Any] = []
        # A sequence draws nothing while it is iterated.
        self._isolated = not isinstance(source, Sequence)

    @property
    def has_data(self) -> bool:
        """Whether the problem was given data."""
        return self._source is not None

    def next(self) -> Any:
        """Returns the next batch, starting a new epoch where one ends.

        Raises:
            DataError: The source yields nothing, or was an iterator and has ended.
        """
        if self._source is None:
            return None
        batch = self._ahead.pop(0) if self._ahead else self._draw()
        self._taken += 1
        self.drawn += 1
        return batch

    def peek(self) -> Any:
        """Returns the batch that :meth:`next` will return, without moving on."""
        if self._source is None:
            return None
        if not self._ahead:
            self._ahead.append(self._draw())
        return self._ahead[0]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: epochs begun before this one, generator states at its start, batches taken since."""
        if self._epoch_start is None:
            return {"epoch": self._epoch, "taken": 0, "random": self._random.state_dict()}
        return {"epoch": self._epoch - 1, "taken": self._taken, "random": self._epoch_start.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position by drawing the epoch's first batches again.

        Raises:
            CheckpointError: The source is an iterator, which cannot be started again, or ends before the position.
        """
        self._epoch, taken = int(state["epoch"]), int(state["taken"])
        self._random = _Generators.from_state_dict(state["random"])
        self._iterator, self._epoch_start, self._ahead, self._taken = None, None, [], 0
        if self._source is None:
            return
        if taken and isinstance(self._source, Iterator):
            raise CheckpointError(
                f"data of problem {self.name!r} is an iterator: its position cannot be restored. Use a DataLoader."
            )
        if taken:
            self._start()
        for _ in range(taken):
            try:
                self._advance()
            except StopIteration:
                raise CheckpointError(
                    f"data of problem {self.name!r} has fewer batches than when the checkpoint was written ({taken} "
                    "expected)"
                ) from None
        self._taken = taken

    def _draw(self) -> Any:
        if self._iterator is None:
            self._start()
        try:
            return self._advance()
        except StopIteration:
            self._start()
        try:
            return self._advance()
        except StopIteration:
            if isinstance(self._source, Iterator):
                raise DataError(
                    f"data of problem {self.name!r} was an iterator and has ended. Pass something that can be "
                    "iterated again: "
                    "a DataLoader or a list."
                ) from None
            raise DataError(
                f"data of problem {self.name!r} yields no batch: check the data set's size and drop_last"
            ) from None

    def _start(self) -> None:
        assert self._source is not None
        self._epoch += 1
        self._taken = 0
        self._epoch_start = self._random.copy()
        if isinstance(self._source, DataLoader):
            for sampler in (self._source.sampler, getattr(self._source.batch_sampler, "sampler", None)):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(self._epoch)
            self._follow_generators(self._source)
        with self._random.installed(self._isolated):
            self._iterator = iter(self._source)

    def _follow_generators(self, loader: DataLoader[Any]) -> None:
        """Seeds generators that the user gave to the loader, so that its order can be restored with the rest."""
        holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        owned = {id(g): g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)}
        if not owned:
            return
        with self._random.installed(True):
            for generator in owned.values():
                generator.manual_seed(int(torch.randint(2**62, ())))

    def _advance(self) -> Any:
        assert self._iterator is not None
        with self._random.installed(self._isolated):
            return next(self._iterator)


class _Generators:
    """States of torch's CPU generator, NumPy's and Python's."""

    def __init__(self, torch_state: torch.Tensor, numpy_state: Any, python_state: Any) -> None:
        self._states = (torch_state, numpy_state, python_state)

    @classmethod
    def seeded(cls, seed: int) -> _Generators:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            generator.get_state(), np.random.RandomState(seed % 2**32).get_state(), random.Random(seed).getstate()
        )

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> _Generators:
        kind, keys, position, has_gauss, gauss = state["numpy"]
        version, internal, gauss_next = state["python"]
        numpy_state = (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
        return cls(state["torch"], numpy_state, (version, tuple(internal.tolist()), gauss_next))

    def state_dict(self) -> dict[str, Any]:
        torch_state, numpy_state, python_state = self._states
        kind, keys, position, has_gauss, gauss = numpy_state
        version, internal, gauss_next = python_state
        return {
            "torch": torch_state,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
            "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
        }

    def copy(self) -> _Generators:
        return _Generators(*self._states)

    @contextmanager
    def installed(self, active: bool) -> Iterator[None]:
        """Makes these the global generators for the body, and keeps what it leaves them in."""
        if not active:
            yield
            return
        outside = _current()
        _install(self._states)
        try:
            yield
        finally:
            self._states = _current()
            _install(outside)


def _current() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _install(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
