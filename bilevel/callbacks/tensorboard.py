"""A log for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.callbacks.extras import require
from bilevel.callbacks.record import flatten
from bilevel.callbacks.step_log import StepLog
from bilevel.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard(StepLog):
    """Writes scalars for TensorBoard: the numbers of :class:`CSVLog`, under the same names, by step.

    A resumed run declares what was written after the saved state as void (TensorBoard's purge step), so that no step is
    shown twice. Saving the state flushes what is waiting. Needs the extra ``logging``; nothing is imported before the
    run starts.

    Cost: some 25 µs a number, half a millisecond for a step of two problems.

    Args:
        folder: Where event files go; missing folders are made.
        overwrite: Whether a new run may delete event files that are in the folder.
        seconds: Whether to write the wall time of every step.

    Raises:
        ConfigError: TensorBoard is not installed; when the run starts: the folder holds event files of another run.

    Example:
        >>> board = TensorBoard("runs/first")  # Engine(..., callbacks=[board])
    """

    def __init__(self, folder: str | os.PathLike[str], *, overwrite: bool = False, seconds: bool = True) -> None:
        super().__init__(seconds=seconds)
        require("TensorBoard", "tensorboard", "logging")
        self.folder = Path(folder)
        self._overwrite = overwrite
        self._own = False
        self._step = 0
        self._writer: SummaryWriter | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the last step that was written; it is on disk then."""
        if self._writer is not None:
            self._writer.flush()
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        super().load_state_dict(state)
        self._step, self._own = int(state["step"]), True

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        there = list(self.folder.glob("events.out.tfevents.*"))
        if there and not self._own:
            if not self._overwrite:
                raise ConfigError(
                    f"{self._who()}: the folder holds {len(there)} event files, and TensorBoard would mix the runs. "
                    "Load a checkpoint to continue the run that wrote them, choose another folder, or pass "
                    "overwrite=True."
                )
            for path in there:
                path.unlink()
        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=self._step + 1 if self._own else None)
        except OSError as error:
            raise ConfigError(f"{self._who()} cannot write to its folder: {error}") from error
        self._own = True

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._step = int(record["step"])
        for name, value in flatten(record).items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, self._step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _who(self) -> str:
        return f"TensorBoard({str(self.folder)!r})"
