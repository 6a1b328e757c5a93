"""The inner problem's updates: recorded by an engine, or made here from the given inner parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError, NonFiniteError
from bilevel.functional import Evaluate, dense_gradient, gradient, independent, leaves, require_finite
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, StepGraph
from bilevel.optim import OPTIMIZERS, default_update
from bilevel.validation import check_choice, check_integer, check_number
from bilevel.vector import Tensors, is_finite

__all__ = ["InnerUpdates", "Taken", "Trajectory", "take_step"]


@dataclass(frozen=True)
class Taken:
    """What a step leads to.

    Attributes:
        inner: The inner parameters after it.
        memory: The optimiser's memory after it.
        graph: The gradient's graph, where it was asked for.
    """

    inner: Tensors
    memory: Tensors
    graph: StepGraph | None = None


@dataclass(frozen=True)
class Trajectory:
    """Inner updates and where they led.

    Attributes:
        steps: The updates, oldest first.
        point: The inner parameters after the last one.
        message: What a user should know: fewer updates than asked for.
    """

    steps: Sequence[InnerStep]
    point: Tensors
    message: str = ""


class InnerUpdates(Estimator):
    """Base of the methods that differentiate, or repeat, the inner problem's updates.

    A subclass declares these fields:

    Attributes:
        steps: As a function, the gradient steps to take from ``inner_params``. In an engine, how many of the last inner
            updates to take; None for all since the last outer update.
        learning_rate: η of the steps, as a function; in an engine the inner problem's own optimiser made them.
        optimizer: Who makes the steps, as a function: ``"sgd"``, ``"momentum"``, ``"nesterov"`` (both with μ = 0.9),
            ``"rmsprop"``, ``"adam"`` or ``"adamw"``, with torch's defaults for everything else.
    """

    steps: int | None
    learning_rate: float | None
    optimizer: str

    needs_trajectory: ClassVar[bool] = True

    def check_updates(self) -> None:
        """Validates the fields above."""
        owner = type(self).__name__
        if self.steps is not None:
            check_integer(owner, "steps", self.steps, minimum=1)
        if self.learning_rate is not None:
            check_number(owner, "learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        check_choice(owner, "optimizer", self.optimizer, tuple(OPTIMIZERS))

    @property
    def recorded_steps(self) -> int | None:
        """See :meth:`Estimator.recorded_steps`."""
        return self.steps

    def recorded(self, problem: InnerProblem) -> Trajectory:
        """Returns the last recorded updates of a problem that has any."""
        steps = problem.trajectory[-self.steps :] if self.steps else problem.trajectory
        short = (self.steps or 0) > len(steps)
        message = f"{len(steps)} of {self.steps} steps: the inner problem made no more" if short else ""
        return Trajectory(steps, problem.inner, message)

    def made(self, problem: InnerProblem, *, graphs: int = 0) -> Trajectory:
        """Makes the steps from the problem's inner parameters and records them.

        Args:
            problem: The problem.
            graphs: Of how many of the last steps to keep the graphs.

        Raises:
            ConfigError: ``steps`` or ``learning_rate`` is missing.
            LossError: The loss does not depend on the inner parameters.
            NonFiniteError: The first loss, or where the steps end, is NaN or infinite.

        Cost: for each step 1 forward and 1 backward pass (with graph where it is kept).
        """
        record: list[InnerStep] = []

        def take(step: InnerStep) -> Taken:
            keep_graph = len(record) + graphs >= (self.steps or 0)
            taken = take_step(step, problem.outer, keep_graph=keep_graph, first=not record)
            record.append(replace(step, graph=taken.graph))
            return taken

        return Trajectory(record, self.descend(problem, take))

    def descend(self, problem: InnerProblem, take: Callable[[InnerStep], Taken]) -> Tensors:
        """Makes the steps by ``take``, one after the other, and returns where they end; raises as :meth:`made`."""
        steps, rate = self.steps, self.learning_rate
        if steps is None or rate is None:
            kind = type(self).__name__
            raise ConfigError(
                f"method {self.name!r} needs steps and learning_rate where no engine has recorded inner updates: "
                f"{kind}(steps=10, learning_rate=0.1). In an engine, take a step first."
            )
        inner = tuple(part.detach() for part in problem.inner)
        _, memory = default_update(self.optimizer, rate, 0, inner)
        for made in range(steps):
            update, _ = default_update(self.optimizer, rate, made, inner)
            taken = take(InnerStep(problem.objective, inner, memory, update))
            inner, memory = taken.inner, taken.memory
        if not is_finite(inner):
            limit = " below 2 / (largest eigenvalue of the inner Hessian)" if self.optimizer == "sgd" else ""
            raise NonFiniteError(
                f"{steps} gradient steps on the loss of {problem.objective.name} end in NaN or infinity: lower "
                f"learning_rate of method {self.name!r} ({rate:g}){',' if limit else ''}{limit}"
            )
        return leaves(inner)


def take_step(step: InnerStep, outer: Tensors, *, keep_graph: bool = False, first: bool = False) -> Taken:
    """Makes an inner update.

    Args:
        step: The update, and from where.
        outer: The outer variables.
        keep_graph: Whether to keep the gradient's graph.
        first: Whether to check that the loss is finite (which waits for the device).

    Raises:
        LossError: The loss does not depend on the inner parameters.
        NonFiniteError: The loss is NaN or infinite, where that is checked.

    Cost: 1 forward and 1 backward pass (with graph where it is kept).
    """
    objective, point = step.objective, leaves(step.inner)

    def body(evaluate: Evaluate) -> tuple[Tensor | None, ...]:
        value = evaluate()
        if first:
            require_finite(value, objective.name)
        return gradient(value, point, objective, create_graph=keep_graph)

    found = objective.within(point, outer, body)
    if all(grad is None for grad in found):
        raise independent(objective.name)
    grads = dense_gradient(found, point)
    # A gradient with graph is this rank's own; the update takes the mean.
    values = objective.reduce(tuple(grad.detach() for grad in grads)) if keep_graph else grads
    with torch.no_grad():
        inner, memory = step.update(step.inner, values, step.memory)
    return Taken(inner, memory, StepGraph(point, grads) if keep_graph else None)
