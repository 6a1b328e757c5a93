"""(c) by hand: the chain of all steps' graphs, or (less memory) steps evaluated again on the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.side import Method, Side
from benchmarks.peers.sides.hand.implicit import move
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Loop(Side):
    """Per step: 1 forward pass, 1 backward pass with graph, 1 product; evaluated again, 1 more of the first two.

    Args:
        problem: The problem.
        steps: Inner steps.
        again: Whether steps are evaluated again.
        graphs: How many of the last ones are not.
    """

    def __init__(self, problem: Unrolling, steps: int, *, again: bool, graphs: int = 0) -> None:
        self.problem, self.steps, self.again, self.graphs = problem, steps, again, graphs
        self.parameters: list[Tensor] = [p.detach().clone() for p in problem.module.parameters()]
        self.decay = problem.decay.clone().requires_grad_()

    def step(self) -> None:
        self.found = [self.evaluated_again() if self.again else self.through_graphs()]
        move([self.decay], -self.problem.outer_rate, self.found)

    def through_graphs(self) -> Tensor:
        w = [p.requires_grad_() for p in self.parameters]
        for _ in range(self.steps):
            grads = torch.autograd.grad(self.inner_loss(w), w, create_graph=True)
            w = [p - self.problem.rate * g for p, g in zip(w, grads, strict=True)]
        self.parameters = [p.detach() for p in w]
        return torch.autograd.grad(self.problem.outer_loss(self.problem.with_parameters(w)), self.decay)[0]

    def evaluated_again(self) -> Tensor:
        rate, kept, w = self.problem.rate, [], self.parameters
        for number in range(self.steps):
            here = [p.requires_grad_() for p in w]
            with_graph = number >= self.steps - self.graphs
            grads = torch.autograd.grad(self.inner_loss(here), here, create_graph=with_graph)
            kept.append((here, grads if with_graph else None))
            w = list(torch._foreach_sub([p.detach() for p in here], [g.detach() for g in grads], alpha=rate))
        self.parameters = w
        last = [p.detach().requires_grad_() for p in w]
        v = torch.autograd.grad(self.problem.outer_loss(self.problem.with_parameters(last)), last)
        found = torch.zeros_like(self.decay)
        while kept:
            here, known = kept.pop()
            grads = known or torch.autograd.grad(self.inner_loss(here), here, create_graph=True)
            inputs = [*here, self.decay] if kept else [self.decay]
            *products, mixed = torch.autograd.grad(grads, inputs, v)
            del known, grads
            found -= rate * mixed
            v = torch._foreach_sub(v, products, alpha=rate) if kept else v
        return found

    def inner_loss(self, w: Sequence[Tensor]) -> Tensor:
        return self.problem.inner_loss(self.problem.with_parameters(w), w, self.decay)


def build(tasks: Tasks, method: Method) -> Loop:
    options = method.options
    return Loop(tasks.case(method), options["steps"], again=options["least_memory"], graphs=options.get("graphs", 0))
