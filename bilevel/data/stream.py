"""The batches of one problem, epoch after epoch."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.data.cursor import Cursor
from bilevel.data.generators import Generators
from bilevel.data.loader import LoaderSource
from bilevel.data.position import Position
from bilevel.data.source import Source
from bilevel.data.stateful_loader import StatefulLoaderSource, can_resume
from bilevel.errors import CheckpointError, DataError

__all__ = ["BatchStream"]


class BatchStream:
    """Batches of one problem, epoch after epoch.

    Batches are drawn with generators of the stream's own (torch's, NumPy's and Python's global ones, and those given to
    a loader, are swapped for the duration of a draw), so that their order depends on the seed alone: neither on what
    the losses draw, nor on a batch that was looked at early, nor on what else uses the same generator.

    A position is restored by drawing the epoch's first batches again; with torchdata's ``StatefulDataLoader``, whose
    data set and samplers are asked for their state, without. A draw that fails leaves the stream where it was: the next
    one tries the same batch again, in new workers where there are any.

    Args:
        source: A ``DataLoader`` or another iterable that can be iterated again; None for a problem without data,
            whose batch is None.
        name: The problem's name, for messages and the seed.
        seed: Seed of the order.

    Raises:
        DataError: ``source`` is not iterable, or looks like the parts of one batch.
    """

    def __init__(self, source: Iterable[Any] | None, name: str, seed: int) -> None:
        if source is not None and not isinstance(source, Iterable):
            raise DataError(
                f"data of problem {name!r} must be a DataLoader or another iterable of batches, not "
                f"{type(source).__name__}"
            )
        if isinstance(source, tuple) and _one_batch(source):
            raise DataError(
                f"data of problem {name!r} is a tuple of {len(source)} tensors of one length, which would be that many "
                "batches: pass [(x, y)] for one batch of all examples, or a DataLoader"
            )
        self.name = name
        self._source = None if source is None else _as_source(source)
        beginning = Position(0, 0, 0, Generators.seeded(zlib.crc32(name.encode()) ^ seed))
        self._cursor = Cursor(self._source or Source([]), name, beginning)
        # Batches that are to come, each with the position that it was drawn at: looked at early, or given back.
        self._ahead: deque[tuple[Position, Any]] = deque()
        # Those handed out since the mark; None where nobody marked.
        self._since: list[tuple[Position, Any]] | None = None
        self._anchor_wanted = False
        self.epoch = 0
        """Of the batch handed out last, counted from 0."""

    @property
    def has_data(self) -> bool:
        """Whether the problem was given data."""
        return self._source is not None

    @property
    def drawn(self) -> int:
        """How many batches have been handed out, rewound ones not counted."""
        return self._position.drawn

    def next(self) -> Any:
        """Returns the next batch, starting a new epoch where one ends.

        Raises:
            DataError: The source failed (its exception is the cause), yields nothing, or was an iterator and has ended.
        """
        if self._source is None:
            return None
        entry = self._ahead.popleft() if self._ahead else self._draw()
        if self._since is not None:
            self._since.append(entry)
        position, batch = entry
        self.epoch = position.epoch
        return batch

    def peek(self) -> Any:
        """Returns the batch that :meth:`next` will return, without moving on.

        Raises:
            DataError: As for :meth:`next`.
        """
        if self._source is None:
            return None
        if not self._ahead:
            self._anchor_wanted = True
            self._ahead.append(self._draw())
        return self._ahead[0][1]

    def mark(self) -> None:
        """Remembers the present position for :meth:`rewind`, in place of the mark before.

        Batches handed out from now on are kept, by reference, until the next mark.
        """
        self._since = []
        self._anchor_wanted = True

    def rewind(self) -> None:
        """Goes back to the mark: the batches drawn since come again, the same objects, whatever the source is.

        Raises:
            DataError: Nothing was marked, or a position was loaded since.
        """
        if self._since is None:
            raise DataError(f"data of problem {self.name!r} cannot go back: call mark() first")
        self._ahead.extendleft(reversed(self._since))
        self.epoch = self._position.epoch
        self._since = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, as nested containers of tensors, numbers and strings.

        Raises:
            CheckpointError: A ``StatefulDataLoader``'s state holds something that a checkpoint cannot.
            DataError: It cannot be taken.
        """
        if not self._ahead:
            self._cursor.take_anchor(wanted=True)
        where = f"the loader state of problem {self.name!r}"
        resumes = self._source is not None and self._source.keeps_state
        return {**self._position.state_dict(where), "stateful": resumes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; where that fails, the stream is where it was.

        Raises:
            CheckpointError: The state is that of another kind of source; the source is an iterator, which cannot be
                started again, or ends before the position.
            DataError: The source failed on the way to the position.
        """
        try:
            position, stateful = Position.from_state_dict(state), bool(state["stateful"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"no position of the data of problem {self.name!r}: {error!r}") from error
        if self._source is None:
            return
        if not self._source.restartable:
            if position.drawn or self.drawn:
                raise CheckpointError(
                    f"data of problem {self.name!r} is an iterator: its position cannot be restored. Use a DataLoader."
                )
            return
        self._check_kind(position, stateful)
        if not self._cursor.seek(position):
            raise CheckpointError(
                f"data of problem {self.name!r} has fewer batches than when the checkpoint was written "
                f"({position.taken} expected)"
            )
        self._ahead.clear()
        self._since = None
        self.epoch = position.epoch

    @property
    def _position(self) -> Position:
        return self._ahead[0][0] if self._ahead else self._cursor.position

    def _draw(self) -> tuple[Position, Any]:
        if self._anchor_wanted:
            self._cursor.take_anchor(wanted=True)
            self._anchor_wanted = False
        return self._cursor.draw()

    def _check_kind(self, position: Position, stateful: bool) -> None:
        assert self._source is not None
        if stateful != self._source.keeps_state and (position.drawn or position.anchor):
            kinds = ("a source that draws its epoch again", "a StatefulDataLoader that restores its state")
            raise CheckpointError(
                f"data of problem {self.name!r} was {kinds[stateful]} when the checkpoint was written and is "
                f"{kinds[not stateful]} now: their orders differ. Use the same loader and sampler."
            )
        if position.anchor is not None and position.anchor.num_workers != self._source.num_workers:
            raise CheckpointError(
                f"data of problem {self.name!r} was loaded by {position.anchor.num_workers} workers when the "
                f"checkpoint was written and is by {self._source.num_workers} now: its state is that "
                f"of its workers. Set num_workers={position.anchor.num_workers}."
            )


def _one_batch(parts: tuple[Any, ...]) -> bool:
    """Whether a tuple looks like the inputs and targets of the same examples rather than like batches."""
    tensors = [part for part in parts if isinstance(part, Tensor) and part.dim()]
    return 1 < len(parts) == len(tensors) and len({len(part) for part in tensors}) == 1


def _as_source(source: Iterable[Any]) -> Source:
    if not isinstance(source, DataLoader):
        return Source(source)
    return StatefulLoaderSource(source) if can_resume(source) else LoaderSource(source)
