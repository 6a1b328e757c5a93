"""What the problems of all workloads share: Betty's engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from betty.configs import EngineConfig
from betty.engine import Engine
from betty.problems import Problem

from benchmarks.peers.side import KeepingSide

BATCH = [(torch.zeros(1),)]  # the losses have their data


class EngineSide(KeepingSide):
    """A step is what ``Engine.run()`` does in ``unroll_steps`` of its iterations."""

    def start(self, outer: Problem, inner: Sequence[Problem], steps: int, *, cuda: bool) -> None:
        """Makes the engine."""
        logging.disable(logging.CRITICAL)
        edges = {"u2l": {outer: list(inner)}, "l2u": {one: [outer] for one in inner}}
        config = EngineConfig(strategy="gpu" if cuda else "cpu", train_iters=steps, logger_type="none")
        self.engine, self.iterations = Engine([outer, *inner], config, edges), steps
        self.engine.train()
        self.outer = outer.optimizer

    def step(self) -> None:
        for _ in range(self.iterations):
            self.engine.global_step += 1
            self.engine.train_step()
