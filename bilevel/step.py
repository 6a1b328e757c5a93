"""One outer step: rounds of updates, from the deepest level up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.faults import Work
from bilevel.feed import Feed
from bilevel.hypergrad import State
from bilevel.levels.differentiate import Differentiator
from bilevel.levels.recording import Recorder
from bilevel.levels.records import InnerRecord, LossGradient, RecordedUpdate
from bilevel.levels.schedule import Round
from bilevel.loss_scale import LossScale
from bilevel.problems import Problem
from bilevel.randomness import Replay, capture
from bilevel.result import SolveInfo
from bilevel.settings import EngineConfig
from bilevel.vector import lengths, on_host, read

__all__ = ["NonFiniteStepError", "Report", "Step"]


class NonFiniteStepError(NonFiniteError):
    """A loss or gradient of a step is NaN or infinite.

    Attributes:
        problem: Whose.
    """

    def __init__(self, message: str, problem: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass
class Report:
    """What a step collects for its result."""

    losses: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    solves: dict[str, SolveInfo] = field(default_factory=dict)
    overflows: dict[str, int] = field(default_factory=dict)


@dataclass
class Step:
    """The updates of one outer step.

    Attributes:
        number: The step, counted from 0.
        differentiator: Takes gradients.
        config: The engine's settings.
        feed: Where batches come from.
        records: What was last kept of the inner problems' updates, by problem; changed.
        states: Estimator states, by problem and problem below it; changed.
        place: Says where in a problem's data its last batch came from, for messages.
        show: Shown every hypergradient before it is used; None where nobody looks.
        scales: Loss scales by problem, where training passes are in float16.
        report: What happened.
        trajectories: Updates recorded since the problem above was updated, by problem; changed.
    """

    number: int
    differentiator: Differentiator
    config: EngineConfig
    feed: Feed
    records: dict[str, InnerRecord]
    states: dict[str, dict[str, State]]
    place: Callable[[str], str]
    show: Callable[[Problem, LossGradient], None] | None = None
    scales: Mapping[str, LossScale] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    trajectories: dict[str, list[RecordedUpdate]] = field(default_factory=dict)
    instead: ClassVar[str] = ", or set EngineConfig(on_non_finite='skip')"

    def __post_init__(self) -> None:
        """Looks up what every update needs."""
        self._problems = self.differentiator.gradients.problems
        self._dependencies = self.differentiator.dependencies
        self._activity = self.differentiator.gradients.activity
        self._recorder = Recorder(self.differentiator)
        self.active = frozenset(name for name, problem in self._problems.items() if problem.is_active(self.number))

    def run(self, whole: Round) -> Report:
        """Makes all updates."""
        self._run(whole)
        for record in self.records.values():
            record.release_graphs()
        return self.report

    def _run(self, one: Round) -> None:
        turns = {name: self._turns(self._problems[name]) for name in one.members}
        for name in self._inner(one.members):
            self._problems[name].restart()
            self.trajectories[name] = []
        for turn in range(max(turns.values())):
            for lower in (*one.before, *one.again):
                self._run(lower)
            self._update([name for name in one.members if turn < turns[name] and name in self.active], turn, turns)

    def _turns(self, problem: Problem) -> int:
        if problem.name in self._dependencies.outer or problem.name not in self.active:
            return 1
        return problem.steps + (0 if problem.num_updates > 0 else problem.warmup_steps)

    def _update(self, names: Sequence[str], turn: int, turns: Mapping[str, int]) -> None:
        """Updates problems of one round, after the gradients of all of them were taken."""
        self._draw_for_products(names)
        taken = [
            (self._problems[name], self._gradient(self._problems[name], turn, turns[name]))
            for name in names
            if not self._waits(name)
        ]
        for problem, result in taken:
            self._report_solves(result.solves)
            self._check_and_update(problem, result)
            self.states.setdefault(problem.name, {}).update(result.states)

    def _draw_for_products(self, names: Sequence[str]) -> None:
        """Draws the batches on which products through the problems below are taken, beside those of their updates."""
        fresh_ones, sampled = self.config.hypergradient_batch == "fresh", self.differentiator.sampled
        if not fresh_ones and not sampled:
            return
        below = set().union(*(self._dependencies.lower[name] for name in names)) & self.active
        for name in self._dependencies.inner:
            if name not in below:
                continue
            record = self.records[name]
            if fresh_ones:
                fresh = [self._next(name) for _ in range(self.config.num_hypergradient_batches)]
                # One replay: all that is taken on this record sees the same masks.
                replay = Replay(self.differentiator.gradients.devices)
                record = self.records[name] = InnerRecord(fresh, replay, record.trajectory)
            if name in sampled:
                self.records[name] = replace(record, samples=[self._next(name) for _ in range(sampled[name])])

    def _gradient(self, problem: Problem, turn: int, turns: int) -> LossGradient:
        batches = [self._next(problem.name) for _ in range(problem.accumulate)]
        try:
            if problem.name in self._dependencies.outer:
                return self.differentiator.total(problem, batches, self.records, self.states, self._responding())
            return self._inner_gradient(problem, batches, turn, turns)
        except NonFiniteError as error:
            raise self._refusal(problem, str(error)) from error

    def _inner_gradient(self, problem: Problem, batches: Sequence[Any], turn: int, turns: int) -> LossGradient:
        estimator, first = self.differentiator.estimators[problem.name], turns - problem.steps
        recorded_from = turns
        if estimator.needs_trajectory:
            recorded_from = max(first, turns - (estimator.recorded_steps or problem.steps))
        last = turn == turns - 1
        generators = capture(self.differentiator.gradients.devices)
        trajectory = self.trajectories[problem.name]
        if turn < recorded_from:
            result = self.differentiator.total(problem, batches, self.records, self.states, self._responding())
        else:
            result, update = self._recorder.take(
                problem,
                batches,
                generators,
                self.records,
                self.states,
                self._responding(),
                trajectory[-1] if trajectory else None,
                first=not trajectory and recorded_from == first,
                remaining=turns - 1 - turn,
            )
            if not result.overflow:
                trajectory.append(update)
        if last:
            self.records[problem.name] = InnerRecord(batches, generators, trajectory)
        return result

    def _check_and_update(self, problem: Problem, result: LossGradient) -> None:
        if problem.name in self.scales and self._overflowed(problem, result):
            return
        shown = self.show is not None and bool(self._dependencies.lower[problem.name])
        metrics = _tensors(result.metrics) if result.metrics else {}
        # A device is not waited for before it has the update to do, where that can be undone and nobody looks at it.
        late = self.config.restore_on_error and not shown and not on_host(result.value) and problem.updates_plainly
        if late:
            try:
                self._apply(problem, result, result.value)
            except Exception:
                self._look(problem, result)  # what an optimiser says of a gradient that is not finite is no help
                raise
            size, value, *numbers = self._look(problem, result, metrics.values())
        else:
            size, value = self._look(problem, result)
            if self.show is not None and shown:
                with self._activity(Work.HOOK, problem.name):
                    self.show(problem, result)
            self._apply(problem, result, value)
            numbers = read(list(metrics.values())) if metrics else []
        self.report.losses[problem.name], self.report.norms[problem.name] = value, size
        if result.metrics:
            found = {**result.metrics, **dict(zip(metrics, numbers, strict=True))}
            self.report.metrics.update({f"{problem.name}/{key}": _number(metric) for key, metric in found.items()})

    def _look(self, problem: Problem, result: LossGradient, metrics: Iterable[Tensor] = ()) -> list[float]:
        """Returns the norm of a gradient, the loss and metrics, in one transfer; raises where the first two say so."""
        found = lengths(result.gradient, also=[*(() if result.number is not None else (result.value,)), *metrics])
        if result.number is not None:
            found.insert(1, result.number)
        for what, number in (("loss", found[1]), ("gradient's norm", found[0])):
            if not math.isfinite(number):
                text = f"the {what} of problem {problem.name!r} is {number}, where a finite number was expected"
                raise self._refusal(problem, text)
        return found

    def _apply(self, problem: Problem, result: LossGradient, value: float | Tensor) -> None:
        with self._activity(Work.UPDATE, problem.name):
            problem.update(result.gradient, {"loss": value, **result.metrics})

    def _overflowed(self, problem: Problem, result: LossGradient) -> bool:
        """Moves the loss scale on; an update whose gradients overflowed is left out and counted."""
        value = float(result.value)
        if not math.isfinite(value):
            return False
        self.scales[problem.name].update(overflow=result.overflow)
        if result.overflow:
            self.report.overflows[problem.name] = self.report.overflows.get(problem.name, 0) + 1
            self.report.losses[problem.name] = value
        return result.overflow

    def _waits(self, name: str) -> bool:
        """Leaves the update of an outer problem out where it would not see its own parameters.

        That is where a problem below has started from them, and all updates of that one overflowed.
        """
        if name not in self._dependencies.outer or not self._dependencies.starts:
            return False
        still = (self.active & self._dependencies.lower[name]) - self._responding()
        if not any(self._problems[other].start_source is not None for other in still):
            return False
        self.report.overflows[name] = self.report.overflows.get(name, 0) + 1
        return True

    def _report_solves(self, solves: Mapping[str, SolveInfo]) -> None:
        """Keeps the last report of every problem, and one that failed rather than a later one that did not."""
        for name, info in solves.items():
            before = self.report.solves.get(name)
            if before is None or info.status.failed or not before.status.failed:
                self.report.solves[name] = info

    def _responding(self) -> frozenset[str]:
        """Returns the active problems, less those whose method follows updates where all of them were left out."""
        following = self.differentiator.following
        if not following:
            return self.active
        return self.active - {name for name in following & self.records.keys() if not self.records[name].trajectory}

    def _next(self, name: str) -> Any:
        with self._activity(Work.DATA, name):
            return self.feed.next(name)

    def _inner(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.active and name not in self._dependencies.outer]

    def _refusal(self, problem: Problem, text: str) -> NonFiniteStepError:
        undone = "No parameter was changed. " if self.config.restore_on_error else ""
        return NonFiniteStepError(
            f"step {self.number + 1}: {text}{self.place(problem.name)}. {undone}"
            f"Look at that batch and the learning rates{self.instead}.",
            problem.name,
        )


def _tensors(metrics: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the metrics that a device may hold."""
    return {key: part.detach() for key, part in metrics.items() if isinstance(part, Tensor) and part.dim() == 0}


def _number(metric: Any) -> float:
    return float(metric.detach()) if isinstance(metric, Tensor) else float(metric)
