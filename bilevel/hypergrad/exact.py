"""Implicit differentiation with the dense Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import Implicit, System
from bilevel.linear import Solution, dense
from bilevel.validation import check_number

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact(Implicit):
    """Forms the dense ``H + δI``, one product a column, and solves in float64: the reference for all other methods.

    The Jacobian of the inner gradient need not be symmetric. An indefinite or singular one is solved (least squares
    where singular) and reported.

    Attributes:
        damping: δ ≥ 0.

    Cost: 1 forward and 1 backward pass with graph, n + 1 products for n inner variables; O(n²) memory, O(n³)
        operations.
    """

    damping: float = 0.0

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "dense inner Hessian, solved directly"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, n + 1 products, O(n³) operations"
    needs: ClassVar[str] = "double backward; few inner parameters (n up to a few thousand)"
    storage: ClassVar[str] = "the gradient's graph, n² numbers"
    purpose: ClassVar[str] = "up to a few thousand inner variables, and as the reference"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_number("Exact", "damping", self.damping, minimum=0.0)

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`."""
        return dense(system.operator, system.v, epsilon=system.epsilon, symmetric=not system.transposed), {}
