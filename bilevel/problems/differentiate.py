"""The gradient of an outer problem through the problems below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.functional import (
    BufferValues,
    ModuleObjective,
    ParameterSlots,
    PassCount,
    Reduce,
    dense_gradient,
    loss_and_outputs,
    require_finite,
)
from bilevel.hypergrad import Estimator, InnerProblem, InnerStep, Pullback, State
from bilevel.optim import Update, curvature_of, update_of
from bilevel.problems.base import Problem
from bilevel.problems.graph import Dependencies
from bilevel.problems.step_graph import KeptGraph, take_with_graph
from bilevel.randomness import Replay, States, generator_devices
from bilevel.result import SolveInfo
from bilevel.vector import Tensors, add

__all__ = ["Differentiator", "InnerRecord", "LossGradient", "RecordedUpdate"]


@dataclass(frozen=True)
class RecordedUpdate:
    """One inner update: see :class:`~bilevel.hypergrad.InnerStep`.

    The loss is held as its batch, and the generators' states and the values of all buffers before it, and the outer
    gradient by problem, with how often each of these problems' parameters had been changed in place.
    """

    batch: Any
    generators: States
    inner: Tensors
    memory: Tensors
    update: Update
    buffers: BufferValues
    gradient: Tensors | None = None
    outer_gradient: Mapping[str, Tensors] = field(default_factory=dict)
    graph: KeptGraph | None = None
    outer_versions: Mapping[int, int] = field(default_factory=dict)


@dataclass
class InnerRecord:
    """What is kept of an inner problem's updates until the problem above is updated.

    Attributes:
        batches: The batches on which the hypergradient takes the inner loss, averaged.
        generators: Generator states to replay; None to draw live.
        trajectory: The updates, where the method needs them.
        samples: Further batches, for methods that want separate ones.
    """

    batches: Sequence[Any]
    generators: States | None = None
    trajectory: list[RecordedUpdate] = field(default_factory=list)
    samples: Sequence[Any] = ()

    def release_graphs(self) -> None:
        """Frees what was kept for the present outer parameters; from here on updates are evaluated again."""
        self.trajectory = [replace(step, graph=None, outer_gradient={}) for step in self.trajectory]


@dataclass(frozen=True)
class LossGradient:
    """A loss and its (total) derivative with respect to its problem's own parameters.

    Attributes:
        value: The loss, detached.
        metrics: Other values that the loss returned.
        gradient: The total derivative.
        direct: The derivative at fixed inner parameters.
        solves: Reports by inner problem.
        states: New estimator states by inner problem.
    """

    value: Tensor
    metrics: Mapping[str, Any]
    gradient: Tensors
    direct: Tensors
    solves: Mapping[str, SolveInfo] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)


class Differentiator:
    """Differentiates problems' losses: plain gradients for inner problems, hypergradients for outer ones.

    Args:
        problems: By name, top level first.
        slots: Where their modules hold parameters.
        passes: Where passes are counted.
        reduce: The mean over data-parallel ranks, or nothing.
        autocast: Makes the context for training passes.
    """

    def __init__(
        self,
        problems: Mapping[str, Problem],
        slots: ParameterSlots,
        passes: PassCount,
        reduce: Reduce,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._problems = problems
        self._slots = slots
        self._passes = passes
        self._reduce = reduce
        self._autocast = autocast
        self.devices = generator_devices(p for problem in problems.values() for p in problem.parameters)

    def plain(
        self, problem: Problem, batch: Any, others: Sequence[str] = ()
    ) -> tuple[LossGradient, dict[str, Tensors]]:
        """Returns the loss and gradient of an inner problem, and its gradient for ``others``, other problems.

        Cost: 1 forward and 1 backward pass.
        """
        names = [problem.name, *others]
        inputs = tuple(p for name in names for p in self._problems[name].parameters)
        value, metrics, grads = self._gradients(problem, batch, inputs)
        own, *more = self._split(grads, names)
        return LossGradient(value, metrics, own, own), dict(zip(others, more, strict=True))

    def recorded(
        self,
        problem: Problem,
        batch: Any,
        generators: States,
        estimator: Estimator,
        responds_to: Sequence[str],
        earlier: RecordedUpdate | None,
        *,
        last: bool,
    ) -> tuple[LossGradient, RecordedUpdate]:
        """Returns the loss and gradient of an inner problem, and what it takes to make its next update again.

        Args:
            problem: The inner problem.
            batch: Its batch.
            generators: The generators' states now.
            estimator: The method, which says what must be kept.
            responds_to: The problems whose parameters reach the loss.
            earlier: The update before, if that was recorded.
            last: Whether this is the last update before the problem above is updated.

        Cost: as :meth:`plain`.
        """
        assert problem.optimizer is not None
        update, memory = update_of(problem.optimizer, problem.parameters)
        inner = tuple(p.detach().clone() for p in problem.parameters)
        buffers = self._slots.buffer_values(None if earlier is None else earlier.buffers)
        step = RecordedUpdate(batch, generators, inner, memory, update, buffers)
        above: dict[str, Tensors] = {}
        if estimator.keeps_graph:
            outer = tuple(p for name in responds_to for p in self._problems[name].parameters)
            value, metrics, grads, graph = take_with_graph(problem, batch, inner, outer, self._slots, self._passes)
            grads = self._reduce(grads)
            result = LossGradient(value, metrics, grads, grads)
            step = replace(step, graph=graph)
        else:
            # What autocast makes of ∂f/∂λ is no match for the products' full precision.
            wanted = last and estimator.needs_outer_gradient and not self._autocasts()
            result, above = self.plain(problem, batch, responds_to if wanted else ())
        if not last:
            return result, step
        versions = {id(p): p._version for name in above for p in self._problems[name].parameters}
        return result, replace(step, gradient=result.gradient, outer_gradient=above, outer_versions=versions)

    def total(
        self,
        problem: Problem,
        batch: Any,
        dependencies: Dependencies,
        records: Mapping[str, InnerRecord],
        estimators: Mapping[str, Estimator],
        states: Mapping[str, State],
        on_solve: Callable[[str, Callable[[Estimator], Pullback], Pullback], Pullback],
    ) -> LossGradient:
        """Returns the loss and hypergradient of an outer problem.

        Cotangents are accumulated over the inner problems, each before those that it responds to, by one best-response
        product a problem.

        Args:
            problem: The outer problem.
            batch: Its batch.
            dependencies: Who depends on whom.
            records: What to take the inner losses on.
            estimators: By inner problem.
            states: Estimator states by inner problem.
            on_solve: Sees every product, with a way to take it again by another method, and returns the one to use.
        """
        inner = [name for name in dependencies.inner if self.affects(name, problem.name, dependencies)]
        names = [problem.name, *inner]
        inputs = tuple(p for name in names for p in self._problems[name].parameters)
        value, metrics, grads = self._gradients(problem, batch, inputs)
        require_finite(value, f"problem {problem.name!r}")
        cotangents = dict(zip(names, self._split(grads, names), strict=True))
        direct = cotangents[problem.name]
        solves: dict[str, SolveInfo] = {}
        new_states: dict[str, State] = {}
        for name in inner:
            others = [other for other in dependencies.responds_to(name) if other in cotangents]
            lower = self.inner_problem(name, others, records[name])
            v = cotangents[name]

            def pull(
                estimator: Estimator, lower: InnerProblem = lower, v: Tensors = v, state: State | None = None
            ) -> Pullback:
                return estimator.respond(lower).pullback(v, state or {})

            pulled = on_solve(name, pull, pull(estimators[name], state=states.get(name)))
            solves[name], new_states[name] = pulled.info, pulled.state
            for other, part in zip(others, self._split(pulled.value, others), strict=True):
                cotangents[other] = add(cotangents[other], part)
        return LossGradient(value, metrics, cotangents[problem.name], direct, solves, new_states)

    def affects(self, name: str, outer: str, dependencies: Dependencies) -> bool:
        """Whether an inner problem responds to an outer one, directly or through other inner problems."""
        seen, stack = set(), [name]
        while stack:
            current = stack.pop()
            for other in dependencies.responds_to(current):
                if other == outer:
                    return True
                if other in dependencies.inner and other not in seen:
                    seen.add(other)
                    stack.append(other)
        return False

    def inner_problem(self, name: str, others: Sequence[str], record: InnerRecord) -> InnerProblem:
        """Returns an inner problem as estimators see it, responding to ``others``."""
        problem = self._problems[name]
        outer = tuple(p for other in others for p in self._problems[other].parameters)
        label = f"problem {name!r}"

        def objective(
            batches: Sequence[Any], generators: States | None, buffers: BufferValues | None = None
        ) -> ModuleObjective:
            def loss() -> Mapping[str, Any]:
                pairs = [loss_and_outputs(problem.loss(batch), label) for batch in batches]
                value = pairs[0][0] if len(pairs) == 1 else torch.stack([value for value, _ in pairs]).mean()
                return {"loss": value, "outputs": [part for _, outputs in pairs for part in outputs]}

            replay = Replay(self.devices, generators)
            return ModuleObjective(
                loss, self._slots, problem.parameters, outer, label, replay, self._passes, self._reduce, buffers
            )

        def recorded(step: RecordedUpdate) -> InnerStep:
            above = [step.outer_gradient.get(other) for other in others]
            # A problem above may have been updated since, where it is an inner problem itself.
            valid = above and None not in above and all(step.outer_versions.get(id(p)) == p._version for p in outer)
            whole = tuple(p for part in above for p in part or ()) if valid else None
            lower = objective([step.batch], step.generators, step.buffers)
            graph = None if step.graph is None else step.graph.still_valid(outer)
            return InnerStep(lower, step.inner, step.memory, step.update, step.gradient, whole, graph)

        return InnerProblem(
            objective(record.batches, record.generators),
            problem.parameters,
            outer,
            [recorded(step) for step in record.trajectory],
            samples=[objective([batch], None) for batch in record.samples],
            diagonal=None if problem.optimizer is None else curvature_of(problem.optimizer, problem.parameters),
        )

    def _autocasts(self) -> bool:
        """Whether training passes run under autocast, the engine's or the user's."""
        with self._autocast():
            return any(torch.is_autocast_enabled(device.partition(":")[0]) for device in self.devices)

    def _gradients(self, problem: Problem, batch: Any, inputs: Tensors) -> tuple[Tensor, dict[str, Any], Tensors]:
        with torch.enable_grad(), self._autocast():
            value, metrics = problem.evaluate_loss(batch)
        self._passes.forward += 1
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if value.requires_grad:
            grads = torch.autograd.grad(value, inputs, allow_unused=True)
            self._passes.backward += 1
        return value.detach(), metrics, self._reduce(dense_gradient(grads, inputs))

    def _split(self, flat: Tensors, names: Sequence[str]) -> list[Tensors]:
        parts, start = [], 0
        for name in names:
            stop = start + len(self._problems[name].parameters)
            parts.append(flat[start:stop])
            start = stop
        return parts
