"""What the Krylov methods for the adjoint system share: when they stop, and how their answer is judged."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.hypergrad.implicit import Iterative
from bilevel.linear import LOST, Solution, rounding_allowance
from bilevel.result import Status
from bilevel.validation import check_integer, check_number

__all__ = ["Krylov"]

# Round-off above which products are in half precision.
HALF = 1e-4


@dataclass(frozen=True)
class Krylov(Iterative):
    """Base of the methods that iterate until the residual of ``(H + δI) q = v`` is small.

    Attributes:
        max_iterations: Cap on iterations; one Hessian product each.
        rtol: Stops once ``‖(H + δI)q − v‖ ≤ rtol ‖v‖``.
        damping: δ ≥ 0.
    """

    max_iterations: int = 50
    rtol: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        owner = type(self).__name__
        check_integer(owner, "max_iterations", self.max_iterations, minimum=1)
        check_number(owner, "rtol", self.rtol, minimum=0.0)
        check_number(owner, "damping", self.damping, minimum=0.0)

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """The recursion's residual drifts from the true one by rounding; the true one decides, up to round-off."""
        solved = residual <= max(2 * self.rtol, rounding_allowance(epsilon))
        # A small residual is a right answer of a system that is no gradient's only where products are transposed.
        untold = solution.status is Status.NOT_SYMMETRIC and self.products == "finite_difference"
        if solved and solution.status is not Status.NEGATIVE_CURVATURE and not untold:
            return Status.CONVERGED
        if solution.status is Status.CONVERGED and residual > LOST:
            if epsilon > HALF:
                return Status.INACCURATE
            return Status.SINGULAR  # to working precision: the recursion converged to what is no solution
        return Status.STOPPED_AT_CAP if solution.status is Status.CONVERGED else solution.status
