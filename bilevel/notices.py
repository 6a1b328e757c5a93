"""Hooks called one after the other: what fails in one keeps no other from hearing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType

from bilevel.errors import BilevelError, BilevelWarning

__all__ = ["Notices"]


class Notices:
    """Collects what hooks raise; the first error is raised on leaving, the others are warnings.

    A callback that fails would otherwise leave those after it a step behind the engine, and their state is saved with
    the engine's. Where an exception is under way on leaving, errors of hooks are warnings all: they do not replace it.

    Args:
        when: The moment, for messages: ``"after step 3, which is complete"``.

    Raises:
        BilevelError: On leaving, where a hook failed; it names the hook and whose it is.

    Example:
        >>> heard = []
        >>> with Notices("after step 1") as notices:
        ...     notices.call("callback A", "on_step_end", lambda: 1 / 0)
        ...     notices.call("callback B", "on_step_end", lambda: heard.append("B"))
        Traceback (most recent call last):
            ...
        bilevel.errors.BilevelError: callback A failed in on_step_end, after step 1: ZeroDivisionError(...)
        >>> heard
        ['B']
    """

    def __init__(self, when: str) -> None:
        self._when = when
        self._failed: list[tuple[str, Exception]] = []

    def call(self, who: str, hook: str, function: Callable[[], object]) -> None:
        """Calls a hook."""
        try:
            function()
        except Exception as error:
            self._failed.append((f"{who} failed in {hook}, {self._when}: {error!r}", error))

    def __enter__(self) -> Notices:
        """Starts collecting."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises the first error, or warns of it where another exception is under way."""
        first = None if error is not None else next(iter(self._failed), None)
        for text, failure in self._failed:
            if first is None or failure is not first[1]:
                warnings.warn(text, BilevelWarning, stacklevel=3)
        if first is not None:
            raise BilevelError(first[0]) from first[1]
