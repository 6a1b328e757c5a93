"""(d) by Betty: implicit MAML, a problem for each task, as in its example; its class for unrolling does not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from betty.configs import Config
from betty.problems import ImplicitProblem
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, NotOffered
from benchmarks.peers.sides.betty.engine import BATCH, EngineSide
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


class Library(EngineSide):
    note = "one problem a task; all query losses in one graph"

    def __init__(self, problem: FewShot) -> None:
        network = problem.copy()
        optimizer = KeepingSGD(network.parameters(), lr=problem.outer_rate)
        outer = Outer("outer", Config(), network, optimizer, None, BATCH)
        inner = []
        for number in range(problem.count):
            module = problem.copy()
            sgd = torch.optim.SGD(module.parameters(), lr=problem.rate)
            settings = Config(type="cg", cg_iterations=problem.products, unroll_steps=problem.steps)
            inner.append(Inner(f"task_{number}", settings, module, sgd, None, BATCH))
            inner[-1].problem, inner[-1].number = problem, number
        outer.problem, outer.inner = problem, inner
        self.start(outer, inner, problem.steps, cuda=problem.batch[0].is_cuda)


def build(tasks: Tasks, method: Method) -> Library:
    if not method.options["implicit"]:
        raise NotOffered("its class for unrolled problems does not run")
    return Library(tasks.case(method))
