"""Where the inner gradient vanishes: the inner problem, solved to rounding.

What is solved is ``g(w, λ) = 0`` for the gradient field g that the inner optimiser follows, whether or not it is the
gradient of something: with a ``detach()`` in the loss, that is where the inner steps end. Derivatives only set the
pace: the root does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.check.references.exact import DenseField
from bilevel.check.references.field import GradientField
from bilevel.check.references.hidden import TOLERATED_DIFFERENCE, hidden
from bilevel.functional import Objective
from bilevel.vector import Tensors

__all__ = ["Root", "RootSolver"]

DENSE_DIMENSION = 2_000
"""Above it, systems with J are solved by GMRES on products by differences."""

_CLOSE = 1e-3
_PATIENCE = 10
_LARGEST_STEP = 1e-8


@dataclass(frozen=True)
class Root:
    """A root of the inner gradient.

    Attributes:
        inner: The inner variables.
        step: The Newton step that is left: the distance from the root, where it has been found.
        gradient_norm: ``‖g‖``.
        converged: Whether ``step`` is within 1e-8 of the size of the inner variables.
    """

    inner: Tensors
    step: Tensor
    gradient_norm: float
    converged: bool


@dataclass
class RootSolver:
    """Solves one inner problem, first from the given point, then again and again near the first solution.

    The first solve is Newton's method with a shift δ of J that keeps its symmetric part positive and grows where a step
    does not reduce ‖g‖: implicit Euler steps of length 1/δ along the gradient flow, which leave saddles and end in
    minima (pseudo-transient continuation: Kelley and Keyes, SIAM J. Numer. Anal. 35, 1998). Later ones iterate
    ``w ← w − J⁻¹ g(w, λ)`` with J of the first solution: one gradient an iteration, contraction by about the relative
    change of J.

    Args:
        objective: f.
        inner: Where to start: leaves that require gradients.
        above: The variables that f depends on otherwise, at the given point.

    Attributes:
        gradients: Gradients taken.
        active: The places of the inner variables that reach the loss.
    """

    objective: Objective
    inner: Tensors
    above: Tensors
    gradients: int = 0
    active: list[int] = field(default_factory=list)
    _inverse: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def solve(self, above: Tensors) -> Root:
        """Returns the root from the given point, and keeps J there."""
        start = GradientField(self.objective, self.inner, above)
        self.active = start.active
        self.gradients += 1
        found = self._newton(start) if len(start.value) <= DENSE_DIMENSION else self._newton_krylov(start)
        if found is None:
            return Root(self.inner, torch.full_like(start.value, math.inf), float(start.value.norm()), converged=False)
        root = self.again(self.inner, above, start=found.point, at=found)
        self.inner = root.inner
        return root

    def again(
        self, inner: Tensors, above: Tensors, *, start: Tensor | None = None, at: GradientField | None = None
    ) -> Root:
        """Returns the root near the first one, for other values of the variables above."""
        assert self._inverse is not None
        near = at or GradientField(self.objective, inner, above)
        w = near.point if start is None else start
        size, stalled = math.inf, 0
        g = near.value
        for _ in range(60):
            step = self._inverse(g)
            if not bool(torch.isfinite(step).all()):
                break
            previous, size = size, float(step.norm())
            extent = float(w.norm()) + size
            stalled += size > 0.5 * previous
            if size <= 4 * near.epsilon * extent or (stalled >= 3 and size > 0.9 * previous):
                break
            w = w - step
            g = near.at(w)
            self.gradients += 1
        close = bool(torch.isfinite(step).all()) and size <= max(_LARGEST_STEP, 1e2 * near.epsilon) * extent
        return Root(near.place(w), step, float(g.norm()), close)

    def _newton(self, current: GradientField) -> GradientField | None:
        probe = hidden(current)
        by_differences = probe.size > TOLERATED_DIFFERENCE and not probe.at_a_kink
        shift, best, best_at = 0.0, math.inf, 0
        for count in range(60):
            size = float(current.value.norm())
            if size < 0.9 * best:
                best, best_at = size, count
            if count - best_at > _PATIENCE:
                return None
            dense = DenseField(current, by_differences=by_differences)
            low, high = float(dense.eigenvalues[0]), float(dense.eigenvalues.abs().max())
            if not math.isfinite(high):
                return None
            null = low > -1e3 * len(current.value) * current.epsilon * high
            needed = 0.0 if null else -1.5 * low
            step = dense.solve(current.value)
            extent = float(current.point.norm()) + float(step.norm())
            if null and shift == 0.0 and float(step.norm()) <= _CLOSE * extent and self._contracts(dense, step):
                self._inverse = dense.solve
                return current
            after = self._shifted_step(current, dense, max(shift, needed), allowance=10.0 if needed else 1.0)
            if after is None:
                return None
            current, used = after
            shift = 0.25 * used if used > max(needed, 1e-8 * high) else 0.0
        return None

    def _contracts(self, dense: DenseField, step: Tensor) -> bool:
        """Whether a Newton step leaves less than half of itself: the iteration with this J converges.

        Or no more than rounding in g makes of it, which is κ(J) times as large in w.
        """
        self.gradients += 1
        rest = dense.solve(dense.field.at(dense.field.point - step))
        floor = max(1e3, 10 * dense.condition) * dense.field.epsilon * float(dense.field.point.norm())
        return float(rest.norm()) <= max(0.5 * float(step.norm()), floor)

    def _shifted_step(
        self, current: GradientField, dense: DenseField, shift: float, allowance: float
    ) -> tuple[GradientField, float] | None:
        high = float(dense.eigenvalues.abs().max())
        eye = torch.eye(len(current.value)).to(current.value)
        for _ in range(15):
            step = (
                torch.linalg.solve(dense.jacobian + shift * eye, current.value) if shift else dense.solve(current.value)
            )
            w = current.point - step
            g = current.at(w)
            self.gradients += 1
            if float(g.norm()) <= allowance * float(current.value.norm()):
                return GradientField(self.objective, current.place(w), current.outer), shift
            shift = max(4 * shift, 1e-3 * high)
        return None

    def _newton_krylov(self, current: GradientField) -> GradientField | None:
        """Newton's method with systems solved by GMRES, and steps halved until they reduce ‖g‖."""
        for _ in range(60):
            inverse = self._gmres(current)
            step = inverse(current.value)
            if float(step.norm()) <= _CLOSE * (float(current.point.norm()) + float(step.norm())):
                self._inverse = inverse
                return current
            for halving in range(20):
                w = current.point - step * 0.5**halving
                self.gradients += 1
                if float(current.at(w).norm()) < float(current.value.norm()):
                    break
            else:
                return None
            current = GradientField(self.objective, current.place(w), current.outer)
        return None

    def _gmres(self, at: GradientField) -> Callable[[Tensor], Tensor]:
        def product(v: Tensor) -> Tensor:
            self.gradients += 1
            step = at.epsilon**0.5 * (1 + float(at.point.norm())) / max(float(v.norm()), 1e-300)
            difference: Tensor = (at.at(at.point + step * v) - at.value) / step
            return difference

        return lambda right: gmres(product, right, products=300, rtol=1e-4)


