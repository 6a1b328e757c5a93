"""(c) by Betty: ``IterativeProblem``, its class for differentiation through the updates."""

from __future__ import annotations

from typing import Any

import torch
from betty.configs import Config
from betty.problems import ImplicitProblem, IterativeProblem
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method
from benchmarks.peers.sides.betty.engine import BATCH, EngineSide
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling


class Outer(ImplicitProblem):  # type: ignore[misc]
    case: Unrolling

    def training_step(self, batch: Any) -> Tensor:
        return self.case.outer_loss(self.inner)


class Inner(IterativeProblem):  # type: ignore[misc]
    case: Unrolling

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fmodule(self.params, self.buffers, x)
        return found

    def training_step(self, batch: Any) -> Tensor:
        return self.case.inner_loss(self, self.params, self.outer.module[0])


class Library(EngineSide):
    def __init__(self, case: Unrolling, steps: int) -> None:
        model, decay = case.copy(), nn.ParameterList([case.decay.clone()])
        optimizers = [
            KeepingSGD(decay.parameters(), lr=case.outer_rate),
            torch.optim.SGD(model.parameters(), case.rate),
        ]
        outer = Outer("outer", Config(first_order=False, retain_graph=True), decay, optimizers[0], None, BATCH)
        settings = Config(first_order=False, retain_graph=True, unroll_steps=steps)
        inner = Inner("inner", settings, model, optimizers[1], None, BATCH)
        outer.case = inner.case = case
        self.start(outer, [inner], steps, cuda=case.decay.is_cuda)


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
