"""What the methods that differentiate one inner step share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError, NonFiniteError
from bilevel.functional import Evaluate, dense_gradient, gradient, independent, leaves, require_finite
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State
from bilevel.hypergrad.mixed_product import DIFFERENCES, MixedProduct, mixed_product
from bilevel.optim import Update
from bilevel.result import SolveInfo
from bilevel.validation import check_choice, check_number
from bilevel.vector import Tensors, is_finite, norm, promote

__all__ = ["SingleStep"]


@dataclass(frozen=True)
class SingleStep(Estimator):
    """Base of the methods that differentiate one step ``w⁺ = U(w, g(w, λ))`` with everything before it constant.

    ``vᵀ dw⁺/dλ = qᵀ ∂²f/∂w∂λ`` with ``q = (∂U/∂g)ᵀ v``; a subclass supplies q.

    Attributes:
        center: Where ``∂²f/∂w∂λ`` is taken. ``"old"``: at the point from which the step was made, on its batch and with
            its random numbers, which makes it the derivative of that very step. ``"new"``: at the point where it ended.
            As a function, ``inner_params`` is the start of the step (``"old"``; the outer loss is then taken at its
            end, as :class:`~bilevel.Unrolled` does) or its end (``"new"``; nothing moves).
        difference: ``"exact"``: by double backward. ``"central"``: ``(∂f/∂λ(w + hq) − ∂f/∂λ(w − hq)) / 2h`` with ``h =
            ε / ‖q‖``; error ``ε² ‖q‖ M₃ / 6`` for a bound M₃ of the third derivative of ``∂f/∂λ``. ``"forward"``:
            ``(∂f/∂λ(w + hq) − ∂f/∂λ(w)) / h`` with the second from the backward pass that made the step, one pass less;
            error ``ε ‖q‖ M₂ / 2``; for ``center="old"`` only, since at the new point that pass would have to be made
            and central differences cost the same.
        epsilon: ε of the differences, the length of the displacement of the inner parameters, or ``"auto"``:
            ``u^(1/3) · sqrt(1 + ‖w‖)`` (central) or ``u^(1/2) · sqrt(1 + ‖w‖)`` (forward) with the round-off u.
    """

    center: str = field(default="old", kw_only=True)
    difference: str = field(default="exact", kw_only=True)
    epsilon: float | str = field(default="auto", kw_only=True)

    needs_trajectory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        check_choice(owner, "center", self.center, ("old", "new"))
        check_choice(owner, "difference", self.difference, DIFFERENCES)
        check_number(owner, "epsilon", self.epsilon, minimum=0.0, exclusive=True, auto=True)
        if self.difference == "exact" and self.epsilon != "auto":
            raise ConfigError(f"{owner}.epsilon belongs to difference='central' or 'forward'")
        if self.difference == "forward" and self.center == "new":
            raise ConfigError(
                f"{owner}: difference='forward' reuses what the step's own backward pass found, at center='old'. At "
                "center='new' use difference='central', which costs no more there and is more accurate."
            )
        # What a configuration needs depends on its fields; the class says what its default needs.
        object.__setattr__(self, "needs_double_backward", self.difference == "exact")

    @property
    def recorded_steps(self) -> int | None:
        """The last one."""
        return 1

    @property
    def needs_outer_gradient(self) -> bool:
        """For forward differences."""
        return self.difference == "forward"

    @abstractmethod
    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`."""

    @abstractmethod
    def direction(self, step: InnerStep | None, v: Tensors) -> Tensors:
        """Returns ``q = (∂U/∂g)ᵀ v`` for a step, in float32 or better; None for no record of the step."""

    def product(self, problem: InnerProblem, step: InnerStep | None, q: Tensors) -> MixedProduct:
        """Returns ``qᵀ ∂²f/∂w∂λ`` at the centre."""
        objective, inner, base = problem.objective, problem.inner, None
        if self.center == "old":
            assert step is not None
            objective, inner, base = step.objective, step.inner, step.outer_gradient
        return mixed_product(
            objective, inner, problem.outer, q, difference=self.difference, epsilon=self.epsilon, base=base
        )


@dataclass(frozen=True)
class SingleStepResponse(Response):
    """The response of one step that was recorded or taken, or of the field values alone (None)."""

    estimator: SingleStep
    problem: InnerProblem
    step: InnerStep | None
    point: Tensors

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        """See :meth:`Response.pullback`."""
        q = self.estimator.direction(self.step, promote(cotangent))
        found = self.estimator.product(self.problem, self.step, q)
        size = found.inner_gradient_norm
        if math.isnan(size) and self.step is not None and self.step.gradient is not None:
            size = float(norm(self.step.gradient))
        info = SolveInfo(
            found.status,
            iterations=1,
            products=found.products,
            inner_gradient_norm=size,
            method=self.estimator.name,
            message=found.message,
        )
        return Pullback(found.value, info, state)


def taken(estimator: SingleStep, problem: InnerProblem, update: Update, memory: Tensors) -> tuple[InnerStep, Tensors]:
    """Makes a step from the problem's inner parameters; returns it and the point where the outer loss is to be taken.

    Cost: 1 forward and 1 backward pass, to the outer parameters too where forward differences want that.
    """
    objective, inner = problem.objective, leaves(problem.inner)
    inputs = inner + (problem.outer if estimator.needs_outer_gradient else ())

    def body(evaluate: Evaluate) -> tuple[Tensor | None, ...]:
        value = evaluate()
        require_finite(value, objective.name)
        return gradient(value, inputs, objective)

    grads = objective.within(inner, problem.outer, body)
    if all(grad is None for grad in grads[: len(inner)]):
        raise independent(objective.name)
    dense = dense_gradient(grads, inputs)
    old = tuple(part.detach() for part in inner)
    step = InnerStep(objective, old, memory, update, dense[: len(inner)])
    if estimator.needs_outer_gradient:
        step = replace(step, outer_gradient=dense[len(inner) :])
    if estimator.center == "new":
        return step, problem.inner
    with torch.no_grad():
        end, _ = update(old, dense[: len(inner)], memory)
    if not is_finite(end):
        raise NonFiniteError(
            f"one step on the loss of {objective.name} ends in NaN or infinity: lower learning_rate of method "
            f"{estimator.name!r}"
        )
    return step, leaves(end)
