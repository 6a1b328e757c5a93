"""The value-function method with a dynamic barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.penalty import Descent, Penalty
from bilevel.hypergrad.surroundings import Surroundings
from bilevel.validation import check_number
from bilevel.vector import Tensors, dot, norm, subtract

__all__ = ["BOME"]


@dataclass(frozen=True)
class BOME(Penalty):
    """``γ (∂f/∂λ(y, λ) − ∂f/∂λ(w, λ))``, with a multiplier γ that makes y lower F and the value gap at once.

    With the value gap ``Δ(y) = f(y, λ) − f(w, λ)`` and its gradient ``g = ∂f/∂w(y, λ)``,

        γ = max((φ − ⟨v, g⟩) / ‖g‖², 0)      φ = ζ ‖g‖²      y ← y − ξ (v + γ g)

    which is the direction next to v along which Δ falls at the rate φ. Where v and g are parallel, γ is ``(1 + ζ ‖g‖ /
    ‖v‖) ‖v‖ / ‖g‖``, and the answer for quadratic f is ``1 + ζ ‖g‖ / ‖v‖`` times ``−vᵀ H⁻¹ ∂²f/∂w∂λ``. With ζ = 0 and
    quadratic f, y tends there. With ζ > 0 it is drawn to w until its steps become unstable, which leaves a relative
    residual near ``sqrt(ξζL / (2 − ξζL))`` for the largest eigenvalue L of the Hessian: a smaller ξ is more accurate,
    and follows w more slowly. Source: Liu et al., NeurIPS 2022 (arXiv 2209.08709), algorithm 1.

    Differences from the publication: F is linearised at w, since an estimator is given ``v = ∂F/∂w(w)`` and not F. The
    inner products are over the inner variables alone; the publication's also have the outer variables' part, ``⟨∂F/∂λ,
    ∂Δ/∂λ⟩`` and ``‖∂Δ/∂λ‖²``, of which an estimator knows the second factors only. The optima are the same, since there
    ``v + γ g = 0``. w, the publication's solution after T steps, is what the inner problem's own optimiser made. y
    steps before the answer is taken, not together with the outer variables, so that the first answer has a direction:
    the first step is ``−ξ v``, as Δ and its barrier are zero at w.

    Attributes:
        barrier: ζ ≥ 0; η in the publication.
        iterations: Steps of y at each call.
        step_size: ξ, to be below ``2 / (ζ λmax)``; ``"auto"``: ``1 / (2 λmax)``, estimated by differences. Scaling the
            outer loss by c asks for ``ξ / c`` and ``c ζ``.

    Cost: ``iterations`` + 2 forward and backward passes (1 less at the first call); 17 more of each at the first call
    with ``"auto"``.

    The state holds y (and the eigenvalue), see :class:`~bilevel.F2SA`.

    Raises:
        ConfigError: A field out of range, or no state.
    """

    barrier: float = 0.5

    name: ClassVar[str] = "bome"
    summary: ClassVar[str] = "value-function method: a second inner iterate with a dynamic barrier (BOME)"
    cost: ClassVar[str] = "iterations + 2 forward and backward (auto: 17 more, once)"
    needs: ClassVar[str] = "first derivatives only; a convex inner loss, well solved; step_size < 2/(barrier λmax)"
    storage: ClassVar[str] = "the parameters twice (the second iterate is state)"
    purpose: ClassVar[str] = "as f2sa, with a multiplier that adapts itself"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_number("BOME", "barrier", self.barrier, minimum=0.0)

    def multiplier_at(self, v: Tensors, slope: Tensors) -> float:
        """See :meth:`Penalty.multiplier_at`."""
        square = float(norm(slope)) ** 2
        return max(self.barrier - float(dot(v, slope)) / square, 0.0) if square > 0.0 else 0.0

    def first_multiplier(self, v: Tensors, slope: Tensors) -> float:
        """See :meth:`Penalty.first_multiplier`: Δ is zero at w, and cannot fall."""
        return 0.0

    def step_for(self, largest: float) -> float:
        """See :meth:`Penalty.step_for`."""
        return 0.5 / largest

    def runs_away(self, descent: Descent, v: Tensors, around: Surroundings) -> bool:
        """See :meth:`Penalty.runs_away`.

        A step is ``−ξζ (g − ∂f/∂w(w))``, which brings y no further from w on a convex loss with ``ξζ ≤ 2/L``, and
        ``−ξ`` times a projection of v and ``ζ ∂f/∂w(w)``: y can recede by ``ξ (‖v‖ + ζ ‖∂f/∂w(w)‖)`` at most.
        """
        reach = descent.step * (float(norm(v)) + self.barrier * float(norm(around.slope)))
        distance = float(norm(subtract(descent.y, around.inner)))
        return not distance <= 1.000001 * (descent.start + self.iterations * reach)
