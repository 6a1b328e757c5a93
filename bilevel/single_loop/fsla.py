"""FSLA: one inner step, one linear step, an outer step with variance-reducing momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from bilevel.hypergrad import fsla
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop.base import Point, State
from bilevel.single_loop.estimated import Estimated
from bilevel.validation import check_number
from bilevel.vector import Tensors, axpy, promote, subtract

__all__ = ["FSLA"]

DIRECT = "direct"


@dataclass(frozen=True, kw_only=True)
class FSLA(Estimated):
    """One step each on w, q and λ, the last along ``dₜ = p(uₜ; sₜ) + (1 − βₜ)(dₜ₋₁ − p(uₜ₋₁; sₜ))``.

    ``p(w, q, λ; s) = ∂F/∂λ − (∂²f/∂λ∂w) q`` on an inner and an outer batch of its own; the implicit part of d is the
    estimator :class:`bilevel.hypergrad.fsla.FSLA`. All steps decrease as t^(−1/2), and β as well. Source: Li, Gu,
    Huang, AAAI 2022 (arXiv 2112.04660), algorithm 1.

    Attributes:
        momentum: β of the first step, in (0, 1]; 1 is none.
        momentum_decay: βₜ is ``momentum (t + 1)^(−momentum_decay)``.

    Cost of an update: over an inner batch 1 forward and 1 backward pass for w, 1 and 2 each for the step on q, the
        mixed product, and the one at the old point; 3 forward and 3 backward passes over an outer batch.
    """

    inner_decay: float = 0.5
    outer_decay: float = 0.5
    momentum: float = 0.5
    momentum_decay: float = 0.5

    name: ClassVar[str] = "FSLA"

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_number("FSLA", "momentum_decay", self.momentum_decay, minimum=0.0)
        super().__post_init__()

    def estimator(self, step: int) -> Stochastic:
        """See :meth:`Estimated.estimator`."""
        momentum = self.momentum * (step + 1.0) ** -self.momentum_decay
        if momentum == 1.0 and self.momentum_decay > 0.0:  # with β = 1 nothing is kept for a later call with less
            momentum = math.nextafter(1.0, 0.0)
        return fsla.FSLA(step_size=self.lengths(step)[1], momentum=momentum)

    def upper(self, point: Point, state: State) -> tuple[Tensors, Tensors, Mapping[str, Tensors]]:
        """See :meth:`Estimated.upper`; the direct part gets the estimator's momentum."""
        v, _ = point.outer_gradients(point.oracles.draw_outer())
        block = point.oracles.draw_outer()
        direct = promote(point.outer_gradients(block)[1])
        estimator, kept = self.estimator(state.step), state.memory
        assert isinstance(estimator, fsla.FSLA)
        if DIRECT in kept and fsla.MOMENTUM in kept:
            before = replace(point, inner=kept[fsla.INNER], outer=kept[fsla.OUTER])
            old = promote(before.outer_gradients(block)[1])
            direct = axpy(1 - estimator.momentum, subtract(kept[DIRECT], old), direct)
        return promote(v), direct, {DIRECT: direct}
