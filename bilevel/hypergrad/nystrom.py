"""Implicit differentiation with a Nyström approximation of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import Implicit, System
from bilevel.linear import Solution, damped, nystrom, rounding_allowance
from bilevel.result import Status
from bilevel.validation import check_integer, check_number

__all__ = ["Nystrom"]


@dataclass(frozen=True)
class Nystrom(Implicit):
    """``q = (Ĥ + δI)⁻¹ v`` with a randomised low-rank approximation ``0 ⪯ Ĥ ⪯ H`` of a positive semi-definite H.

    Its products do not depend on each other, and there is no iteration that could diverge. The error is at most
    ``‖H − Ĥ‖ / δ`` of the solution of ``(H + δI) q = v``; zero for a rank of at least H's. Sources: Hataya and Yamada,
    AISTATS 2023 (arXiv 2302.09726), there with unit vectors for the random ones here; Frangella, Tropp, Udell 2021
    (arXiv 2110.02820), algorithm 2.1, and proposition 2.2 for the size of ``‖H − Ĥ‖``.

    Attributes:
        rank: Products, and vectors kept; more than there are inner variables are not taken.
        damping: δ > 0, which stands for the eigenvalues that the rank leaves out.

    Where these exceed the damping by so much that the residual is larger than that of ``q = 0``, the status is
    ``DIVERGED``; negative curvature is noticed where one of the random vectors shows it.

    Cost: 1 forward and 1 backward pass with graph, rank + 1 products.
    """

    rank: int = 10
    damping: float = 1e-2

    name: ClassVar[str] = "nystrom"
    summary: ClassVar[str] = "randomised low-rank approximation of the inner Hessian, inverted with damping"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, rank + 1 products; rank vectors kept"
    needs: ClassVar[str] = "double backward; a positive semi-definite Hessian with few large eigenvalues; damping > 0"
    storage: ClassVar[str] = "the gradient's graph, 2 × rank vectors"
    purpose: ClassVar[str] = (
        "ill-conditioned curvature with few large eigenvalues; one approximation, no iteration to tune"
    )

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("Nystrom", "rank", self.rank, minimum=1)
        check_number("Nystrom", "damping", self.damping, minimum=0.0, exclusive=True)

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        operator = damped(system.operator, -self.damping)
        approximation = nystrom(operator, system.v, rank=self.rank, epsilon=system.epsilon)
        q = approximation.solve(system.v, self.damping)
        status = Status.STOPPED_AT_CAP if approximation.status is Status.CONVERGED else approximation.status
        message = approximation.message
        if not message and len(approximation.eigenvalues) < approximation.dimension:
            message = f"smallest eigenvalue kept {float(approximation.eigenvalues[-1]):.2g}"
        return Solution(q, status, approximation.products, message), {}

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """A residual above 1 is worse than that of no answer at all."""
        if solution.status.failed:
            return solution.status
        if residual <= rounding_allowance(epsilon):
            return Status.CONVERGED
        return Status.DIVERGED if residual > 1.0 else Status.STOPPED_AT_CAP
