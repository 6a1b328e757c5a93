"""Best responses as differentiable functions: what makes a middle level an inner problem like any other.

A problem b with problems c below it has the total loss ``G(b, a, c*(b, a))``. Where b is inner to a, methods evaluate
that loss and differentiate it, twice or at points nearby. So ``c*`` goes into it as a function that autograd can
differentiate any number of times, and that can be evaluated around the point where c stands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bilevel.errors import LossError
from bilevel.functional import Evaluate, Objective, dense_gradient, gradient, leaves
from bilevel.hypergrad import Automatic, Estimator, FiniteDifference, Identity, InnerProblem, InnerStep, Nystrom
from bilevel.implicit_function import AdjointRule, obstacle
from bilevel.result import SolveInfo
from bilevel.slots import ParameterSlots
from bilevel.vector import Tensors, subtract

__all__ = ["BestResponse", "Lower", "NestedObjective", "RepeatedUpdates", "SolvedResponse", "method_again"]

T = TypeVar("T")


class BestResponse(ABC):
    """``λ ↦ w*(λ)`` of one problem, around the point where it stands."""

    @abstractmethod
    def __call__(self, outer: Tensors) -> Tensors:
        """Returns ``w*``, which autograd can differentiate with respect to ``outer`` any number of times."""


class RepeatedUpdates(BestResponse):
    """The updates that were made, made again from the same start, as a function of λ.

    Args:
        steps: The updates, oldest first.
        start: For each inner variable the place among the outer ones of that from which it started; None where the
            start is a constant.

    Cost: for each step 1 forward and 1 backward pass with graph.
    """

    def __init__(self, steps: Sequence[InnerStep], start: Sequence[int] | None = None) -> None:
        self._steps = steps
        self._start = start

    def __call__(self, outer: Tensors) -> Tensors:
        """See :meth:`BestResponse.__call__`."""
        inner, memory = self._steps[0].inner, self._steps[0].memory
        if self._start is not None:
            # Copies: a loss may read the variables it started from as well, and depends on those by itself.
            inner = tuple(outer[place].clone() for place in self._start)
        with torch.enable_grad():
            for step in self._steps:
                point = tuple(part if part.requires_grad else part.detach().requires_grad_() for part in inner)
                inner, memory = step.update(point, _gradient(step.objective, point, outer, graph=True), memory)
        return inner


class SolvedResponse(BestResponse):
    """The solution of ``∂f/∂w (w, λ) = 0`` near ``(w₀, λ₀)``, where the problem stands and is taken for solved.

    At other λ it is one Newton step from there, ``w₀ − H(w₀, λ)⁻¹ (g(w₀, λ) − g(w₀, λ₀))``, right to first order in
    ``λ − λ₀``. First derivatives are those of the problem's own method, unless that continues from a state. Further
    ones are those of the implicit function theorem (:mod:`bilevel.implicit_function`), every solve by ``solver``.

    Args:
        problem: f, ``w₀`` and ``λ₀``.
        estimator: The problem's own method.
        solver: A method whose solution can be differentiated.
        report: Told of every solve by ``solver``.
    """

    def __init__(
        self,
        problem: InnerProblem,
        estimator: Estimator,
        solver: Estimator,
        report: Callable[[SolveInfo], None],
    ) -> None:
        self._problem = replace(problem, outer=tuple(part.detach().clone() for part in problem.outer))
        self._point = tuple(part.detach() for part in problem.inner)
        # A state belongs to the cotangent of the last call, and here come others.
        self._estimator = solver if estimator.needs_state else estimator
        self.rule = AdjointRule(problem.objective, solver, report, closed=False)
        self._slope: Tensors | None = None

    def __call__(self, outer: Tensors) -> Tensors:
        """See :meth:`BestResponse.__call__`."""
        with torch.enable_grad():
            found: Tensors = _Solved.apply(self, len(self._point), *self._values(outer), *outer)  # type: ignore[no-untyped-call]
        return found

    def pullback(self, cotangent: Tensors, inner: Tensors, outer: Tensors) -> Tensors:
        """Returns ``cotangentᵀ dw*/dλ`` by the problem's own method, as numbers."""
        here = replace(self._problem, inner=leaves(inner), outer=leaves(outer))
        return self._estimator.respond(here).pullback(cotangent, {}).value

    def _values(self, outer: Tensors) -> Tensors:
        base = self._problem.outer
        # Copies in another precision (a check in float64) are at the same place.
        if all(
            given is known or torch.equal(given.detach().to(known), known)
            for given, known in zip(outer, base, strict=True)
        ):
            return tuple(part.clone() for part in self._point)
        there = tuple(part.detach() for part in outer)
        objective = self._problem.objective
        if self._slope is None:
            self._slope = _gradient(objective, self._point, base)
        moved = subtract(_gradient(objective, self._point, there), self._slope)
        step, _ = self.rule.solve_once(moved, self._point, there, (True,) * len(moved))
        return tuple(part - move.to(part) for part, move in zip(self._point, step, strict=True))


