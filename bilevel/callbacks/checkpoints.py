"""Periodic, last and best checkpoints of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import distributed
from bilevel.callbacks.base import Callback
from bilevel.callbacks.best_metric import BestMetric
from bilevel.checkpoint import (
    DamagedError,
    FolderLock,
    duplicate,
    entries,
    file_name,
    prune,
    read_state,
    remove_partials,
    set_aside,
)
from bilevel.errors import BilevelWarning, CheckpointError
from bilevel.validation import check_choice, check_integer

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["Checkpoints"]


class Checkpoints(Callback):
    """Saves an engine's complete state to a folder: every so many steps, at the end of a run, and where it is best.

    Files are named by the number of outer steps taken: ``step-00000100.safetensors``, ``best-00000080.safetensors``.
    Each is complete, whole or absent, and can be loaded by ``Engine.load``; ``Engine.resume(folder)`` goes on from the
    newest good one. A write that fails (a full disk, say) leaves all earlier files, and the next one tries again.

    Put it last among the callbacks: at the end of a run, it saves what the others have become by then.

    One run writes to a folder at a time: a second one is refused, whichever process it is in. A folder with checkpoints
    of later steps than the engine's is refused too, so that two runs' files are never mixed.

    Args:
        folder: Where; made when the first run starts. What else is in it stays.
        every: Steps from one periodic checkpoint to the next: the steps whose number it divides.
        keep: How many of the newest periodic ones stay; None for all.
        best: What the best checkpoint is best in: ``"problem"`` for its loss, or ``"problem/metric"`` for a value
            that its loss or its ``evaluate()`` returns. None for no best checkpoint. Values that are NaN, or those of
            skipped steps, are never best.
        mode: ``"min"`` or ``"max"``: which values are better.
        on_failure: ``"warn"`` and go on where a checkpoint cannot be written, or ``"raise"``.

    Attributes:
        folder: The folder.
        best_value: The best value so far; None before the first.
        best_step: The number of steps taken when it was seen.

    Raises:
        ConfigError: A value that makes no sense.
        CheckpointError: When a run starts: the folder cannot be written to, is another run's, or holds later steps.
        UnknownNameError: Once it can be known: there is no such metric.

    Example:
        >>> Checkpoints("runs/a", every=500, keep=2, best="classifier/accuracy", mode="max")
        Checkpoints('runs/a', every=500, keep=2, best='classifier/accuracy', mode='max')
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 100,
        keep: int | None = 3,
        best: str | None = None,
        mode: str = "min",
        on_failure: str = "warn",
    ) -> None:
        check_integer("Checkpoints", "every", every, minimum=1)
        if keep is not None:
            check_integer("Checkpoints", "keep", keep, minimum=1)
        check_choice("Checkpoints", "mode", mode, ("min", "max"))
        check_choice("Checkpoints", "on_failure", on_failure, ("warn", "raise"))
        self.folder = Path(folder)
        self.best_value: float | None = None
        self.best_step = 0
        self._every, self._keep, self._on_failure = every, keep, on_failure
        self._best, self._mode = best, mode
        self._metric = None if best is None else BestMetric(best)
        self._lock: FolderLock | None = None
        self._steps_left: int | None = None
        self._complete: int | None = None
        self._saved: int | None = None

    @property
    def best_path(self) -> Path | None:
        """The file of the best checkpoint; None where there is none."""
        return None if self.best_value is None else self.folder / file_name("best", self.best_step)

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """See :meth:`Callback.on_run_start`."""
        self._steps_left = steps
        if self._metric is not None:
            self._metric.check_problem(engine)
        self._open(engine)

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_end`."""
        if self._steps_left is not None:
            self._steps_left -= 1
        if self._metric is not None:
            self._metric.see_step(result)

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """See :meth:`Callback.on_evaluate`."""
        if self._metric is not None:
            self._metric.see_evaluation(metrics)

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_complete`."""
        if self._metric is not None:
            self._metric.check(engine)
        self._open(engine)
        step = self._complete = engine.step_count
        best = self._is_best() and self._write_best(engine)
        if step % self._every == 0:
            there = self.folder / file_name("best", step) if best else None
            self._write(engine, "step", there)

    def on_run_end(self, engine: Engine) -> None:
        """See :meth:`Callback.on_run_end`."""
        whole = engine.config.restore_on_error or self._steps_left == 0 or bool(engine.stop_reason)
        try:
            if self._complete == engine.step_count and self._saved != engine.step_count and whole:
                self._write(engine, "step")
        finally:
            self._steps_left = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Callback.state_dict`."""
        if self._best is None:
            return {}
        return {"best": self._best, "mode": self._mode, "value": self.best_value, "step": self.best_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`. A best value of another metric is forgotten."""
        self._complete = self._saved = None
        if self._best is None:
            return
        value, step = state["value"], state["step"]
        if type(step) is not int or not (value is None or isinstance(value, float)):
            raise CheckpointError(f"Checkpoints: {dict(state)!r:.80} is no state")
        if (state["best"], state["mode"]) != (self._best, self._mode):
            _warn(f"the checkpoint knows the best {state['best']!r}; that of {self._best!r} is looked for afresh")
            value, step = None, 0
        self.best_value, self.best_step = value, step

    def __repr__(self) -> str:
        """Names the settings that differ from their defaults."""
        values: dict[str, tuple[object, object]] = {
            "every": (self._every, 100),
            "keep": (self._keep, 3),
            "best": (self._best, None),
            "mode": (self._mode, "min"),
            "on_failure": (self._on_failure, "warn"),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return f"Checkpoints({', '.join([repr(str(self.folder)), *changed])})"

    def _open(self, engine: Engine) -> None:
        """Takes the folder for this run, and clears up after an earlier one that was killed."""
        if self._lock is not None or distributed.rank() != 0:
            return
        try:
            self._lock = FolderLock(self.folder)
            remove_partials(self.folder)
            self._refuse_later_steps(engine)
        except OSError as error:
            self._release()
            raise CheckpointError(f"checkpoints cannot be written to {self.folder}: {error}") from error
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _refuse_later_steps(self, engine: Engine) -> None:
        for entry in entries(self.folder):
            if entry.step <= engine.step_count:
                break
            try:
                read_state(entry.path)
            except DamagedError as error:
                _warn(f"{error}. It was set aside as {set_aside(entry).name}")
                continue
            raise CheckpointError(
                f"{self.folder} holds a checkpoint of step {entry.step}; this engine has taken {engine.step_count}: go "
                "on from it (Engine.resume, or --resume on the command line), or name another folder for another run"
            )

    def _is_best(self) -> bool:
        value = None if self._metric is None else self._metric.take()
        if value is None or value != value:
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self._mode == "min" else value > self.best_value

    def _write_best(self, engine: Engine) -> bool:
        """Writes a best checkpoint, which knows that it is; the former best stays one where that fails."""
        assert self._metric is not None
        before = self.best_value, self.best_step
        self.best_value, self.best_step = self._metric.last, engine.step_count
        if self._write(engine, "best"):
            return True
        self.best_value, self.best_step = before
        return False

    def _write(self, engine: Engine, kind: str, same: Path | None = None) -> bool:
        """Writes a file, or gives an equal one a second name; then removes those that need not stay."""
        if distributed.rank() != 0:
            return True
        step = engine.step_count
        target = self.folder / file_name(kind, step)
        try:
            if same is None or not duplicate(same, target):
                engine.save(target)
        except CheckpointError as error:
            self._failed(f"the {kind} checkpoint of step {step} was not written: {error}", error)
            return False
        if kind == "step":
            self._saved = step
        keep = 1 if kind == "best" else self._keep
        if keep is not None:
            try:
                prune(self.folder, kind, keep)
            except OSError as error:
                self._failed(f"an old checkpoint could not be removed from {self.folder}: {error}", error)
        return True

    def _failed(self, text: str, error: Exception) -> None:
        if self._on_failure == "raise":
            raise CheckpointError(text) from error
        _warn(f"{text}. The run goes on; earlier checkpoints are as they were, and the next one will be tried")


def _warn(text: str) -> None:
    warnings.warn(text, BilevelWarning, stacklevel=4)
