"""(d) by higher: a loop over tasks, each backward at its end."""

from __future__ import annotations

from collections.abc import Sequence

import higher
import torch
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Library(Side):
    def __init__(self, problem: FewShot) -> None:
        self.problem, self.network = problem, problem.copy()
        self.inner = torch.optim.SGD(self.network.parameters(), lr=problem.rate)
        self.outer = KeepingSGD(self.network.parameters(), lr=problem.outer_rate)

    def step(self) -> None:
        problem = self.problem
        self.outer.zero_grad()
        for number in range(problem.count):
            with higher.innerloop_ctx(self.network, self.inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(problem.steps):
                    optimizer.step(problem.support_loss(fast, number))
                (problem.query_loss(fast, number) / problem.count).backward()
        self.outer.step()

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("no implicit differentiation")
    return Library(tasks.case(method))
