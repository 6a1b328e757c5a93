"""A log for Weights & Biases."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bilevel.callbacks.extras import require
from bilevel.callbacks.record import flatten
from bilevel.callbacks.step_log import StepLog
from bilevel.validation import check_choice

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases(StepLog):
    """Logs to Weights & Biases: the fields of :class:`CSVLog`, under the same names, by step.

    The state holds the run's id: a resumed run goes on under it, where the service ignores steps that it has already.
    Needs the extra ``logging``; nothing is imported, and no connection made, before the run starts.

    Args:
        project: The project; wandb's default where None.
        name: The run's name; one is made up where None.
        folder: Where wandb keeps its files; the current folder where None.
        mode: ``"online"``, ``"offline"`` (files only, for ``wandb sync`` later) or ``"disabled"``; what wandb's
            environment variables say where None.
        config: Settings to show with the run.
        seconds: Whether to log the wall time of every step.

    Raises:
        ConfigError: wandb is not installed, or a mode that there is not.

    Example:
        >>> log = WeightsAndBiases("bilevel", mode="offline")  # Engine(..., callbacks=[log])
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        config: Mapping[str, Any] | None = None,
        seconds: bool = True,
    ) -> None:
        super().__init__(seconds=seconds)
        require("WeightsAndBiases", "wandb", "logging")
        if mode is not None:
            check_choice("WeightsAndBiases", "mode", mode, ("online", "offline", "disabled"))
        self.run_id = secrets.token_hex(4)
        self._project = project
        self._name = name
        self._folder = folder
        self._mode = mode
        self._config = dict(config or {})
        self._run: Run | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the run's id."""
        return {**super().state_dict(), "run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        super().load_state_dict(state)
        self.run_id = str(state["run_id"])

    def _open(self) -> None:
        import wandb

        self._wait_for_another_second()
        self._run = wandb.init(
            project=self._project,
            name=self._name,
            dir=None if self._folder is None else os.fspath(self._folder),
            mode=self._mode,
            config=self._config,
            id=self.run_id,
            resume="allow",
            reinit="create_new",
        )

    def _wait_for_another_second(self) -> None:
        # wandb names a folder by the second in which a run starts: it would write over that of a part just ended.
        files = Path(self._folder or os.environ.get("WANDB_DIR", ".")) / "wandb"
        while any(files.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self.run_id}")):
            time.sleep(0.05)

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._run is not None
        cells = {name: value for name, value in flatten(record).items() if value is not None and name != "step"}
        self._run.log(cells, step=int(record["step"]))

    def _close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None
