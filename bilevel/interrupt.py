"""Signals that ask a run to end, taken at moments when the state is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from bilevel.errors import unknown_name

__all__ = ["CATCHABLE", "STOP_SIGNALS", "Shield", "StopSignals", "check_signals", "signals_kept_from_children"]

STOP_SIGNALS = ("SIGINT", "SIGTERM")
"""Ctrl-C and a notebook's stop button; what schedulers and container hosts send before they kill."""

_NAMED = [number for number in signal.Signals if number in signal.valid_signals()]
CATCHABLE = tuple(sorted(number.name for number in _NAMED if number.name not in ("SIGKILL", "SIGSTOP")))
"""Names of the signals that a process may handle on this platform."""

# All: which ones stop a run is configuration, and programs raise from handlers of others.
_SHIELDED = tuple(int(signal.Signals[name]) for name in CATCHABLE)

# What the functions of ``signal`` wrap, where there is such a module. Those make enumerations of what these return,
# numbers where a handler is not Python's: to look at all signals takes them 20 µs before Python 3.12, and these one.
_bare: Any = getattr(signal, "_signal", signal)
_get_handler: Callable[[int], Any] = _bare.getsignal
_set_handler: Callable[[int, Any], Any] = _bare.signal


class _Handlers:
    """Installs one handler for several signals, and gives a signal to its former handler where that is due."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._active = False
        self._process = os.getpid()

    def _install(self, number: int, before: Any) -> None:
        self._before[number] = before
        _set_handler(number, self._handle)

    def _uninstall(self) -> None:
        self._active = False
        for number, before in self._before.items():
            present = _set_handler(number, before)
            # Somebody may have put a handler of his own in front meanwhile, as torch does for SIGCHLD: it stays.
            if present != self._handle:
                _set_handler(number, present)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._active and os.getpid() == self._process:
            self._received(number, frame)
        else:  # a forked child, or somebody kept this handler for longer than it was meant to be
            self._pass_on(number, frame)

    def _received(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)


class StopSignals(_Handlers):
    """While it is entered, the first of the given signals is noted, and each further one raises ``KeyboardInterrupt``.

    The loop inside reads :attr:`received` between its steps. Handlers are installed in the main thread only (elsewhere
    Python allows none: nothing is noted then), only where the present one is Python's default, so that a program's own
    handler and ``nohup`` keep their say, and they are put back on leaving. Where one loop runs within another, both
    end. A forked child that inherits the handlers does what it would have done without them.

    Args:
        names: Names of signals, such as ``"SIGINT"``.

    Raises:
        UnknownNameError: This platform has no such signal, or none that can be handled.

    Example:
        >>> import signal
        >>> with StopSignals() as stop:
        ...     for step in range(100):
        ...         if step == 3:
        ...             signal.raise_signal(signal.SIGINT)  # Ctrl-C
        ...         if stop.received:
        ...             break
        >>> step, stop.received
        (3, 'SIGINT')
    """

    def __init__(self, names: Iterable[str] = STOP_SIGNALS) -> None:
        super().__init__()
        self._names = check_signals(names)
        self.received = ""
        """Name of the first signal that came; empty before."""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for name in self._names:
                number = signal.Signals[name]
                before = _get_handler(number)
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                if before == default or _outer_loop(before) is not None:
                    self._install(number, before)
            self._active = True
        except BaseException:  # a signal that came too early
            self._uninstall()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._uninstall()

    def _received(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received:
            raise KeyboardInterrupt(f"{name}, after {self.received}")
        self.received = name
        if _outer_loop(self._before[number]) is not None:
            self._pass_on(number, frame)


class Shield(_Handlers):
    """While it is entered, no signal handler raises, save inside :meth:`opened`, and there only once.

    A step that changes state runs its work ``opened`` and undoes or completes it shielded: an exception that a handler
    raises (``KeyboardInterrupt``, an alarm, torch's report of a dead data-loader worker) arrives either inside the work
    or after the shield is left, never between. What came meanwhile is raised again on leaving. Handlers that are not
    Python's are left alone, as is everything outside the main thread, where no handler ever runs.

    Example:
        >>> import signal
        >>> with Shield() as shield:
        ...     try:
        ...         with shield.opened():
        ...             signal.raise_signal(signal.SIGINT)
        ...     except KeyboardInterrupt:
        ...         print("undone")
        undone
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[int] = []
        self._open = False

    def __enter__(self) -> Shield:
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in _SHIELDED:
                before = _get_handler(number)
                if callable(before):
                    self._install(number, before)
            self._active = True
        except BaseException:  # a signal that came too early
            self._uninstall()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._uninstall()
        finally:
            self._deliver()

    def opened(self) -> AbstractContextManager[None]:
        """Lets handlers do what they do, until one of them raises or the body ends."""
        return _Opened(self)

    def set_open(self, open_: bool) -> None:
        """Lets handlers do what they do, or no longer."""
        self._open = open_

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            self._pending.append(number)
            return
        self._open = False  # if the handler raises, the body has ended: nothing may disturb what comes next
        self._pass_on(number, frame)
        self._open = True

    def _deliver(self) -> None:
        if self._pending:
            try:
                signal.raise_signal(self._pending.pop(0))
            finally:  # one that raises keeps no other from being heard
                self._deliver()


class _Opened(AbstractContextManager[None]):
    __slots__ = ("_shield",)

    def __init__(self, shield: Shield) -> None:
        self._shield = shield

    def __enter__(self) -> None:
        self._shield.set_open(True)

    def __exit__(self, *_: object) -> None:
        self._shield.set_open(False)


@contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """Lets processes that the body starts never receive SIGINT.

    Ctrl-C in a terminal goes to every process of the group. Data-loader workers that end of it leave the step that is
    to be finished without batches. The signal is blocked rather than ignored, so that this process receives one that
    arrives meanwhile. Workers still end with SIGTERM, and with their parent.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_signals(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names of signals as a tuple, each once.

    Raises:
        UnknownNameError: This platform has no such signal, or none that can be handled.
    """
    found = tuple(dict.fromkeys((names,) if isinstance(names, str) else names))
    for name in found:
        if name not in CATCHABLE:
            raise unknown_name("signal", str(name), CATCHABLE)
    return found


def _outer_loop(handler: Any) -> StopSignals | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, StopSignals) else None