def method_again(estimator: Estimator, default: Estimator) -> Estimator:
    """Returns the method by which a response is differentiated again: the problem's own, where that solves its system.

    ``H⁻¹ ≈ I`` is a solver too: what is left out of the first derivative is left out of the further ones.
    """
    if isinstance(estimator, (Automatic, FiniteDifference)):
        return Identity()
    if isinstance(estimator, Identity) or (isinstance(estimator, Nystrom) and estimator.products == "autodiff"):
        return estimator
    return default if estimator.needs_state or obstacle(estimator) else estimator


class _Solved(torch.autograd.Function):
    """The solution forward, the implicit function theorem backward."""

    @staticmethod
    def forward(ctx: Any, response: SolvedResponse, count: int, *tensors: Tensor) -> Tensors:
        inner, outer = tensors[:count], tensors[count:]
        values = tuple(part.clone() for part in inner)
        ctx.response, ctx.count = response, count
        ctx.save_for_backward(*values, *outer)
        return values

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        response, count = ctx.response, ctx.count
        inner, outer = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # create_graph=True
            found = response.rule.pullback(cotangents, inner, outer)
        else:
            found = response.pullback(cotangents, inner, outer)
        wanted = ctx.needs_input_grad[2 + count :]
        grads = [grad if needed else None for grad, needed in zip(found, wanted, strict=True)]
        return (None, None, *(None,) * count, *grads)


def _gradient(objective: Objective, inner: Tensors, outer: Tensors, *, graph: bool = False) -> Tensors:
    point = inner if graph else leaves(inner)

    def body(evaluate: Evaluate) -> Tensors:
        return dense_gradient(gradient(evaluate(), point, objective, create_graph=graph), point)

    return objective.within(point, outer, body)


@dataclass(frozen=True)
class Lower:
    """A problem below another one.

    Attributes:
        name: Its name.
        live: Its parameters as the modules hold them.
        given: The problems that it responds to, of those that are known when it is evaluated.
        respond: Its best response to their parameters.
        module: Its module.
    """

    name: str
    live: Tensors
    given: Sequence[str]
    respond: BestResponse
    module: nn.Module


@contextmanager
def _no_recomputation(name: str, module: nn.Module, slots: ParameterSlots) -> Iterator[None]:
    """Refuses activation checkpointing in a module whose updates are made again.

    Each update has parameters of its own, and a checkpoint evaluates again, in a later backward pass, with those that
    the module holds then.
    """

    def refuse(part: nn.Module, arguments: Any) -> None:
        if not slots.evaluating and torch._C._current_graph_task_id() != -1:  # within a backward pass
            raise LossError(
                f"the module of problem {name!r} uses activation checkpointing, but a problem above it is itself "
                "differentiated through, for which the updates of this one are made again with parameters of their own "
                "each: a checkpoint would evaluate with others. Leave the checkpoint out, or differentiate through "
                f"{name!r} by an implicit method (conjugate_gradient, say)"
            )

    hooks = [part.register_forward_pre_hook(refuse) for part in module.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class NestedObjective(Objective):
    """The total loss of a problem with others below it: each of these at its best response.

    Args:
        plain: The problem's own loss.
        slots: Where the modules hold parameters.
        own: The problem's name.
        sizes: For each problem above that is varied, how many parameters it has.
        lower: The problems below, each after those that it responds to.
    """

    def __init__(
        self, plain: Objective, slots: ParameterSlots, own: str, sizes: Mapping[str, int], lower: Sequence[Lower]
    ) -> None:
        super().__init__(plain.name, plain.replay, plain.passes)
        self._plain = plain
        self._slots = slots
        self._own = own
        self._sizes = sizes
        self._lower = lower

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`."""

        def settled(evaluate: Evaluate) -> T:
            with ExitStack() as stack:

                def run() -> tuple[Tensor, Tensors]:
                    self._settle(inner, outer, stack)
                    return evaluate.run()

                return body(Evaluate(run))

        return self._plain.within(inner, outer, settled)

    def _settle(self, inner: Tensors, outer: Tensors, stack: ExitStack) -> None:
        """Puts the problems below at their best responses, until the stack is left.

        That is when the body ends: its backward passes may evaluate again with what the modules hold.
        """
        known, start = {self._own: inner}, 0
        for name, size in self._sizes.items():
            known[name] = outer[start : start + size]
            start += size
        for lower in self._lower:
            given = tuple(part for name in lower.given for part in known[name])
            if isinstance(lower.respond, RepeatedUpdates):
                stack.enter_context(_no_recomputation(lower.name, lower.module, self._slots))
            known[lower.name] = lower.respond(given)
            stack.enter_context(self._slots.swapped(lower.live, known[lower.name]))
