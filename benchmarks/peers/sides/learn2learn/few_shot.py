"""(d) by learn2learn: ``MAML``, a loop over tasks, each backward at its end."""

from __future__ import annotations

from collections.abc import Sequence

from learn2learn.algorithms.maml import MAML
from torch import Tensor

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Side
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Library(Side):
    def __init__(self, problem: FewShot) -> None:
        self.problem = problem
        self.learner = MAML(problem.copy(), lr=problem.rate, first_order=False)
        self.outer = KeepingSGD(self.learner.parameters(), lr=problem.outer_rate)

    def step(self) -> None:
        problem = self.problem
        self.outer.zero_grad()
        for number in range(problem.count):
            fast = self.learner.clone()
            for _ in range(problem.steps):
                fast.adapt(problem.support_loss(fast, number))
            (problem.query_loss(fast, number) / problem.count).backward()
        self.outer.step()

    def hypergradient(self) -> Sequence[Tensor]:
        return self.outer.kept


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("no implicit differentiation")
    return Library(tasks.case(method))
