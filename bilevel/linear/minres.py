"""The minimum residual method for symmetric systems that may be indefinite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.linear.base import Operator, Solution, first_residual, machine_epsilon
from bilevel.linear.lanczos import tridiagonal
from bilevel.linear.probe import Probe
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm, scale, subtract

__all__ = ["minres"]

# In units of the round-off, relative to the largest product seen: what loss of orthogonality leaves of a vanishing Hr.
FLAT = 1e3
# In units of the round-off, the residual that a stable method reaches relative to ‖H‖‖q‖ + ‖v‖.
ATTAINABLE = 10.0
# Share of the right-hand side that rounding may take before H counts as singular.
HIDDEN = 0.01
ROUNDED = "rounding keeps the true residual above what the recursion believes: more precision will help"


def minres(
    operator: Operator,
    v: Tensors,
    *,
    max_iterations: int,
    rtol: float,
    epsilon: float | None = None,
    start: Tensors | None = None,
) -> Solution:
    """Solves ``H q = v`` for a symmetric H, definite or not (Paige and Saunders 1975, section 6).

    Iterate k minimises ``‖Hq − v‖`` over the Krylov space, so that the residual never grows and is at most
    ``min over polynomials p of degree k with p(0) = 1 of max |p(λ)|`` over the eigenvalues λ, times the first one. For
    eigenvalues in ``[μ, L]`` that is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` with ``κ = L/μ``; in ``[−a, −b] ∪ [c, d]`` of
    equal lengths, ``2 ((√(ad) − √(bc))/(√(ad) + √(bc)))^⌊k/2⌋`` (Greenbaum 1997, equation 3.16). Seven vectors are
    kept.

    Args:
        operator: The product with H.
        v: The right-hand side.
        max_iterations: Cap on iterations, one product each. A start takes one product more, for its residual, and so
            does every look at the true residual where H is ill-conditioned enough for rounding to matter.
        rtol: Stops once ``‖H q − v‖ ≤ rtol ‖v‖``; 0 runs to the cap, or to the dtype's round-off.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        start: The first iterate; zero without it, or where its residual is larger than that of zero.

    Returns:
        The solution; ``CONVERGED`` for an indefinite system that was solved, with a message that says so. ``SINGULAR``
        where the residual r that is left has ``Hr = 0`` but for rounding: q is then a least-squares solution.
        ``NOT_SYMMETRIC`` where ``pᵀ(Hp')`` and ``p'ᵀ(Hp)`` differ for two successive Lanczos vectors: a probe that
        costs no product.
    """
    q, residual, products = first_residual(operator, v, start)
    goal = float(norm(v))
    epsilon = epsilon or machine_epsilon(v)
    probe = Probe(epsilon, max(HIDDEN, 30 * epsilon))
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding.
    target = max(rtol, 0.01 * probe.epsilon) * goal
    while True:
        before = float(norm(residual))
        run = _Run(operator, q, residual, probe)
        run.iterate(target, max_iterations)
        products += run.iterations
        max_iterations -= run.iterations
        # Rounding of q reaches the residual with the square of the condition (Sleijpen, van der Vorst, Modersitzki
        # 2000), unseen by the recursion. Where that may matter the residual is looked at, and refined.
        doubtful = run.suspended or probe.epsilon * run.condition**2 * before > max(target, run.residual)
        if run.status not in (Status.CONVERGED, Status.STOPPED_AT_CAP) or not doubtful:
            return probe.solution(run.q, run.status, products, goal, run.curvature())
        residual = subtract(v, operator(run.q))
        products += 1
        size = float(norm(residual))
        if not math.isfinite(size):
            return probe.solution(q, Status.DIVERGED, products, goal)
        if size <= max(2 * target, ATTAINABLE * probe.epsilon * (probe.largest * float(norm(run.q)) + goal)):
            return probe.solution(run.q, Status.CONVERGED, products, goal, run.curvature())
        q = run.q if size <= before else q
        rounded = not run.suspended and size > 2 * max(target, run.residual)
        if rounded and (max_iterations == 0 or not size <= 0.5 * before):
            unseen = probe.epsilon * probe.largest * float(norm(run.q))
            lost = (
                unseen > probe.lost * goal or probe.epsilon * run.condition**2 > 1.0
            )  # no digit of a solution survives
            return probe.solution(q, Status.SINGULAR if lost else Status.STOPPED_AT_CAP, products, goal, ROUNDED)
        if max_iterations == 0:
            return probe.solution(q, Status.STOPPED_AT_CAP, products, goal, run.curvature())


def _flat(probe: Probe) -> float:
    """Returns the size below which a product with a unit vector is rounding."""
    return min(FLAT * probe.epsilon, math.sqrt(probe.epsilon)) * probe.largest


class _Run:
    """Iterations from one residual.

    Attributes:
        q: The current iterate.
        status: How the run ended.
        suspended: Whether it ended because ``Hr`` has fallen as far as rounding lets it fall in one run: from there on
            the null space of a singular H would swallow the iterates.
        iterations: Products taken.
        condition: A lower estimate of the condition number of H on the Krylov space.
    """

    def __init__(self, operator: Operator, q: Tensors, residual: Tensors, probe: Probe) -> None:
        self.q = q
        self.status = Status.STOPPED_AT_CAP
        self.suspended = False
        self.iterations = 0
        self.condition = 1.0
        self._probe = probe
        self._lanczos = _Lanczos(operator, residual, probe)
        self._rotation = _Rotation(float(norm(residual)))

    def iterate(self, target: float, cap: int) -> None:
        """Iterates until the recursion's residual reaches the target, or something else ends it."""
        rotation, newer, older, reach = self._rotation, None, None, 0.0
        while rotation.residual > target and self.iterations < cap and self._lanczos.vector is not None:
            vector = self._lanczos.vector
            alpha, after = self._lanczos.advance()
            self.iterations += 1
            if not math.isfinite(alpha + after):
                self.status = Status.DIVERGED
                return
            rotation.turn(alpha, after)
            if self.iterations == 1:
                reach = 2 * self._probe.epsilon**0.5 * rotation.image
            if rotation.image <= _flat(self._probe):
                self.status = Status.SINGULAR
                return
            if rotation.image <= reach:
                self.suspended = True
                return
            search = vector if newer is None else axpy(-rotation.second, newer, vector)
            search = search if older is None else axpy(-rotation.third, older, search)
            older, newer = newer, scale(1 / rotation.first, search)
            self.q = axpy(rotation.step, newer, self.q)
            self.condition = max(self.condition, self._probe.largest / rotation.first)
        if rotation.residual <= target:
            self.status = Status.CONVERGED

    @property
    def residual(self) -> float:
        """What the recursion believes of ``‖v − Hq‖``."""
        return self._rotation.residual

    def curvature(self) -> str:
        """Says where H shows to be indefinite: the smallest Ritz value is an upper bound of the smallest eigenvalue."""
        smallest = self._lanczos.smallest()
        if smallest >= -_flat(self._probe):
            return ""
        return f"the Hessian has an eigenvalue of {smallest:.3g} or below"


class _Lanczos:
    """The recurrence ``H vₖ = βₖ vₖ₋₁ + αₖ vₖ + βₖ₊₁ vₖ₊₁`` from a first residual.

    Attributes:
        vector: ``vₖ``; None where the Krylov space ends.
    """

    def __init__(self, operator: Operator, residual: Tensors, probe: Probe) -> None:
        self._operator = operator
        self._probe = probe
        self._previous: Tensors | None = None
        self._diagonal: list[float] = []
        self._off: list[float] = []
        size = float(norm(residual))
        self.vector: Tensors | None = scale(1 / size, residual) if size > 0.0 else None

    def advance(self) -> tuple[float, float]:
        """Takes a product; returns αₖ and βₖ₊₁, and moves on to the next vector."""
        vector = self.vector
        assert vector is not None
        product = self._operator(vector)
        along = dot(vector, product)
        image = axpy(-along, vector, product)
        if self._previous is not None:
            image = axpy(-self._off[-1], self._previous, image)
        numbers = [along, norm(image), norm(vector), norm(product), *self._probe.crossed(vector, product)]
        alpha, after, length, size, *crossed = torch.stack(numbers).tolist()
        if math.isfinite(alpha + after):
            self._probe.record(vector, product, length, size, crossed)
            self._diagonal.append(alpha)
            self._off.append(after)
        self._previous = vector
        self.vector = scale(1 / after, image) if after > 0.0 else None
        return alpha, after

    def smallest(self) -> float:
        """Returns the smallest Ritz value."""
        return float(tridiagonal(self._diagonal, self._off)[0][0]) if self._diagonal else 0.0


@dataclass
class _Rotation:
    """The QR decomposition of the Lanczos matrix, one Givens rotation a step.

    Attributes:
        residual: ``‖rₖ‖`` of the iterate after the step.
        image: ``‖H rₖ₋₁‖ / ‖rₖ₋₁‖`` of the iterate before the step.
        first: New diagonal entry of R.
        second: Entry of R above it.
        third: Entry of R above that.
        step: Coefficient of the new search direction.
    """

    residual: float
    image: float = math.inf
    first: float = 1.0
    second: float = 0.0
    third: float = 0.0
    step: float = 0.0
    _cosine: float = -1.0
    _sine: float = 0.0
    _corner: float = 0.0  # what the rotation before left of βₖ in row k and of βₖ₊₁ in row k − 1
    _beyond: float = 0.0

    def turn(self, alpha: float, after: float) -> None:
        """Takes αₖ and βₖ₊₁ in; βₖ came with the column before, as the matrix is symmetric."""
        self.third = self._beyond
        self.second = self._cosine * self._corner + self._sine * alpha
        diagonal = self._sine * self._corner - self._cosine * alpha
        self._beyond = self._sine * after
        self._corner = -self._cosine * after
        self.image = math.hypot(diagonal, self._corner)
        self.first = math.hypot(diagonal, after)
        if self.first == 0.0:  # H is zero on what is left; image is zero too, and no step is taken
            return
        self._cosine, self._sine = diagonal / self.first, after / self.first
        self.step = self._cosine * self.residual
        self.residual *= self._sine
