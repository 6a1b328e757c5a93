"""Ends a run that no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.callbacks.base import Callback
from bilevel.callbacks.watched_metric import WatchedMetric
from bilevel.validation import check_integer

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """Ends the run when a metric of any problem has not improved for a while.

    A loss and its metrics are looked at after every step, what ``evaluate()`` returns after every evaluation; patience
    counts those looks. NaN is no improvement. Steps that were skipped are not looked at. In a loop of your own, ask
    for ``engine.stop_reason`` after each step.

    A resumed run goes on counting where it was, so that it stops at the step at which an uninterrupted one does. Under
    data parallelism the metric is the mean over ranks, so that all stop together.

    Args:
        metric: ``"problem"`` for a problem's loss, ``"problem/metric"`` for another value that its loss or its
            ``evaluate()`` returns.
        patience: How many looks in a row may bring no improvement; at the last of them the run ends.
        mode: ``"min"`` or ``"max"``: which values are better.
        min_delta: By how much a value must be better than the best to count as an improvement.
        start: Number of the first step whose value counts: what comes before is warm-up.

    Raises:
        ConfigError: A value that makes no sense.
        UnknownNameError: At the first step, or at the first evaluation: there is no such metric; the message lists
            those that there are.

    Example:
        >>> stopping = EarlyStopping("outer/accuracy", patience=5, mode="max")  # Engine(..., callbacks=[stopping])
    """

    def __init__(
        self, metric: str, *, patience: int = 10, mode: str = "min", min_delta: float = 0.0, start: int = 0
    ) -> None:
        self._watched = WatchedMetric("EarlyStopping", metric, mode, min_delta, start)
        check_integer("EarlyStopping", "patience", patience, minimum=1)
        self.patience = patience
        self.waited = 0

    @property
    def best(self) -> float:
        """The best value so far; NaN before there is one."""
        return self._watched.best

    @property
    def best_step(self) -> int:
        """The step of the best value; 0 before there is one."""
        return self._watched.best_step

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """Looks at a loss or its metric."""
        self._look(engine, self._watched.after_step(engine, result))

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        """Looks at an evaluated metric."""
        self._look(engine, self._watched.after_evaluation(engine, metrics))

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and how long there was none."""
        return {"watched": self._watched.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting where the saved state was."""
        self._watched.load_state_dict(state["watched"])
        self.waited = int(state["waited"])

    def _look(self, engine: Engine, better: bool | None) -> None:
        if better is None:
            return
        self.waited = 0 if better else self.waited + 1
        if self.waited >= self.patience:
            engine.stop(
                f"{self._watched.name} has not improved for {self.waited} looks; it was best, {self.best:.6g}, at "
                f"step {self.best_step}"
            )
