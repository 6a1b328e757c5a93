"""TTSA: one inner step, a Neumann series of random length, an outer step on a slower time scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.hypergrad import ttsa
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop.base import Point
from bilevel.single_loop.estimated import Estimated
from bilevel.vector import Tensors

__all__ = ["TTSA"]


@dataclass(frozen=True, kw_only=True)
class TTSA(Estimated):
    """One step on w, and one random term of the series for each step on λ; see :class:`bilevel.hypergrad.ttsa.TTSA`.

    Two time scales: w's steps decrease as t^(−2/5), those on λ as t^(−3/5); the series keeps a constant
    ``linear_step``. Source: Hong, Wai, Wang, Yang 2020 (arXiv 2007.05170), algorithm 1 and theorem 1.

    Attributes:
        terms: Summands of the series that a step is right for on average.

    Cost of an update: 1 forward and 1 backward pass over an inner batch for w, on average ``(terms + 1) / 2`` times 1
        and 2 for q and the mixed product, 1 and 1 over an outer batch.
    """

    linear_step: float | None = 0.1
    inner_decay: float = 0.4
    outer_decay: float = 0.6
    terms: int = 10

    name: ClassVar[str] = "TTSA"

    def start(self, point: Point) -> Mapping[str, Tensors]:
        """See :meth:`Method.start`: the draws of the lengths are a stream of their own, apart from that of batches."""
        seed = int(torch.randint(2**62, (), generator=point.oracles.generator))
        return {ttsa.GENERATOR: (torch.Generator().manual_seed(seed).get_state(),)}

    def estimator(self, step: int) -> Stochastic:
        """See :meth:`Estimated.estimator`."""
        return ttsa.TTSA(terms=self.terms, step_size=self.lengths(step)[1])
