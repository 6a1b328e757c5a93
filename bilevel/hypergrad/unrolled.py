"""Reverse-mode differentiation through the inner updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import ConfigError, NonFiniteError
from bilevel.functional import Evaluate, dense_gradient, gradient, independent, leaves, require_finite
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State
from bilevel.optim import GradientDescent
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors, add, is_finite, promote, zeros_like

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Differentiates the inner updates: ``dw_K/dλ`` for ``w_{t+1} = U_t(w_t, ∇f(w_t, λ))``, with w₀ constant.

    Only parameters and optimiser state are kept of each step; the backward sweep evaluates the step again, so that
    memory does not depend on the size of activations. Sources: Franceschi et al., ICML 2017 (arXiv 1703.01785);
    truncation: Shaban et al., AISTATS 2019 (arXiv 1810.10667).

    Attributes:
        steps: As a function (:func:`bilevel.hypergradient`), the gradient steps to take from ``inner_params``; the
            outer loss is taken at their end. In an engine, how many of the last inner updates to differentiate (None:
            all since the last outer update); the inner problem's own optimiser made them.
        learning_rate: η of those gradient steps; in an engine the optimiser's own is used.

    Cost: for each step 1 forward and 1 backward pass with graph and 1 product, beyond making the step.
    """

    steps: int | None = None
    learning_rate: float | None = None

    name: ClassVar[str] = "unrolled"
    summary: ClassVar[str] = "reverse mode through the inner updates, evaluated again on the way back"
    cost: ClassVar[str] = "per step: 1 forward, 1 backward with graph, 1 product"
    needs: ClassVar[str] = (
        "double backward; an inner optimiser among SGD, Adam, AdamW; one copy of the parameters per step"
    )
    needs_trajectory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.steps is not None:
            check_integer("Unrolled", "steps", self.steps, minimum=1)
        if self.learning_rate is not None:
            check_number("Unrolled", "learning_rate", self.learning_rate, minimum=0.0, exclusive=True)

    @property
    def recorded_steps(self) -> int | None:
        """See :meth:`Estimator.recorded_steps`."""
        return self.steps

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Takes the gradient steps, where no trajectory was recorded."""
        if problem.trajectory:
            steps = problem.trajectory[-self.steps :] if self.steps else problem.trajectory
            short = (
                f"{len(steps)} of {self.steps} steps: the inner problem made no more"
                if (self.steps or 0) > len(steps)
                else ""
            )
            return _UnrolledResponse(problem, steps, problem.inner, short)
        if self.steps is None or self.learning_rate is None:
            raise ConfigError(
                "method 'unrolled' needs steps and learning_rate where no engine has recorded inner updates: "
                "Unrolled(steps=10, learning_rate=0.1). In an engine, take a step first."
            )
        steps, point = _descend(problem, self.steps, GradientDescent(self.learning_rate))
        return _UnrolledResponse(problem, steps, point, "")


@dataclass(frozen=True)
class _UnrolledResponse(Response):
    problem: InnerProblem
    steps: Sequence[InnerStep]
    point: Tensors
    message: str

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        inner = promote(cotangent)
        memory = zeros_like(self.steps[-1].memory)
        total = zeros_like(self.problem.outer)
        for place, step in reversed(list(enumerate(self.steps))):
            # nothing comes before the oldest step: its parameters need no cotangent
            inner, memory, outer = _pull_step(step, inner, memory, self.problem.outer, oldest=place == 0)
            total = add(total, outer)
        status = Status.NOT_APPLICABLE if is_finite(total) else Status.DIVERGED
        length = len(self.steps)
        info = SolveInfo(status, iterations=length, products=length, method=Unrolled.name, message=self.message)
        return Pullback(total, info, state)


def _descend(problem: InnerProblem, steps: int, update: GradientDescent) -> tuple[list[InnerStep], Tensors]:
    """Takes gradient steps from the problem's inner parameters."""
    objective, outer = problem.objective, problem.outer
    record: list[InnerStep] = []
    inner = tuple(part.detach() for part in problem.inner)
    for _ in range(steps):
        point = leaves(inner)

        def body(evaluate: Evaluate, at: Tensors = point, first: bool = not record) -> tuple[Tensor | None, ...]:
            value = evaluate()
            if first:
                require_finite(value, objective.name)
            return gradient(value, at, objective)

        grads = objective.within(point, outer, body)
        record.append(InnerStep(objective, inner, (), update))
        if all(grad is None for grad in grads):
            raise independent(objective.name)
        with torch.no_grad():
            inner, _ = update(inner, dense_gradient(grads, inner), ())
    if not is_finite(inner):
        raise NonFiniteError(
            f"{steps} gradient steps on the loss of {objective.name} end in NaN or infinity: lower learning_rate of "
            f"method 'unrolled' ({update.learning_rate:g}), below 2 / (largest eigenvalue of the inner Hessian)"
        )
    return record, leaves(inner)


def _pull_step(
    step: InnerStep, inner_bar: Tensors, memory_bar: Tensors, outer: Tensors, *, oldest: bool
) -> tuple[Tensors, Tensors, Tensors]:
    """Pulls cotangents of the state after a step back to the state before it and to the outer parameters."""
    inner, memory = leaves(step.inner), leaves(step.memory)
    before = () if oldest else inner + memory

    def body(evaluate: Evaluate) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            grads = gradient(evaluate(), inner, step.objective, create_graph=True)
            new_inner, new_memory = step.update(inner, _mean_valued(dense_gradient(grads, inner), step), memory)
        pairs = [
            (output, bar.to(output.dtype))
            for output, bar in zip(new_inner + new_memory, inner_bar + memory_bar, strict=True)
            if output.requires_grad
        ]
        outputs, bars = zip(*pairs, strict=True)
        step.objective.passes.backward += 1
        with second_derivative_errors(step.objective.name):
            return torch.autograd.grad(outputs, before + outer, bars, allow_unused=True)

    pulled = dense_gradient(step.objective.within(inner, outer, body), before + outer)
    pulled = step.objective.reduce(pulled)
    first, second = (0, 0) if oldest else (len(inner), len(inner) + len(memory))
    return promote(pulled[:first]), pulled[first:second], pulled[second:]


def _mean_valued(grads: Tensors, step: InnerStep) -> Tensors:
    """Gives local gradients the value of their mean over ranks, at which the optimiser's update was taken."""
    local = tuple(grad.detach() for grad in grads)
    mean = step.objective.reduce(local)
    if mean is local:
        return grads
    return tuple(grad + (target - value) for grad, target, value in zip(grads, mean, local, strict=True))
