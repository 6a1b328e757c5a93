"""Where the batches of one step come from: the caller of ``step``, or the problems' own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bilevel.data import BatchStream
from bilevel.errors import DataError, unknown_name

__all__ = ["Feed"]


class Feed:
    """Batches for one step.

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
        for name in self._given:
            if name not in streams:
                raise unknown_name("problem", name, streams)

    def next(self, name: str) -> Any:
        """Returns the next batch of a problem.

        Raises:
            DataError: The iterator given for this problem has ended, or its own data yields nothing.
        """
        if name not in self._given:
            return self._streams[name].next()
        batch = self._given[name]
        if isinstance(batch, Iterator):
            try:
                return next(batch)
            except StopIteration:
                raise DataError(f"step() needs more batches for problem {name!r} than its iterator holds") from None
        return batch

    def peek(self, name: str) -> Any:
        """Returns a problem's next batch without consuming it, where its own data is used."""
        if name not in self._given:
            return self._streams[name].peek()
        if isinstance(self._given[name], Iterator):
            first = next(self._given[name])
            rest = self._given[name]
            self._given[name] = _chain(first, rest)
            return first
        return self._given[name]


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
