"""What the problems of all workloads share: this library's engine."""

from __future__ import annotations

from benchmarks.peers.side import KeepingSide
from bilevel import Engine, EngineConfig, Estimator, Problem


class EngineSide(KeepingSide):
    """The engine with its defaults."""

    def __init__(self, outer: Problem, inner: Problem, method: Estimator) -> None:
        self.engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient=method)
        self.outer = outer.optimizer

    def step(self) -> None:
        self.engine.step()
