"""A log as a table."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bilevel.callbacks.log_file import LogFile
from bilevel.callbacks.record import Cell, flatten

__all__ = ["CSVLog"]


class CSVLog(LogFile):
    """Writes a table with one row a step to a CSV file.

    The columns are the fields of :class:`JSONLinesLog` with their nesting in the name: ``loss/outer``,
    ``solve/inner/residual``, ``learning_rate/inner`` (``learning_rate/inner/0``, … where there are several parameter
    groups), ``evaluate/outer/accuracy``. A cell is empty where a step has no such value. Numbers read back as the same
    float; NaN and infinities are ``nan``, ``inf``, ``-inf``.

    A name that comes later (that of a metric which is evaluated every hundredth step, say) adds a column: the file is
    written again, with empty cells in the rows before, and replaced as a whole. Otherwise rows are appended, and
    everything that :class:`JSONLinesLog` says about resuming, full disks and data parallelism holds here too.

    Args:
        path: The file; missing folders are made.
        overwrite: Whether a new run may replace what is in the file.
        seconds: Whether rows hold the wall time of the step.

    Raises:
        ConfigError: When the run starts: the file is not empty and this is a new run, or it cannot be opened.
        CheckpointError: When a resumed run starts: the file is missing, or not the one that the state speaks of.

    Example:
        >>> log = CSVLog("run.csv", seconds=True)  # Engine(..., callbacks=[log])
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, seconds: bool = False) -> None:
        super().__init__(path, overwrite=overwrite, seconds=seconds)
        self._columns: list[str] = []
        self._written = 0

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`LogFile.state_dict`; with the columns and the number of rows."""
        return {**super().state_dict(), "columns": list(self._columns), "rows": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`LogFile.load_state_dict`."""
        super().load_state_dict(state)
        self._columns, self._written = list(state["columns"]), int(state["rows"])

    def _rows(self, record: Mapping[str, Any]) -> bytes:
        cells = flatten(record)
        head = b""
        if new := [name for name in cells if name not in self._columns]:
            columns = [*self._columns, *new]
            if self._position:
                self._widen(columns)
            else:
                head = _line(columns)
            self._columns = columns
        self._written += 1
        return head + _line(_text(cells.get(name)) for name in self._columns)

    def _write(self, record: Mapping[str, Any]) -> None:
        columns, written = self._columns, self._written
        try:
            super()._write(record)
        except OSError:
            self._written = written
            if not self._position:  # the header has not been written either
                self._columns = columns
            raise

    def _prepare(self) -> None:
        try:
            if self._position and self._header() != self._columns:
                self._replace(self._columns, self._checksum)  # columns were added after the state was saved
        except (csv.Error, UnicodeError) as error:
            raise self._foreign() from error
        super()._prepare()

    def _header(self) -> list[str]:
        with self.path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _widen(self, columns: Sequence[str]) -> None:
        self._close()  # an open file cannot be replaced everywhere
        try:
            self._checksum = self._replace(columns)
        finally:
            self._reopen()
        self._position = os.fstat(self._file).st_size

    def _replace(self, columns: Sequence[str], expected: int | None = None) -> int:
        """Writes the rows again with other columns and returns the checksum.

        The file is replaced once all of it is on disk, and only where the checksum is the expected one.
        """
        path, checksum = self.path.resolve(), 0
        if not path.is_file():
            raise OSError(f"{path} is no regular file: columns cannot be added to it")
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with path.open(encoding="utf-8", newline="") as source, temporary.open("wb") as target:
                rows = csv.reader(source)
                place = {name: index for index, name in enumerate(next(rows, []))}
                for line in itertools.chain([_line(columns)], _lines(rows, place, columns, self._written)):
                    target.write(line)
                    checksum = zlib.crc32(line, checksum)
                target.flush()
                os.fsync(target.fileno())
            if expected not in (None, checksum):
                raise self._foreign()
            shutil.copymode(path, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return checksum


def _lines(rows: Iterable[list[str]], place: Mapping[str, int], columns: Sequence[str], count: int) -> Iterator[bytes]:
    for row in itertools.islice(rows, count):
        yield _line(row[place[name]] if place.get(name, len(row)) < len(row) else "" for name in columns)


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(list(cells))
    return text.getvalue().encode()


def _text(cell: Cell) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else repr(cell)
