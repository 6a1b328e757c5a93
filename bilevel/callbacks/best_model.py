"""Keeps the best parameters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bilevel import distributed
from bilevel.callbacks.base import Callback
from bilevel.callbacks.replace_file import replace_file
from bilevel.callbacks.watched_metric import WatchedMetric
from bilevel.errors import BilevelWarning, ConfigError

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["BestModel"]


class BestModel(Callback):
    """Keeps a copy of all parameters and buffers at the best value of a metric, and puts it back when the run is over.

    A value of ``evaluate()`` belongs to the parameters that were evaluated. A loss was taken before the step's
    updates and on its batch: the parameters kept with it are those after them. Prefer what ``evaluate()`` returns.

    The copy, on the CPU, holds what the problems' optimisers own and their modules' buffers; it is part of the saved
    state. It is put back where ``run()`` took all its steps or was asked to stop, not where it ended by an exception.
    The parameters before that are kept, and the next ``run()`` continues from them: two runs of n steps are one of 2n.

    Args:
        metric: ``"problem"`` for a problem's loss, ``"problem/metric"`` for another value that its loss or its
            ``evaluate()`` returns.
        mode: ``"min"`` or ``"max"``: which values are better.
        min_delta: By how much a value must be better than the best to replace it.
        start: Number of the first step whose value counts.
        restore: Whether to put the copy back at the end of the run; :meth:`restore` does it at any time.
        path: A safetensors file of the copy, by ``"problem.parameter"``, replaced at every improvement; None for none.
            Where it cannot be written the run goes on, with a warning.

    Raises:
        ConfigError: A value that makes no sense.
        UnknownNameError: At the first step, or at the first evaluation: there is no such metric.

    Example:
        >>> best = BestModel("outer/accuracy", mode="max")  # Engine(..., callbacks=[best])
    """

    def __init__(
        self,
        metric: str,
        *,
        mode: str = "min",
        min_delta: float = 0.0,
        start: int = 0,
        restore: bool = True,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self._watched = WatchedMetric("BestModel", metric, mode, min_delta, start)
        self._restore_at_end = restore
        self._path = None if path is None else Path(path)
        self._copy: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._steps_left = 0
        self._warned = False

    @property
    def best(self) -> float:
        """The best value so far; NaN before there is one."""
        return self._watched.best

    @property
    def best_step(self) -> int:
        """The step of the best value; 0 before there is one."""
        return self._watched.best_step

    def restore(self, engine: Engine) -> None:
        """Puts the best parameters and buffers into the engine's modules.

        Raises:
            ConfigError: Nothing has been kept yet.
        """
        if not self._copy:
            raise ConfigError(f"BestModel has kept nothing yet: no value of {self._watched.name!r} has been seen")
        _put(engine, self._copy)

    def on_run_start(self, engine: Engine, steps: int) -> None:
        """Continues from the last parameters where the best were put back after a run."""
        self._steps_left = steps
        if self._last and _holds(engine, self._copy):
            _put(engine, self._last)
        self._last = {}

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Looks at a loss or its metric."""
        self._steps_left -= 1
        self._look(engine, self._watched.after_step(engine, result))

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Looks at an evaluated metric."""
        self._look(engine, self._watched.after_evaluation(engine, metrics))

    def on_run_end(self, engine: Engine) -> None:
        """Puts the best parameters back, unless the run ended by an exception."""
        over = self._steps_left <= 0 or engine.stop_reason
        if self._restore_at_end and over and self._copy:
            self._last = _tensors(engine)
            self.restore(engine)

    def state_dict(self) -> dict[str, Any]:
        """Returns the copy, and the last parameters where the best were put back."""
        return {"watched": self._watched.state_dict(), "copy": dict(self._copy), "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self._watched.load_state_dict(state["watched"])
        self._copy, self._last = dict(state["copy"]), dict(state["last"])

    def _look(self, engine: Engine, better: bool | None) -> None:
        if not better:
            return
        self._copy = _tensors(engine)
        if self._path is not None and distributed.rank() == 0:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        try:
            replace_file(path, lambda temporary: save_file(self._copy, temporary))
        except (OSError, SafetensorError) as error:
            if not self._warned:
                text = f"BestModel cannot write {path}: {error}. The run goes on; the copy in memory is kept."
                warnings.warn(text, BilevelWarning, stacklevel=2)
            self._warned = True


def _live(engine: Engine) -> dict[str, Tensor]:
    """Returns all problems' parameters and buffers, each tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, problem in engine.problems.items():
        parts = [*zip(problem.parameter_names, problem.parameters, strict=True), *problem.module.named_buffers()]
        for key, tensor in parts:
            found.setdefault(id(tensor), (f"{name}.{key}", tensor))
    return dict(found.values())


def _tensors(engine: Engine) -> dict[str, Tensor]:
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in _live(engine).items()}


def _put(engine: Engine, copy: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in _live(engine).items():
            tensor.copy_(copy[key])


def _holds(engine: Engine, copy: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor.detach().cpu(), copy[key]) for key, tensor in _live(engine).items())
