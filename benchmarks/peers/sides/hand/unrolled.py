"""(c) by hand: the chain of all steps' graphs, or (least memory) every step evaluated again on the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.side import Method, Side
from benchmarks.peers.sides.hand.implicit import move
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Loop(Side):
    """Per step: 1 forward pass, 1 backward pass with graph, 1 product; evaluated again, 1 more of the first two."""

    def __init__(self, problem: Unrolling, steps: int, *, again: bool) -> None:
        self.problem, self.steps, self.again = problem, steps, again
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
        for _ in range(self.steps):
            here = [p.requires_grad_() for p in w]
            kept.append(here)
            grads = torch.autograd.grad(self.inner_loss(here), here)
            w = list(torch._foreach_sub([p.detach() for p in here], list(grads), alpha=rate))
        self.parameters = w
        last = [p.detach().requires_grad_() for p in w]
        v = torch.autograd.grad(self.problem.outer_loss(self.problem.with_parameters(last)), last)
        found = torch.zeros_like(self.decay)
        while kept:
            here = kept.pop()
            grads = torch.autograd.grad(self.inner_loss(here), here, create_graph=True)
            inputs = [*here, self.decay] if kept else [self.decay]
            *products, mixed = torch.autograd.grad(grads, inputs, v)
            found -= rate * mixed
            v = torch._foreach_sub(v, products, alpha=rate) if kept else v
        return found

    def inner_loss(self, w: Sequence[Tensor]) -> Tensor:
        return self.problem.inner_loss(self.problem.with_parameters(w), w, self.decay)


def build(tasks: Tasks, method: Method) -> Loop:
    return Loop(tasks.case(method), method.options["steps"], again=method.options["least_memory"])
