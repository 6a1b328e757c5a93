"""What chunks of tasks cost: an inner step, its derivative and the outer loss, evaluated at the tasks at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import distributed
from bilevel.errors import ConfigError
from bilevel.functional import derivatives, leaves
from bilevel.hypergrad import Estimator
from bilevel.problems.few_shot.budget import SHARE, Chunking, Need, choose, free_memory, measured_peak, timed
from bilevel.problems.few_shot.chunks import Chunk, Sum
from bilevel.vector import Tensors

__all__ = ["Costs", "measured_chunking"]

PRODUCTS = 5
"""How many products an implicit method is taken to need, where chunk sizes are compared."""


def measured_chunking(
    inner: Sum, outer: Sum, steps: int, method: Estimator | None, count: int, budget: int | None, name: str
) -> Chunking:
    """Returns the chunk size that is the best for the tasks at hand, the same one on all ranks.

    Ranks measure different times and may have less memory free than others. The smallest size that one of them would
    take is in the budget of all. So that none waits for one that stopped, they also fail together.

    Args:
        inner: The inner loss.
        outer: The outer loss.
        steps: Inner steps.
        method: By which the inner problem is differentiated.
        count: M.
        budget: Bytes; None for :data:`~bilevel.problems.few_shot.budget.SHARE` of those that are free.
        name: Whose choice it is, for messages.

    Raises:
        ConfigError: Chunks of a single task take more than the budget, on this rank or on another one.
    """

    def own() -> Chunking:
        limit = int(SHARE * free_memory(inner.device)) if budget is None else budget
        costs = Costs(inner, outer, steps, method, count, limit)
        return choose(count, limit, costs.memory, costs.seconds, budget is not None, name)

    if distributed.size() == 1:
        return own()
    try:
        found = own()
    except Exception:
        distributed.least(0)
        raise
    size = distributed.least(found.size)
    if not size:
        raise ConfigError(f"{name}: another rank could choose no chunk size; its error says why")
    return replace(found, size=size)


@dataclass(frozen=True)
class Costs:
    """Measures chunks of the first tasks.

    Attributes:
        inner: The inner loss.
        outer: The outer loss.
        steps: Inner steps.
        method: By which the inner problem is differentiated.
        count: M.
        budget: Bytes; a measurement ends where it exceeds them.
    """

    inner: Sum
    outer: Sum
    steps: int
    method: Estimator | None
    count: int
    budget: int

    def memory(self, size: int) -> Need:
        """Returns the peak of a chunk: of a step's graph and product, or of the outer loss's pass.

        Where the method keeps graphs, those of all chunks and steps are held at once.
        """
        chunk, device = Chunk(0, size), self.inner.device
        kept = self._graphs_kept(size)
        held = None
        with measured_peak(device, self.budget) as graph:
            held = self._graph(self.inner, chunk)
        del held
        if graph.peak > self.budget:
            return Need(graph.peak, graph.peak)
        with measured_peak(device, self.budget) as product:
            self._product(chunk)
        with measured_peak(device, self.budget) as outer:
            self._gradient(self.outer, chunk, shared_too=True)
        total = max(product.peak + max(kept - 1, 0) * graph.held, outer.peak + kept * graph.held)
        return Need(max(product.peak, outer.peak), total)

    def seconds(self, size: int) -> float:
        """Returns the time of an outer step of a chunk."""
        chunk, device = Chunk(0, size), self.inner.device

        def time_of(body: Callable[[], object]) -> float:
            return timed(body, device)

        step = 0.0 if self._graphs_kept(size) else time_of(lambda: self._gradient(self.inner, chunk, shared_too=False))
        product = time_of(lambda: self._product(chunk))
        products = self.steps if self.method is None or self.method.needs_trajectory else PRODUCTS
        return (
            self.steps * step + products * product + time_of(lambda: self._gradient(self.outer, chunk, shared_too=True))
        )

    def _graphs_kept(self, size: int) -> int:
        if self.method is None or not self.method.keeps_graph:
            return 0
        steps = self.method.recorded_steps or self.steps
        if self.method.num_graphs is not None:
            steps = min(steps, self.method.num_graphs)
        return steps * math.ceil(self.count / size)

    def _leaves(self, total: Sum, chunk: Chunk) -> tuple[Tensors, Tensors]:
        return total.leaves(chunk, total.stacked.tensors, total.shared.tensors)

    def _gradient(self, total: Sum, chunk: Chunk, *, shared_too: bool) -> tuple[Tensor | None, ...]:
        rows, shared = self._leaves(total, chunk)
        with torch.enable_grad():
            inputs = tuple(part for part in (rows + shared if shared_too else rows) if part.requires_grad)
            return derivatives(total.at(chunk, rows, shared), inputs)

    def _graph(self, total: Sum, chunk: Chunk) -> tuple[Tensors, tuple[Tensor | None, ...]]:
        rows, shared = self._leaves(total, chunk)
        with torch.enable_grad():
            grads = derivatives(total.at(chunk, rows, shared), rows, create_graph=True)
        return tuple(part for part in rows + shared if part.requires_grad), grads

    def _product(self, chunk: Chunk) -> None:
        inputs, grads = self._graph(self.inner, chunk)
        curved = tuple(grad for grad in grads if grad is not None and grad.requires_grad)
        if curved:
            torch.autograd.grad(curved, inputs, leaves(curved), allow_unused=True)
