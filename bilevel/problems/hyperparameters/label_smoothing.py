"""Label smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError, LossError
from bilevel.problems.hyperparameters.base import Hyperparameter
from bilevel.validation import check_number

__all__ = ["LabelSmoothing"]


class LabelSmoothing(Hyperparameter):
    """Label smoothing: class c is aimed at with ``(1 − s) [c = y] + s / C``, ``s = σ(λ)`` in [0, 1).

    The criterion must take probabilities for targets, as the cross-entropy does. Classes are the outputs' dimension 1.

    Args:
        initial: The s that it starts from, above 0 and below 1.
        tasks: The tasks whose labels are smoothed, where the criterion is :class:`Tasks`; all by default.

    Raises:
        ConfigError: ``initial`` is not within (0, 1), no task, or tasks of a criterion that has none.
        UnknownNameError: A task that the criterion does not have (within the loss).
        LossError: Targets that are no class indices (within the loss).
    """

    def __init__(self, initial: float = 0.1, *, tasks: str | Sequence[str] | None = None) -> None:
        super().__init__()
        check_number("LabelSmoothing", "initial", initial, minimum=0.0, exclusive=True)
        if initial >= 1.0:
            raise ConfigError(f"LabelSmoothing.initial must be below 1, not {initial!r}: at 1 no label is left")
        self.logit = nn.Parameter(torch.tensor(math.log(initial / (1 - initial))))
        self.tasks = None if tasks is None else (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if self.tasks == ():
            raise ConfigError("LabelSmoothing.tasks names no task: no label would be smoothed")

    def value(self) -> Tensor:
        """Returns s."""
        return self.logit.sigmoid()

    def targets(self, targets: Any, outputs: Any, task: str) -> Any:
        """Returns the probabilities, in the outputs' shape."""
        if self.tasks is not None and task not in self.tasks:
            return targets
        count = outputs.shape[1] if outputs.ndim > 1 else 0
        if targets.is_floating_point() or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
            raise LossError(
                f"label smoothing needs class indices of the shape of the outputs {tuple(outputs.shape)} without their "
                f"dimension 1; targets{f' of task {task!r}' if task else ''} are {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        classes = torch.arange(count, device=targets.device).reshape(-1, *[1] * (targets.ndim - 1))
        hot = (targets.unsqueeze(1) == classes).to(outputs.dtype)
        if not bool(hot.any(1).all()):
            raise LossError(f"label smoothing met a class below 0 or above {count - 1}: mask such examples out first")
        smoothing = self.value()
        return (1 - smoothing) * hot + smoothing / count
