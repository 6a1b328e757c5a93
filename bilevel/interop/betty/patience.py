"""Betty's early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bilevel.errors import ConfigError, unknown_name

__all__ = ["Patience"]


class Patience:
    """Counts validations without improvement.

    Args:
        metric: Name of a number that ``validation`` returns.
        mode: ``"min"`` or ``"max"``: which values are better.
        tolerance: At how many validations in a row without improvement to stop.
    """

    def __init__(self, metric: str, mode: str, tolerance: int) -> None:
        self.metric = metric
        self.mode = mode
        self.tolerance = tolerance
        self.best: float | None = None
        self.counter = 0

    def __call__(self, validation_stats: Mapping[str, Any]) -> bool:
        """Looks at a validation, and says whether to stop. NaN is no improvement.

        Raises:
            UnknownNameError: The metric is not among the numbers.
        """
        if self.metric not in validation_stats:
            raise unknown_name(
                "EngineConfig.early_stopping_metric, for what validation() returned:", self.metric, validation_stats
            )
        value = _number(self.metric, validation_stats[self.metric])
        best = self.best
        better = not math.isnan(value) and (best is None or (value < best if self.mode == "min" else value > best))
        if better:
            self.best, self.counter = value, 0
        else:
            self.counter += 1
        return self.over

    @property
    def over(self) -> bool:
        """Whether it is exhausted."""
        return self.counter >= self.tolerance


def _number(metric: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"EngineConfig.early_stopping_metric={metric!r} must be a number that validation() returns, not {value!r}"
        ) from None
