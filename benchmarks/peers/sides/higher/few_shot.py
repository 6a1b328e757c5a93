"""(d) by higher: a loop over tasks, each backward at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import higher
import torch
from torch import nn

from benchmarks.peers.side import Method, NotOffered
from benchmarks.peers.sides.loops import TaskLoop
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Library(TaskLoop):
    def __init__(self, problem: FewShot) -> None:
        self.network = problem.copy()
        super().__init__(problem, self.network.parameters())
        self.inner = torch.optim.SGD(self.network.parameters(), lr=problem.rate)

    @contextmanager
    def adapted(self, number: int) -> Iterator[nn.Module]:
        with higher.innerloop_ctx(self.network, self.inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(self.problem.steps):
                optimizer.step(self.problem.support_loss(fast, number))
            yield fast


def build(tasks: Tasks, method: Method) -> Library:
    if method.options["implicit"]:
        raise NotOffered("no implicit differentiation")
    return Library(tasks.case(method))
