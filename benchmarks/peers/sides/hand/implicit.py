"""Implicit methods by hand for any task in the functional form: the least number of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.side import Method, NotOffered, Side, Task

KINDS = ("identity", "finite_difference", "neumann", "conjugate_gradient")


class Loop(Side):
    def __init__(self, task: Task, method: Method) -> None:
        if method.kind not in KINDS:
            raise NotOffered(f"no loop for {method.kind}")
        self.task, self.method = task, method
        self.w = [part.clone().requires_grad_() for part in task.inner]
        self.lam = [part.clone().requires_grad_() for part in task.outer]

    def step(self) -> None:
        task = self.task
        for _ in range(task.steps):
            move(self.w, -task.rate, torch.autograd.grad(task.inner_loss(self.w, self.lam), self.w))
        inputs = [*self.w, *self.lam] if task.direct else self.w
        both = torch.autograd.grad(task.outer_loss(self.w, self.lam), inputs)
        self.found = [-part for part in self.mixed(both[: len(self.w)])]
        if task.direct:
            self.found = [a + b for a, b in zip(self.found, both[len(self.w) :], strict=True)]
        move(self.lam, -task.outer_rate, self.found)

    def mixed(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns ``qᵀ ∂²f/∂w∂λ``."""
        if self.method.kind == "finite_difference":
            return self.differences(v)
        g = torch.autograd.grad(self.task.inner_loss(self.w, self.lam), self.w, create_graph=True)
        q = {"identity": lambda g, v: v, "neumann": self.neumann, "conjugate_gradient": self.conjugate_gradient}[
            self.method.kind
        ](g, v)
        return torch.autograd.grad(g, self.lam, q)

    def neumann(self, g: Sequence[Tensor], v: Sequence[Tensor]) -> Sequence[Tensor]:
        alpha = self.method.step_size
        term = list(v)
        total = [part.clone() for part in v]
        for _ in range(self.method.products):
            image = torch.autograd.grad(g, self.w, term, retain_graph=True)
            term = torch._foreach_add(term, image, alpha=-alpha)
            torch._foreach_add_(total, term)
        return torch._foreach_mul(total, alpha)

    def conjugate_gradient(self, g: Sequence[Tensor], v: Sequence[Tensor]) -> Sequence[Tensor]:
        return conjugate_gradient(
            lambda p, _: torch.autograd.grad(g, self.w, p, retain_graph=True), v, self.method.products
        )

    def differences(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """Central differences of ``∂f/∂λ`` along v, ε = ε_machine^⅓ (1 + ‖w‖)^½ / ‖v‖."""
        machine = torch.finfo(v[0].dtype).eps
        epsilon = machine ** (1 / 3) * (1 + dot(self.w, self.w).sqrt()).sqrt() / dot(v, v).sqrt()
        sides = []
        for sign in (1, -1):
            here = [w.detach() + sign * epsilon * part for w, part in zip(self.w, v, strict=True)]
            sides.append(torch.autograd.grad(self.task.inner_loss(here, self.lam), self.lam))
        return [(a - b) / (2 * epsilon) for a, b in zip(*sides, strict=True)]

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put([*self.w, *self.lam], [*inner, *outer])


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x.detach() * y.detach()).sum() for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def conjugate_gradient(
    product: Callable[[Sequence[Tensor], int], Sequence[Tensor]],
    v: Sequence[Tensor],
    products: int,
    dot: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = dot,
) -> list[Tensor]:
    """Returns q of ``A q ≈ v`` after a number of iterations from zero; ``product(p, iteration)`` is ``A p``."""
    r = p = list(v)
    q, rr = [torch.zeros_like(part) for part in v], dot(r, r)
    for iteration in range(products):
        image = product(p, iteration)
        alpha = rr / dot(p, image)
        torch._foreach_add_(q, torch._foreach_mul(p, alpha))
        if iteration + 1 < products:
            r = torch._foreach_sub(r, torch._foreach_mul(list(image), alpha))
            new = dot(r, r)
            p, rr = torch._foreach_add(r, torch._foreach_mul(p, new / rr)), new
    return q


@torch.no_grad()
def move(parameters: Sequence[Tensor], scale: float, steps: Sequence[Tensor]) -> None:
    torch._foreach_add_(list(parameters), list(steps), alpha=scale)


@torch.no_grad()
def put(parameters: Sequence[Tensor], values: Sequence[np.ndarray]) -> None:
    """Copies arrays into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(torch.as_tensor(value))


build = Loop
