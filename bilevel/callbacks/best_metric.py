"""The number by which a checkpoint is called the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bilevel.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["BestMetric"]


class BestMetric:
    """The latest value of what the best checkpoint is best in.

    Args:
        name: ``"problem"`` for its loss, ``"problem/metric"`` for a value that its loss or its ``evaluate()`` returns.

    Attributes:
        last: What :meth:`take` returned last.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._problem = name.partition("/")[0]
        self._in_steps: dict[str, float] = {}
        self._in_evaluations: dict[str, float] = {}
        self._problem_stepped = self._evaluated = False
        self._value: float | None = None
        self.last: float | None = None

    def check_problem(self, engine: Engine) -> None:
        """Raises where the name is that of no problem.

        Raises:
            UnknownNameError: It is.
        """
        if self._problem not in engine.problems:
            raise unknown_name("problem in Checkpoints.best", self._problem, engine.problems)

    def see_step(self, result: StepResult) -> None:
        """Takes note of a step."""
        self._value = None
        if result.skipped is None:
            self._in_steps = {**result.metrics, **result.losses}
            self._problem_stepped |= self._problem in result.losses
            self._value = self._in_steps.get(self._name)

    def see_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Takes note of an evaluation."""
        self._in_evaluations, self._evaluated = dict(metrics), True
        if self._name in metrics:
            self._value = metrics[self._name]

    def check(self, engine: Engine) -> None:
        """Raises where the name can be known to be that of no metric, or of two.

        Raises:
            UnknownNameError: Of none.
            ConfigError: Of two.
        """
        self.check_problem(engine)
        known = {**self._in_evaluations, **self._in_steps}
        if self._name in self._in_evaluations and self._name in self._in_steps:
            raise ConfigError(
                f"Checkpoints.best={self._name!r} is returned by the problem's loss and by its evaluate(): give them "
                "two names"
            )
        evaluated = self._evaluated or not engine.config.evaluate_every
        if self._name not in known and self._problem_stepped and evaluated:
            raise unknown_name("metric in Checkpoints.best", self._name, known)

    def take(self) -> float | None:
        """Returns the value of the present step, once."""
        self.last, self._value = self._value, None
        return self.last
