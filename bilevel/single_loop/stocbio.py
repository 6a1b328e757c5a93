"""stocBiO: a few inner steps, a Neumann series on fresh batches, an outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad import stocbio
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop.estimated import Estimated

__all__ = ["StocBiO"]


@dataclass(frozen=True, kw_only=True)
class StocBiO(Estimated):
    """Warm-started steps on w, and a series from zero for each step on λ.

    Constant steps; the truncation leaves a bias. The series is that of the estimator
    :class:`bilevel.hypergrad.stocbio.StocBiO`. Source: Ji, Yang, Liang, ICML 2021 (arXiv 2010.07962), algorithm 2.

    Attributes:
        terms: Hessian products of the series.

    Cost of an update: ``inner_steps`` forward and backward passes over an inner batch for w, ``terms + 1`` times 1 and
        2 for q and the mixed product, 1 and 1 over an outer batch.
    """

    inner_steps: int = 10
    terms: int = 10

    name: ClassVar[str] = "stocBiO"

    def estimator(self, step: int) -> Stochastic:
        """See :meth:`Estimated.estimator`."""
        return stocbio.StocBiO(terms=self.terms, step_size=self.lengths(step)[1])