def gmres(product: Callable[[Tensor], Tensor], right: Tensor, *, products: int, rtol: float) -> Tensor:
    """Returns an approximate solution of ``J x = right`` by minimal residuals, without restarts."""
    size = float(right.norm())
    if size == 0.0:
        return torch.zeros_like(right)
    basis = [right / size]
    columns: list[Tensor] = []
    for count in range(1, products + 1):
        image = product(basis[-1])
        span = torch.stack(basis)
        entries = span @ image
        image = image - span.T @ entries
        again = span @ image
        image = image - span.T @ again
        length = image.norm()
        columns.append(torch.cat([entries + again, length[None]]))
        if count % 5 and count < min(products, len(right)) and float(length) > 1e-12 * float(entries.norm()):
            basis.append(image / length)
            continue
        H = torch.zeros(count + 1, count, dtype=right.dtype, device=right.device)
        for place, column in enumerate(columns):
            H[: len(column), place] = column
        goal = torch.zeros(count + 1, dtype=right.dtype, device=right.device)
        goal[0] = size
        y = torch.linalg.lstsq(H, goal[:, None]).solution[:, 0]
        if float((H @ y - goal).norm()) <= rtol * size or float(length) <= 1e-12 * float(entries.norm() + length):
            break
        basis.append(image / length)
    found: Tensor = torch.stack(basis[:count]).T @ y
    return found
