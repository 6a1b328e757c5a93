"""(d) by hand with ``torch.func.vmap``: all tasks of a chunk together, and autograd around that.

The derivative is autograd's, not ``torch.func.grad``'s: that one is wrong by 1 % through batch normalisation's second
derivative (torch 2.13, float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from benchmarks.peers.side import Method, NotOffered, Side
from benchmarks.peers.sides.hand.implicit import move
from benchmarks.peers.workloads.few_shot import FewShot, Tasks

CHUNK = 4  # of conv nets on a processor, where more are slower; all tasks otherwise


class Chunks(Side):
    def __init__(self, problem: FewShot, chunk: int) -> None:
        self.problem = problem
        self.names = [name for name, _ in problem.network.named_parameters()]
        self.start = [p.detach().clone().requires_grad_() for p in problem.network.parameters()]
        self.chunks = list(zip(*(part.split(chunk) for part in problem.batch), strict=True))
        self.note = f"{chunk} task{'' if chunk == 1 else 's'} at a time"

    def step(self) -> None:
        total = [torch.zeros_like(p) for p in self.start]
        for support_x, support_y, query_x, query_y in self.chunks:
            w = [p.expand(len(support_x), *p.shape) for p in self.start]
            for _ in range(self.problem.steps):
                grads = torch.autograd.grad(self.losses(w, support_x, support_y), w, create_graph=True)
                w = [p - self.problem.rate * g for p, g in zip(w, grads, strict=True)]
            found = torch.autograd.grad(self.losses(w, query_x, query_y), self.start)
            torch._foreach_add_(total, list(found), alpha=1 / self.problem.count)
        self.found = total
        move(self.start, -self.problem.outer_rate, total)

    def losses(self, w: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of the tasks' losses."""
        self.problem.passes.forward += 1

        def single(values: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return self.problem.criterion(functional_call(self.problem.network, values, (inputs,)), targets)

        found: Tensor = vmap(single)(dict(zip(self.names, w, strict=True)), x, y).sum()
        return found


def build(tasks: Tasks, method: Method) -> Chunks:
    if method.options["implicit"]:
        raise NotOffered("no loop for implicit MAML")
    problem = tasks.case(method)
    whole = problem.batch[0].is_cuda or method.options["network"] == "sinusoid"
    return Chunks(problem, problem.count if whole else CHUNK)
