"""(c) by TorchOpt: ``MetaSGD``."""

from __future__ import annotations

from collections.abc import Sequence

import torchopt
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, Side
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Library(Side):
    note = "keeps the graphs of all steps; has no other mode"

    def __init__(self, case: Unrolling, steps: int) -> None:
        self.case, self.steps = case, steps
        self.model = case.copy()
        self.decay = case.decay.clone().requires_grad_()
        self.inner = torchopt.MetaSGD(self.model, lr=case.rate)
        self.outer = KeepingSGD([self.decay], lr=case.outer_rate)

    def step(self) -> None:
        self.outer.zero_grad()
        for _ in range(self.steps):
            self.inner.step(self.case.inner_loss(self.model, list(self.model.parameters()), self.decay))
        self.case.outer_loss(self.model).backward(inputs=[self.decay])
        torchopt.stop_gradient(self.model)
        torchopt.stop_gradient(self.inner)
        self.outer.step()

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
