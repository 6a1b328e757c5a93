"""A metric that a callback watches: found by name, compared with the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel import distributed
from bilevel.errors import ConfigError, unknown_name
from bilevel.validation import check_choice, check_integer, check_number

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["WatchedMetric"]


class WatchedMetric:
    """Compares a metric with its best value.

    Args:
        owner: The callback that watches, for messages.
        name: ``"problem"`` for its loss, ``"problem/metric"`` for another value that its loss or its ``evaluate()``
            returns.
        mode: ``"min"`` or ``"max"``: which values are better.
        min_delta: By how much a value must be better than the best to count as better.
        start: Values of steps before this one are not looked at.

    Raises:
        ConfigError: A value that makes no sense.
    """

    def __init__(self, owner: str, name: str, mode: str, min_delta: float, start: int) -> None:
        if not name:
            raise ConfigError(f"{owner}.metric must be 'problem' or 'problem/metric', not empty")
        check_choice(owner, "mode", mode, ("min", "max"))
        check_number(owner, "min_delta", min_delta, minimum=0.0)
        check_integer(owner, "start", start, minimum=0)
        self.name = name
        self.best = math.nan
        self.best_step = 0
        self._owner = owner
        self._sign = 1.0 if mode == "min" else -1.0
        self._min_delta = min_delta
        self._start = start
        self._source = ""
        self._others: set[str] = set()

    def after_step(self, engine: Engine, result: StepResult) -> bool | None:
        """Returns whether the step's value is the best so far; None where there is none to look at.

        Raises:
            UnknownNameError: Nothing has this name, and no evaluation will bring it.
            ConfigError: A metric of the loss and one of ``evaluate()`` share the name.
        """
        values = {**result.losses, **result.metrics}
        self._others.update(values)
        if self.name in values:
            self._seen("loss")
        elif not self._source and result.skipped is None and not self._may_come(engine, result):
            raise self._unknown(engine)
        if self._source == "evaluate":
            return None
        value = values.get(self.name) if result.skipped is None else None
        return self._compare(distributed.mean(value), result.step)

    def after_evaluation(self, engine: Engine, metrics: Mapping[str, float]) -> bool | None:
        """Returns whether the evaluated value is the best so far; None where there is none to look at.

        Raises:
            UnknownNameError: Neither a loss nor this evaluation has the name.
            ConfigError: A metric of the loss and one of ``evaluate()`` share the name.
        """
        if self.name not in metrics:
            self._others.update(metrics)
            if not self._source:
                raise self._unknown(engine)
            return None
        self._seen("evaluate")
        return self._compare(distributed.mean(metrics[self.name]), engine.step_count)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and its step."""
        return {"best": self.best, "best_step": self.best_step, "source": self._source}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` returned."""
        self.best, self.best_step = float(state["best"]), int(state["best_step"])
        self._source = str(state["source"])

    def _compare(self, value: float | None, step: int) -> bool | None:
        if value is None or step < self._start:
            return None
        if math.isnan(value):
            return False
        better = math.isnan(self.best) or self._sign * (self.best - value) > self._min_delta
        if better:
            self.best, self.best_step = value, step
        return better

    def _seen(self, source: str) -> None:
        if self._source and self._source != source:
            raise ConfigError(
                f"{self._owner} watches {self.name!r}, which both the problem's loss and its evaluate() return: rename "
                "one of them"
            )
        self._source = source

    def _may_come(self, engine: Engine, result: StepResult) -> bool:
        """Whether an evaluation will bring it, or a step in which its problem is updated."""
        owner, slash, _ = self.name.partition("/")
        return bool(slash and owner in engine.evaluates) or (owner in engine.problems and owner not in result.losses)

    def _unknown(self, engine: Engine) -> ConfigError:
        error = unknown_name(f"metric of {self._owner}", self.name, {*engine.problems, *self._others})
        if engine.evaluates:
            return error
        hint = "For a metric of evaluate(), set EngineConfig(evaluate_every=...)."
        return type(error)(f"{error}. {hint}")
