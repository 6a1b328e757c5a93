"""(c) by TorchOpt: ``MetaSGD``."""

from __future__ import annotations

import torchopt

from benchmarks.peers.side import Method
from benchmarks.peers.sides.loops import Chain
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Library(Chain):
    def __init__(self, case: Unrolling, steps: int) -> None:
        super().__init__(case, steps)
        self.inner = torchopt.MetaSGD(self.model, lr=case.rate)

    def step(self) -> None:
        self.outer.zero_grad()
        for _ in range(self.steps):
            self.inner.step(self.case.inner_loss(self.model, list(self.model.parameters()), self.decay))
        self.case.outer_loss(self.model).backward(inputs=[self.decay])
        torchopt.stop_gradient(self.model)
        torchopt.stop_gradient(self.inner)
        self.outer.step()


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
