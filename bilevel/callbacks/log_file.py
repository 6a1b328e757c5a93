"""Logs that append to a file, and cut it back to a saved position when a run is resumed."""

from __future__ import annotations

import os
import weakref
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bilevel.callbacks.step_log import StepLog
from bilevel.errors import CheckpointError, ConfigError

__all__ = ["LogFile"]


class LogFile(StepLog):
    """A file that grows by one row a step, handed to the operating system before the step is complete.

    The saved state holds the file's length and checksum. A run that continues from it cuts the file back to that length
    first, so that an interrupted and resumed run leaves the bytes of one that was not. Only rank 0 writes.

    Args:
        path: The file; missing folders are made.
        overwrite: Whether a new run may replace what is in the file.
        seconds: Whether rows hold wall times, which differ from run to run.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, seconds: bool = False) -> None:
        super().__init__(seconds=seconds)
        self.path = Path(path)
        self._overwrite = overwrite
        self._position = 0
        self._checksum = 0
        self._own = False
        self._file = -1
        self._closing: weakref.finalize[[int], LogFile] | None = None

    @abstractmethod
    def _rows(self, record: Mapping[str, Any]) -> bytes:
        """Returns what a record appends to the file."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the file's length and checksum; what they count is on disk then."""
        if self._is_open:
            with suppress(OSError):  # a pipe or device has no disk to reach
                os.fsync(self._file)
        return {**super().state_dict(), "position": self._position, "checksum": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`; the file is cut back when it is opened."""
        super().load_state_dict(state)
        self._position, self._checksum = int(state["position"]), int(state["checksum"])
        self._own = True

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check()
            self._prepare()
            self._reopen()
        except OSError as error:
            raise ConfigError(f"{self._who()} cannot open its file: {error}") from error
        self._own = True

    def _close(self) -> None:
        if self._closing is not None:
            self._closing()
        self._closing = None

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            data = self._rows(record)
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._position)  # half a row may have been written
            raise
        self._position += len(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def _check(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else None
        if not self._own and size and not self._overwrite:
            raise ConfigError(
                f"{self._who()}: the file exists and holds {size} bytes. Load a checkpoint to continue the run that "
                "wrote it, choose another path, or pass overwrite=True."
            )
        if self._own and self._position > (size or 0):
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{self._who()}: the file {found}, and the run continues from a state in which it had "
                f"{self._position}. Put the right one back, or go on from a state that was saved without this log."
            )

    def _prepare(self) -> None:
        """Leaves the file with what was in it at the saved position; nothing for a new run."""
        with self.path.open("ab") as file:
            if not file.seekable():  # a pipe
                return
        with self.path.open("rb") as file:
            if _checksum(file, self._position) != self._checksum:
                raise self._foreign()
        if self.path.stat().st_size > self._position:
            os.truncate(self.path, self._position)

    def _foreign(self) -> CheckpointError:
        return CheckpointError(
            f"{self._who()}: what the file holds is not what the run had written when its state was saved; nothing was "
            "changed. Put the right one back, or go on from a state that was saved without this log."
        )

    def _reopen(self) -> None:
        self._close()
        # Unbuffered: nothing waits in this process, where a kill would lose it, or in a forked one's copy.
        # O_BINARY is there on Windows, which would write two characters for a newline without it.
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        self._closing = weakref.finalize(self, os.close, self._file)

    def _who(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


def _checksum(file: BinaryIO, length: int) -> int:
    """Returns the checksum of a file's next bytes."""
    checksum = 0
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        checksum, length = zlib.crc32(chunk, checksum), length - len(chunk)
    return checksum
