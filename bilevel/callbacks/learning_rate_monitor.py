"""Learning rates over the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.callbacks.base import Callback
from bilevel.callbacks.history import History
from bilevel.callbacks.record import learning_rates

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.result import StepResult

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Remembers the learning rates of all problems after every step: those of the next updates.

    :attr:`history` maps a problem's name, or ``"problem/0"``, ``"problem/1"``, … where it has several parameter groups,
    to an array. Logs record learning rates by themselves; this is for reading them in the program.

    Example:
        >>> rates = LearningRateMonitor()  # Engine(..., callbacks=[rates]); later rates.history["inner"]
    """

    def __init__(self) -> None:
        self.history = History()

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        """See :meth:`Callback.on_step_end`."""
        values: dict[str, float] = {}
        for name, problem in engine.problems.items():
            rates = learning_rates(problem)
            values.update({name if len(rates) == 1 else f"{name}/{place}": rate for place, rate in enumerate(rates)})
        self.history.append(result.step, values)

    def state_dict(self) -> dict[str, Any]:
        """Returns the history."""
        return self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Callback.load_state_dict`."""
        self.history.load_state_dict(state)
