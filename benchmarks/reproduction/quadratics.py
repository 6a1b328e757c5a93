"""Random quadratics, drawn as benchopt's ``datasets/simulated.py`` draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.reproduction.task import EVERYTHING, Block, Task

__all__ = ["Quadratics"]


@dataclass(frozen=True)
class _Sum:
    """``1/n Σᵢ ½ (xᵢᵀw)² + ½ (zᵢᵀλ)² + (sᵢᵀλ)(tᵢᵀw) + aᵢᵀw + bᵢᵀλ``: every term has Hessians of rank one."""

    x: Tensor
    z: Tensor
    s: Tensor
    t: Tensor
    a: Tensor
    b: Tensor

    def loss(self, w: Tensor, lam: Tensor, block: Block) -> Tensor:
        x, z, s, t = (part[block] for part in (self.x, self.z, self.s, self.t))
        squares = 0.5 * ((x @ w).square().mean() + (z @ lam).square().mean())
        linear = self.a[block].mean(0) @ w + self.b[block].mean(0) @ lam
        return squares + ((s @ lam) * (t @ w)).mean() + linear

    @property
    def hessian(self) -> Tensor:
        return self.x.T @ self.x / len(self.x)

    @property
    def outer_hessian(self) -> Tensor:
        return self.z.T @ self.z / len(self.z)

    @property
    def cross(self) -> Tensor:
        """Of shape (outer, inner)."""
        return self.s.T @ self.t / len(self.s)


class Quadratics(Task):
    """Both losses quadratic; inner Hessian about μ = 0.1 to L = 1, cross terms up to 0.1.

    The instance is drawn again until h is convex, as benchopt does. w*, h and its minimum have closed forms.

    Args:
        seed: Of the instance.
        size: Number of terms of either loss.
        dimension: Of w and of λ.
    """

    name = "quadratics"

    def __init__(self, seed: int, size: int = 1024, dimension: int = 100) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            self.inner, self.outer = _draw(size, dimension, generator), _draw(size, dimension, generator)
            self.response = -torch.linalg.solve(self.inner.hessian, self.inner.cross.T)
            self.curvature = self._curvature()
            if float(torch.linalg.eigvalsh(self.curvature)[0]) > 1e-12:
                break
        else:
            raise RuntimeError(f"seed {seed}: no quadratic with a convex value function in 20 draws")
        self.num_inner = self.num_outer = size
        self.inner_start = torch.zeros(dimension, dtype=torch.float64)
        self.outer_start = torch.full((dimension,), -2.0, dtype=torch.float64)
        self.smoothness = float(torch.linalg.eigvalsh(self.inner.hessian)[-1])

    def inner_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        return self.inner.loss(w, lam, block)

    def outer_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        return self.outer.loss(w, lam, block)

    def solve(self, lam: Tensor, near: Tensor) -> Tensor:
        return -torch.linalg.solve(self.inner.hessian, self.inner.cross.T @ lam + self.inner.a.mean(0))

    def lowest(self, starts: list[Tensor]) -> float:
        """The minimum: h is quadratic, with the gradient at 0 and the Hessian known."""
        zero = torch.zeros_like(self.outer_start)
        w = self.solve(zero, zero)
        outer = self.outer
        slope = self.response.T @ (outer.hessian @ w + outer.a.mean(0)) + outer.cross @ w + outer.b.mean(0)
        return self.value(-torch.linalg.solve(self.curvature, slope), w)

    def end_of(self, inverse: Tensor) -> Tensor:
        """Returns the λ at which a method stops that takes a matrix for the inverse of the inner Hessian.

        Its hypergradient at w*(λ) is ``∂F/∂λ − C · inverse · ∂F/∂w``, linear in λ.
        """
        zero = torch.zeros_like(self.outer_start)
        w, outer, cross = self.solve(zero, zero), self.outer, self.inner.cross
        matrix = outer.outer_hessian + outer.cross @ self.response
        matrix = matrix - cross @ inverse @ (outer.hessian @ self.response + outer.cross.T)
        constant = outer.cross @ w + outer.b.mean(0) - cross @ inverse @ (outer.hessian @ w + outer.a.mean(0))
        return -torch.linalg.solve(matrix, constant)

    def _curvature(self) -> Tensor:
        """Returns the Hessian of h."""
        crossed = self.outer.cross @ self.response
        return self.response.T @ self.outer.hessian @ self.response + self.outer.outer_hessian + crossed + crossed.T


def _draw(size: int, dimension: int, generator: torch.Generator, mu: float = 0.1, cross: float = 0.1) -> _Sum:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rotation() -> Tensor:
        return torch.linalg.qr(normal(dimension, dimension))[0]

    def root(eigenvalues: Tensor) -> Tensor:
        basis = rotation()
        return basis @ torch.diag(eigenvalues.sqrt()) @ basis.T

    def logspace(low: float, high: float, count: int) -> Tensor:
        return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)

    flat = torch.cat([torch.zeros(1, dtype=torch.float64), logspace(mu, 1.0, dimension - 1)])
    x = normal(size, dimension) @ root(logspace(mu, 1.0, dimension))
    z = normal(size, dimension) @ root(flat)
    # E[s tᵀ] = U D V for s = U D g, t = Vᵀ g, with singular values between μ and the cross constant
    g = normal(size, dimension)
    s = g @ (rotation() @ torch.diag(logspace(mu, cross, dimension))).T
    t = g @ rotation()
    return _Sum(x, z, s, t, normal(size, dimension), normal(size, dimension))
