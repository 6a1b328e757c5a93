"""What is the same in loops that are written with a library: over tasks, and over unrolled steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from benchmarks.peers.side import KeepingSGD, KeepingSide
from benchmarks.peers.workloads.few_shot import FewShot
from benchmarks.peers.workloads.unrolled import Unrolling


class TaskLoop(KeepingSide):
    """(d): task after task, each backward at its end."""

    def __init__(self, problem: FewShot, parameters: Iterable[Any]) -> None:
        self.problem = problem
        self.outer = KeepingSGD(parameters, lr=problem.outer_rate)

    def step(self) -> None:
        problem = self.problem
        self.outer.zero_grad()
        for number in range(problem.count):
            with self.adapted(number) as network:
                (problem.query_loss(network, number) / problem.count).backward()
        self.outer.step()

    @abstractmethod
    def adapted(self, number: int) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Returns the network after the inner steps on a task."""


class Chain(KeepingSide):
    """(c): a network, and a weight decay for each of its tensors."""

    note = "keeps the graphs of all steps; has no other mode"

    def __init__(self, case: Unrolling, steps: int) -> None:
        self.case, self.steps = case, steps
        self.model = case.copy()
        self.decay = case.decay.clone().requires_grad_()
        self.outer = KeepingSGD([self.decay], lr=case.outer_rate)
