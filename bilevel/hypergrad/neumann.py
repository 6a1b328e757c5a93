"""Implicit differentiation with the truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.hypergrad.base import State
from bilevel.hypergrad.implicit import System
from bilevel.hypergrad.preconditioning import Factors, Preconditioned
from bilevel.linear import Operator, Solution, estimate_spectrum, neumann, rounding_allowance
from bilevel.result import Status
from bilevel.validation import check_integer, check_number

__all__ = ["Neumann"]

ESTIMATION_PRODUCTS = 8


@dataclass(frozen=True)
class Neumann(Preconditioned):
    """``H⁻¹v ≈ q₀ + α Σₖ₌₀ᴷ (I − αH)ᵏ (v − Hq₀)``, the truncated Neumann series, with ``q₀ = 0`` unless started warm.

    For an inner Hessian with eigenvalues in [μ, L] and ``0 < α < 2/L`` the error is at most ``ρ^(K+1)`` of the start's
    with ``ρ = max(|1 − αμ|, |1 − αL|)``. With a preconditioner P the series is that of ``P⁻¹H``, and the error that in
    the P-norm. Source: Lorraine, Vicol, Duvenaud, AISTATS 2020 (arXiv 1911.02590), algorithm 3.

    Attributes:
        terms: K, the Hessian products taken. As in Betty, hypertorch, BOAT and TorchOpt the sum has K + 1 summands:
            ``terms=0`` is ``α v``.
        step_size: α, or ``"auto"``: ``1 / λmax`` from 8 Lanczos products, kept in the state and estimated again only
            when the series stops contracting.
        damping: δ ≥ 0; the system solved is ``(H + δI) q = v``.
        rtol: Stops before K terms once ``‖(H + δI)q − v‖ ≤ rtol ‖v‖``, which the series knows without a product.

    Cost: 1 forward and 1 backward pass with graph, at most K + 1 products; 8 more at the first call with ``"auto"``, 1
        more with a warm start, and the rank of the Nyström preconditioner.
    """

    terms: int = 10
    step_size: float | str = "auto"
    damping: float = 0.0
    rtol: float = 0.0

    name: ClassVar[str] = "neumann"
    summary: ClassVar[str] = "truncated Neumann series for the inverse Hessian"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, terms + 1 products (auto: 8 more, once)"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; 0 < step_size < 2/λmax"
    storage: ClassVar[str] = "the gradient's graph, 3 vectors"
    purpose: ClassVar[str] = "a few terms where the curvature is well conditioned, or warm-started across outer steps"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("Neumann", "terms", self.terms, minimum=0)
        check_number("Neumann", "step_size", self.step_size, minimum=0.0, exclusive=True, auto=True)
        check_number("Neumann", "damping", self.damping, minimum=0.0)
        check_number("Neumann", "rtol", self.rtol, minimum=0.0)

    def solve(self, system: System) -> tuple[Solution, State]:
        """See :meth:`Implicit.solve`. The estimate kept in the state is that of the undamped largest eigenvalue."""
        factors, kept = self.factors(system)
        solution, state = self._solved(system, factors)
        return solution, state if solution.status.failed else {**state, **kept}

    def _solved(self, system: System, factors: Factors | None) -> tuple[Solution, State]:
        if not isinstance(self.step_size, str):
            return self._series(system, factors, self.step_size), {}
        # That of P⁻¹(H + δI), which changes with δ and P, is another number under another name.
        key, shift = ("largest_eigenvalue", self.damping) if factors is None else ("largest_preconditioned", 0.0)
        known = system.state.get(key)
        if known is not None:
            solution = self._series(system, factors, 1 / (float(known[0]) + shift))
            if solution.status is not Status.DIVERGED:
                return solution, {key: known}
        dimension = sum(part.numel() for part in system.v)
        products = min(ESTIMATION_PRODUCTS, dimension)
        spectrum = estimate_spectrum(_symmetric(system.operator, factors), system.v, products=products)
        if not 0.0 < spectrum.largest < math.inf:
            status = Status.NEGATIVE_CURVATURE if spectrum.largest < 0.0 else Status.SINGULAR
            status = Status.DIVERGED if math.isnan(spectrum.largest) else status
            message = "no positive curvature found; the identity was used for the inverse"
            return Solution(system.v, status, 0, message), {}
        solution = self._series(system, factors, 1 / spectrum.largest)
        if spectrum.smallest < -1e-6 * spectrum.largest:
            solution = Solution(solution.q, Status.NEGATIVE_CURVATURE, solution.iterations, solution.message)
        return solution, {key: (torch.tensor(spectrum.largest - shift, dtype=torch.float64),)}

    def _series(self, system: System, factors: Factors | None, step_size: float) -> Solution:
        return neumann(
            system.operator,
            system.v,
            terms=self.terms,
            step_size=step_size,
            epsilon=system.epsilon,
            start=system.start,
            preconditioner=None if factors is None else factors.inverse,
            symmetric=not system.transposed,
            rtol=self.rtol,
            compiled=system.compiled,
        )

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """A convergent series never leaves a residual above 1, whatever its length (in the norm of P⁻¹)."""
        if solution.status.failed:
            return solution.status
        if residual <= max(self.rtol, rounding_allowance(epsilon)):
            return Status.CONVERGED
        if solution.status is Status.CONVERGED:
            return Status.STOPPED_AT_CAP
        plain = self.preconditioner == "none"
        return Status.DIVERGED if plain and residual > 1 + 1e-6 else Status.STOPPED_AT_CAP


def _symmetric(operator: Operator, factors: Factors | None) -> Operator:
    """Returns ``q ↦ P^(−1/2) H P^(−1/2) q``, which is symmetric and has the eigenvalues of ``P⁻¹H``."""
    if factors is None:
        return operator
    root = factors.inverse_root
    return lambda q: root(operator(root(q)))
