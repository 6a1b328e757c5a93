"""The identity for the inverse Hessian, with the mixed product by central differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.hypergrad.mixed_product import mixed_product
from bilevel.result import SolveInfo
from bilevel.validation import check_number
from bilevel.vector import Tensors, promote

__all__ = ["FiniteDifference"]


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
    storage: ClassVar[str] = "the parameters twice"
    purpose: ClassVar[str] = (
        "large models and fused attention, where no second derivative exists; a direction, not a length"
    )
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
        objective, inner, outer = self.problem.objective, self.problem.inner, self.problem.outer
        epsilon = self.estimator.epsilon
        found = mixed_product(objective, inner, outer, promote(cotangent), difference="central", epsilon=epsilon)
        info = SolveInfo(found.status, products=found.products, method=self.estimator.name, message=found.message)
        return Pullback(negative(found.value), info, state)
