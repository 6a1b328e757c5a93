"""stocBiO: a truncated Neumann series with a fresh batch for every product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import Pullback, State
from bilevel.hypergrad.stochastic import Batches, Stochastic
from bilevel.validation import check_integer
from bilevel.vector import Tensors, add, axpy, scale

__all__ = ["StocBiO"]


@dataclass(frozen=True)
class StocBiO(Stochastic):
    """``q = ρ Σₖ₌₀ᴷ Πⱼ₌₁ᵏ (I − ρHⱼ) v`` for K ``terms``, with a batch of its own in every factor; no warm start.

    On one batch that is :class:`~bilevel.Neumann` with ``terms=K``. Over independent batches its mean is the series of
    the mean Hessian. A further batch serves the mixed product. Source: Ji, Yang, Liang, ICML 2021 (arXiv 2010.07962),
    algorithm 3.

    Attributes:
        terms: K, the Hessian products taken; the sum has K + 1 summands.
        step_size: ρ; below ``2 / (λmax + δ)``.

    Cost: 1 forward and 1 backward pass with graph for each separate batch (terms + 1 of them), terms + 1 products.
    """

    terms: int = 10
    name: ClassVar[str] = "stocbio"
    summary: ClassVar[str] = "truncated Neumann series, each product on a fresh batch"
    cost: ClassVar[str] = "1 forward, 1 backward with graph for each batch, terms + 1 products"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; step_size < 2/λmax"
    storage: ClassVar[str] = "a batch's gradient graph, 2 vectors"
    purpose: ClassVar[str] = "stochastic losses with a well solved inner problem; no state"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("StocBiO", "terms", self.terms, minimum=0)

    @property
    def num_samples(self) -> int:
        """One batch for each factor, and one for the mixed product."""
        return self.terms + 1

    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """See :meth:`Stochastic.pull`."""
        summand = total = v
        for place in range(self.terms):
            summand = axpy(-self.step_size, batches.image(place, summand), summand)
            total = add(total, summand)
        answer = batches.answer(self.terms, scale(self.step_size, total), v)
        return batches.pullback(answer, {}, iterations=self.terms, contracts=True)
