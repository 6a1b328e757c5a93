"""Implicit differentiation with the minimum residual method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import System
from bilevel.hypergrad.krylov import Krylov
from bilevel.linear import Solution, minres
from bilevel.result import Status

__all__ = ["MINRES"]


@dataclass(frozen=True)
class MINRES(Krylov):
    """Solves ``(H + δI) q = v`` by the minimum residual method: H may be indefinite, as at a saddle of the inner loss.

    The residual never grows. After k iterations it is at most ``min over polynomials p of degree k with p(0) = 1 of
    max |p(h)|`` over the eigenvalues h of ``H + δI``: ``2 ((√κ − 1)/(√κ + 1))ᵏ`` where they are positive, ``2 ((κ −
    1)/(κ + 1))^⌊k/2⌋`` where they have both signs, with ``κ = max |h| / min |h|``. An indefinite system that was solved
    is ``CONVERGED``, with a message that the Hessian has a negative eigenvalue: the hypergradient is that of the
    stationary point. Source: Paige and Saunders 1975.

    Attributes:
        max_iterations: Cap on iterations; one Hessian product each.
        rtol: Stops once ``‖(H + δI)q − v‖ ≤ rtol ‖v‖``.
        damping: δ ≥ 0.

    Cost: 1 forward and 1 backward pass with graph, iterations + 1 products; a warm start takes 1 more, and so does a
        look at the true residual where H is ill-conditioned enough for rounding to matter.
    """

    name: ClassVar[str] = "minres"
    summary: ClassVar[str] = "minimum residual method: a symmetric inner Hessian, definite or not"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "double backward; a symmetric Hessian without null space (or damping)"
    storage: ClassVar[str] = "the gradient's graph, 7 vectors"
    purpose: ClassVar[str] = (
        "symmetric but indefinite curvature: an inner problem at a saddle, or not yet at its minimum"
    )
    refuses_gauss_newton: ClassVar[str] = (
        "the Gauss–Newton curvature is positive semi-definite by construction, and MINRES is for indefinite ones; use "
        "ConjugateGradient, whose error is smaller after as many products"
    )

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        solution = minres(
            system.operator,
            system.v,
            max_iterations=self.max_iterations,
            rtol=self.rtol,
            epsilon=system.epsilon,
            start=system.start,
        )
        return solution, {}

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """The residual never grows: where it did, rounding made it, and the system is singular to working precision."""
        status = super().judge(solution, residual, epsilon)
        return Status.SINGULAR if status is Status.STOPPED_AT_CAP and residual > 1 + 1e-3 else status
