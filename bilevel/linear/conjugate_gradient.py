"""The conjugate gradient method."""

from __future__ import annotations

import torch

from bilevel.linear.base import Operator, Solution, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm, zeros_like

__all__ = ["conjugate_gradient"]

# Both in units of the round-off, relative to the largest product seen.
ASYMMETRY_TOLERANCE = 1e3
FLAT = 10.0
# Share of the right-hand side that rounding may take before H counts as singular.
LOST = 0.1


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
    q, residual, direction = zeros_like(v), v, v
    squared = start = float(dot(v, v))
    probe = _Probe(epsilon or machine_epsilon(v))
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding (and NaN).
    target = max(rtol, 0.01 * probe.epsilon) ** 2 * start
    for iteration in range(max_iterations):
        if squared <= target:
            return probe.solution(q, Status.CONVERGED, iteration, start)
        product = operator(direction)
        status = probe.look(direction, product)
        if status is not None:
            return probe.solution(q, status, iteration + 1, start)
        step = squared / probe.curvature
        q = axpy(step, direction, q)
        residual = axpy(-step, product, residual)
        previous, squared = squared, float(dot(residual, residual))
        direction = axpy(squared / previous, direction, residual)
    return probe.solution(q, Status.CONVERGED if squared <= target else Status.STOPPED_AT_CAP, max_iterations, start)


class _Probe:
    """What directions and their products tell about H: its sign, its null space, its symmetry."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.curvature = 0.0
        self._largest = 0.0
        self._asymmetry = 0.0
        self._before: tuple[Tensors, Tensors, float] | None = None

    def look(self, direction: Tensors, product: Tensors) -> Status | None:
        """Takes a pair in; returns a status where conjugate gradients must stop."""
        crossed = None if self._before is None else dot(self._before[0], product) - dot(direction, self._before[1])
        numbers = [dot(direction, product), norm(direction), norm(product)] + ([] if crossed is None else [crossed])
        self.curvature, length, size, *difference = torch.stack(numbers).tolist()
        if self.curvature != self.curvature or size == float("inf"):
            return Status.DIVERGED
        self._largest = max(self._largest, size / length)
        if self._before is not None:
            self._asymmetry = max(self._asymmetry, abs(difference[0]) / (length * self._before[2]))
        self._before = direction, product, length
        flat = FLAT * self.epsilon * self._largest * length**2
        if self.curvature > flat:
            return None
        # ‖Hp‖² ≤ λmax pᵀHp where H is semi-definite: a flat direction then has a vanishing product
        vanishes = size <= 10 * self.epsilon**0.5 * self._largest * length
        return Status.SINGULAR if vanishes and abs(self.curvature) <= flat else Status.NEGATIVE_CURVATURE

    def solution(self, q: Tensors, status: Status, iterations: int, start: float) -> Solution:
        """Makes the result. Asymmetry explains other failures, but not a singular H, whose products are noise."""
        if status is Status.DIVERGED:
            return Solution(q, status, iterations, "a Hessian product is not finite")
        # Rounding of ‖H‖‖q‖ is what the recursion's residual does not see.
        unseen = self.epsilon * self._largest * float(norm(q))
        if status is Status.SINGULAR or (status is not Status.NEGATIVE_CURVATURE and unseen > LOST * start**0.5):
            return Solution(q, Status.SINGULAR, iterations)
        if self._asymmetry > ASYMMETRY_TOLERANCE * self.epsilon * self._largest:
            asymmetry = self._asymmetry / self._largest
            return Solution(q, Status.NOT_SYMMETRIC, iterations, f"relative asymmetry {asymmetry:.1e}")
        return Solution(q, status, iterations)
