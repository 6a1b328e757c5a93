"""Implicit differentiation with conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import Iterative, System
from bilevel.linear import LOST, Solution, conjugate_gradient
from bilevel.result import Status
from bilevel.validation import check_integer, check_number

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True)
class ConjugateGradient(Iterative):
    """Solves ``(H + δI) q = v`` by conjugate gradients, stopped by the residual.

    After k iterations the error in the H-norm is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` of the solution's. Sources:
    Hestenes and Stiefel 1952; for hypergradients Pedregosa, ICML 2016 (arXiv 1602.02355) and Rajeswaran et al.,
    NeurIPS 2019 (arXiv 1909.04630).

    Attributes:
        max_iterations: Cap on iterations; one Hessian product each.
        rtol: Stops once ``‖(H + δI)q − v‖ ≤ rtol ‖v‖``.
        damping: δ ≥ 0.

    Cost: 1 forward and 1 backward pass with graph, iterations + 1 products.
    """

    max_iterations: int = 50
    rtol: float = 1e-6
    damping: float = 0.0

    name: ClassVar[str] = "conjugate_gradient"
    summary: ClassVar[str] = "conjugate gradients on the inner Hessian, stopped by the residual"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products"
    needs: ClassVar[str] = "double backward; a symmetric positive definite Hessian (or damping)"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("ConjugateGradient", "max_iterations", self.max_iterations, minimum=1)
        check_number("ConjugateGradient", "rtol", self.rtol, minimum=0.0)
        check_number("ConjugateGradient", "damping", self.damping, minimum=0.0)

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        solution = conjugate_gradient(
            system.operator, system.v, max_iterations=self.max_iterations, rtol=self.rtol, epsilon=system.epsilon
        )
        return solution, {}

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """The recursion's residual drifts from the true one by rounding; the true one decides, up to round-off."""
        solved = residual <= max(2 * self.rtol, 100 * epsilon)
        if solved and solution.status is not Status.NEGATIVE_CURVATURE:
            return Status.CONVERGED
        if solution.status is Status.CONVERGED and residual > LOST:
            return Status.SINGULAR  # to working precision: the recursion converged to what is no solution
        return Status.STOPPED_AT_CAP if solution.status is Status.CONVERGED else solution.status
