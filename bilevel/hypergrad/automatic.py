"""The identity for the inverse Hessian, with the mixed product as the inner loss allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.double_backward import NoSecondDerivativeError
from bilevel.errors import warn
from bilevel.functional import gradient
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.hypergrad.mixed_product import IdentityResponse, MixedProduct
from bilevel.products import difference_length
from bilevel.result import SolveInfo
from bilevel.validation import check_number
from bilevel.vector import Tensors, length

__all__ = ["Automatic"]

DIFFERENCES = "differences"
"""The state's key that says that the exact product was tried, and does not exist or is not the loss's."""


@dataclass(frozen=True)
class Automatic(Estimator):
    """``H⁻¹ ≈ I``: :class:`~bilevel.Identity` where the inner loss has second derivatives, else differences.

    The exact product costs as much as central differences and has no ε, so it comes first. Where an operation of the
    inner loss has no second derivative (fused attention, a compiled module), :class:`~bilevel.FiniteDifference` answers
    instead, from then on: that is found at the first product, said by a ``BilevelWarning`` that names the operation, by
    every report's message, and kept in the state, so that nothing is tried twice.

    A custom backward pass that detaches (``2 * x.detach() * grad``) has a second derivative for autograd: zero. Where
    the exact product is zero, differences are taken as well, and answer from then on where they are not zero beyond
    rounding. Products that such a pass changes and leaves other than zero go unnoticed here; ``hypergradcheck`` finds
    them.

    Attributes:
        epsilon: ε of the differences, see :class:`~bilevel.FiniteDifference`.

    Cost: 1 forward and 1 backward pass with graph, 1 product; or 2 forward passes and 2 backward passes to the outer
    parameters only, and up to 1 forward pass, 1 backward pass and 1 product at the first call, which fail. Each call
    whose exact product is zero takes 3 forward and 3 backward passes more, to see whether it is.

    Example:
        >>> import torch
        >>> from bilevel import hypergradient
        >>> lam = torch.tensor(3.0)
        >>> losses = lambda w, l: (w - l) ** 2 / 2, lambda w, l: w**2 / 2
        >>> result = hypergradient(*losses, lam.clone(), lam, Automatic())
        >>> result.grad, result.info.message
        (tensor(3.), 'exact mixed product')
    """

    epsilon: float | str = "auto"

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "identity for the inverse Hessian, exact mixed product where it exists, else differences"
    cost: ClassVar[str] = "that of identity, or of finite_difference (and a failed try at the first call)"
    needs: ClassVar[str] = "first derivatives only"
    storage: ClassVar[str] = "the gradient's graph, or the parameters twice"
    purpose: ClassVar[str] = "large models of which you do not know whether they can be differentiated twice"
    needs_double_backward: ClassVar[bool] = False
    needs_finite_cotangent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the field."""
        check_number("Automatic", "epsilon", self.epsilon, minimum=0.0, exclusive=True, auto=True)

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _AutomaticResponse(self, problem)


@dataclass(frozen=True)
class _AutomaticResponse(Response):
    estimator: Automatic
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        if DIFFERENCES in state:
            return self._reported("central differences", self._taken("central", cotangent), state)
        found = {**state, DIFFERENCES: (torch.ones(()),)}
        try:
            exact = self._taken("exact", cotangent)
        except NoSecondDerivativeError as error:
            self._warn(f"has no second derivative, since {error.reason}")
            return self._reported("central differences", self._taken("central", cotangent), found)
        if exact.size == 0.0:
            central = self._taken("central", cotangent)
            if not central.status.failed and self._exceeds_rounding(central, cotangent):
                self._warn(
                    "has a mixed product of zero for autograd and another one by differences, as where a custom "
                    "backward pass detaches what it multiplies by"
                )
                return self._reported("central differences", central, found)
        return self._reported("exact mixed product", exact, state)

    def _warn(self, reason: str) -> None:
        warn(
            f"method 'auto' takes central differences: the loss of {self.problem.objective.name} {reason} (said once)",
        )

    def _exceeds_rounding(self, central: MixedProduct, cotangent: Tensors) -> bool:
        """Whether ``∂f/∂λ`` has changed by more than ``u^(2/3)`` of itself over the differences' displacement.

        It changes by an order of u where only rounding and third derivatives do it (a length is ``u^(1/3)``), and by an
        order of ``u^(1/3)`` where there is a product. Cost: 1 forward and 1 backward pass, unless they are zero.
        """
        size = central.size
        if not size:
            return False
        inner, outer, objective = self.problem.inner, self.problem.outer, self.problem.objective
        change = size * difference_length(self.estimator.epsilon, inner) / length(cotangent)
        grads = objective.within(inner, outer, lambda evaluate: gradient(evaluate(), outer, objective))
        roundoff = max(torch.finfo(part.dtype).eps for part in inner + outer)
        return change > float(roundoff ** (2 / 3)) * length([part for part in grads if part is not None])

    def _taken(self, difference: str, cotangent: Tensors) -> MixedProduct:
        response = IdentityResponse(self.estimator, self.problem, "new", difference, self.estimator.epsilon)
        return response.product(cotangent)

    def _reported(self, what: str, found: MixedProduct, state: State) -> Pullback:
        message = "; ".join(part for part in (what, found.message) if part)
        info = SolveInfo(found.status, products=found.products, method=self.estimator.name, message=message)
        return Pullback(negative(found.value), info, state)
