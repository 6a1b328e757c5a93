"""The gradient of a problem's loss through the problems below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel import distributed
from bilevel.faults import Deadline, Work
from bilevel.functional import ModuleObjective, Objective, loss_and_outputs, require_finite
from bilevel.hypergrad import Estimator, InnerProblem, InnerStep, Pullback, State
from bilevel.levels.accumulation import accumulate
from bilevel.levels.gradients import Gradients
from bilevel.levels.graph import Dependencies
from bilevel.levels.records import InnerRecord, LossGradient, RecordedUpdate, Settled
from bilevel.levels.response import (
    BestResponse,
    Lower,
    NestedObjective,
    RepeatedUpdates,
    SolvedResponse,
    method_again,
)
from bilevel.optim import curvature_of
from bilevel.problems.base import Problem
from bilevel.products import full_precision
from bilevel.randomness import Replay, States
from bilevel.result import SolveInfo
from bilevel.slots import BufferValues
from bilevel.vector import Tensors

__all__ = ["Differentiator", "Policy"]


class Policy(Protocol):
    """What happens where a best-response product fails."""

    def take(
        self, name: str, method: Estimator, product: Callable[[Estimator, State | None], Pullback], state: State | None
    ) -> Pullback:
        """Takes a product through a problem by ``product(method, state)``, or otherwise where that fails."""

    def judge(self, names: str, info: SolveInfo) -> None:
        """Hears how the system of problems that respond to each other was solved; raises where that is not enough."""

    def below(self, name: str, info: SolveInfo) -> None:
        """Hears of a solve by which the response of a problem below the present one is differentiated again."""


class _Look:
    """Reads a loss when it is first called, and raises where that is not finite.

    A device that works on what is queued stands still after every number that is read of it. So a loss is read with
    the update, but where a product has failed, which a loss that is not finite explains.

    Attributes:
        number: The loss, once it was read.
    """

    def __init__(self, value: Tensor, name: str) -> None:
        self._value = value
        self._name = name
        self.number: float | None = None

    def __call__(self) -> None:
        if self.number is None:
            self.number = require_finite(self._value, self._name)


@dataclass(frozen=True)
class Differentiator:
    """Differentiates problems' losses through the problems below them.

    Attributes:
        gradients: Takes the training passes.
        dependencies: Who depends on whom.
        estimators: The method by which each inner problem is differentiated.
        solver: The method by which the response of a problem below a middle one is differentiated again, where its own
            method can't be.
        policy: What happens where a product fails.
        solve_timeout: Seconds that one product may take; None for no limit.
    """

    gradients: Gradients
    dependencies: Dependencies
    estimators: Mapping[str, Estimator]
    solver: Estimator
    policy: Policy
    solve_timeout: float | None = None

    @cached_property
    def following(self) -> frozenset[str]:
        """The inner problems whose methods follow recorded updates."""
        return frozenset(name for name, estimator in self.estimators.items() if estimator.needs_trajectory)

    @cached_property
    def delicate(self) -> frozenset[str]:
        """The inner problems whose methods must know beforehand that cotangents are finite."""
        return frozenset(name for name, estimator in self.estimators.items() if estimator.needs_finite_cotangent)

    @cached_property
    def sampled(self) -> Mapping[str, int]:
        """How many separate batches are wanted of an inner problem, where it is more than one."""
        numbers = {name: estimator.num_samples for name, estimator in self.estimators.items()}
        return {name: number for name, number in numbers.items() if number > 1}

    def total(
        self,
        problem: Problem,
        batches: Sequence[Any],
        records: Mapping[str, InnerRecord],
        states: Mapping[str, Mapping[str, State]],
        active: frozenset[str],
        others: Sequence[str] = (),
    ) -> LossGradient:
        """Returns a problem's loss and total gradient: its hypergradient, where there are problems below it.

        Cotangents are accumulated over the problems below, each before those that it responds to, by one best-response
        product a problem.

        Args:
            problem: The problem.
            batches: Its batches.
            records: What to take the losses below on.
            states: Estimator states, by problem and problem below it.
            active: The problems that are differentiated through; others are constants.
            others: Further problems with respect to whose parameters to differentiate.

        Raises:
            NonFiniteError: The loss was looked at, and is not finite. It is not always.
        """
        blocks, below = self.dependencies.active_below(problem.name, active)
        taken = self.gradients.take(problem, batches, [problem.name, *below, *others])
        if not below or taken.overflow:
            own = taken.parts[problem.name]
            further = {other: taken.parts[other] for other in others}
            return LossGradient(taken.value, taken.metrics, own, own, further, overflow=taken.overflow)
        look = _Look(taken.value, f"problem {problem.name!r}")
        if len(blocks) < len(below) or not self.delicate.isdisjoint(below):
            look()
        cotangents, direct = dict(taken.parts), taken.parts[problem.name]
        solves: dict[str, SolveInfo] = {}
        new_states: dict[str, State] = {}
        own_states = states.get(problem.name, {})
        lowers: dict[str, tuple[list[str], InnerProblem]] = {}

        def pull(name: str, v: Tensors, last: bool) -> Mapping[str, Tensors]:
            if name not in lowers:
                given = [other for other in self.dependencies.responds_to(name) if other in cotangents]
                lowers[name] = given, self.inner_problem(name, given, records[name], records, active)
            given, lower = lowers[name]

            def product(estimator: Estimator, state: State | None = None) -> Pullback:
                try:
                    pulled = self._product(name, estimator, lower, v, state or {})
                except Exception:
                    look()  # whatever came of it, a loss that is not finite comes first
                    raise
                if pulled.info.status.failed:
                    look()
                return pulled

            pulled = self.policy.take(name, self.estimators[name], product, own_states.get(name))
            if last:
                solves[name], new_states[name] = pulled.info, pulled.state
            parts: dict[str, Tensors] = self.gradients.split(pulled.value, given)
            return parts

        solves.update(accumulate(blocks, cotangents, set(taken.reached), pull, self.policy.judge))
        return LossGradient(
            taken.value,
            taken.metrics,
            cotangents[problem.name],
            direct,
            {other: cotangents[other] for other in others},
            solves,
            new_states,
            number=look.number,
        )

    def _product(self, name: str, estimator: Estimator, lower: InnerProblem, v: Tensors, state: State) -> Pullback:
        lower = self._with_diagonal(name, estimator, lower)
        limited = lower if self.solve_timeout is None else self._limited(name, estimator, lower)
        # backward passes follow the caller's autocast as well
        with self.gradients.activity(Work.RESPONSE, name, estimator.name), full_precision():
            return self.gradients.problems[name].respond(estimator, limited).pullback(v, state)

    def _with_diagonal(self, name: str, estimator: Estimator, lower: InnerProblem) -> InnerProblem:
        """Returns the problem with the diagonal of its optimiser, where a method needs that: it takes operations."""
        problem = self.gradients.problems[name]
        if not estimator.needs_diagonal or problem.optimizer is None:
            return lower
        return replace(lower, diagonal=curvature_of(problem.optimizer, problem.parameters))

    def _limited(self, name: str, estimator: Estimator, lower: InnerProblem) -> InnerProblem:
        """Returns the problem with all its losses raising once the time for this product is over."""
        assert self.solve_timeout is not None
        what = f"the best-response product of problem {name!r} by method {estimator.name!r}"
        deadline = Deadline(self.gradients.reduce, self.solve_timeout, what, shared=distributed.size() > 1)
        losses = (lower.objective, *lower.samples, *(step.objective for step in lower.trajectory))
        for objective in losses:
            objective.reduce = deadline
        return lower

    def inner_problem(
        self,
        name: str,
        given: Sequence[str],
        record: InnerRecord,
        records: Mapping[str, InnerRecord],
        active: frozenset[str],
        values: Mapping[str, Tensors] | None = None,
    ) -> InnerProblem:
        """Returns an inner problem as estimators see it.

        Args:
            name: The problem.
            given: The problems that it responds to, as far as they are varied.
            record: What to take its loss on.
            records: What to take the losses below it on.
            active: The problems that respond; others are constants.
            values: Where problems stood when the record was made; where they stand now by default.
        """
        problem = self.gradients.problems[name]
        outer = self._parameters(given)
        here = {other: each.parameters for other, each in self.gradients.problems.items()}
        if values:
            here.update(values)
        taking_part = self.dependencies.settled_before(name, active & records.keys())
        below = {other: Settled(records[other], here[other]) for other in taking_part}

        def objective(
            batches: Sequence[Any],
            generators: States | Replay | None,
            buffers: BufferValues | None = None,
            inner: Tensors = here[name],
            settled: Mapping[str, Settled] = below,
            loss: Callable[[Any], object] = problem.response_loss,
        ) -> Objective:
            return self._objective(problem, loss, given, batches, generators, buffers, here | {name: inner}, settled)

        def recorded(step: RecordedUpdate) -> InnerStep:
            above = [step.outer_gradient.get(other) for other in given]
            # A problem above may have been updated since, where it is an inner problem itself.
            valid = above and None not in above and all(step.outer_versions.get(id(p)) == p._version for p in outer)
            whole = tuple(p for part in above for p in part or ()) if valid else None
            lower = objective(step.batches, step.generators, step.buffers, step.inner, step.below, problem.loss)
            graph = None if step.graph is None else step.graph.still_valid(outer)
            return InnerStep(lower, step.inner, step.memory, step.update, step.gradient, whole, graph)

        trajectory = [recorded(step) for step in record.trajectory]
        return InnerProblem(
            objective(record.batches, record.generators),
            problem.parameters,
            outer,
            trajectory,
            samples=[objective([batch], None) for batch in record.samples],
            start=self._start(problem, given, record),
        )

    def _objective(
        self,
        problem: Problem,
        batch_loss: Callable[[Any], object],
        given: Sequence[str],
        batches: Sequence[Any],
        generators: States | Replay | None,
        buffers: BufferValues | None,
        here: Mapping[str, Tensors],
        settled: Mapping[str, Settled],
    ) -> Objective:
        """Returns a problem's total loss as a function of its own parameters and of those in ``given``."""
        label = f"problem {problem.name!r}"

        def loss() -> object:
            if len(batches) == 1:
                return batch_loss(batches[0])
            pairs = [loss_and_outputs(batch_loss(batch), label) for batch in batches]
            value = torch.stack([value for value, _ in pairs]).mean()
            return {"loss": value, "outputs": [part for _, outputs in pairs for part in outputs]}

        parts = self.gradients
        replay = generators if isinstance(generators, Replay) else Replay(parts.devices, generators)
        outer = self._parameters(given)
        plain = ModuleObjective(
            loss, parts.slots, problem.parameters, outer, label, replay, parts.passes, parts.reduce, buffers
        )
        if not settled:
            return plain
        known = {other: here[other] for other in (problem.name, *given)}
        known |= {other: state.values for other, state in settled.items()}
        below = self.dependencies.settled_before(problem.name, settled)
        lower = [self._lower(name, known, settled) for name in below]
        sizes = {other: len(known[other]) for other in given}
        return NestedObjective(plain, parts.slots, problem.name, sizes, lower)

    def _lower(
        self,
        name: str,
        known: Mapping[str, Tensors],
        settled: Mapping[str, Settled],
    ) -> Lower:
        """Returns a problem below another as a function of those that it responds to, around the ``known`` values."""
        given = [other for other in self.dependencies.responds_to(name) if other in known]
        here, problem = settled[name], self.gradients.problems[name]
        records = {other: state.record for other, state in settled.items()}
        lower = self.inner_problem(name, given, here.record, records, frozenset(settled), known)
        base = tuple(part for other in given for part in known[other])
        estimator = self.estimators[name]
        respond: BestResponse
        if estimator.needs_trajectory and lower.trajectory:
            respond = RepeatedUpdates(lower.trajectory, lower.start)
        else:
            solver = method_again(estimator, self.solver)
            standing = self._with_diagonal(name, estimator, replace(lower, inner=here.values, outer=base))
            respond = SolvedResponse(standing, estimator, solver, lambda info: self.policy.below(name, info))
        return Lower(name, problem.parameters, given, respond, problem.module)

    def _start(self, problem: Problem, given: Sequence[str], record: InnerRecord) -> tuple[int, ...] | None:
        """Returns the places among the given parameters of those from which a problem's recorded updates started."""
        if problem.start_source not in given or not record.trajectory or not record.trajectory[0].first:
            return None
        place = 0
        for other in given:
            source = self.gradients.problems[other]
            if other == problem.start_source:
                return tuple(place + source.parameter_names.index(name) for name in problem.parameter_names)
            place += len(source.parameters)
        return None

    def _parameters(self, names: Sequence[str]) -> Tensors:
        return self.gradients.parameters(names)
