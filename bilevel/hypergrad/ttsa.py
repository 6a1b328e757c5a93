"""TTSA: a Neumann series of random length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.hypergrad.base import Pullback, State
from bilevel.hypergrad.stochastic import Batches, Stochastic
from bilevel.validation import check_integer
from bilevel.vector import Tensors, axpy, scale

__all__ = ["TTSA"]

GENERATOR = "generator"


@dataclass(frozen=True)
class TTSA(Stochastic):
    """``q = K ρ Πⱼ₌₁ᵖ (I − ρHⱼ) v`` with p uniform in ``{0, …, K − 1}`` for K ``terms``, each factor on its own batch.

    Over p its mean is the truncated series ``ρ Σₖ₌₀ᴷ⁻¹ (I − ρH)ᵏ v``: half the products of the sum on average, for a
    large variance. A single call's residual is that of one draw, often above 1. A further batch serves the mixed
    product. Sources: Hong, Wai, Wang, Yang 2020 (arXiv 2007.05170); Ghadimi and Wang 2018 (arXiv 1802.02246).
    Decreasing step sizes for the two levels are the optimisers' business.

    Attributes:
        terms: K, the summands of the series that a call is right for on average.
        step_size: ρ; below ``2 / (λmax + δ)``.
        seed: Of the draws of p. Data-parallel ranks draw alike.

    Cost: 1 forward and 1 backward pass with graph for each separate batch used (p + 1), p + 1 products. State: the
        random generator.
    """

    terms: int = 10
    seed: int = 0

    name: ClassVar[str] = "ttsa"
    summary: ClassVar[str] = "one random term of the Neumann series, right on average"
    cost: ClassVar[str] = "1 forward, 1 backward with graph for each batch, on average (terms + 1) / 2 products"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; step_size < 2/λmax; state across calls"
    storage: ClassVar[str] = "a batch's gradient graph, 2 vectors"
    purpose: ClassVar[str] = "stochastic losses where an unbiased truncated series is wanted; noisy"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("TTSA", "terms", self.terms, minimum=1)
        check_integer("TTSA", "seed", self.seed, minimum=0)

    @property
    def needs_state(self) -> bool:
        """Without the generator of the call before, all calls would draw the same p: right on no average."""
        return True

    @property
    def num_samples(self) -> int:
        """One batch for each possible factor, and one for the mixed product."""
        return self.terms

    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """See :meth:`Stochastic.pull`."""
        generator = torch.Generator()
        known = state.get(GENERATOR)
        if known is None:
            generator.manual_seed(self.seed)
        else:
            generator.set_state(known[0].cpu())
        power = int(torch.randint(self.terms, (), generator=generator))
        r = v
        for place in range(power):
            r = axpy(-self.step_size, batches.image(place, r), r)
        answer = batches.answer(self.terms - 1, scale(self.terms * self.step_size, r), v)
        return batches.pullback(
            answer,
            {},
            iterations=power,
            always={GENERATOR: (generator.get_state(),)},
            message=f"drew power {power} of 0 to {self.terms - 1}",
        )
