"""A whole nest of updates as one program that autograd differentiates: brute force, with optimisers written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.proofs.nests import Nest

__all__ = ["OPTIMIZERS", "PROGRAMS", "Program", "Rule"]

Values = dict[str, Tensor]
Memory = tuple[Tensor, ...]

# Whose blocks of updates come before each update of a problem. A problem's loss sees those below it at their response
# to the present values: where it reads one that is below through another, that one takes its block once more.
PROGRAMS: Mapping[str, Mapping[str, str]] = {
    "two_levels": {"a": "b"},
    "three_levels": {"a": "b c", "b": "c"},
    "three_levels_next_only": {"a": "b", "b": "c"},
    "four_levels_next_only": {"a": "b", "b": "c", "c": "d"},
    "four_levels": {"a": "b c d", "b": "c d", "c": "d"},
    "top_reads_lowest": {"a": "b c", "b": "c"},
    "lowest_reads_top": {"a": "b", "b": "c"},
    "only_lowest_reads_top": {"a": "b", "b": "c"},
    "two_inner": {"a": "c b"},
    "sibling_responds_upwards": {"a": "c b"},
    "two_outer": {"p": "c", "q": "c"},
    "middle_beside_inner": {"a": "d b", "b": "c"},
}


@dataclass(frozen=True)
class Rule:
    """An optimiser: torch's, and the same update written out.

    Attributes:
        torch: Makes torch's from parameters.
        update: ``(values, gradient, memory, count) -> (values, memory)`` in differentiable operations.
    """

    torch: Callable[[Any], torch.optim.Optimizer]
    update: Callable[[Tensor, Tensor, Memory, int], tuple[Tensor, Memory]]


def _momentum(x: Tensor, g: Tensor, memory: Memory, count: int) -> tuple[Tensor, Memory]:
    g = g + 0.1 * x
    m = g if not memory else 0.9 * memory[0] + g
    return x - 0.1 * m, (m,)


def _adam(x: Tensor, g: Tensor, memory: Memory, count: int) -> tuple[Tensor, Memory]:
    m, v = memory or (torch.zeros_like(g), torch.zeros_like(g))
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    return x - 0.1 * (m / (1 - 0.9**count)) / ((v / (1 - 0.99**count)).sqrt() + 1e-3), (m, v)


OPTIMIZERS: Mapping[str, Rule] = {
    "sgd": Rule(lambda params: torch.optim.SGD(params, lr=0.2), lambda x, g, memory, count: (x - 0.2 * g, ())),
    "momentum": Rule(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1), _momentum),
    "adam": Rule(lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.99), eps=1e-3), _adam),
}


@dataclass
class Program:
    """The updates of a nest below its outer problems.

    Attributes:
        nest: The losses.
        order: Whose blocks come before each update of a problem; see :data:`PROGRAMS`.
        rules: Optimisers by problem.
        steps: Updates a block, by problem.
        reset: By problem: ``"initial"``, a problem above, or None where the last block's end is the start, a constant.
        recorded: By problem: how many of a block's last updates are differentiated; all by default.
        clip: By problem: the largest norm of a gradient.
        memories: Of the optimisers, and how many updates they have made, where they go on from block to block.
    """

    nest: Nest
    order: Mapping[str, str]
    rules: Mapping[str, Rule]
    steps: Mapping[str, int]
    reset: Mapping[str, str | None]
    recorded: Mapping[str, int] = field(default_factory=dict)
    clip: Mapping[str, float] = field(default_factory=dict)
    memories: dict[str, tuple[Memory, int]] = field(default_factory=dict)

    def loss(self, name: str, values: Values) -> Tensor:
        return self.nest.losses[name](self.nest.join(values))

    def below(self, name: str, values: Values) -> Values:
        """The values after the blocks that come before an update of a problem."""
        for lower in self.order.get(name, "").split():
            values = self.block(lower, values)
        return values

    def block(self, name: str, values: Values) -> Values:
        """The values after one block of a problem's updates."""
        reset = self.reset.get(name)
        memory, count = ((), 0) if reset else self.memories.get(name, ((), 0))
        if reset == "initial":
            x = self.nest.part(self.nest.point, name).clone()
        else:
            # a clone: the derivative by what starts from a vector is not that by the vector
            x = values[reset].clone() if reset else values[name].detach()
        x = x if x.requires_grad else x.clone().requires_grad_()
        for place in range(self.steps[name]):
            if name in self.recorded and place == self.steps[name] - self.recorded[name]:
                x, memory = x.detach().requires_grad_(), tuple(part.detach() for part in memory)
            values = self.below(name, {**values, name: x})
            (g,) = torch.autograd.grad(self.loss(name, values), x, create_graph=True)
            if name in self.clip:
                g = g * torch.clamp(self.clip[name] / (g.norm() + 1e-6), max=1.0)
            x, memory = self.rules[name].update(x, g, memory, count + 1)
            count += 1
        self.memories[name] = tuple(part.detach() for part in memory), count
        return {**values, name: x}

    def run(self, *outer: str) -> tuple[Values, dict[str, Tensor]]:
        """All values before the update of the outer problems, and the total gradients of these."""
        z = self.nest.point
        values = {name: self.nest.part(z, name).clone() for name in self.nest.structure.names}
        values |= {name: values[name].requires_grad_() for name in outer}
        values |= {name: part for name, part in self.below(outer[0], values).items() if name not in outer}
        grads = {
            name: torch.autograd.grad(self.loss(name, values), values[name], retain_graph=True)[0] for name in outer
        }
        return {name: part.detach() for name, part in values.items()}, grads
