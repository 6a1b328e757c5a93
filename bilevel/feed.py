"""Where the batches of one step come from: the caller of ``step``, or the problems' own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bilevel.data import BatchStream
from bilevel.errors import DataError, unknown_name

__all__ = ["Feed"]


class Feed:
    """Batches for one step.

    A problem's own data goes back with a step that fails (:meth:`BatchStream.rewind`). What was drawn from an iterator
    that the caller gave cannot be put back: give a failed step's batches again, or a list's ``iter`` anew. What such an
    iterator raises comes through as it is.

    Args:
        streams: The problems' own data.
        given: Batches by problem name: one batch for all updates of the problem in this step, or an iterator of
            batches.

    Raises:
        UnknownNameError: A batch for a problem that does not exist.
    """

    def __init__(self, streams: Mapping[str, BatchStream], given: Mapping[str, Any] | None = None) -> None:
        self._streams = streams
        self._given = dict(given or {})
        # Batches of given iterators that were looked at early.
        self._ahead: dict[str, Any] = {}
        for name in self._given:
            if name not in streams:
                raise unknown_name("problem", name, streams)

    def next(self, name: str) -> Any:
        """Returns the next batch of a problem.

        Raises:
            DataError: The iterator given for this problem has ended, or its own data failed or yields nothing.
        """
        if name not in self._given:
            return self._streams[name].next()
        if name in self._ahead:
            return self._ahead.pop(name)
        given = self._given[name]
        if not isinstance(given, Iterator):
            return given
        try:
            return next(given)
        except StopIteration:
            raise DataError(f"step() needs more batches for problem {name!r} than its iterator holds") from None

    def stream(self, name: str) -> BatchStream:
        """Returns a problem's own data."""
        return self._streams[name]

    def peek(self, name: str) -> Any:
        """Returns a problem's next batch; :meth:`next` returns it again.

        Raises:
            DataError: As for :meth:`next`.
        """
        if name not in self._given:
            return self._streams[name].peek()
        if name not in self._ahead:
            self._ahead[name] = self.next(name)
        return self._ahead[name]
