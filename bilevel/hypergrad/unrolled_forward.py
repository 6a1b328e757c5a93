"""Forward mode through the inner updates: for few outer variables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import ConfigError
from bilevel.functional import Evaluate, PassCount, dense_gradient, gradient, independent, leaves, require_finite
from bilevel.hypergrad.base import InnerProblem, InnerStep, Pullback, Response, State
from bilevel.hypergrad.inner_updates import Taken
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, dot, is_finite, promote, zeros_like

if TYPE_CHECKING:
    from bilevel.hypergrad.unrolled import Unrolled

__all__ = ["FORWARD_LIMIT", "forward_response"]

FORWARD_LIMIT = 100_000_000
"""The largest product of outer and inner variables (elements) for forward mode: 400 MB of tangents in float32, and
again as much for each slot of the optimiser's memory."""


def forward_response(estimator: Unrolled, problem: InnerProblem) -> Response:
    """Takes the steps, or follows the recorded ones oldest first, and carries ``dw_t/dλ`` along.

    With ``(w', m') = U(w, g, m)`` and ``g = ∂f/∂w (w, λ)``, for each outer variable:
    ``ġ = ∂g/∂w ẇ + ∂g/∂λ λ̇`` and ``(ẇ', ṁ') = ∂U/∂(w, g, m) (ẇ, ġ, ṁ)``, from zero, or from ``ẇ = λ̇`` where the start
    is an outer parameter.

    Raises:
        ConfigError: Outer times inner variables exceed :data:`FORWARD_LIMIT`.
    """
    outer_size, inner_size = (sum(part.numel() for part in parts) for parts in (problem.outer, problem.inner))
    if outer_size * inner_size > FORWARD_LIMIT:
        raise ConfigError(
            f"Unrolled(mode='forward') holds a tangent of the inner parameters for each outer variable: {outer_size} "
            f"outer times {inner_size} inner variables are more than {FORWARD_LIMIT}. Use mode='reverse'."
        )
    carried: list[_Tangent] = []
    taken = 0

    def take(step: InnerStep) -> Taken:
        nonlocal carried, taken
        if not taken:
            carried = [(first, zeros_like(promote(step.memory))) for first in _starts(problem, step)]
        result, carried = _push_step(step, carried, problem.outer, first=not taken)
        taken += 1
        return result

    if problem.trajectory:
        trajectory = estimator.recorded(problem)
        point, message = trajectory.point, trajectory.message
        for step in trajectory.steps:
            take(step)
    else:
        point, message = estimator.descend(problem, take), ""
    columns = [inner for inner, _ in carried]
    return _ForwardResponse(problem, point, columns, taken, message, estimator.name)


def _starts(problem: InnerProblem, step: InnerStep) -> Iterator[Tensors]:
    """Yields ``dw₀/dλ``, for each outer variable."""
    for unit in _units(problem.outer):
        if problem.start is None:
            yield zeros_like(promote(step.inner))
        else:
            yield tuple(unit[place].to(part) for place, part in zip(problem.start, promote(step.inner), strict=True))


@dataclass(frozen=True)
class _ForwardResponse(Response):
    """``columns`` hold ``dw_K/dλ``, one for each outer variable."""

    problem: InnerProblem
    point: Tensors
    columns: Sequence[Tensors]
    steps: int
    message: str
    method: str

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        v, outer = promote(cotangent), self.problem.outer
        flat = torch.stack([dot(column, v) for column in self.columns]) if self.columns else torch.zeros(0)
        pieces = torch.split(flat, [part.numel() for part in outer])
        value = tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, promote(outer), strict=True))
        value = tuple(part.detach() for part in value)
        info = SolveInfo(
            Status.NOT_APPLICABLE if is_finite(value) else Status.DIVERGED,
            iterations=self.steps,
            products=self.steps * len(self.columns),
            method=self.method,
            message=self.message,
        )
        return Pullback(value, info, state)


