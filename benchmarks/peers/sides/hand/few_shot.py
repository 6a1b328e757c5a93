"""(d) by hand: a loop over tasks with the least number of passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.side import Method, Side
from benchmarks.peers.sides.hand.implicit import conjugate_gradient, move
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Loop(Side):
    def __init__(self, problem: FewShot) -> None:
        self.problem = problem
        self.start = [p.detach().clone().requires_grad_() for p in problem.network.parameters()]

    def step(self) -> None:
        single = self.implicit if self.problem.proximal else self.unrolled
        total = [torch.zeros_like(p) for p in self.start]
        for number in range(self.problem.count):
            torch._foreach_add_(total, list(single(number)), alpha=1 / self.problem.count)
        self.found = total
        move(self.start, -self.problem.outer_rate, total)

    def unrolled(self, number: int) -> Sequence[Tensor]:
        problem, w = self.problem, self.start
        for _ in range(problem.steps):
            value = problem.support_loss(problem.with_parameters(w), number)
            grads = torch.autograd.grad(value, w, create_graph=True)
            w = [p - problem.rate * g for p, g in zip(w, grads, strict=True)]
        return torch.autograd.grad(problem.query_loss(problem.with_parameters(w), number), self.start)

    def implicit(self, number: int) -> Sequence[Tensor]:
        problem, beta = self.problem, self.problem.proximal
        w = [p.detach().clone().requires_grad_() for p in self.start]
        for _ in range(problem.steps):
            grads = torch.autograd.grad(problem.support_loss(problem.with_parameters(w), number), w)
            with torch.no_grad():
                away = torch._foreach_sub(w, self.start)
                move(w, -problem.rate, torch._foreach_add(list(grads), away, alpha=beta))
        v = torch.autograd.grad(problem.query_loss(problem.with_parameters(w), number), w)
        grads = torch.autograd.grad(problem.support_loss(problem.with_parameters(w), number), w, create_graph=True)

        def product(p: Sequence[Tensor], iteration: int) -> Sequence[Tensor]:
            found = torch.autograd.grad(grads, w, p, retain_graph=iteration + 1 < problem.products)
            return torch._foreach_add(list(p), list(found), alpha=1 / beta)

        return conjugate_gradient(product, v, problem.products)


def build(tasks: Tasks, method: Method) -> Loop:
    return Loop(tasks.case(method))
