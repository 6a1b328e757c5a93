"""Periodic, last and best checkpoints of a run."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import distributed
from bilevel.callbacks.base import Callback
from bilevel.callbacks.watched_metric import WatchedMetric
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
from bilevel.errors import BilevelWarning, CheckpointError, ConfigError
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

    It must come after all callbacks that have a state: what they do when a step is complete belongs to that step.

    One run writes to a folder at a time: a second one is refused, whichever process it is in. A folder with checkpoints
    of later steps than the engine's is refused too, so that two runs' files are never mixed.

    Args:
        folder: Where; made when the first run starts. What else is in it stays.
        every: Steps from one periodic checkpoint to the next: the steps whose number it divides.
        keep: How many of the newest periodic ones stay; None for all.
        best: What the best checkpoint is best in: ``"problem"`` for its loss, or ``"problem/metric"`` for a value
            that its loss or its ``evaluate()`` returns. None for no best checkpoint. Values that are NaN, or those of
            skipped steps, are never best. A value of ``evaluate()`` belongs to the state that is saved; a loss was
            taken before the step's updates.
        mode: ``"min"`` or ``"max"``: which values are better.
        on_failure: ``"warn"`` and go on where a checkpoint cannot be written, or ``"raise"``.

    Attributes:
        folder: The folder.

    Raises:
        ConfigError: A value that makes no sense; when a run starts: a callback with a state comes after this one.
        CheckpointError: When a run starts: the folder cannot be written to, is another run's, or holds later steps.
        UnknownNameError: At the first step, or at the first evaluation: there is no such metric.

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
        self._every, self._keep, self._on_failure = every, keep, on_failure
        self._metric, self._mode = best, mode
        self._watched = None if best is None else WatchedMetric("Checkpoints", best, mode, 0.0, 0)
        self._lock: FolderLock | None = None
        self._steps_left: int | None = None
        self._before_step: dict[str, Any] = {}
        self._in_step = self._is_best = False
        self._complete: int | None = None
        self._saved: int | None = None

    @property
    def best(self) -> float:
        """The best value so far; NaN before there is one."""
        return math.nan if self._watched is None else self._watched.best

    @property
    def best_step(self) -> int:
        """The step of the best value; 0 before there is one."""
        return 0 if self._watched is None else self._watched.best_step

    @property
    def best_path(self) -> Path | None:
        """The file of the best checkpoint; None before there is one."""
        return self.folder / file_name("best", self.best_step) if self.best_step else None

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """See :meth:`Callback.on_run_start`."""
        self._steps_left = steps
        self._open(engine)

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_end`."""
        self._in_step, self._is_best = True, False
        if self._steps_left is not None:
            self._steps_left -= 1
        if self._watched is not None:
            self._before_step = self._watched.state_dict()
            self._is_best = bool(self._watched.after_step(engine, result))

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """See :meth:`Callback.on_evaluate`. Of evaluations between steps, no checkpoint can be made."""
        if self._watched is not None and self._in_step:
            self._is_best |= bool(self._watched.after_evaluation(engine, metrics))

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_complete`."""
        self._open(engine)
        self._in_step = False
        step = self._complete = engine.step_count
        best = self._is_best and self._write(engine, "best")
        if self._is_best and not best and self._watched is not None:
            self._watched.load_state_dict(self._before_step)  # the former best one is still that
        if step % self._every == 0:
            self._write(engine, "step", self.best_path if best else None)

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
        """Returns the best value so far, of which metric it is, and its step."""
        if self._watched is None:
            return {}
        return {"metric": self._metric, "mode": self._mode, "watched": self._watched.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`. A best value of another metric is forgotten, with a warning."""
        self._complete = self._saved = None
        if self._watched is None:
            return
        if (state["metric"], state["mode"]) == (self._metric, self._mode):
            self._watched.load_state_dict(state["watched"])
        else:
            _warn(f"the checkpoint knows the best {state['metric']!r}; that of {self._metric!r} is looked for afresh")

    def __repr__(self) -> str:
        """Names the settings that differ from their defaults."""
        values: dict[str, tuple[object, object]] = {
            "every": (self._every, 100),
            "keep": (self._keep, 3),
            "best": (self._metric, None),
            "mode": (self._mode, "min"),
            "on_failure": (self._on_failure, "warn"),
        }
        changed = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return f"Checkpoints({', '.join([repr(str(self.folder)), *changed])})"

    def _open(self, engine: Engine) -> None:
        """Takes the folder for this run, and clears up after an earlier one that was killed."""
        if self._lock is not None or distributed.rank() != 0:
            return
        _refuse_followers(self, engine.callbacks)
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
            self._complete = None  # the end of the run does not try again
            raise CheckpointError(text) from error
        _warn(f"{text}. The run goes on; earlier checkpoints are as they were, and the next one will be tried")


def _refuse_followers(own: Checkpoints, callbacks: Sequence[Callback]) -> None:
    """Raises where a callback would still change its state after this one has saved it."""
    place = next((place for place, callback in enumerate(callbacks) if callback is own), len(callbacks))
    for callback in callbacks[place:]:
        if not isinstance(callback, Checkpoints) and type(callback).state_dict is not Callback.state_dict:
            raise ConfigError(
                f"Checkpoints comes before {type(callback).__name__}, whose state of a step would be missing from that "
                "step's checkpoint: list Checkpoints last in Engine(callbacks=[...])"
            )


def _warn(text: str) -> None:
    warnings.warn(text, BilevelWarning, stacklevel=4)
