"""(c) by higher: its patched model and differentiable optimiser."""

from __future__ import annotations

import higher
import torch

from benchmarks.peers.side import Method
from benchmarks.peers.sides.loops import Chain
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Library(Chain):
    def __init__(self, case: Unrolling, steps: int) -> None:
        super().__init__(case, steps)
        self.inner = torch.optim.SGD(self.model.parameters(), lr=case.rate)

    def step(self) -> None:
        self.outer.zero_grad()
        with higher.innerloop_ctx(self.model, self.inner, copy_initial_weights=True) as (fast, optimizer):
            for _ in range(self.steps):
                optimizer.step(self.case.inner_loss(fast, list(fast.parameters()), self.decay))
            self.case.outer_loss(fast).backward(inputs=[self.decay])
            with torch.no_grad():
                for p, value in zip(self.model.parameters(), fast.parameters(), strict=True):
                    p.copy_(value)
        self.outer.step()


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
