"""Implicit differentiation with the generalised minimum residual method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import System
from bilevel.hypergrad.krylov import Krylov
from bilevel.linear import Solution, gmres
from bilevel.validation import check_integer

__all__ = ["GMRES"]


@dataclass(frozen=True)
class GMRES(Krylov):
    """Solves ``(J + δI)ᵀ q = v`` by GMRES, where the Jacobian J of the inner gradient need not be symmetric.

    That is the case where a custom backward pass makes the inner gradient a field that is no gradient, and in games.
    The residual never grows, and without restarts the solution is reached after at most as many iterations as there
    are inner variables; where the symmetric part M of J is positive definite the residual is at most
    ``(1 − λ_min(M)² / ‖J‖²)^(k/2)`` after k iterations. Products by differences are not with the transpose: an
    asymmetry is then ``NOT_SYMMETRIC``. Source: Saad and Schultz 1986; Eisenstat, Elman, Schultz 1983.

    Attributes:
        max_iterations: Cap on iterations; one product each.
        rtol: Stops once ``‖(J + δI)ᵀq − v‖ ≤ rtol ‖v‖``.
        damping: δ ≥ 0.
        restart: Iterations after which the Krylov space is begun anew; None keeps all of its vectors, one an iteration.

    Cost: 1 forward and 1 backward pass with graph, iterations + 1 products; a warm start and every restart take 1 more.
        Memory: a vector of the inner parameters' size an iteration, up to ``restart``.
    """

    restart: int | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "gmres"
    summary: ClassVar[str] = "generalised minimum residual method: any inner Jacobian, symmetric or not"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, iterations + 1 products; a vector kept an iteration"
    needs: ClassVar[str] = "double backward; an invertible Jacobian of the inner gradient (or damping)"
    storage: ClassVar[str] = "the gradient's graph, a vector an iteration"
    purpose: ClassVar[str] = (
        "inner gradient fields that are no gradient: custom backward passes, and with products='field' a detach()"
    )

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        if self.restart is not None:
            check_integer("GMRES", "restart", self.restart, minimum=1)

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        solution = gmres(
            system.operator,
            system.v,
            max_iterations=self.max_iterations,
            rtol=self.rtol,
            restart=self.restart,
            epsilon=system.epsilon,
            start=system.start,
            symmetric=not system.transposed,
        )
        return solution, {}
