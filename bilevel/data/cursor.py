"""Draws batches forward from a source, from any position, and stands where it stood after whatever failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from bilevel.data.position import Anchor, Position
from bilevel.data.source import Source
from bilevel.errors import DataError, warn
from bilevel.interrupt import signals_kept_from_children

__all__ = ["Cursor"]

_END = object()


class Cursor:
    """A place in a source, and the iterator that stands there.

    Args:
        source: What to draw from.
        name: The problem's name, for messages.
        position: Where to begin.
    """

    def __init__(self, source: Source, name: str, position: Position) -> None:
        self._source = source
        self._name = name
        self.position = position
        self._generators = position.start.copy()
        self._iterator: Iterator[Any] | None = None

    def draw(self) -> tuple[Position, Any]:
        """Returns the next batch and the position that it was drawn at, beginning a new epoch where one ends.

        Raises:
            DataError: The source failed, yields nothing, or was an iterator and has ended. The position is as before.
        """
        if self._iterator is None and not self._open(self.position):
            self._abandon()
            raise DataError(f"data of problem {self._name!r} has fewer batches than when they were first drawn")
        anchored = self._source.keeps_state
        if anchored:
            self.take_anchor(wanted=False)
        batch = self._advance(self.position)
        if batch is _END and self.position.taken:
            self.position = self._begin_next(self.position)
            if anchored:
                self.take_anchor(wanted=False)
            batch = self._advance(self.position)
        if batch is _END:
            raise self._no_batch()
        at = self.position
        self.position = at.after_one()
        return at, batch

    def seek(self, position: Position) -> bool:
        """Goes to a position, and returns whether there is such a one; the present one is kept otherwise.

        Raises:
            DataError: The source failed on the way; the present position is kept.
        """
        before = self.position
        self._abandon()
        if not position.drawn:
            self.position = position  # nothing to pass over: it is gone to when a batch is wanted
            return True
        reached = False
        try:
            reached = self._open(position)
        finally:
            if not reached:
                self._abandon()
                self.position = before
        return reached

    def take_anchor(self, *, wanted: bool) -> None:
        """Lets the position hold the loader's own state, where the loader says what it is.

        Args:
            wanted: Also where there is an anchor in this epoch.

        Raises:
            DataError: The loader's state cannot be taken.
        """
        at, source = self.position, self._source
        if not source.keeps_state or self._iterator is None or not (at.taken or source.keeps_state_at_start):
            return
        if at.anchor and (at.anchor.at.drawn == at.drawn or not wanted) and at.anchor.at.epoch == at.epoch:
            return
        with self._faults(lambda: f"the loader's state before batch number {at.drawn + 1} could not be taken"):
            state = source.state()
        anchor = Anchor(replace(at, anchor=None), self._generators.copy(), state, source.num_workers)
        self.position = replace(at, anchor=anchor)

    def _open(self, position: Position) -> bool:
        """Makes an iterator that stands at ``position``; returns whether there is such a position."""
        at = position.from_where()
        self._begin(at, position.anchor)
        while at.drawn < position.drawn:
            if self._advance(at) is not _END:
                at = at.after_one()
            elif at.taken and at.epoch < position.epoch:
                at = self._begin_next(at)
            else:
                return False
        if at.epoch < position.epoch:
            if self._advance(at) is not _END:
                return False
            self._begin_next(at)
        self.position = position
        caveat = self._source.caveat(position.epoch) if position.drawn else ""
        if caveat:
            message = f"data of problem {self._name!r}: going back may give other batches than the first time: {caveat}"
            warn(message)
        return True

    def _begin_next(self, at: Position) -> Position:
        following = Position(at.epoch + 1, 0, at.drawn, self._generators.copy(), at.anchor)
        self._begin(following, None)
        return following

    def _begin(self, at: Position, anchor: Anchor | None) -> None:
        self._generators = at.start.copy()
        # Workers that end of Ctrl-C would leave the step that is to be finished without batches.
        kept = signals_kept_from_children() if self._source.num_workers else nullcontext()
        with self._faults(lambda: f"epoch {at.epoch + 1} could not be begun"), kept:
            state = None if anchor is None else anchor.loader
            self._iterator = self._source.begin(at.epoch, self._generators, state)
        if anchor is not None:
            self._generators = anchor.generators.copy()

    def _advance(self, at: Position) -> Any:
        assert self._iterator is not None
        try:
            return self._source.advance(self._iterator, self._generators, _END)
        except BaseException as error:
            what = f"batch number {at.drawn + 1} (number {at.taken + 1} of epoch {at.epoch + 1}) failed"
            shown = self.failed(what, error)
            if shown is None:
                raise
            raise shown from error

    def _faults(self, what: Callable[[], str]) -> AbstractContextManager[None]:
        """Whatever is raised leaves no iterator in an unknown state."""
        return _Faults(self, what)

    def failed(self, what: str, error: BaseException) -> DataError | None:
        """Abandons the iterator; returns what to raise instead of an exception, if it is one."""
        self._abandon()
        if not isinstance(error, Exception):
            return None
        if self._source.num_workers:
            _release_frames(error)
        return DataError(self._describe(what, error))

    def _abandon(self) -> None:
        if self._source.restartable:
            self._iterator = None
            self._source.abandon()

    def _describe(self, what: str, error: Exception) -> str:
        text = f"data of problem {self._name!r}: {what} with {type(error).__name__}: {error}".rstrip(". \n")
        if not self._source.restartable:
            return f"{text}. It is an iterator, which cannot be begun again: pass a DataLoader or another iterable."
        text += ". The next draw tries the same batch again."
        if self._source.num_workers:
            text += (
                f" Set num_workers=0 (now {self._source.num_workers}) to see where it is raised; a worker that was "
                "killed most often had too little memory, or too little shared memory."
            )
        return text

    def _no_batch(self) -> DataError:
        if not self._source.restartable:
            return DataError(
                f"data of problem {self._name!r} was an iterator and has ended. Pass something that can be iterated "
                "again: a DataLoader or a list."
            )
        return DataError(f"data of problem {self._name!r} yields no batch: check the data set's size and drop_last")


class _Faults(AbstractContextManager[None]):
    __slots__ = ("_cursor", "_what")

    def __init__(self, cursor: Cursor, what: Callable[[], str]) -> None:
        self._cursor = cursor
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            shown = self._cursor.failed(self._what(), error)
            if shown is not None:
                raise shown from error


def _release_frames(error: BaseException | None) -> None:
    """Clears what a loader's frames hold, so that its workers end now and not when the exception is forgotten.

    They hold the iterator; what happened in the worker is in the message.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
