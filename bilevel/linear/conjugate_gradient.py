"""The conjugate gradient method."""

from __future__ import annotations

from bilevel.linear.base import Operator, Solution, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm, zeros_like

__all__ = ["conjugate_gradient"]

ASYMMETRY_TOLERANCE = 1e3  # times the round-off


def conjugate_gradient(
    operator: Operator, v: Tensors, *, max_iterations: int, rtol: float, epsilon: float | None = None
) -> Solution:
    """Solves ``H q = v`` for a symmetric positive definite H (Hestenes and Stiefel 1952), from q = 0.

    After k iterations the error in the H-norm is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` of ``‖q*‖_H``, κ the condition
    number.

    Args:
        operator: The product with H.
        v: The right-hand side.
        max_iterations: Cap on iterations, one product each.
        rtol: Stops once ``‖H q − v‖ ≤ rtol ‖v‖``; 0 runs to the cap, or to the dtype's round-off.
        epsilon: Relative round-off of the products, where it is larger than that of v.

    Returns:
        The solution. On a direction p with pᵀHp ≤ 0 the iterate before it is returned, with status
        ``NEGATIVE_CURVATURE``, or ``SINGULAR`` where Hp is rounding only. ``NOT_SYMMETRIC`` where ``pᵀ(Hp')`` and
        ``p'ᵀ(Hp)`` differ for two successive directions: a probe that costs no product.
    """
    epsilon = epsilon or machine_epsilon(v)
    q, residual, direction = zeros_like(v), v, v
    squared = float(dot(v, v))
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding (and NaN).
    target = max(rtol, 0.01 * epsilon) ** 2 * squared
    largest, asymmetry = 0.0, 0.0
    before: tuple[Tensors, Tensors, float] | None = None
    for iteration in range(max_iterations):
        if squared <= target:
            return _solution(q, Status.CONVERGED, iteration, asymmetry, epsilon)
        product = operator(direction)
        curvature, length, size = float(dot(direction, product)), float(norm(direction)), float(norm(product))
        if curvature != curvature or size == float("inf"):
            return Solution(q, Status.DIVERGED, iteration + 1, "a Hessian product is not finite")
        largest = max(largest, size / length)
        if before is not None:
            difference = float(dot(before[0], product) - dot(direction, before[1]))
            asymmetry = max(asymmetry, abs(difference) / (largest * length * before[2]))
        if curvature <= epsilon * largest * length**2:
            # ‖Hp‖² ≤ λmax pᵀHp where H is semi-definite: a flat direction then has a vanishing product
            null = abs(curvature) <= epsilon * largest * length**2 and size <= 10 * epsilon**0.5 * largest * length
            return _solution(
                q, Status.SINGULAR if null else Status.NEGATIVE_CURVATURE, iteration + 1, asymmetry, epsilon
            )
        step = squared / curvature
        q = axpy(step, direction, q)
        residual = axpy(-step, product, residual)
        before = direction, product, length
        previous, squared = squared, float(dot(residual, residual))
        direction = axpy(squared / previous, direction, residual)
    status = Status.CONVERGED if squared <= target else Status.STOPPED_AT_CAP
    return _solution(q, status, max_iterations, asymmetry, epsilon)


def _solution(q: Tensors, status: Status, iterations: int, asymmetry: float, epsilon: float) -> Solution:
    """Makes the result; an asymmetric H explains any other failure."""
    if asymmetry <= ASYMMETRY_TOLERANCE * epsilon:
        return Solution(q, status, iterations)
    return Solution(q, Status.NOT_SYMMETRIC, iterations, f"relative asymmetry {asymmetry:.1e}")
