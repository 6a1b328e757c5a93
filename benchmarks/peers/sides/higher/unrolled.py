"""(c) by higher: its patched model and differentiable optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import higher
import torch
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, Side
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Library(Side):
    note = "keeps the graphs of all steps; has no other mode"

    def __init__(self, case: Unrolling, steps: int) -> None:
        self.case, self.steps = case, steps
        self.model = case.copy()
        self.decay = case.decay.clone().requires_grad_()
        self.inner = torch.optim.SGD(self.model.parameters(), lr=case.rate)
        self.outer = KeepingSGD([self.decay], lr=case.outer_rate)

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

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
