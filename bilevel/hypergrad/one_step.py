"""The derivative of one gradient step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.errors import ConfigError
from bilevel.hypergrad.base import InnerProblem, InnerStep, Response
from bilevel.hypergrad.single_step import SingleStep, SingleStepResponse, taken
from bilevel.optim import default_update, learning_rates
from bilevel.validation import check_number
from bilevel.vector import Tensors

__all__ = ["OneStep"]


@dataclass(frozen=True)
class OneStep(SingleStep):
    """Differentiates one gradient step ``w⁺ = w − η ∂f/∂w(w, λ)``: ``vᵀ dw⁺/dλ = −η vᵀ ∂²f/∂w∂λ``.

    The first-order form of DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055, equations 6 to 8) *with* the inner
    learning rate, which :class:`~bilevel.FiniteDifference` and :class:`~bilevel.Identity` leave to the outer one. With
    ``center="old"`` and ``difference="exact"`` it is ``Unrolled(steps=1)``. The response is that of a *plain* gradient
    step with the rate η, whatever momentum or preconditioning the optimiser uses; :class:`~bilevel.SAMA` follows the
    optimiser itself.

    Attributes:
        learning_rate: η. None, in an engine: the optimiser's own at that step, of each parameter's group (negative
            where it maximises). As a function it must be given. 0 leaves the derivative at fixed inner parameters alone
            (DARTS' first-order variant, ξ = 0); with ``difference="central"`` it costs nothing.
        center: ``"old"`` or ``"new"``, see :class:`~bilevel.hypergrad.single_step.SingleStep`.
        difference: ``"exact"``, ``"central"`` or ``"forward"``, likewise.
        epsilon: ε of the differences, likewise.

    Cost in an engine: ``"exact"`` 1 forward and 1 backward pass with graph, 1 product; ``"central"`` 2 forward and 2
    backward passes to the outer parameters only; ``"forward"`` 1 and 1, and the step's own backward pass also reaches
    the outer parameters (2 and 2 where that pass ran under autocast, or where an outer parameter has changed since). As
    a function with ``center="old"`` 1 and 1 more, which make the step.

    Raises:
        ConfigError: A field out of range; ``difference="forward"`` with ``center="new"``; no learning rate.

    Example:
        The inner minimum of ``(w − λ)²/2`` is ``w = λ``, and of ``F = w²/2`` one step sees η of the hypergradient λ:

        >>> import torch
        >>> from bilevel import hypergradient
        >>> lam = torch.tensor(3.0)
        >>> losses = lambda w, l: (w - l) ** 2 / 2, lambda w, l: w**2 / 2
        >>> hypergradient(*losses, lam.clone(), lam, OneStep(0.1, difference="forward")).grad
        tensor(0.3000)
    """

    learning_rate: float | None = None

    name: ClassVar[str] = "one_step"
    summary: ClassVar[str] = "one gradient step with the inner learning rate, exactly or by differences (DARTS)"
    cost: ClassVar[str] = "exact: 1 forward, 1 backward with graph, 1 product; central: 2 and 2; forward: 1 and 1"
    needs: ClassVar[str] = "double backward for difference='exact', else first derivatives only; a learning rate"
    storage: ClassVar[str] = "the gradient's graph (exact), or the parameters twice"
    purpose: ClassVar[str] = (
        "one or few inner steps per outer step: the direction of identity with the inner learning rate's scale"
    )

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        if self.learning_rate is not None:
            check_number("OneStep", "learning_rate", self.learning_rate, minimum=0.0)
        # The new point with a given rate needs nothing of the step that led there.
        object.__setattr__(self, "needs_trajectory", self.center == "old" or self.learning_rate is None)

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Makes the step, where none was recorded and ``center="old"`` wants one."""
        if problem.trajectory:
            return SingleStepResponse(self, problem, problem.trajectory[-1], problem.inner)
        if self.learning_rate is None:
            raise ConfigError(
                "method 'one_step' needs learning_rate where no engine has recorded an inner update: "
                "OneStep(learning_rate=0.1). In an engine, take a step first."
            )
        if self.center == "new":
            return SingleStepResponse(self, problem, None, problem.inner)
        update, memory = default_update("sgd", self.learning_rate, 0, problem.inner)
        step, end = taken(self, problem, update, memory)
        return SingleStepResponse(self, problem, step, end)

    def direction(self, step: InnerStep | None, v: Tensors) -> Tensors:
        """See :meth:`SingleStep.direction`."""
        if self.learning_rate is not None:
            return tuple(-self.learning_rate * part for part in v)
        assert step is not None
        return tuple(-rate * part for rate, part in zip(learning_rates(step.update), v, strict=True))
