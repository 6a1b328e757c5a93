"""Implicit methods for any task in the functional form, by TorchOpt's ``custom_root``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchopt
from torchopt.diff.implicit import custom_root

from benchmarks.peers.side import Method, NotOffered, Side, Task
from benchmarks.peers.sides.hand.implicit import move, put


class Library(Side):
    """The inner steps are the solver, the gradient of the inner loss the optimality condition."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task = task
        self.w = [part.clone().requires_grad_() for part in task.inner]
        self.lam = [part.clone().requires_grad_() for part in task.outer]
        gradient = torch.func.grad(lambda w, lam: task.inner_loss(w, lam))

        def optimality(w: Any, lam: Any) -> Any:
            return gradient(w, lam)

        def solver(w: Any, lam: Any) -> Any:
            w = tuple(part.detach().clone().requires_grad_() for part in w)
            lam = tuple(part.detach() for part in lam)
            for _ in range(task.steps):
                with torch.enable_grad():
                    grads = torch.autograd.grad(task.inner_loss(w, lam), w)
                move(w, -task.rate, grads)
            return w

        solve, self.note = linear_solver(method)
        self.solved = custom_root(optimality, argnums=1, solve=solve)(solver)

    def step(self) -> None:
        w = self.solved(tuple(self.w), tuple(self.lam))
        self.found = torch.autograd.grad(self.task.outer_loss(w, self.lam), self.lam)
        with torch.no_grad():
            for part, new in zip(self.w, w, strict=True):
                part.copy_(new)
        move(self.lam, -self.task.outer_rate, self.found)

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put([*self.w, *self.lam], [*inner, *outer])


def linear_solver(method: Method) -> tuple[Callable[..., Any], str]:
    """Returns TorchOpt's solver for a method, and what a reader should know."""
    if method.kind == "identity":
        return lambda matvec, b: b, "H⁻¹ ≈ I is a user's own linear solver, `lambda matvec, b: b`"
    if method.kind == "neumann":
        return torchopt.linear_solve.solve_inv(ns=True, maxiter=method.products, alpha=method.step_size), ""
    if method.kind == "conjugate_gradient":
        solve = torchopt.linear_solve.solve_cg(maxiter=method.products, rtol=0.0, atol=0.0)
        return solve, "conjugate gradients take one more product, for the residual of the start at zero"
    raise NotOffered(f"no linear solver for {method.kind}")


build = Library
