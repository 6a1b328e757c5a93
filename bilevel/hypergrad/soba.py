"""SOBA: one step on the linear system, simultaneous with the outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import Pullback, State
from bilevel.hypergrad.stochastic import SOLUTION, Batches, Stochastic, started
from bilevel.vector import Tensors, axpy

__all__ = ["SOBA"]


@dataclass(frozen=True)
class SOBA(Stochastic):
    """Pulls back the q that the call before left, and takes one step ``q ← q − ρ ((H + δI) q − v)`` for the next.

    Both directions are taken at the same point, so that one backward pass gives both products. At a fixed point with
    one batch the error of q falls by ``max |1 − ρh|`` a call over the Hessian's eigenvalues h. The first call pulls
    back ``q = 0``: it returns the direct part alone. Source: Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022 (arXiv
    2201.13409), equations 5 to 7; the inner step is the inner problem's own.

    Attributes:
        step_size: ρ; below ``2 / (λmax + δ)``.

    Cost: 1 forward and 1 backward pass with graph, 1 product. State: q.
    """

    name: ClassVar[str] = "soba"
    summary: ClassVar[str] = "one warm-started step on the linear system a call, after the product (single loop)"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, 1 product"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; step_size < 2/λmax; state across calls"
    storage: ClassVar[str] = "the gradient's graph, 1 vector of state"
    purpose: ClassVar[str] = "stochastic losses, many cheap outer steps: one product each"

    @property
    def needs_state(self) -> bool:
        """It goes on from the call before."""
        return True

    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """See :meth:`Stochastic.pull`."""
        q, _ = started(self, state, v)
        answer = batches.answer(0, q, v)
        return batches.pullback(answer, {SOLUTION: axpy(-self.step_size, answer.residual, answer.q)}, iterations=1)
