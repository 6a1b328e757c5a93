"""(c) by this library: ``Unrolled(memory="graph")``, or (least memory) ``memory="replay"``, its default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, Side
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling
from bilevel import Engine, EngineConfig, Problem, Unrolled


class Decay(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.case.outer_loss(self.network.module)


class Network(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.case.inner_loss(self.module, list(self.module.parameters()), self.decay.module[0])


class Library(Side):
    """The engine with its defaults."""

    def __init__(self, case: Unrolling, steps: int, memory: str) -> None:
        self.note = f'memory="{memory}"'
        outer = Decay(nn.ParameterList([case.decay.clone()]), optimizer=lambda p: KeepingSGD(p, lr=case.outer_rate))
        inner = Network(case.copy(), optimizer=lambda p: torch.optim.SGD(p, lr=case.rate), steps=steps)
        outer.case = inner.case = case  # type: ignore[attr-defined]
        self.engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient=Unrolled(memory=memory))

    def step(self) -> None:
        self.engine.step()

    def hypergradient(self) -> Sequence[Tensor]:
        optimizer = self.engine.problems["decay"].optimizer
        assert isinstance(optimizer, KeepingSGD)
        return optimizer.kept


def build(tasks: Tasks, method: Method) -> Library:
    memory = "replay" if method.options["least_memory"] else "graph"
    return Library(tasks.case(method), method.options["steps"], memory)
