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
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State, StepGraph
from bilevel.hypergrad.mixed_product import CENTERS, DIFFERENCES, MixedProduct, check_center, mixed_product_at
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
        memory: For ``center="old"`` with ``difference="exact"``. ``"replay"``: the step's gradient is taken again, with
            its graph. ``"graph"``: the step itself is made with the graph of its gradient, which is kept until the
            product has been taken on it; the same number for 1 forward and 1 backward pass less. In an engine the graph
            is freed with the outer update; ``Engine.hypergradient()`` after it replays.
    """

    center: str = field(default="old", kw_only=True)
    difference: str = field(default="exact", kw_only=True)
    epsilon: float | str = field(default="auto", kw_only=True)
    memory: str = field(default="replay", kw_only=True)

    needs_trajectory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        check_choice(owner, "center", self.center, CENTERS)
        check_choice(owner, "difference", self.difference, DIFFERENCES)
        check_number(owner, "epsilon", self.epsilon, minimum=0.0, exclusive=True, auto=True)
        if self.difference == "exact" and self.epsilon != "auto":
            raise ConfigError(f"{owner}.epsilon belongs to difference='central' or 'forward'")
        check_center(owner, self.center, self.difference)
        check_choice(owner, "memory", self.memory, ("replay", "graph"))
        if self.memory == "graph" and (self.center, self.difference) != ("old", "exact"):
            raise ConfigError(
                f"{owner}: memory='graph' keeps the graph of the step's own gradient, which center='old' with "
                "difference='exact' takes the product on: set both, or leave memory out"
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

    @property
    def keeps_graph(self) -> bool:
        """For exact products on the step's own graph."""
        return self.memory == "graph"

    @abstractmethod
    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`."""

    @abstractmethod
    def direction(self, step: InnerStep | None, v: Tensors) -> Tensors:
        """Returns ``q = (∂U/∂g)ᵀ v`` for a step, in float32 or better; None for no record of the step."""

    def product(self, problem: InnerProblem, step: InnerStep | None, q: Tensors) -> MixedProduct:
        """Returns ``qᵀ ∂²f/∂w∂λ`` at the centre."""
        return mixed_product_at(problem, step, q, center=self.center, difference=self.difference, epsilon=self.epsilon)


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
        inner = found.gradient if found.gradient is not None or self.step is None else self.step.gradient
        size = math.nan if inner is None else float(norm(inner))
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
    old = tuple(part.detach() for part in problem.inner)
    step = _graded(estimator, problem, InnerStep(problem.objective, old, memory, update))
    if estimator.center == "new":
        return step, problem.inner
    assert step.gradient is not None
    with torch.no_grad():
        end, _ = update(old, step.gradient, memory)
    if not is_finite(end):
        raise NonFiniteError(
            f"one step on the loss of {problem.objective.name} ends in NaN or infinity: lower learning_rate of method "
            f"{estimator.name!r}"
        )
    return step, leaves(end)


def _graded(estimator: SingleStep, problem: InnerProblem, step: InnerStep) -> InnerStep:
    """Returns a step with its gradient, and with what else of it the method wants."""
    objective, inner, outer = problem.objective, leaves(problem.inner), problem.outer
    inputs = inner + (outer if estimator.needs_outer_gradient else ())

    def body(evaluate: Evaluate) -> tuple[Tensor | None, ...]:
        value = evaluate()
        require_finite(value, objective.name)
        return gradient(value, inputs, objective, create_graph=estimator.keeps_graph)

    grads = objective.within(inner, outer, body)
    if all(grad is None for grad in grads[: len(inner)]):
        raise independent(objective.name)
    dense = dense_gradient(grads, inputs)
    if estimator.keeps_graph:
        # A gradient with graph is this rank's own; the update takes the mean.
        values = objective.reduce(tuple(grad.detach() for grad in dense))
        return replace(step, gradient=values, graph=StepGraph(inner, dense))
    further = dense[len(inner) :] if estimator.needs_outer_gradient else None
    return replace(step, gradient=dense[: len(inner)], outer_gradient=further)
