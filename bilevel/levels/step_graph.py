"""Inner updates whose gradients are taken with their graphs, for methods that keep these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.double_backward import made_since, operations_made, refuse_once_differentiable
from bilevel.functional import PassCount, dense_gradient, derivatives, gradients_on, independent, leaves
from bilevel.hypergrad.base import StepGraph
from bilevel.levels.metrics import mean_metrics
from bilevel.problems.base import Problem
from bilevel.slots import ParameterSlots
from bilevel.vector import Tensors

__all__ = ["KeptGraph", "take_with_graph"]


@dataclass(frozen=True)
class KeptGraph:
    """A step's graph, and how to tell that it is still valid.

    Attributes:
        graph: The graph. Its leaves are copies of the inner parameters, which the update changes in place, and the
            live parameters of the problems above.
        versions: How often each of those live parameters had been changed in place, by identity.
    """

    graph: StepGraph
    versions: Mapping[int, int]

    def still_valid(self, outer: Tensors) -> StepGraph | None:
        """Returns the graph; None where a parameter of a problem above has changed since."""
        return self.graph if all(self.versions.get(id(p)) == p._version for p in outer) else None


def take_with_graph(
    problem: Problem,
    batches: Sequence[Any],
    inner: Tensors,
    outer: Tensors,
    slots: ParameterSlots,
    passes: PassCount,
    *,
    once: bool = False,
) -> tuple[Tensor, Mapping[str, Any], Tensors, KeptGraph]:
    """Takes an inner problem's training pass at copies of its parameters.

    Args:
        problem: The problem.
        batches: Its batches.
        inner: Copies of its parameters' values.
        outer: The parameters of the problems above that reach its loss.
        slots: Where the modules hold parameters.
        passes: Where passes are counted.
        once: Whether a single derivative of the gradient is expected: it frees the graph, unless parts of that were
            computed before this pass.

    Returns:
        The loss, the metrics, the gradient (detached, not reduced over ranks) and the graph.

    Raises:
        LossError: The loss does not depend on the copies, or cannot be differentiated twice.

    Cost: 1 forward pass and 1 backward pass with graph.
    """
    name, copies = f"problem {problem.name!r}", leaves(inner)
    before = operations_made()
    # Backward inside the swap: activation checkpointing evaluates again with what the modules hold at that moment.
    apart = slots.buffers_apart() if slots.has_buffers else nullcontext()
    with apart, slots.swapped(problem.parameters, copies), gradients_on():
        taken = [problem.evaluate_loss(batch) for batch in batches]
        value = taken[0][0] if len(taken) == 1 else torch.stack([loss for loss, _ in taken]).mean()
        metrics = mean_metrics([more for _, more in taken])
        passes.forward += len(taken)
        grads: Sequence[Tensor | None] = ()
        if value.requires_grad:
            once = made_since(refuse_once_differentiable(value, copies, name), before) and once
            grads = derivatives(value, copies, create_graph=True, name=name)
            passes.backward += 1
    if not any(grad is not None for grad in grads):
        raise independent(name)
    gradient = dense_gradient(grads, copies)
    versions = {id(p): p._version for p in outer}
    local = tuple(map(Tensor.detach, gradient))
    return value.detach(), metrics, local, KeptGraph(StepGraph(copies, gradient, once), versions)
