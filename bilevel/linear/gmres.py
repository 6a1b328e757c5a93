"""The generalised minimum residual method for systems that need not be symmetric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.linear.base import Operator, Solution, first_residual, machine_epsilon
from bilevel.linear.probe import ASYMMETRY_TOLERANCE
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm, scale, subtract

__all__ = ["gmres"]

# In units of the round-off, relative to the largest product seen: what is left of a vector is rounding.
FLAT = 10.0
# A vector that loses more than this share to the basis is orthogonalised again (Daniel et al. 1976).
AGAIN = 0.7
# Share of the right-hand side that rounding may take before H counts as singular.
HIDDEN = 0.01
# A cycle that leaves more than this share of its residual would be followed by others like it.
STAGNANT = 1 - 1e-6


def gmres(
    operator: Operator,
    v: Tensors,
    *,
    max_iterations: int,
    rtol: float,
    restart: int | None = None,
    epsilon: float | None = None,
    start: Tensors | None = None,
    symmetric: bool = False,
) -> Solution:
    """Solves ``H q = v`` for any invertible H (Saad and Schultz 1986).

    Iterate k of a cycle minimises ``‖Hq − v‖`` over the Krylov space, so that the residual never grows, and without
    restarts vanishes after at most n products. Where the symmetric part ``M = (H + Hᵀ)/2`` is positive definite it is
    at most ``(1 − λ_min(M)² / ‖H‖²)^(k/2)`` of the first one, with any restart (Eisenstat, Elman, Schultz 1983).

    Args:
        operator: The product with H.
        v: The right-hand side.
        max_iterations: Cap on iterations, one product each. A start and every restart take one product more, for the
            residual.
        rtol: Stops once ``‖H q − v‖ ≤ rtol ‖v‖``; 0 runs to the cap, or to the dtype's round-off.
        restart: Iterations of a cycle, which keeps as many vectors; None for one cycle.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        start: The first iterate; zero without it, or where its residual is larger than that of zero.
        symmetric: Whether H must be symmetric for the answer to be right; ``NOT_SYMMETRIC`` where it shows not to be,
            which costs no product.

    Returns:
        The solution. ``STOPPED_AT_CAP`` with a message where a cycle made no progress: the next one would not either.
        ``SINGULAR`` where the Krylov space ends before the residual does, or rounding of ``‖H‖‖q‖`` hides the
        right-hand side. ``DIVERGED`` where a product is not finite.
    """
    q, residual, products = first_residual(operator, v, start)
    goal = float(norm(v))
    epsilon = epsilon or machine_epsilon(v)
    hidden = max(HIDDEN, 30 * epsilon)
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding.
    target = max(rtol, 0.01 * epsilon) * goal
    size, largest, asymmetry, left = float(norm(residual)), 0.0, 0.0, max_iterations
    status, message = Status.STOPPED_AT_CAP, ""
    while size > target and left > 0:
        cycle = _Cycle(operator, residual, size, epsilon, epsilon / (hidden * goal))
        cycle.iterate(target, min(left, restart or left))
        products, left = products + cycle.products, left - cycle.products
        largest, asymmetry = max(largest, cycle.largest), max(asymmetry, cycle.asymmetry)
        q = cycle.correct(q)
        if cycle.status is not Status.STOPPED_AT_CAP or left == 0:
            status = cycle.status
            break
        residual = subtract(v, operator(q))
        products += 1
        before, size = size, float(norm(residual))
        if not math.isfinite(size):
            status = Status.DIVERGED
            break
        if size > STAGNANT * before:
            message = f"a cycle of {restart} products left the residual as it was: raise restart"
            break
    else:
        status = Status.CONVERGED if size <= target else status
    if status is Status.DIVERGED:
        message = "a Hessian product is not finite"
    elif epsilon * largest * float(norm(q)) > hidden * goal:
        status = Status.SINGULAR  # rounding of ‖H‖‖q‖ is what the recursion's residual does not see
    elif symmetric and asymmetry > ASYMMETRY_TOLERANCE * epsilon * largest:
        status, message = Status.NOT_SYMMETRIC, f"relative asymmetry {asymmetry / largest:.1e}"
    return Solution(q, status, products, message)


class _Cycle:
    """Arnoldi's process from one residual, and the least-squares problem of its Hessenberg matrix by rotations.

    Attributes:
        status: How it ended: ``STOPPED_AT_CAP`` where neither of the others holds.
        products: Products taken.
        largest: The largest ``‖Hp‖ / ‖p‖`` seen.
        asymmetry: The largest ``|pᵀHp' − p'ᵀHp|`` of two vectors of the basis.
    """

    def __init__(self, operator: Operator, residual: Tensors, size: float, epsilon: float, loss: float) -> None:
        self.status = Status.STOPPED_AT_CAP
        self.products = 0
        self.largest = 0.0
        self.asymmetry = 0.0
        self._before = 0.0
        self._operator = operator
        self._epsilon = epsilon
        self._loss = loss  # times ‖H‖‖q‖: 1 where rounding hides the right-hand side
        self._basis = [scale(1 / size, residual)]
        self._columns: list[list[float]] = []  # of R, the Hessenberg matrix after the rotations
        self._rotations: list[tuple[float, float]] = []
        self._right = [size]

    def iterate(self, target: float, cap: int) -> None:
        """Iterates until the residual reaches the target, the Krylov space ends, or the cap is reached."""
        while self.products < cap:
            image = self._operator(self._basis[-1])
            self.products += 1
            image, column, size, after = _orthogonalise(image, self._basis)
            if not math.isfinite(size + after):
                self.status = Status.DIVERGED
                return
            self.largest = max(self.largest, size)
            # The Hessenberg matrix of a symmetric H is symmetric, and so tridiagonal.
            above = [abs(entry) for entry in column[:-2]] + [abs(entry - self._before) for entry in column[-2:-1]]
            self.asymmetry, self._before = max([self.asymmetry, *above]), after
            ends = after <= FLAT * self._epsilon * self.largest
            if not self._take(column, 0.0 if ends else after):
                self.status = Status.SINGULAR
                return
            if ends or abs(self._right[-1]) <= target:
                self.status = Status.CONVERGED
                return
            self._basis.append(scale(1 / after, image))

    def _take(self, column: list[float], after: float) -> bool:
        """Rotates a column of the Hessenberg matrix in; refuses one that leaves R singular to rounding."""
        for place, (cosine, sine) in enumerate(self._rotations):
            upper, lower = column[place], column[place + 1] if place + 1 < len(column) else 0.0
            column[place] = cosine * upper + sine * lower
            if place + 1 < len(column):
                column[place + 1] = cosine * lower - sine * upper
        pivot = math.hypot(column[-1], after)
        if pivot <= FLAT * self._epsilon * self.largest:  # ‖H x‖ ≤ pivot for some unit vector x
            return False
        cosine, sine = column[-1] / pivot, after / pivot
        column[-1] = pivot
        self._rotations.append((cosine, sine))
        self._columns.append(column)
        last = self._right.pop()
        self._right += [cosine * last, -sine * last]
        return True

    def correct(self, q: Tensors) -> Tensors:
        """Returns ``q`` plus the minimiser of the residual over the Krylov space.

        Over as much of that space, to be exact, as leaves rounding of ``‖H‖‖q‖`` below the right-hand side.
        """
        size = len(self._columns)
        triangle = torch.zeros(size, size, dtype=torch.float64)
        for place, column in enumerate(self._columns):
            triangle[: place + 1, place] = torch.tensor(column, dtype=torch.float64)
        right = torch.tensor(self._right[:size], dtype=torch.float64)
        while size > 0:
            coefficients = torch.linalg.solve_triangular(triangle[:size, :size], right[:size, None], upper=True)[:, 0]
            if float(coefficients.norm()) * self.largest * self._loss <= 1.0:
                for coefficient, vector in zip(coefficients.tolist(), self._basis, strict=False):
                    q = axpy(coefficient, vector, q)
                break
            self.status = Status.DIVERGED if self.status is Status.DIVERGED else Status.SINGULAR
            size -= 1
        return q


def _orthogonalise(image: Tensors, basis: list[Tensors]) -> tuple[Tensors, list[float], float, float]:
    """Returns a vector without its components in the basis, these, and its norm before and after.

    Modified Gram–Schmidt, once more where cancellation may have left components behind.
    """
    before = norm(image)
    image, components = _pass(image, basis)
    column, size, after = components.tolist(), float(before), float(norm(image))
    if after <= AGAIN * size:
        image, components = _pass(image, basis)
        column = [a + b for a, b in zip(column, components.tolist(), strict=True)]
        after = float(norm(image))
    return image, column, size, after


def _pass(image: Tensors, basis: list[Tensors]) -> tuple[Tensors, Tensor]:
    components = []
    for vector in basis:
        components.append(dot(vector, image))
        image = axpy(-components[-1], vector, image)
    return image, torch.stack(components)
