"""(d) by Betty: implicit MAML, a problem for each task, as in its example; its class for unrolling does not run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Outer(ImplicitProblem):  # type: ignore[misc]
    problem: FewShot
    inner: Sequence[Inner]

    def training_step(self, batch: Any) -> Tensor:
        losses = [self.problem.query_loss(inner.module, inner.number) for inner in self.inner]
        return torch.stack(losses).mean()


class Inner(ImplicitProblem):  # type: ignore[misc]
    problem: FewShot
    number: int

    def on_inner_loop_start(self) -> None:
        self.module.load_state_dict(self.outer.module.state_dict())

    def training_step(self, batch: Any) -> Tensor:
        pairs = zip(self.module.parameters(), self.outer.module.parameters(), strict=True)
        penalty: Any = sum((a - b).square().sum() for a, b in pairs)
        return self.problem.support_loss(self.module, self.number) + self.problem.proximal / 2 * penalty


class Library(Side):
    note = "one problem a task; all query losses in one graph"

    def __init__(self, problem: FewShot) -> None:
        logging.disable(logging.CRITICAL)
        batch = [(torch.zeros(1),)]
        network = problem.copy()
        optimizer = KeepingSGD(network.parameters(), lr=problem.outer_rate)
        self.outer = Outer("outer", Config(), network, optimizer, None, batch)
        inner = []
        for number in range(problem.count):
            module = problem.copy()
            sgd = torch.optim.SGD(module.parameters(), lr=problem.rate)
            settings = Config(type="cg", cg_iterations=problem.products, unroll_steps=problem.steps)
            inner.append(Inner(f"task_{number}", settings, module, sgd, None, batch))
            inner[-1].problem, inner[-1].number = problem, number
        self.outer.problem, self.outer.inner, self.steps = problem, inner, problem.steps
        edges = {"u2l": {self.outer: inner}, "l2u": {one: [self.outer] for one in inner}}
        device = "gpu" if problem.batch[0].is_cuda else "cpu"
        self.engine = Engine([self.outer, *inner], EngineConfig(strategy=device, logger_type="none"), edges)

    def step(self) -> None:
        for _ in range(self.steps):
            self.engine.train_step()

    def hypergradient(self) -> Sequence[Tensor]:
        optimizer = self.outer.optimizer
        assert isinstance(optimizer, KeepingSGD)
        return optimizer.kept


def build(tasks: Tasks, method: Method) -> Library:
    if not method.options["implicit"]:
        raise NotOffered("its class for unrolled problems does not run")
    return Library(tasks.case(method))
