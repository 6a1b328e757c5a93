"""The identity for the inverse Hessian, with the mixed product by central differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.functional import (
    Evaluate,
    Objective,
    dense_gradient,
    gradient,
    independent,
    leaves,
    require_finite,
)
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.products import difference_length, displaced, lost_to_rounding
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_number
from bilevel.vector import Tensors, is_finite, norm, promote

__all__ = ["FiniteDifference"]

TOLERATED_ROUNDING = 0.1


@dataclass(frozen=True)
class FiniteDifference(Estimator):
    """``H⁻¹ ≈ I``, and ``vᵀ ∂²f/∂w∂λ ≈ (∂f/∂λ(w + hv) − ∂f/∂λ(w − hv)) / 2h`` with ``h = ε / ‖v‖``.

    The error of the difference is ``ε² M / 6`` for a bound M of the third derivative along ``v/‖v‖``, plus rounding
    of order ``u ‖∂f/∂λ‖ / ε`` with the round-off u. Needs first derivatives only, and so works with any attention
    back end. Source: Liu, Simonyan, Yang, ICLR 2019 (DARTS, arXiv 1806.09055), equation 8, with the inner learning
    rate left to the outer one.

    Attributes:
        epsilon: ε, the length of the displacement of the inner parameters (Euclidean norm), or ``"auto"``:
            ``u^(1/3) · sqrt(1 + ‖w‖)`` with the round-off u of the parameters' dtype, which balances both errors.

    Where rounding to the parameters' dtype changes the displacement by more than a tenth, the status is ``INACCURATE``.

    Cost: 2 forward passes and 2 backward passes to the outer parameters only (one more of each, to find out why, where
    the differences vanish or are not finite).
    """

    epsilon: float | str = "auto"

    name: ClassVar[str] = "finite_difference"
    summary: ClassVar[str] = "identity for the inverse Hessian, mixed product by central differences (DARTS)"
    cost: ClassVar[str] = "2 forward, 2 backward to the outer parameters only"
    needs: ClassVar[str] = "first derivatives only"
    needs_double_backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the field."""
        check_number("FiniteDifference", "epsilon", self.epsilon, minimum=0.0, exclusive=True, auto=True)

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _DifferenceResponse(self, problem)


@dataclass(frozen=True)
class _DifferenceResponse(Response):
    estimator: FiniteDifference
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        v = promote(cotangent)
        inner, outer, objective = self.problem.inner, self.problem.outer, self.problem.objective
        size = float(norm(v))
        name = self.estimator.name
        if size == 0.0:  # the outer loss is flat in the inner parameters
            zeros = tuple(torch.zeros_like(part) for part in outer)
            return Pullback(zeros, SolveInfo(Status.NOT_APPLICABLE, method=name), state)
        epsilon = difference_length(self.estimator.epsilon, inner)
        with torch.no_grad():
            moves = tuple(step * (epsilon / size) for step in v)
            ahead, behind = displaced(inner, moves, 1), displaced(inner, moves, -1)
            lost = lost_to_rounding(ahead, behind, moves)
        forward, backward = (_outer_gradient(objective, place, outer) for place in (ahead, behind))
        half = size / (2 * epsilon)
        mixed = tuple(
            (a.to(torch.promote_types(a.dtype, torch.float32)) - b) * half
            for a, b in zip(forward, backward, strict=True)
        )
        status = Status.INACCURATE if lost > TOLERATED_ROUNDING else Status.NOT_APPLICABLE
        if not is_finite(mixed):
            status = Status.DIVERGED
        if status is Status.DIVERGED or float(norm(mixed)) == 0.0:
            _require_dependence(objective, inner, outer)
        message = f"epsilon {epsilon:.3g}, norm of direction {size:.3g}, rounding of the displacement {lost:.0e}"
        info = SolveInfo(status, products=2, method=name, message=message)
        return Pullback(negative(mixed), info, state)


def _require_dependence(objective: Objective, inner: Tensors, outer: Tensors) -> None:
    """Tells why differences vanish or are not finite, where the inner loss itself is at fault; one more pass."""
    point = leaves(inner)

    def body(evaluate: Evaluate) -> None:
        value = evaluate()
        require_finite(value, objective.name)
        if all(grad is None for grad in gradient(value, point, objective)):
            raise independent(objective.name)

    objective.within(point, outer, body)


def _outer_gradient(objective: Objective, inner: Tensors, outer: Tensors) -> Tensors:
    grads = objective.within(inner, outer, lambda evaluate: gradient(evaluate(), outer, objective))
    return dense_gradient(grads, outer)
