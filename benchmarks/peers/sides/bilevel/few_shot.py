"""(d) by this library: ``MetaLearner`` and ``Adaptation``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, Side
from benchmarks.peers.workloads.few_shot import FewShot, Tasks
from bilevel import ConjugateGradient, Engine, EngineConfig, Unrolled
from bilevel.problems import Adaptation, MetaLearner, TaskBatch


class Library(Side):
    def __init__(self, problem: FewShot) -> None:
        self.problem, network = problem, problem.copy()
        self.meta = MetaLearner(network, optimizer=lambda p: KeepingSGD(p, lr=problem.outer_rate))
        inner = Adaptation(
            network,
            [TaskBatch(*problem.batch)],
            optimizer=lambda p: torch.optim.SGD(p, lr=problem.rate),
            steps=problem.steps,
            criterion=problem.criterion,
            proximal=problem.proximal,
            chunk_size="auto",
        )
        cg = ConjugateGradient(max_iterations=problem.products or 1, rtol=0.0)
        method = cg if problem.proximal else Unrolled(memory="graph")
        self.engine = Engine([self.meta, inner], EngineConfig(progress=False), hypergradient=method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was chosen is in the note
            self.engine.step()  # chooses the chunk size, by measuring
        with torch.no_grad():
            for p, start in zip(network.parameters(), problem.network.parameters(), strict=True):
                p.copy_(start)
        self.note = f"{inner.chunking.size} tasks at a time, as measured" if inner.chunking else ""

    def step(self) -> None:
        self.problem.passes.forward += self.engine.step().passes[0]

    def hypergradient(self) -> Sequence[Tensor]:
        optimizer = self.meta.optimizer
        assert isinstance(optimizer, KeepingSGD)
        return optimizer.kept


def build(tasks: Tasks, method: Method) -> Library:
    return Library(tasks.case(method))
