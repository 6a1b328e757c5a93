"""Implicit differentiation with the truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import Implicit
from bilevel.linear import Operator, Solution, damped, estimate_spectrum, neumann
from bilevel.result import Status
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors

__all__ = ["Neumann"]

ESTIMATION_PRODUCTS = 8


@dataclass(frozen=True)
class Neumann(Implicit):
    """``H⁻¹v ≈ α Σₖ₌₀ᴷ (I − αH)ᵏ v``, the truncated Neumann series.

    For an inner Hessian with eigenvalues in [μ, L] and ``0 < α < 2/L`` the relative error is at most ``ρ^(K+1)`` with
    ``ρ = max(|1 − αμ|, |1 − αL|)``. Source: Lorraine, Vicol, Duvenaud, AISTATS 2020 (arXiv 1911.02590), algorithm 3.

    Attributes:
        terms: K, the Hessian products taken. As in Betty, hypertorch, BOAT and TorchOpt the sum has K + 1 summands:
            ``terms=0`` is ``α v``.
        step_size: α, or ``"auto"``: ``1 / λ_max`` from 8 Lanczos products, kept in the state and estimated again only
            when the series stops contracting.
        damping: δ ≥ 0; the system solved is ``(H + δI) q = v``.

    Cost: 1 forward and 1 backward pass with graph, K + 1 products; 8 more at the first call with ``"auto"``.
    """

    terms: int = 10
    step_size: float | str = "auto"
    damping: float = 0.0

    name: ClassVar[str] = "neumann"
    summary: ClassVar[str] = "truncated Neumann series for the inverse Hessian"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, terms + 1 products (auto: 8 more, once)"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; 0 < step_size < 2/λmax"

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_integer("Neumann", "terms", self.terms, minimum=0)
        check_number("Neumann", "step_size", self.step_size, minimum=0.0, exclusive=True, auto=True)
        check_number("Neumann", "damping", self.damping, minimum=0.0)

    def regularisation(self) -> float:
        """See :meth:`Implicit.regularisation`."""
        return self.damping

    def solve(self, operator: Operator, v: Tensors, state: State, epsilon: float) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        system = damped(operator, self.damping)
        if not isinstance(self.step_size, str):
            return neumann(system, v, terms=self.terms, step_size=self.step_size, epsilon=epsilon), state
        known = state.get("largest_eigenvalue")
        if known is not None:
            step_size = 1 / (float(known[0]) + self.damping)
            solution = neumann(system, v, terms=self.terms, step_size=step_size, epsilon=epsilon)
            if solution.status is not Status.DIVERGED:
                return solution, state
        largest, smallest = self._extremes(operator, v)
        damped_largest = largest + self.damping
        if not 0.0 < damped_largest < float("inf"):
            status = Status.NEGATIVE_CURVATURE if damped_largest < 0.0 else Status.SINGULAR
            status = status if largest == largest else Status.DIVERGED
            return Solution(v, status, 0, "no positive curvature found; the identity was used for the inverse"), {}
        solution = neumann(system, v, terms=self.terms, step_size=1 / damped_largest, epsilon=epsilon)
        if smallest + self.damping < -1e-6 * damped_largest:
            solution = Solution(solution.q, Status.NEGATIVE_CURVATURE, solution.iterations, solution.message)
        return solution, {"largest_eigenvalue": (torch.tensor(largest, dtype=torch.float64),)}

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """A convergent series never leaves a residual above 1, whatever its length."""
        if solution.status.failed:
            return solution.status
        if residual <= 100 * epsilon:
            return Status.CONVERGED
        return Status.DIVERGED if residual > 1 + 1e-6 else Status.STOPPED_AT_CAP

    def _extremes(self, operator: Operator, v: Tensors) -> tuple[float, float]:
        dimension = sum(part.numel() for part in v)
        estimate = estimate_spectrum(operator, v, products=min(ESTIMATION_PRODUCTS, dimension))
        return estimate.largest, estimate.smallest
