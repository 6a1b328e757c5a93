"""The fully first-order penalty method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.penalty import Descent, Penalty
from bilevel.hypergrad.surroundings import Surroundings
from bilevel.validation import check_number
from bilevel.vector import Tensors, axpy, norm

__all__ = ["F2SA"]


@dataclass(frozen=True)
class F2SA(Penalty):
    """``σ (∂f/∂λ(y, λ) − ∂f/∂λ(w, λ))`` with ``y → argmin of f(·, λ) + vᵀ(·) / σ``, by gradient steps on y.

    At an inner solution w the limit of y lies ``−H⁻¹v/σ`` away, to first order in 1/σ, so that the implicit part tends
    to ``−vᵀ H⁻¹ ∂²f/∂w∂λ``. With μ-strongly convex f, Lipschitz constants L_H and L_B of ``∂²f/∂w²`` and ``∂²f/∂w∂λ``
    in w, and B the latter at w,

        ‖bias‖ ≤ ‖v‖² (‖B‖ L_H / μ + L_B) / (2 μ² σ)

    It is exact for quadratic f. y approaches its limit with the factor ``max |1 − ηh|`` (h: eigenvalues). Source: Kwon
    et al., ICML 2023 (arXiv 2301.10945), algorithm 1; the bias is its lemma 3.1.

    Differences from the publication: F is linearised at w, since an estimator is given ``v = ∂F/∂w(w)`` and not F: y
    follows ``v / σ`` where the publication has ``∂F/∂w(y) / σ``. That changes the answer by O(1/σ), the order of the
    bias, and makes the method exact for quadratic f whatever F is. σ is constant, where the publication lets it grow:
    give another one as the search goes on. w is whatever the inner problem's own optimiser made of the publication's z.

    Where w is not solved, ``∂f/∂w(w)`` enters the answer σ times enlarged, which the residual shows: σ is to be small
    beside ``‖v‖ / ‖∂f/∂w(w)‖``. Scaling the outer loss by c asks for ``c σ``.

    Attributes:
        multiplier: σ. Larger: less bias, more of w's error and of rounding.
        iterations: Steps of y at each call.
        step_size: η, below ``2 / λmax`` of the inner Hessian; ``"auto"``: ``1 / λmax``, estimated by differences.

    Cost: ``iterations`` + 2 forward and backward passes (1 less at the first call); 17 more of each at the first call
    with ``"auto"``.

    The state holds y (and the eigenvalue): in an engine it is in every checkpoint; as a function pass ``state={}`` at
    first and each result's ``state`` to the next call.

    Raises:
        ConfigError: A field out of range, or no state.

    Example:
        The inner minimum of ``(w − λ)²/2`` is ``w = λ``, so that ``F = w²/2`` has the hypergradient λ, which y, ``v/σ``
        below w, gives as ``σ (λ − y)``:

        >>> import torch
        >>> from bilevel import hypergradient
        >>> lam = torch.tensor(3.0)
        >>> losses = lambda w, l: (w - l) ** 2 / 2, lambda w, l: w**2 / 2
        >>> result = hypergradient(*losses, lam.clone(), lam, F2SA(iterations=1, step_size=1.0), state={})
        >>> result.grad, result.state["auxiliary"]
        (tensor(3.0000), (tensor(2.7000),))
    """

    multiplier: float = 10.0

    name: ClassVar[str] = "f2sa"
    summary: ClassVar[str] = "penalty method: a second inner iterate, and first derivatives only (F2SA)"
    cost: ClassVar[str] = "iterations + 2 forward and backward (auto: 17 more, once)"
    needs: ClassVar[str] = "first derivatives only; a strongly convex inner loss, well solved; 0 < step_size < 2/λmax"
    storage: ClassVar[str] = "the parameters twice (the second iterate is state)"
    purpose: ClassVar[str] = "inner losses without second derivatives where the curvature matters"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_number("F2SA", "multiplier", self.multiplier, minimum=0.0, exclusive=True)

    def multiplier_at(self, v: Tensors, slope: Tensors) -> float:
        """See :meth:`Penalty.multiplier_at`: σ everywhere."""
        return self.multiplier

    def step_of(self, step_size: float) -> float:
        """See :meth:`Penalty.step_of`: ``η (v/σ + ∂f/∂w) = (η/σ) (v + σ ∂f/∂w)``."""
        return step_size / self.multiplier

    def step_for(self, largest: float) -> float:
        """See :meth:`Penalty.step_for`."""
        return 1 / (largest * self.multiplier)

    def runs_away(self, descent: Descent, v: Tensors, around: Surroundings) -> bool:
        """See :meth:`Penalty.runs_away`.

        On a convex loss with Lipschitz constant L of its gradient G, cocoercivity gives ``‖G⁺‖² ≤ ‖G‖² + (1 − 2/(ηL))
        ‖G⁺ − G‖²``: the gradient never grows while ``η ≤ 2/L``. Where it is small beside v it may grow by rounding.
        """
        last = float(norm(axpy(self.multiplier, descent.slope, v)))
        return not last <= max(1.000001 * descent.first, 1e-3 * float(norm(v)))
