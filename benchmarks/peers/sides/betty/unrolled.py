"""(c) by Betty: ``IterativeProblem``, its class for differentiation through the updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, Side
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


class Library(Side):
    def __init__(self, case: Unrolling, steps: int) -> None:
        logging.disable(logging.CRITICAL)
        model, decay = case.copy(), nn.ParameterList([case.decay.clone()])
        optimizers = [
            KeepingSGD(decay.parameters(), lr=case.outer_rate),
            torch.optim.SGD(model.parameters(), case.rate),
        ]
        batch = [(torch.zeros(1),)]
        outer = Outer("outer", Config(first_order=False, retain_graph=True), decay, optimizers[0], None, batch)
        settings = Config(first_order=False, retain_graph=True, unroll_steps=steps)
        inner = Inner("inner", settings, model, optimizers[1], None, batch)
        outer.case = inner.case = case
        self.steps, self.decay = steps, decay
        edges = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
        device = "gpu" if case.decay.is_cuda else "cpu"
        self.engine = Engine([outer, inner], EngineConfig(strategy=device, logger_type="none"), edges)
        self.outer = outer

    def step(self) -> None:
        for _ in range(self.steps):
            self.engine.train_step()

    def hypergradient(self) -> Sequence[Tensor]:
        optimizer = self.outer.optimizer
        assert isinstance(optimizer, KeepingSGD)
        return optimizer.kept


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method), method.options["steps"])