_Tangent = tuple[Tensors, Tensors]
"""``(ẇ, ṁ)`` of one outer variable."""


def _push_step(
    step: InnerStep, carried: Sequence[_Tangent], outer: Tensors, *, first: bool
) -> tuple[Taken, list[_Tangent]]:
    """Makes a step and carries the tangents along."""
    objective, point = step.objective, leaves(step.inner)

    def body(evaluate: Evaluate) -> tuple[Tensors, list[Tensors]]:
        value = evaluate()
        if first:
            require_finite(value, objective.name)
        found = gradient(value, point, objective, create_graph=True)
        if all(grad is None for grad in found):
            raise independent(objective.name)
        grads = dense_gradient(found, point)
        with second_derivative_errors(objective.name):
            push = _Linearised(grads, point + outer, objective.passes)
            moved = [push(inner + unit) for (inner, _), unit in zip(carried, _units(outer), strict=True)]
        return objective.reduce(tuple(grad.detach() for grad in grads)), [objective.reduce(part) for part in moved]

    values, moved = objective.within(point, outer, body)
    inputs = leaves(step.inner), leaves(values), leaves(step.memory)
    with torch.enable_grad():
        inner, memory = step.update(*inputs)
    push = _Linearised(inner + memory, inputs[0] + inputs[1] + inputs[2], PassCount())
    after: list[_Tangent] = []
    for (inner_dot, memory_dot), grad_dot in zip(carried, moved, strict=True):
        both = promote(push(inner_dot + grad_dot + memory_dot))
        after.append((both[: len(inner)], both[len(inner) :]))
    return Taken(tuple(part.detach() for part in inner), tuple(part.detach() for part in memory)), after


class _Linearised:
    """The Jacobian's product ``ẋ ↦ J ẋ`` by reverse mode twice: ``u ↦ Jᵀ u`` is linear, and its transpose is J.

    Forward-mode autodiff would do the same where every operation has it; custom functions and checkpoints do not.

    Cost: 1 backward pass with graph, and 1 backward pass a product.
    """

    def __init__(self, outputs: Tensors, inputs: Tensors, passes: PassCount) -> None:
        self._passes = passes
        self._outputs = outputs
        self._dependent = tuple(place for place, part in enumerate(outputs) if part.requires_grad)
        heads = [outputs[place] for place in self._dependent]
        self._dummies = tuple(torch.zeros_like(head).requires_grad_() for head in heads)
        self._pulled: Sequence[Tensor | None] = (None,) * len(inputs)
        if heads:
            self._pulled = torch.autograd.grad(heads, inputs, self._dummies, create_graph=True, allow_unused=True)
            passes.backward += 1

    def __call__(self, tangents: Tensors) -> Tensors:
        """Returns ``J ẋ``; may be called any number of times."""
        result = list(zeros_like(self._outputs))
        pairs = [
            (pulled, tangent.to(pulled.dtype))
            for pulled, tangent in zip(self._pulled, tangents, strict=True)
            if pulled is not None and pulled.requires_grad
        ]
        if not pairs:
            return tuple(part.detach() for part in result)
        heads, bars = zip(*pairs, strict=True)
        found = torch.autograd.grad(heads, self._dummies, bars, retain_graph=True, allow_unused=True)
        self._passes.backward += 1
        for place, part in zip(self._dependent, dense_gradient(found, self._dummies), strict=True):
            result[place] = part
        return tuple(part.detach() for part in result)


def _units(tensors: Tensors) -> Iterator[Tensors]:
    """Yields the unit vectors of all elements, in order."""
    for place, part in enumerate(tensors):
        for element in range(part.numel()):
            one = torch.zeros(part.numel(), dtype=part.dtype, device=part.device)
            one[element] = 1.0
            yield (*zeros_like(tensors[:place]), one.reshape(part.shape), *zeros_like(tensors[place + 1 :]))
