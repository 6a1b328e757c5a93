"""(c) by this library: ``Unrolled(memory="graph")``, or (less memory) with the last steps' graphs, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method
from benchmarks.peers.sides.bilevel.engine import EngineSide
from benchmarks.peers.workloads.unrolled import Tasks, Unrolling
from bilevel import Estimator, Problem, Unrolled


class Decay(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.case.outer_loss(self.network.module)


class Network(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.case.inner_loss(self.module, list(self.module.parameters()), self.decay.module[0])


class Library(EngineSide):
    """The problem with a network, by any method."""

    def __init__(self, case: Unrolling, steps: int, method: Estimator) -> None:
        outer = Decay(nn.ParameterList([case.decay.clone()]), optimizer=lambda p: KeepingSGD(p, lr=case.outer_rate))
        inner = Network(case.copy(), optimizer=lambda p: torch.optim.SGD(p, lr=case.rate), steps=steps)
        outer.case = inner.case = case  # type: ignore[attr-defined]
        super().__init__(outer, inner, method)


def build(tasks: Tasks, method: Method) -> Library:
    if not method.options["least_memory"]:
        estimator, note = Unrolled(memory="graph"), 'memory="graph"'
    elif graphs := method.options.get("graphs", 0):
        estimator, note = Unrolled(memory="graph", graphs=graphs), f'memory="graph", graphs={graphs}'
    else:
        estimator, note = Unrolled(), 'memory="replay"'
    side = Library(tasks.case(method), method.options["steps"], estimator)
    side.note = note
    return side
