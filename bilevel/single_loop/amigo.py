"""AmIGO: a few inner steps, a few warm-started steps on the linear system, an outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad import amigo
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop.estimated import Estimated

__all__ = ["AmIGO"]


@dataclass(frozen=True, kw_only=True)
class AmIGO(Estimated):
    """Warm-started steps on w and on q for each on λ; see the estimator :class:`bilevel.hypergrad.amigo.AmIGO`.

    Constant steps. Source: Arbel and Mairal, ICLR 2022 (arXiv 2111.14580), algorithm 1.

    Attributes:
        linear_steps: Steps on q for each on λ.
        solver: ``"sgd"`` or ``"conjugate_gradient"``.

    Cost of an update: ``inner_steps`` forward and backward passes over an inner batch for w, ``linear_steps + 1`` times
        1 and 2 for q and the mixed product, 1 and 1 over an outer batch.
    """

    inner_steps: int = 10
    linear_steps: int = 10
    solver: str = "sgd"

    name: ClassVar[str] = "AmIGO"

    def estimator(self, step: int) -> Stochastic:
        """See :meth:`Estimated.estimator`."""
        return amigo.AmIGO(steps=self.linear_steps, step_size=self.lengths(step)[1], solver=self.solver)
