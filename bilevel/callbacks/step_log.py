"""What all logs have in common: one record a step, complete, in order, by rank 0 only."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel import distributed
from bilevel.callbacks.base import Callback
from bilevel.callbacks.record import step_record
from bilevel.errors import BilevelWarning

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["StepLog"]


class StepLog(Callback, ABC):
    """Writes a record when a step is complete, so that evaluated metrics and other callbacks' values are in it.

    Where an error of another callback keeps a step from being completed, its record is written with the next one, or
    at the end of the run. A log does not end a run: what cannot be written is counted in :attr:`lost_rows`, with a
    warning the first time and at the end.

    Args:
        seconds: Whether records hold wall times.
    """

    def __init__(self, *, seconds: bool) -> None:
        self.lost_rows = 0
        self._seconds = seconds
        self._is_open = False
        self._pending: tuple[Engine, StepResult, dict[str, float]] | None = None
        self._owed: dict[str, Any] | None = None

    @abstractmethod
    def _open(self) -> None:
        """Gets ready for writing."""

    @abstractmethod
    def _write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; an ``OSError`` says that it could not be written."""

    @abstractmethod
    def _close(self) -> None:
        """Finishes what :meth:`_open` began."""

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """Opens the log, so that what is wrong with it shows before the first step."""
        if distributed.rank() == 0:
            self._ready()

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_end`."""
        if distributed.rank() == 0:
            self._ready()
            self._write_pending()
            self._pending = (engine, result, {})

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """See :meth:`Callback.on_evaluate`."""
        if self._pending is not None:
            self._pending[2].update(metrics)
        elif distributed.rank() == 0 and metrics:
            self._emit({"step": engine.step_count, "evaluate": dict(metrics)})

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        """Writes the step's record."""
        self._write_pending()

    def on_run_end(self, engine: Engine) -> None:
        """Closes the log, and says how many rows could not be written."""
        self._write_pending()
        self._shut()
        if self.lost_rows:
            warnings.warn(f"{self._who()} lost {self.lost_rows} rows", BilevelWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Returns the count of lost rows, and the record of a step that is not complete yet.

        The latter is there where a callback that comes earlier saves the state in its ``on_step_complete``.
        """
        return {"lost_rows": self.lost_rows, "pending": self._owed if self._pending is None else self._record()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._shut()
        self._pending, self._owed = None, state["pending"]
        self.lost_rows = int(state["lost_rows"])

    def _ready(self) -> None:
        if self._is_open:
            return
        self._open()
        self._is_open = True
        if self._owed is not None:
            owed, self._owed = self._owed, None
            self._emit(owed)

    def _shut(self) -> None:
        if self._is_open:
            self._close()
        self._is_open = False

    def _write_pending(self) -> None:
        if self._pending is not None:
            record, self._pending = self._record(), None
            self._emit(record)

    def _record(self) -> dict[str, Any]:
        assert self._pending is not None
        engine, result, evaluated = self._pending
        return step_record(engine, result, evaluated, seconds=self._seconds)

    def _emit(self, record: Mapping[str, Any]) -> None:
        self._ready()
        try:
            self._write(record)
        except OSError as error:
            if not self.lost_rows:
                text = f"{self._who()} cannot write: {error}. The run goes on, and rows are lost."
                warnings.warn(text, BilevelWarning, stacklevel=2)
            self.lost_rows += 1

    def _who(self) -> str:
        return type(self).__name__
