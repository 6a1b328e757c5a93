"""Hooks called one after the other: what fails in one keeps no other from hearing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import TracebackType

from bilevel.errors import BilevelError, BilevelWarning

__all__ = ["Notices"]


class Notices:
    """Collects what hooks raise, and raises the first on leaving; the others are its notes.

    A callback that fails would otherwise leave those after it a step behind the engine, and their state is saved with
    the engine's. Where an exception is under way on leaving, those of hooks are warnings: they do not replace it.

    Args:
        when: The moment, for messages: ``"after step 3, which is complete"``.

    Raises:
        BilevelError: On leaving, where a callback failed; it names the callback and the hook. An error that has a type
            of this library keeps it; so does everything that a problem's hooks raise, which gets a note.

    Example:
        >>> heard = []
        >>> with Notices("after step 1") as notices:
        ...     notices.callback("A", "on_step_end", lambda: 1 / 0)
        ...     notices.callback("B", "on_step_end", lambda: heard.append("B"))
        Traceback (most recent call last):
            ...
        bilevel.errors.BilevelError: callback A failed in on_step_end, after step 1: ZeroDivisionError(...)
        >>> heard
        ['B']
    """

    def __init__(self, when: str) -> None:
        self._when = when
        self._failed: list[tuple[str, Exception]] = []

    def callback(self, name: str, hook: str, function: Callable[[], object]) -> None:
        """Calls a callback's hook."""
        try:
            function()
        except BilevelError as error:
            text = f"callback {name} failed in {hook}, {self._when}: {error}"
            error.args = (text, *error.args[1:])
            self._failed.append((text, error))
        except Exception as error:
            shown = BilevelError(f"callback {name} failed in {hook}, {self._when}: {error!r}")
            shown.__cause__ = error
            self._failed.append((str(shown), shown))

    def problem(self, name: str, hook: str, function: Callable[[], object]) -> None:
        """Calls a problem's hook."""
        self.hook(f"problem {name!r} failed in {hook}", function)

    def hook(self, what: str, function: Callable[[], object]) -> None:
        """Calls something else of the user's.

        Args:
            what: What to say where it fails.
            function: What to call.
        """
        try:
            function()
        except Exception as error:
            text = f"{what}, {self._when}"
            _add_note(error, text)
            self._failed.append((f"{text}: {error!r}", error))

    def __enter__(self) -> Notices:
        """Starts collecting."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises the first error, or warns of it where another exception is under way."""
        failed, self._failed = self._failed, []
        if error is not None:
            for text, _ in failed:
                warnings.warn(text, BilevelWarning, stacklevel=3)
        elif failed:
            (_, first), *others = failed
            for text, _ in others:
                if not _add_note(first, f"And {text}"):
                    warnings.warn(text, BilevelWarning, stacklevel=3)
            try:
                raise first
            finally:  # no cycle of exception and frame
                del first, failed, others


def _add_note(error: Exception, text: str) -> bool:
    """Adds a note, where Python has them."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
        return True
    return False
