"""AmIGO: a few warm-started steps on the linear system."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from bilevel.hypergrad.base import Pullback, State
from bilevel.hypergrad.stochastic import SOLUTION, Batches, Stochastic, started
from bilevel.linear import Operator, Solution, conjugate_gradient, richardson
from bilevel.validation import check_choice, check_integer
from bilevel.vector import Tensors, norm, scale

__all__ = ["AmIGO"]


@dataclass(frozen=True)
class AmIGO(Stochastic):
    """Takes ``steps`` steps on ``(H + δI) q = v`` from the q of the call before, and pulls the new q back.

    With ``solver="sgd"`` a step is ``q ← q − ρ ((H + δI) q − v)`` on a fresh batch each; with one batch the error of q
    falls by ``max |1 − ρh|^steps`` a call, h the eigenvalues of H. ``"conjugate_gradient"`` needs a fixed system: all
    of its products are taken on one batch. A further batch serves the mixed product. Source: Arbel and Mairal, ICLR
    2022 (arXiv 2111.14580), algorithms 1 and 3; the inner steps are the inner problem's own.

    Attributes:
        steps: Steps a call.
        step_size: ρ of ``"sgd"``; below ``2 / (λmax + δ)``.
        solver: ``"sgd"`` or ``"conjugate_gradient"``.

    Cost: 1 forward and 1 backward pass with graph for each separate batch (steps + 1 of them, 2 with conjugate
        gradients), steps + 1 products (one more for the residual of the start with conjugate gradients). State: q.
    """

    steps: int = 10
    solver: str = "sgd"

    name: ClassVar[str] = "amigo"
    summary: ClassVar[str] = "a few warm-started steps on the linear system a call, each on a fresh batch"
    cost: ClassVar[str] = "1 forward, 1 backward with graph for each batch, steps + 1 products"
    needs: ClassVar[str] = "double backward; a positive definite Hessian; step_size < 2/λmax; state across calls"
    storage: ClassVar[str] = "the gradient's graph, 1 vector of state"
    purpose: ClassVar[str] = "stochastic losses where one step on the system is not enough"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        check_integer("AmIGO", "steps", self.steps, minimum=1)
        check_choice("AmIGO", "solver", self.solver, ("sgd", "conjugate_gradient"))

    @property
    def needs_state(self) -> bool:
        """It goes on from the call before."""
        return True

    @property
    def num_samples(self) -> int:
        """One batch for each system that is stepped on, and one for the mixed product."""
        return 2 if self.solver == "conjugate_gradient" else self.steps + 1

    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """See :meth:`Stochastic.pull`."""
        q, from_zero = started(self, state, v)
        if self.solver == "conjugate_gradient":
            start = None if from_zero else q
            solution = batches.fixed(0, lambda operator, reached: self._conjugate_gradient(operator, reached(v), start))
        else:
            solution = richardson(batches.in_turn(), v, iterations=self.steps, step_size=self.step_size, start=q)
        answer = batches.answer(self.num_samples - 1, solution.q, v)
        if self.solver == "conjugate_gradient":
            return batches.pullback(
                answer, {SOLUTION: answer.q}, iterations=self.steps, stepped=False, status=solution.status
            )
        # Not the status of the steps themselves: what grows from batch to batch may be noise. The products decide.
        return batches.pullback(answer, {SOLUTION: answer.q}, iterations=self.steps, contracts=from_zero)

    def _conjugate_gradient(self, operator: Operator, v: Tensors, start: Tensors | None) -> Solution:
        # Squares of a tiny or huge cotangent leave the range of float32; a power of two rescales without rounding.
        size = float(norm(v))
        unit = 2.0 ** max(-100, min(100, math.frexp(size)[1])) if math.isfinite(size) else 1.0
        begin = None if start is None else scale(1 / unit, start)
        solution = conjugate_gradient(operator, scale(1 / unit, v), max_iterations=self.steps, rtol=0.0, start=begin)
        return replace(solution, q=scale(unit, solution.q))
