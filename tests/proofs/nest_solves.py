"""Nests solved by Newton's method inside Newton's method, as one autograd graph: no implicit function theorem."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.proofs.nests import Nest

__all__ = ["by_autograd", "by_differences", "solve_below"]


def solve_below(nest: Nest, name: str, z: Tensor, *, graph_steps: int = 2, iterations: int = 60) -> Tensor:
    """z with the vectors below a problem at their best responses, each found by its own nested solve.

    Differentiable in the other vectors: from a solution that is exact to rounding, k Newton steps as a graph have the
    right derivatives up to order 2ᵏ − 1.

    Raises:
        AssertionError: Newton's method did not converge.
    """
    below = nest.structure.below[name]
    if not below:
        return z
    rows = nest.indices(below)

    def residual(x: Tensor, z: Tensor) -> Tensor:
        """The total gradients of all below, each with those below it solved anew."""
        whole = z.index_copy(0, torch.tensor(rows), x)
        parts = []
        for lower in below:
            loss = nest.losses[lower](solve_below(nest, lower, whole, graph_steps=graph_steps))
            (grad,) = torch.autograd.grad(loss, whole, create_graph=True)
            parts.append(nest.part(grad, lower))
        return torch.cat(parts)

    def step(x: Tensor, z: Tensor, *, graph: bool) -> tuple[Tensor, float]:
        with torch.enable_grad():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            g = residual(x, z)
            # a vector may not reach another's gradient
            J = torch.stack([_derivative(part, x, create_graph=graph) for part in g])
            return x - torch.linalg.solve(J, g), float(g.detach().norm())

    x, frozen, last = z.detach()[rows], z.detach(), float("inf")
    for _ in range(iterations):
        x, size = step(x, frozen, graph=False)
        x = x.detach()
        if size < 1e-13 or (size < 1e-10 and size >= last):
            break
        last = size
    else:
        raise AssertionError(f"Newton's method did not converge below {name!r}: {size}")
    for _ in range(graph_steps):
        x, _ = step(x, z, graph=True)
    return z.index_copy(0, torch.tensor(rows), x)


def _derivative(value: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    (grad,) = torch.autograd.grad(value, x, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def by_autograd(nest: Nest, name: str, z: Tensor, *, graph_steps: int = 2) -> Tensor:
    """The hypergradient of a problem by differentiating every solve below it."""
    z = z.detach().requires_grad_()
    (grad,) = torch.autograd.grad(nest.losses[name](solve_below(nest, name, z, graph_steps=graph_steps)), z)
    return nest.part(grad, name)


def by_differences(nest: Nest, name: str, z: Tensor, *, step: float = 1e-4) -> Tensor:
    """The hypergradient by central differences, extrapolated: an error of order ``step⁴``."""

    def at(shift: Tensor) -> float:
        moved = (z + shift).detach().requires_grad_()
        return float(nest.losses[name](solve_below(nest, name, moved, graph_steps=2)).detach())

    slopes = []
    for direction in torch.eye(len(z), dtype=z.dtype)[nest.place(name)]:
        near, far = ((at(h * direction) - at(-h * direction)) / (2 * h) for h in (step, 2 * step))
        slopes.append((4 * near - far) / 3)
    return torch.tensor(slopes, dtype=z.dtype)
