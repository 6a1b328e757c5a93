"""What ready-made problems share: a model fitted to labelled batches, and what is judged by how well it then does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.errors import GraphError
from bilevel.problems.base import Problem

__all__ = ["Criterion", "Training", "Validation", "counterpart"]

Criterion = Callable[..., Tensor]
"""``(outputs, targets) -> scalar``; with ``reduction="none"``, where it is asked for, one value an example."""

Kind = TypeVar("Kind", bound=Problem)


def counterpart(problem: Problem, kind: type[Kind], name: str | None = None) -> Kind:
    """Returns the other problem of an engine that a ready-made one works with.

    Args:
        problem: The problem that looks for another one.
        kind: Of which class that is.
        name: Its name; None where it is the only one of its class.

    Raises:
        GraphError: There is none, or there are several and no name says which.

    Example::

        training = counterpart(self, Training)      # within a loss
    """
    found = {key: other for key, other in problem._siblings.items() if isinstance(other, kind) and other is not problem}
    if name is not None and name in found:
        return found[name]
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    wanted = f"a {kind.__name__}" if name is None else f"the {kind.__name__} {name!r}"
    there = {key: type(other).__name__ for key, other in problem._siblings.items()}
    remedy = "name the one that is meant" if found else "give the engine one"
    raise GraphError(
        f"problem {problem.name!r} works with {wanted}, of which its engine has {len(found)} (problems: {there}): "
        f"{remedy}"
    )


class Training(Problem):
    """The usual inner problem: a model fitted to labelled batches ``(inputs, targets)``.

    The loss is ``criterion(model(inputs), targets)``. Its batches and the model's outputs are where subclasses hook in.

    Args:
        module: The model.
        criterion: ``(outputs, targets) -> scalar``; the cross-entropy by default.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, steps, ….

    Cost: 1 forward pass a loss.
    """

    def __init__(self, module: nn.Module, *, criterion: Criterion = F.cross_entropy, **settings: Any) -> None:
        super().__init__(module, **settings)
        self.criterion = criterion

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the loss on a batch, with the model's outputs."""
        inputs, targets = batch
        outputs = self(inputs)
        return {"loss": self.criterion(outputs, targets), "outputs": outputs}


class Validation(Problem):
    """The usual outer problem: its parameters are judged by the trained model's loss on batches ``(inputs, targets)``.

    Args:
        module: Holds what is learned on this level, the hyper-parameters.
        training: The name of the inner problem; None where the engine has one :class:`Training` only.
        criterion: ``(outputs, targets) -> scalar``; the inner problem's by default.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, ….

    Cost: 1 forward pass of the model a loss.
    """

    def __init__(
        self, module: nn.Module, *, training: str | None = None, criterion: Criterion | None = None, **settings: Any
    ) -> None:
        super().__init__(module, **settings)
        self.training_name = training
        self.criterion = criterion

    def trained(self) -> Training:
        """Returns the inner problem."""
        return counterpart(self, Training, self.training_name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the trained model's loss on a batch."""
        inputs, targets = batch
        training = self.trained()
        return (self.criterion or training.criterion)(training(inputs), targets)
