"""(d) by this library: ``MetaLearner`` and ``Adaptation``."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.peers.side import KeepingSGD, Method
from benchmarks.peers.sides.bilevel.engine import EngineSide
from benchmarks.peers.workloads.few_shot import FewShot, Tasks
from bilevel import ConjugateGradient, Unrolled
from bilevel.problems import Adaptation, MetaLearner, TaskBatch


class Library(EngineSide):
    """The engine; ``settings`` are those of :class:`bilevel.problems.Adaptation`."""

    def __init__(self, problem: FewShot, **settings: Any) -> None:
        self.problem, self.network = problem, problem.copy()
        outer = MetaLearner(self.network, optimizer=lambda p: KeepingSGD(p, lr=problem.outer_rate))
        self.inner = Adaptation(
            self.network,
            [TaskBatch(*problem.batch)],
            optimizer=lambda p: torch.optim.SGD(p, lr=problem.rate),
            steps=problem.steps,
            criterion=problem.criterion,
            proximal=problem.proximal,
            **settings,
        )
        cg = ConjugateGradient(max_iterations=problem.products or 1, rtol=0.0)
        super().__init__(outer, self.inner, cg if problem.proximal else Unrolled(memory="graph"))

    def step(self) -> None:
        self.problem.passes.forward += self.engine.step().passes[0]


def build(tasks: Tasks, method: Method) -> Library:
    problem = tasks.case(method)
    side = Library(problem, chunk_size="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was chosen is in the note
        side.engine.step()  # chooses the chunk size, by measuring
    with torch.no_grad():
        for p, start in zip(side.network.parameters(), problem.network.parameters(), strict=True):
            p.copy_(start)
    if side.inner.chunking:
        size = side.inner.chunking.size
        side.note = f"{size} task{'' if size == 1 else 's'} at a time, as measured"
    return side
