"""The loop: who steps when, with which gradient. Nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bilevel import distributed
from bilevel.callbacks import Callback, Progress
from bilevel.checkpoint import read_state, write_state
from bilevel.data import BatchStream
from bilevel.engine_state import engine_state, load_engine_state, resume_engine
from bilevel.errors import (
    ConfigError,
    GraphError,
    unknown_name,
)
from bilevel.faults import Activity, Work, explained
from bilevel.feed import Feed
from bilevel.functional import PassCount, refuse_inference_mode, require_finite
from bilevel.hypergrad import Estimator, Exact, State, as_estimator
from bilevel.interrupt import Shield, StopSignals
from bilevel.levels import Dependencies
from bilevel.levels.differentiate import Differentiator
from bilevel.levels.gradients import Gradients
from bilevel.levels.graph import check_ownership
from bilevel.levels.losses import NestedLosses, nested_losses
from bilevel.levels.records import InnerRecord, LossGradient
from bilevel.levels.schedule import Round
from bilevel.loss_scale import LossScale
from bilevel.notices import Notices
from bilevel.planning import Planner
from bilevel.policy import SolvePolicy
from bilevel.problems import Problem
from bilevel.randomness import preserved
from bilevel.result import Hypergradient, StepResult
from bilevel.settings import EngineConfig
from bilevel.slots import ParameterSlots, buffers_protected
from bilevel.snapshot import Snapshot
from bilevel.step import NonFiniteStepError, Report, Step
from bilevel.validation import NamedArguments, check_integer

__all__ = ["Engine"]

_AS_IT_IS = nullcontext()


class Engine(NamedArguments):
    """Runs nested problems.

    One outer step is every inner problem's ``steps`` updates, then one update of every outer problem with its
    hypergradient at the *new* inner parameters. With more levels the same holds at each: before every update of a
    problem, the problems below it take their ``steps`` updates.

    Args:
        problems: Top level first. Who depends on whom is found by evaluating each loss; see :attr:`dependencies`.
        config: Settings.
        hypergradient: How to differentiate through inner problems that do not say so themselves: an estimator, its
            name, or a mapping with ``method`` and its fields.
        callbacks: Watchers, called in this order.

    Raises:
        GraphError: Problems that are no nested structure, share a name, or own one parameter together.
        ConfigError: A method that an inner problem cannot serve.
        DataError: Data that yields nothing.

    Example:
        >>> import torch
        >>> from bilevel import Engine, EngineConfig, Problem
        >>> class Outer(Problem):
        ...     def loss(self, batch):
        ...         return (self.inner.module.weight - 1.0).square().sum()
        >>> class Inner(Problem):
        ...     def loss(self, batch):
        ...         return (self.module.weight - self.outer.module.weight).square().sum() / 2
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.5)
        >>> problems = [
        ...     Outer(torch.nn.Linear(1, 1, bias=False), optimizer=sgd),
        ...     Inner(torch.nn.Linear(1, 1, bias=False), optimizer=sgd, steps=20),
        ... ]
        >>> engine = Engine(problems, EngineConfig(steps=5, progress=False), hypergradient="identity")
        >>> round(engine.run().losses["outer"], 6)
        0.0
    """

    _fewest = 2  # problems

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineConfig | None = None,
        hypergradient: Estimator | str | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = EngineConfig() if config is None else config
        _check_arguments(problems, self.config, callbacks, self._fewest)
        self.hypergradient_method = as_estimator("neumann" if hypergradient is None else hypergradient)
        self.callbacks = tuple(callbacks)
        self.stop_reason = ""
        self.problems: Mapping[str, Problem] = {problem.name: problem for problem in problems}
        self.step_count = 0
        self.skipped_steps = 0
        self.passes = PassCount()
        check_ownership(problems)
        slots = ParameterSlots(problem.module for problem in problems)
        every = {id(m): m for problem in problems for m in problem.module.modules()}.values()
        self._modules = tuple(module for module in every if module._buffers)
        self.streams = {
            name: BatchStream(problem.data, name, self.config.seed) for name, problem in self.problems.items()
        }
        self.scales = {name: self._loss_scale(name) for name in self.problems if self._precision(name) == "float16"}
        self._activity = Activity()
        self._gradients = Gradients(
            self.problems, slots, self.passes, distributed.reducer(), self._activity, self._autocast, self.scales
        )
        self.estimator_states: dict[str, dict[str, State]] = {}
        self._records: dict[str, InnerRecord] = {}
        self._snapshot = Snapshot(problems, every, self._gradients.devices, self.streams, self.scales, self.passes)
        policy = SolvePolicy(self.config, lambda: self.step_count + 1)
        self._planner = self._new_planner(policy)
        for problem in problems:
            problem.attach(self.problems)
        self._planner.plan_early(Feed(self.streams))

    @property
    def dependencies(self) -> Dependencies:
        """Who depends on whom."""
        return self._planner.plan(Feed(self.streams))[0].dependencies

    @property
    def evaluates(self) -> tuple[str, ...]:
        """Whose metrics the evaluations within a run bring: the problems', if there are evaluations."""
        return tuple(self.problems) if self.config.evaluate_every else ()

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The method by which each inner problem is differentiated."""
        return dict(self._planner.plan(Feed(self.streams))[0].estimators)

    def step(self, batches: Mapping[str, Any] | None = None) -> StepResult:
        """Runs one outer step.

        Args:
            batches: Batches by problem name, for an engine that is driven from outside: one batch for all updates of
                the problem in this step, or an iterator of batches. Problems that are not named use their own data.

        Whatever is raised within it, no parameter has changed (but with ``restore_on_error=False``).

        Returns:
            Losses, norms, reports and passes of the step.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite (unless such steps are skipped).
            SolveError: A solve failed and ``on_solve_failure`` is ``"raise"``.
            LossError: This is inside ``torch.inference_mode()``, where torch records nothing.
        """
        refuse_inference_mode()
        started, before = time.perf_counter(), self.passes.copy()
        feed = Feed(self.streams, batches)
        plan = self._planner.plan(feed)
        with Shield() as shield:
            report, skipped = self._step_or_undo(feed, plan, shield)
            self.step_count += 1
        result = StepResult(
            step=self.step_count,
            losses=report.losses,
            metrics=report.metrics,
            gradient_norms=report.norms,
            solves=report.solves,
            passes=self.passes.since(before),
            seconds=time.perf_counter() - started,
            overflows=report.overflows,
            skipped=skipped,
        )
        hooked = [problem for problem in self.problems.values() if type(problem).on_step_end is not Problem.on_step_end]
        if not hooked and not self.callbacks and not self._evaluation_is_due():
            return result
        with Notices(f"after step {self.step_count}, which is complete") as notices:
            for problem in hooked:
                notices.problem(problem.name, "on_step_end", partial(problem.on_step_end, result))
            self._tell(notices, "on_step_end", result)
            if self._evaluation_is_due():
                self._evaluate_in_step(notices)
            self._tell(notices, "on_step_complete", result)
        return result

    def stop(self, reason: str) -> None:
        """Lets :meth:`run` end after the present step.

        Args:
            reason: Why; kept as :attr:`stop_reason` until the next run starts.
        """
        self.stop_reason = reason

    def run(self, steps: int | None = None) -> StepResult:
        """Runs outer steps, with a progress bar unless the configuration says otherwise.

        Ends early where :meth:`stop` was called, or a signal of ``config.stop_signals`` arrived (Ctrl-C): the present
        step is finished, callbacks end as always, and :attr:`stop_reason` says why.

        Args:
            steps: How many; ``config.steps`` by default.

        Returns:
            The last step's result.

        Raises:
            ConfigError: ``steps`` is below 1.
        """
        total = self.config.steps if steps is None else steps
        check_integer("Engine", "run(steps)", total, minimum=1)
        kept = self.callbacks
        if self.config.progress and distributed.rank() == 0 and not any(isinstance(c, Progress) for c in kept):
            self.callbacks = (*kept, Progress())
        self.stop_reason = ""
        with StopSignals(self.config.stop_signals) as stop, Notices("at the end of the run") as ending:
            try:
                with Notices("before the first step") as notices:
                    for name, problem in self.problems.items():
                        notices.problem(name, "on_run_start", partial(problem.on_run_start, total))
                    self._tell(notices, "on_run_start", total)
                for _ in range(total):
                    result = self.step()
                    if stop.received and not self.stop_reason:
                        self.stop(f"interrupted by {stop.received}")
                    if self.stop_reason:
                        break
            finally:
                self._tell(ending, "on_run_end")
                self.callbacks = kept
        return result

    def hypergradient(self, problem: str | None = None, batches: Mapping[str, Any] | None = None) -> Hypergradient:
        """Returns the current hypergradient of a problem, and changes nothing.

        Losses are taken on the batch that comes next, one of each problem; the inner loss on that of the last inner
        update, if there was one.

        Args:
            problem: Name of a problem with others below it; may be left out where one is outer.
            batches: As for :meth:`step`.

        Returns:
            The hypergradient; ``.grad`` and ``.direct`` are mappings from the problem's parameter names.

        Raises:
            UnknownNameError: No problem with others below it has this name.
            ConfigError: A method that differentiates inner updates, where none are recorded.
        """
        feed = Feed(self.streams, batches)
        differentiator, _ = self._planner.plan(feed)
        name, passes = self._outer_name(problem), self.passes.copy()
        self._check_recorded(name)
        scale = self.scales.get(name)
        kept = None if scale is None else scale.state_dict()
        with self._unchanged():
            records, active = self._present_records(feed), self._active()
            take = partial(
                differentiator.total, self.problems[name], [feed.peek(name)], records, self.estimator_states, active
            )
            result = take()
            while result.overflow and scale is not None:
                scale.update(overflow=True)
                result = take()
            require_finite(result.value, f"problem {name!r}", result.number)
        if scale is not None and kept is not None:
            scale.load_state_dict(kept)
        self.passes.forward, self.passes.backward = passes.forward, passes.backward
        return result.as_hypergradient(self.problems[name].parameter_names)

    def losses(self, problem: str, batches: Mapping[str, Any] | None = None) -> NestedLosses:
        """Returns the losses of :meth:`hypergradient` as pure functions of tensors, on the batches that it takes."""
        feed = Feed(self.streams, batches)
        differentiator, _ = self._planner.plan(feed)
        # A reference: where a response is differentiated, it is by the dense system.
        exact = replace(differentiator, estimators=dict.fromkeys(differentiator.estimators, Exact()), solver=Exact())
        records = self._present_records(feed)
        return nested_losses(exact, problem, [feed.peek(problem)], records, self._active())

    def evaluate(self) -> dict[str, float]:
        """Returns what the problems' ``evaluate()`` say, as ``"problem/metric"``.

        Neither buffers nor generators change.
        """
        metrics: dict[str, float] = {}
        with torch.no_grad(), self._unchanged():
            for problem in self.problems.values():
                self._evaluate(problem, metrics)
        with Notices(f"after step {self.step_count}") as notices:
            self._tell(notices, "on_evaluate", metrics)
        return metrics

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the complete state to one file.

        It holds parameters, optimisers, schedulers, estimators, generators and the position in the data.

        Raises:
            CheckpointError: The file cannot be written; what was there before stays.
        """
        write_state(path, engine_state(self))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a state that :meth:`save` wrote; the run goes on as if it had not stopped.

        Raises:
            CheckpointError: A damaged file, or one of an engine of another structure; nothing has changed then.
        """
        load_engine_state(self, read_state(path))
        self._records = {}

    def resume(self, folder: str | os.PathLike[str]) -> int | None:
        """Continues from the newest good checkpoint that :class:`~bilevel.callbacks.Checkpoints` wrote to a folder.

        A damaged file is reported by a warning, and the one before it is taken. ``run(steps)`` takes ``steps`` more.

        Returns:
            The number of outer steps taken so far; None where there is no checkpoint, and nothing has changed.

        Raises:
            CheckpointError: All checkpoints are damaged, or the newest good one is of an engine of another structure.
        """
        return resume_engine(self, folder)

    def __repr__(self) -> str:
        """Lists the problems."""
        return f"Engine([{', '.join(map(repr, self.problems.values()))}], step_count={self.step_count})"

    def _step_or_undo(
        self, feed: Feed, plan: tuple[Differentiator, Round], shield: Shield
    ) -> tuple[Report, str | None]:
        """Makes the updates of a step, or leaves the state before it; returns the problem for which it was skipped."""
        differentiator, rounds = plan
        step = self._new_step(differentiator, feed)
        keeps = self.config.restore_on_error
        try:
            if keeps:
                self._snapshot.take(self._step_tables())
            with shield.opened():
                for problem in self.problems.values():
                    if type(problem).on_step_start is not Problem.on_step_start:
                        with self._activity(Work.HOOK, problem.name):
                            problem.on_step_start()
                step.run(rounds)
        except BaseException as error:
            skip = isinstance(error, NonFiniteStepError) and self.config.on_non_finite == "skip"
            if keeps:
                self._snapshot.restore(data_moves_on=skip)
            if skip and isinstance(error, NonFiniteStepError):
                self.skipped_steps += 1
                return step.report, error.problem
            shown = explained(error, self._activity.failed, self.step_count + 1, undone=keeps)
            try:
                if shown is error:
                    raise
                raise shown from error
            finally:
                # Whoever holds the exception holds this frame: no step's records, and no cycle.
                del step, shown
        self._snapshot.drop()
        return step.report, None

    def _new_planner(self, policy: SolvePolicy) -> Planner:
        return Planner(self.problems, self._gradients, self.config, policy, lambda: self.hypergradient_method)

    def _new_step(self, differentiator: Differentiator, feed: Feed) -> Step:
        return Step(**self._step_parts(differentiator, feed))

    def _step_parts(self, differentiator: Differentiator, feed: Feed) -> dict[str, Any]:
        """Returns what every step is made of."""
        watched = any(type(c).on_hypergradient is not Callback.on_hypergradient for c in self.callbacks)
        return {
            "number": self.step_count,
            "differentiator": differentiator,
            "config": self.config,
            "feed": feed,
            "records": self._records,
            "states": self.estimator_states,
            "place": self._place,
            "show": self._show if watched else None,
            "scales": self.scales,
        }

    def _step_tables(self) -> tuple[dict[str, Any], ...]:
        """Returns what a step changes beside parameters, buffers and optimisers."""
        return self._records, self.estimator_states

    def _show(self, problem: Problem, result: LossGradient) -> None:
        """Shows callbacks a hypergradient before the update."""
        shown = result.as_hypergradient(problem.parameter_names)
        with Notices(f"in step {self.step_count + 1}") as notices:
            self._tell(notices, "on_hypergradient", problem.name, shown)

    def _check_recorded(self, name: str) -> None:
        for inner in sorted(self.dependencies.lower[name] & self._active()):
            record, estimator = self._records.get(inner), self.estimators[inner]
            if estimator.needs_trajectory and not (record and record.trajectory):
                raise ConfigError(
                    f"method {estimator.name!r} differentiates updates of problem {inner!r}, and none are recorded: "
                    "it made none since the engine was made or loaded, or by another method: take a step first"
                )

    def _present_records(self, feed: Feed) -> dict[str, InnerRecord]:
        """Returns what is kept of the inner problems' updates, and the next batch where there were none."""
        return {name: self._records.get(name) or InnerRecord([feed.peek(name)]) for name in self.dependencies.inner}

    def _active(self) -> frozenset[str]:
        # After the last step, its problems are the ones whose updates are kept.
        present = max(0, self.step_count - 1)
        return frozenset(name for name, problem in self.problems.items() if problem.is_active(present))

    def _place(self, name: str) -> str:
        stream = self.streams[name]
        return f" (batch number {stream.drawn} of its data)" if stream.has_data and stream.drawn else ""

    def _outer_name(self, name: str | None) -> str:
        outer, over = self.dependencies.outer, [n for n in self.problems if self.dependencies.lower[n]]
        if name is None:
            if len(outer) > 1:
                raise ConfigError(f"hypergradient() needs problem=, one of {', '.join(over)}")
            return outer[0]
        if name not in over:
            raise unknown_name("problem with others below it", name, over)
        return name

    def _precision(self, name: str) -> str:
        """Returns the precision of a problem's training passes: everybody's, here."""
        return self.config.precision

    def _loss_scale(self, name: str) -> LossScale:
        return LossScale(name)

    def _autocast(self, name: str) -> AbstractContextManager[Any]:
        precision = self._precision(name)
        if precision == "float32":
            return _AS_IT_IS
        device = self.problems[name].parameters[0].device.type
        return torch.autocast(device, dtype=getattr(torch, precision))

    def _evaluation_is_due(self) -> bool:
        return bool(self.config.evaluate_every) and self.step_count % self.config.evaluate_every == 0

    def _evaluate_in_step(self, notices: Notices) -> None:
        """Evaluates, and moves the schedulers on that wait for it."""
        metrics: dict[str, float] = {}
        with torch.no_grad(), self._unchanged():
            for name, problem in self.problems.items():
                notices.problem(name, "evaluate", partial(self._evaluate, problem, metrics))
        for name, problem in self.problems.items():
            if problem.stepper is not None:
                own = {key.partition("/")[2]: value for key, value in metrics.items() if key.partition("/")[0] == name}
                notices.problem(name, "scheduler", partial(problem.stepper.evaluated, own))
        self._tell(notices, "on_evaluate", metrics)

    def _evaluate(self, problem: Problem, metrics: dict[str, float]) -> None:
        metrics.update({f"{problem.name}/{key}": float(value) for key, value in problem.evaluate().items()})

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Lets the body draw random numbers and change buffers without effect."""
        with preserved(self._gradients.devices), buffers_protected(self._modules):
            yield

    def _tell(self, notices: Notices, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            notices.callback(type(callback).__name__, hook, partial(getattr(callback, hook), self, *arguments))


def _check_arguments(
    problems: Sequence[Problem], config: EngineConfig, callbacks: Sequence[Callback], fewest: int
) -> None:
    if not isinstance(config, EngineConfig):
        raise ConfigError(
            f"config must be an EngineConfig, not {type(config).__name__}; the method goes to hypergradient="
        )
    if isinstance(problems, Problem):
        raise GraphError(f"problems must be a list, top level first; got the {type(problems).__name__} alone")
    for problem in problems:
        if not isinstance(problem, Problem):
            raise GraphError(f"problems must be Problem instances, top level first; got a {type(problem).__name__}")
    if len(problems) < fewest:
        raise GraphError(f"an engine needs an outer and an inner problem; got {len(problems)}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks must derive from bilevel.callbacks.Callback; got {callback!r}")
