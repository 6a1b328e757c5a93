"""The conjugate gradient method, with and without a preconditioner."""

from __future__ import annotations

import torch

from bilevel.linear.base import Operator, Preconditioner, Solution, first_residual, machine_epsilon
from bilevel.linear.probe import Probe
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm

__all__ = ["conjugate_gradient"]

# In units of the round-off, relative to the largest product seen.
FLAT = 10.0


def conjugate_gradient(
    operator: Operator,
    v: Tensors,
    *,
    max_iterations: int,
    rtol: float,
    epsilon: float | None = None,
    start: Tensors | None = None,
    preconditioner: Preconditioner | None = None,
) -> Solution:
    """Solves ``H q = v`` for a symmetric positive definite H (Hestenes and Stiefel 1952).

    After k iterations the error in the H-norm is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` of the start's, κ the condition
    number of H, or of ``P^(−1/2) H P^(−1/2)`` with a preconditioner (Saad, Iterative methods for sparse linear systems,
    algorithm 9.1).

    Args:
        operator: The product with H.
        v: The right-hand side.
        max_iterations: Cap on iterations, one product each; a start takes one more, for its residual.
        rtol: Stops once ``‖H q − v‖ ≤ rtol ‖v‖``; 0 runs to the cap, or to the dtype's round-off.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        start: The first iterate; zero without it, or where its error in the H-norm is larger than that of zero.
        preconditioner: ``r ↦ P⁻¹ r`` with P symmetric positive definite. Stopping goes by the residual itself.

    Returns:
        The solution. On a direction p with pᵀHp ≤ 0 the iterate before it is returned, with status
        ``NEGATIVE_CURVATURE``, or ``SINGULAR`` where Hp is rounding only. ``NOT_SYMMETRIC`` where ``pᵀ(Hp')`` and
        ``p'ᵀ(Hp)`` differ for two successive directions: a probe that costs no product. ``DIVERGED`` where a product
        is not finite, or P shows not to be positive definite.
    """
    q, residual, products = first_residual(operator, v, start, energy=True)
    goal = float(dot(v, v))
    direction, energy, squared = _precondition(preconditioner, residual)
    probe = Probe(epsilon or machine_epsilon(v))
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding (and NaN).
    target = max(rtol, 0.01 * probe.epsilon) ** 2 * goal
    status, message = Status.STOPPED_AT_CAP, ""
    for _ in range(max_iterations):
        if squared <= target:
            break
        if not energy > 0.0:
            status, message = Status.DIVERGED, "the preconditioner is not positive definite, or not finite"
            break
        product = operator(direction)
        products += 1
        curvature, stop = _look(probe, direction, product)
        if stop is not None:
            status = stop
            break
        step = energy / curvature
        q = axpy(step, direction, q)
        residual = axpy(-step, product, residual)
        before = energy
        scaled, energy, squared = _precondition(preconditioner, residual)
        direction = axpy(energy / before, direction, scaled)
    if status is Status.STOPPED_AT_CAP and squared <= target:
        status = Status.CONVERGED
    return probe.solution(q, status, products, goal**0.5, message)


def _precondition(preconditioner: Preconditioner | None, residual: Tensors) -> tuple[Tensors, float, float]:
    """Returns ``z = P⁻¹ r``, ``rᵀz`` and ``rᵀr``."""
    if preconditioner is None:
        squared = float(dot(residual, residual))
        return residual, squared, squared
    scaled = preconditioner(residual)
    energy, squared = torch.stack([dot(residual, scaled), dot(residual, residual)]).tolist()
    return scaled, energy, squared


def _look(probe: Probe, direction: Tensors, product: Tensors) -> tuple[float, Status | None]:
    """Returns the curvature pᵀHp, and a status where conjugate gradients must stop."""
    numbers = [dot(direction, product), norm(direction), norm(product), *probe.crossed(direction, product)]
    curvature, length, size, *crossed = torch.stack(numbers).tolist()
    if curvature != curvature or size == float("inf"):
        return curvature, Status.DIVERGED
    probe.record(direction, product, length, size, crossed)
    flat = FLAT * probe.epsilon * probe.largest * length**2
    if curvature > flat:
        return curvature, None
    # ‖Hp‖² ≤ λmax pᵀHp where H is semi-definite: a flat direction then has a vanishing product
    vanishes = size <= 10 * probe.epsilon**0.5 * probe.largest * length
    return curvature, Status.SINGULAR if vanishes and abs(curvature) <= flat else Status.NEGATIVE_CURVATURE
