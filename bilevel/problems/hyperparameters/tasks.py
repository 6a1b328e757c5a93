"""Several tasks, and the weights of their training losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import ConfigError, LossError, unknown_name
from bilevel.problems.hyperparameters.base import Hyperparameter
from bilevel.problems.supervised import Criterion

__all__ = ["TaskWeights", "Tasks"]


class Tasks:
    """A criterion of several tasks: outputs and targets are mappings from their names.

    Called, as the validation loss does, it is the sum of the *main* tasks' losses; training weighs all of them.

    Args:
        criteria: ``(outputs, targets) -> scalar`` by task.
        main: The tasks that count in validation; all by default.

    Raises:
        ConfigError: No task, or none that is main.
        UnknownNameError: A main task that does not exist.
        LossError: Outputs or targets without a task (when called).
    """

    def __init__(self, criteria: Mapping[str, Criterion], main: str | Sequence[str] | None = None) -> None:
        if not criteria:
            raise ConfigError("Tasks needs at least one criterion")
        self.criteria = dict(criteria)
        self.main = tuple(criteria) if main is None else (main,) if isinstance(main, str) else tuple(main)
        for name in self.main:
            if name not in self.criteria:
                raise unknown_name("main task", name, self.criteria)
        if not self.main:
            raise ConfigError("Tasks.main names no task: nothing would be left of the validation loss")

    def part(self, values: Any, task: str, what: str) -> Any:
        """Returns a task's outputs or targets."""
        if not isinstance(values, Mapping) or task not in values:
            found = list(values) if isinstance(values, Mapping) else f"a {type(values).__name__}"
            raise LossError(f"the {what} must be a mapping from tasks with {task!r} among them, not {found}")
        return values[task]

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Returns the sum of the main tasks' losses."""
        given = [(self.part(outputs, task, "outputs"), self.part(targets, task, "targets")) for task in self.main]
        return torch.stack([self.criteria[task](*pair) for task, pair in zip(self.main, given, strict=True)]).sum()


class TaskWeights(Hyperparameter):
    """Learned weights of several tasks' training losses: ``Σₖ wₖ fₖ`` with ``w = K softmax(λ)`` for K tasks.

    They add up to K, so that all of them cannot vanish; judged by the main tasks' validation loss, they say how much
    each of the others helps. Source: auxiliary losses weighted by an implicit hypergradient, Navon et al., ICLR 2021
    (arXiv 2007.02693).

    Args:
        tasks: The inner problem's criterion.

    Raises:
        ConfigError: Fewer than two tasks.
        LossError: Other tasks than these (within the loss).
    """

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.names = tuple(tasks.criteria)
        if len(self.names) < 2:
            raise ConfigError("TaskWeights needs two tasks or more: the weight of a single one is always 1")
        self.logits = nn.Parameter(torch.zeros(len(self.names)))

    def value(self) -> dict[str, Tensor]:
        """Returns w by task."""
        return dict(zip(self.names, len(self.names) * self.logits.softmax(0), strict=True))

    def losses(self, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the weighted losses."""
        if set(losses) != set(self.names):
            found = "one loss" if set(losses) == {""} else f"the losses of {sorted(losses)}"
            raise LossError(
                f"TaskWeights has weights for {sorted(self.names)} and was given {found}: give the inner problem the "
                "same criterion=Tasks(...)"
            )
        weights = self.value()
        return {task: weights[task] * loss for task, loss in losses.items()}
