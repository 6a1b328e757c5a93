"""(d) by TorchOpt: ``MetaSGD`` for MAML, an implicit function with its conjugate gradients for implicit MAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torchopt
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, KeepingSide, Method, Side
from benchmarks.peers.sides.loops import TaskLoop
from benchmarks.peers.workloads.few_shot import FewShot, Tasks


class Unrolled(TaskLoop):
    """The network is put back to λ after each task."""

    def __init__(self, problem: FewShot) -> None:
        self.network = problem.copy()
        super().__init__(problem, self.network.parameters())
        self.inner = torchopt.MetaSGD(self.network, lr=problem.rate)

    def step(self) -> None:
        self.start = torchopt.extract_state_dict(self.network, by="reference", detach_buffers=True)
        self.optimizer = torchopt.extract_state_dict(self.inner, by="reference")
        super().step()

    @contextmanager
    def adapted(self, number: int) -> Iterator[nn.Module]:
        for _ in range(self.problem.steps):
            self.inner.step(self.problem.support_loss(self.network, number))
        yield self.network
        torchopt.recover_state_dict(self.network, self.start)
        torchopt.recover_state_dict(self.inner, self.optimizer)


class Implicit(KeepingSide):
    """A loop over tasks, each with an implicit function of λ."""

    note = "custom_root with solve_cg; an iteration evaluates the loss's gradient once more"

    def __init__(self, problem: FewShot) -> None:
        self.problem = problem
        self.start = [p.detach().clone().requires_grad_() for p in problem.network.parameters()]
        self.outer = KeepingSGD(self.start, lr=problem.outer_rate)
        self.solvers = [self.solver(number) for number in range(problem.count)]

    def step(self) -> None:
        self.outer.zero_grad()
        for number, solved in enumerate(self.solvers):
            w = solved(tuple(p.detach() for p in self.start), tuple(self.start))
            loss = self.problem.query_loss(self.problem.with_parameters(w), number)
            (loss / self.problem.count).backward(inputs=self.start)
        self.outer.step()

    def solver(self, number: int) -> Any:
        problem, beta = self.problem, self.problem.proximal

        def objective(w: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
            penalty: Any = sum((a - b).square().sum() for a, b in zip(w, start, strict=True))
            return problem.support_loss(problem.with_parameters(w), number) + beta / 2 * penalty

        def optimality(w: Sequence[Tensor], start: Sequence[Tensor]) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.func.grad(objective)(tuple(w), tuple(start))
            return found

        solve = torchopt.linear_solve.solve_cg(maxiter=problem.products, rtol=0.0, atol=0.0)

        @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
        def solved(w: tuple[Tensor, ...], start: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            fixed = [p.detach() for p in start]
            for _ in range(problem.steps):
                with torch.enable_grad():
                    here = tuple(p.detach().requires_grad_() for p in w)
                    grads = torch.autograd.grad(objective(here, fixed), here)
                w = tuple(p.detach() - problem.rate * g for p, g in zip(here, grads, strict=True))
            return w

        return solved


def build(tasks: Tasks, method: Method) -> Side:
    problem = tasks.case(method)
    return Implicit(problem) if method.options["implicit"] else Unrolled(problem)
