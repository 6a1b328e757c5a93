"""How well tasks were learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Assessment"]


@dataclass(frozen=True)
class Assessment:
    """What tasks were judged by after adaptation.

    Attributes:
        losses: The loss on every task's query set, ``(tasks,)``.
        accuracies: The share of right answers there; None where targets are no classes.
    """

    losses: Tensor
    accuracies: Tensor | None

    def metrics(self) -> dict[str, float]:
        """Returns means over tasks, and under ``…_interval`` half of their 95 % interval, ``1.96 s/√n``."""
        found: dict[str, float] = {}
        for name, values in (("loss", self.losses), ("accuracy", self.accuracies)):
            if values is not None:
                spread = float(values.std()) if len(values) > 1 else math.nan
                found[name] = float(values.mean())
                found[f"{name}_interval"] = 1.96 * spread / math.sqrt(len(values))
        return found
