"""A quadratic inner problem below a quadratic outer one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from bilevel.errors import ConfigError
from bilevel.problems.analytic.base import Analytic, check_positive, check_shapes, normals, with_spectrum
from bilevel.validation import check_integer, check_number

__all__ = ["Quadratic"]


@dataclass(frozen=True)
class Quadratic(Analytic):
    """Two quadratics.

        f(w, λ) = ½ wᵀHw − wᵀ(Cλ + b),        F(w, λ) = ½ ‖Aw − t‖² + ½ ‖Dλ − s‖²

    so that ``w*(λ) = H⁻¹(Cλ + b)``, and ``F(w*(λ), λ)`` is quadratic too: :meth:`optimum` is exact.

    Attributes:
        H: Symmetric positive definite, (n, n) for n inner variables.
        C: (n, m) for m outer ones.
        b: (n).
        A: (k, n).
        t: (k).
        D: (l, m).
        s: (l).

    Raises:
        ParameterError: Shapes that do not go together, or an H that is not symmetric positive definite.

    Example:
        >>> from bilevel import Engine, EngineConfig, hypergradient
        >>> problem = Quadratic.random(inner=20, outer=3, conditioning=10.0)
        >>> lam = torch.zeros(3, dtype=torch.float64)
        >>> w = problem.solution(lam)
        >>> found = hypergradient(problem.inner_loss, problem.outer_loss, w, lam, "conjugate_gradient")
        >>> torch.allclose(found.grad, problem.hypergradient(lam), rtol=1e-4)
        True
        >>> engine = Engine(problem.problems(steps=20), EngineConfig(steps=100, progress=False), hypergradient="exact")
        >>> _ = engine.run()
        >>> torch.allclose(engine.problems["outer"].module["value"], problem.optimum(), atol=1e-4)
        True
    """

    H: Tensor
    C: Tensor
    b: Tensor
    A: Tensor
    t: Tensor
    D: Tensor
    s: Tensor

    def __post_init__(self) -> None:
        """Validates the shapes."""
        n, m = len(self.b), self.C.shape[-1]
        wanted = {"H": (n, n), "C": (n, m), "A": (len(self.t), n), "D": (len(self.s), m)}
        check_shapes(self, wanted)
        check_positive("Quadratic.H", self.H)

    @classmethod
    def random(
        cls,
        inner: int = 10,
        outer: int = 3,
        *,
        conditioning: float = 10.0,
        largest: float = 1.0,
        spectrum: Tensor | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Quadratic:
        """Draws a problem; everything but H is Gaussian.

        Args:
            inner: n.
            outer: m.
            conditioning: Ratio of H's extreme eigenvalues; those between are spread evenly in their logarithm.
            largest: The largest eigenvalue.
            spectrum: All n eigenvalues, in place of ``conditioning`` and ``largest``.
            seed: Of the draw, which is the same for every dtype.
            dtype: Of the tensors.

        Raises:
            ConfigError: A size below 1, a conditioning below 1, eigenvalues that are not positive or not n.
        """
        check_integer("Quadratic", "inner", inner, minimum=1)
        check_integer("Quadratic", "outer", outer, minimum=1)
        check_number("Quadratic", "conditioning", conditioning, minimum=1.0)
        check_number("Quadratic", "largest", largest, minimum=0.0, exclusive=True)
        normal = normals(seed)
        if spectrum is None:
            spectrum = largest * conditioning ** -torch.linspace(0, 1, inner, dtype=torch.float64)
        elif spectrum.shape != (inner,) or not bool((spectrum > 0).all()):
            raise ConfigError(
                f"Quadratic.spectrum must be {inner} positive eigenvalues, one for each inner variable; it has shape "
                f"{tuple(spectrum.shape)} and smallest element {float(spectrum.min()):g}"
            )
        H = with_spectrum(spectrum.double(), normal(inner, inner))
        C, A, D = (normal(rows, cols) / cols**0.5 for rows, cols in ((inner, outer), (inner, inner), (outer, outer)))
        return cls(H, C, normal(inner), A, normal(inner), D, normal(outer)).to(dtype)

    @property
    def start(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.C[0])

    def inner_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.inner_loss`."""
        return w @ (self.H @ w) / 2 - w @ (self.C @ lam + self.b)

    def outer_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.outer_loss`."""
        return (self.A @ w - self.t).square().sum() / 2 + (self.D @ lam - self.s).square().sum() / 2

    def solution(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.solution`."""
        found: Tensor = torch.linalg.solve(self.H, self.C @ lam + self.b)
        return found

    def hessian(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.hessian`."""
        return self.H

    def mixed(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.mixed`."""
        return -self.C

    def cotangent(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.cotangent`."""
        found: Tensor = self.A.T @ (self.A @ self.solution(lam) - self.t)
        return found

    def direct(self, lam: Tensor) -> Tensor:
        """See :meth:`Analytic.direct`."""
        found: Tensor = self.D.T @ (self.D @ lam - self.s)
        return found

    def outer_hessian(self) -> Tensor:
        """Returns the Hessian of ``F(w*(λ), λ)``: ``JᵀAᵀAJ + DᵀD`` with ``J = H⁻¹C``."""
        response = self.A @ torch.linalg.solve(self.H, self.C)
        found: Tensor = response.T @ response + self.D.T @ self.D
        return found

    def optimum(self) -> Tensor:
        """See :meth:`Analytic.optimum`."""
        found: Tensor = torch.linalg.solve(self.outer_hessian(), -self.hypergradient(self.start))
        return found

    def outer_optimizer(self, parameters: Any) -> Optimizer:
        """Gradient steps of size ``2 / (μ + L)`` for the outer Hessian."""
        eigenvalues = torch.linalg.eigvalsh(self.outer_hessian())
        return SGD(parameters, lr=2 / float(eigenvalues[0] + eigenvalues[-1]))
