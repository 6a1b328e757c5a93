"""The identity for the inverse Hessian, with the mixed product as the inner loss allows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bilevel.double_backward import NoSecondDerivativeError
from bilevel.errors import BilevelWarning
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State
from bilevel.hypergrad.mixed_product import IdentityResponse
from bilevel.validation import check_number
from bilevel.vector import Tensors

__all__ = ["Automatic"]

DIFFERENCES = "differences"
"""The state's key that says that the exact product was tried, and does not exist."""


@dataclass(frozen=True)
class Automatic(Estimator):
    """``H⁻¹ ≈ I``: :class:`~bilevel.Identity` where the inner loss has second derivatives, else differences.

    The exact product costs as much as central differences and has no ε, so it comes first. Where an operation of the
    inner loss has no second derivative (fused attention, a compiled module), :class:`~bilevel.FiniteDifference` answers
    instead, from then on: that is found at the first product, said by a ``BilevelWarning`` that names the operation, by
    every report's message, and kept in the state, so that nothing is tried twice.

    Attributes:
        epsilon: ε of the differences, see :class:`~bilevel.FiniteDifference`.

    Cost: 1 forward and 1 backward pass with graph, 1 product; or 2 forward passes and 2 backward passes to the outer
    parameters only, and up to 1 forward pass, 1 backward pass and 1 product at the first call, which fail.

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
        if DIFFERENCES not in state:
            try:
                return self._taken("exact", "exact mixed product", cotangent, state)
            except NoSecondDerivativeError as error:
                warnings.warn(
                    f"method 'auto' takes central differences: the loss of {self.problem.objective.name} has no second "
                    f"derivative, since {error.reason} (said once)",
                    BilevelWarning,
                    stacklevel=2,
                )
        state = {**state, DIFFERENCES: (torch.ones(()),)}
        return self._taken("central", "central differences", cotangent, state)

    def _taken(self, difference: str, what: str, cotangent: Tensors, state: State) -> Pullback:
        response = IdentityResponse(self.estimator, self.problem, "new", difference, self.estimator.epsilon)
        pulled = response.pullback(cotangent, state)
        message = "; ".join(part for part in (what, pulled.info.message) if part)
        return replace(pulled, info=replace(pulled.info, message=message))
