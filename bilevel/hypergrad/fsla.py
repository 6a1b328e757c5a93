"""FSLA: one step on the linear system, and momentum on the hypergradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.errors import ConfigError
from bilevel.functional import leaves
from bilevel.hypergrad.base import Pullback, State, negative
from bilevel.hypergrad.stochastic import SOLUTION, Answer, Batches, Stochastic, kept, started
from bilevel.linear import richardson
from bilevel.validation import check_number
from bilevel.vector import Tensors, axpy, subtract

__all__ = ["FSLA"]

MOMENTUM, INNER, OUTER = "momentum", "inner", "outer"


@dataclass(frozen=True)
class FSLA(Stochastic):
    """One step ``qₖ = qₖ₋₁ − ρ ((H + δI) qₖ₋₁ − v)`` a call, pulled back with variance-reducing momentum.

    With ``p(w, λ, q; s) = −(∂²f/∂λ∂w) q`` on a batch s other than the step's,

        dₖ = p(wₖ, λₖ, qₖ; sₖ) + (1 − β) (dₖ₋₁ − p(wₖ₋₁, λₖ₋₁, qₖ₋₁; sₖ)),        d₁ = p(w₁, λ₁, q₁; s₁)

    is returned: the noise of the mixed derivative is averaged over calls. On one batch throughout, ``dₖ`` is p itself.
    The direct part ``∂F/∂λ`` is not the estimator's, and gets no momentum here. Source: Li, Gu, Huang, AAAI 2022 (arXiv
    2112.04660), algorithm 1.

    Attributes:
        step_size: ρ; below ``2 / (λmax + δ)``.
        momentum: β in (0, 1]; 1 is none, and saves the products at the old point.

    Cost: 1 forward and 1 backward pass with graph for each separate batch (2), 2 products; from the second call on
        another 1, 1 and 1 at the old point. State: q, d, and copies of w and λ.
    """

    momentum: float = 0.5

    name: ClassVar[str] = "fsla"
    summary: ClassVar[str] = "one warm-started step on the linear system a call, momentum on the mixed product"
    cost: ClassVar[str] = "1 forward, 1 backward with graph for each batch, 2 products; 1 of each more for the momentum"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; step_size < 2/λmax; state across calls"
    storage: ClassVar[str] = "a batch's gradient graph, 3 vectors of state"
    purpose: ClassVar[str] = "stochastic losses whose noise momentum should average"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_number("FSLA", "momentum", self.momentum, minimum=0.0, exclusive=True)
        if self.momentum > 1.0:
            raise ConfigError(f"FSLA.momentum must be at most 1 (1 is none), not {self.momentum!r}")

    @property
    def needs_state(self) -> bool:
        """It goes on from the call before."""
        return True

    @property
    def num_samples(self) -> int:
        """One batch for the step, one for the mixed product."""
        return 2

    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """See :meth:`Stochastic.pull`."""
        start, from_zero = started(self, state, v)
        q = richardson(batches.in_turn(), v, iterations=1, step_size=self.step_size, start=start).q
        answer = batches.answer(1, q, v)
        direction = self._direction(batches, answer, start, state)
        new = {SOLUTION: answer.q}
        if self.momentum < 1.0:
            inner, outer = batches.problem.inner, batches.problem.outer
            copies = (tuple(part.detach().clone() for part in point) for point in (inner, outer))
            new = {**new, MOMENTUM: direction, **dict(zip((INNER, OUTER), copies, strict=True))}
        return batches.pullback(answer, new, iterations=1, value=direction, contracts=from_zero)

    def _direction(self, batches: Batches, answer: Answer, start: Tensors, state: State) -> Tensors:
        fresh = negative(answer.mixed)
        before = kept(self, state, MOMENTUM, fresh)
        inner, outer = kept(self, state, INNER, batches.problem.inner), kept(self, state, OUTER, batches.problem.outer)
        if self.momentum == 1.0 or before is None or inner is None or outer is None:
            return fresh
        old = negative(batches.mixed_at(1, leaves(inner), leaves(outer), start))
        return axpy(1 - self.momentum, subtract(before, old), fresh)
