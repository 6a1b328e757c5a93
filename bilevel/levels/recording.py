"""Inner updates, and what it takes to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.hypergrad import State
from bilevel.levels.differentiate import Differentiator
from bilevel.levels.records import InnerRecord, LossGradient, RecordedUpdate, Settled
from bilevel.levels.step_graph import take_with_graph
from bilevel.optim import Update, clipped, projected, update_of
from bilevel.problems.base import Problem
from bilevel.randomness import States
from bilevel.vector import Tensors

__all__ = ["Recorder"]


@dataclass(frozen=True)
class Recorder:
    """Takes the gradients of inner updates in a way that lets the updates be made again.

    Attributes:
        differentiator: Takes the gradients.
    """

    differentiator: Differentiator

    def take(
        self,
        problem: Problem,
        batches: Sequence[Any],
        generators: States,
        records: Mapping[str, InnerRecord],
        states: Mapping[str, Mapping[str, State]],
        active: frozenset[str],
        earlier: RecordedUpdate | None,
        *,
        first: bool,
        remaining: int,
    ) -> tuple[LossGradient, RecordedUpdate]:
        """Returns the loss and total gradient of an inner problem, and the record of its next update.

        Args:
            problem: The inner problem.
            batches: Its batches.
            generators: The generators' states now.
            records: What the losses below it are taken on.
            states: Estimator states, by problem and problem below it.
            active: The problems that are differentiated through.
            earlier: The update before, if that was recorded.
            first: Whether this is the first update since the problem above was updated.
            remaining: How many updates come after this one, before the problem above is updated.

        Cost: that of the gradient.
        """
        assert problem.optimizer is not None
        parts, dependencies = self.differentiator.gradients, self.differentiator.dependencies
        estimator = self.differentiator.estimators[problem.name]
        with torch.no_grad():
            inner = tuple([p.clone() for p in problem.parameters])
        buffers = parts.slots.buffer_values(None if earlier is None else earlier.buffers)
        below = self._settled_below(problem, records, active) if dependencies.lower[problem.name] else {}
        above, last = dependencies.responds_to(problem.name), remaining == 0
        if estimator.keeps_graph and (estimator.num_graphs is None or remaining < estimator.num_graphs):
            outer = parts.parameters(above)
            # One problem above: one product. Several, or problems that respond to each other, take more of them.
            value, metrics, grads, graph = take_with_graph(
                problem, batches, inner, outer, parts.slots, parts.passes, once=len(above) == 1
            )
            grads = parts.reduce(grads)
            result = LossGradient(value, metrics, grads, grads)
        else:
            # What autocast makes of ∂f/∂λ is no match for the products' full precision.
            wanted = last and estimator.needs_outer_gradient and not parts.autocasts(problem.name)
            others = above if wanted else ()
            result, graph = self.differentiator.total(problem, batches, records, states, active, others), None
        # Read now: a loss may set the learning rate that its own update is made with.
        update, memory = _followed(problem) if estimator.needs_update else (_not_followed, ())
        step = RecordedUpdate(
            batches, generators, inner, memory, update, buffers, graph=graph, first=first, below=below
        )
        if last:
            step.gradient, step.outer_gradient = result.gradient, result.others
            step.outer_versions = {id(p): p._version for p in parts.parameters([*result.others])}
        return result, step

    def _settled_below(
        self, problem: Problem, records: Mapping[str, InnerRecord], active: frozenset[str]
    ) -> dict[str, Settled]:
        """Returns the problems below, as they are now."""
        problems = self.differentiator.gradients.problems
        return {
            other: Settled(records[other], tuple(p.detach().clone() for p in problems[other].parameters))
            for other in self.differentiator.dependencies.settled_before(problem.name, active)
        }


def _followed(problem: Problem) -> tuple[Update, Tensors]:
    """Returns the optimiser's update with all that is done to it, and copies of its memory."""
    assert problem.optimizer is not None
    update, memory = update_of(problem.optimizer, problem.parameters)
    if problem.max_grad_norm is not None:
        update = clipped(update, problem.max_grad_norm)
    if problem.projects:
        update = projected(update, problem.project)
    return update, memory


def _not_followed(inner: Tensors, gradient: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
    """Stands for the update where a method asks for the start and the gradient of a step only."""
    raise AssertionError("the update was not recorded")
