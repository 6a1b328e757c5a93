"""Implicit differentiation with conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import System
from bilevel.hypergrad.krylov import Krylov
from bilevel.hypergrad.preconditioning import Preconditioned
from bilevel.linear import Solution, conjugate_gradient

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True)
class ConjugateGradient(Krylov, Preconditioned):
    """Solves ``(H + δI) q = v`` by conjugate gradients, stopped by the residual.

    After k iterations the error in the H-norm is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` of the start's (zero, or the
    solution before), κ the condition number of ``H + δI``, or of ``P⁻¹(H + δI)`` with a preconditioner. Sources:
    Hestenes and Stiefel 1952; for hypergradients Pedregosa, ICML 2016 (arXiv 1602.02355) and Rajeswaran et al.,
    NeurIPS 2019 (arXiv 1909.04630).

    Attributes:
        max_iterations: Cap on iterations; one Hessian product each.
        rtol: Stops once ``‖(H + δI)q − v‖ ≤ rtol ‖v‖``.
        damping: δ ≥ 0.

    Cost: 1 forward and 1 backward pass with graph, iterations + 1 products; a warm start takes 1 more (but 1
        in all where it is accurate enough), the Nyström preconditioner its rank.
    """

    name: ClassVar[str] = "conjugate_gradient"
    summary: ClassVar[str] = "conjugate gradients on the inner Hessian, stopped by the residual"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "double backward; a symmetric positive definite Hessian (or damping)"
    storage: ClassVar[str] = "the gradient's graph, 4 vectors"
    purpose: ClassVar[str] = (
        "the default for a solved, convex or regularised inner problem: fewest products for a given error"
    )

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        factors, kept = self.factors(system)
        solution = conjugate_gradient(
            system.operator,
            system.v,
            max_iterations=self.max_iterations,
            rtol=self.rtol,
            epsilon=system.epsilon,
            start=system.start,
            preconditioner=None if factors is None else factors.inverse,
            compiled=system.compiled,
        )
        return solution, {} if solution.status.failed else kept
