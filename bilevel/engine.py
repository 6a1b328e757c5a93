"""The loop: who steps when, with which gradient. Nothing else."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bilevel import distributed
from bilevel.callbacks import Callback, Progress
from bilevel.checkpoint import read_state, write_state
from bilevel.data import BatchStream
from bilevel.engine_state import engine_state, load_engine_state
from bilevel.errors import (
    BilevelError,
    BilevelWarning,
    ConfigError,
    GraphError,
    NonFiniteError,
    SolveError,
    unknown_name,
)
from bilevel.feed import Feed
from bilevel.functional import ParameterSlots, PassCount, buffers_protected
from bilevel.hypergrad import Estimator, Pullback, State, Unrolled, as_estimator
from bilevel.problems import Dependencies, Problem, discover
from bilevel.problems.differentiate import Differentiator, InnerRecord, LossGradient, RecordedUpdate
from bilevel.problems.graph import check_ownership
from bilevel.problems.losses import NestedLosses, nested_losses
from bilevel.problems.method_check import check_method
from bilevel.randomness import capture, preserved
from bilevel.result import Hypergradient, SolveInfo, StepResult
from bilevel.settings import EngineConfig
from bilevel.snapshot import Snapshot
from bilevel.vector import norm

__all__ = ["Engine"]


class Engine:
    """Runs nested problems.

    One outer step is every inner problem's ``steps`` updates, then one update of every outer problem with its
    hypergradient at the *new* inner parameters.

    Args:
        problems: Top level first. Who depends on whom is found by evaluating each loss once; see :attr:`dependencies`.
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

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineConfig | None = None,
        hypergradient: Estimator | str | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config or EngineConfig()
        self.hypergradient_method = as_estimator("neumann" if hypergradient is None else hypergradient)
        self.callbacks = tuple(callbacks)
        self.stop_reason = ""
        self.problems: Mapping[str, Problem] = {problem.name: problem for problem in problems}
        self.step_count = 0
        self.skipped_steps = 0
        self.passes = PassCount()
        _check_arguments(problems, self.config, self.callbacks)
        check_ownership(problems)
        self._slots = ParameterSlots(problem.module for problem in problems)
        every = {id(m): m for problem in problems for m in problem.module.modules()}.values()
        self._modules = tuple(module for module in every if module._buffers)
        self.streams = {
            name: BatchStream(problem.data, name, self.config.seed) for name, problem in self.problems.items()
        }
        self._differentiator = Differentiator(
            self.problems, self._slots, self.passes, distributed.reducer(), self._autocast
        )
        self.estimator_states: dict[str, dict[str, State]] = {}
        self._records: dict[str, InnerRecord] = {}
        self._warned: set[tuple[str, str]] = set()
        self._dependencies: Dependencies | None = None
        for problem in problems:
            problem.attach(self.problems)
        self._discover_early()

    @property
    def dependencies(self) -> Dependencies:
        """Who depends on whom."""
        if self._dependencies is None:
            self._discover(Feed(self.streams))
        assert self._dependencies is not None
        return self._dependencies

    @property
    def estimators(self) -> dict[str, Estimator]:
        """The method by which each inner problem is differentiated."""
        return {
            name: self.problems[name].hypergradient or self.hypergradient_method for name in self.dependencies.inner
        }

    def step(self, batches: Mapping[str, Any] | None = None) -> StepResult:
        """Runs one outer step.

        Args:
            batches: Batches by problem name, for an engine that is driven from outside: one batch for all updates of
                the problem in this step, or an iterator of batches. Problems that are not named use their own data.

        Returns:
            Losses, norms, reports and passes of the step.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite (unless such steps are skipped). No parameter has
                changed.
            SolveError: A solve failed and ``on_solve_failure`` is ``"raise"``. No parameter has changed.
        """
        started, before = time.perf_counter(), self.passes.copy()
        feed = Feed(self.streams, batches)
        if self._dependencies is None:
            self._discover(feed)
        for problem in self.problems.values():
            problem.on_step_start()
        report = _Report()
        problems = list(self.problems.values())
        snapshot = Snapshot(problems, self._modules) if self.config.restore_on_error else None
        skipped = None
        try:
            self._step(feed, report)
        except BaseException as error:
            if snapshot is not None:
                snapshot.restore()
            if not isinstance(error, _NonFiniteStepError) or self.config.on_non_finite != "skip":
                raise
            skipped = error.problem
            self.skipped_steps += 1
        self.step_count += 1
        result = StepResult(
            step=self.step_count,
            losses=report.losses,
            metrics=report.metrics,
            gradient_norms=report.norms,
            solves=report.solves,
            passes=self.passes.since(before),
            seconds=time.perf_counter() - started,
            skipped=skipped,
        )
        for problem in self.problems.values():
            problem.on_step_end(result)
        self._call("on_step_end", result)
        if self.config.evaluate_every and self.step_count % self.config.evaluate_every == 0:
            self.evaluate()
        self._call("on_step_complete", result)
        return result

    def stop(self, reason: str) -> None:
        """Lets :meth:`run` end after the present step.

        Args:
            reason: Why; kept as :attr:`stop_reason` until the next run starts.
        """
        self.stop_reason = reason

    def run(self, steps: int | None = None) -> StepResult:
        """Runs outer steps, with a progress bar unless the configuration says otherwise.

        Args:
            steps: How many; ``config.steps`` by default.

        Returns:
            The last step's result.

        Raises:
            ConfigError: ``steps`` is below 1.
        """
        total = self.config.steps if steps is None else steps
        if total < 1:
            raise ConfigError(f"run() needs at least 1 step, not {total}")
        kept = self.callbacks
        if self.config.progress and distributed.rank() == 0 and not any(isinstance(c, Progress) for c in kept):
            self.callbacks = (*kept, Progress())
        self.stop_reason = ""
        try:
            for problem in self.problems.values():
                problem.on_run_start(total)
            self._call("on_run_start", total)
            for _ in range(total):
                result = self.step()
                if self.stop_reason:
                    break
        finally:
            self._call("on_run_end")
            self.callbacks = kept
        return result

    def hypergradient(self, problem: str | None = None, batches: Mapping[str, Any] | None = None) -> Hypergradient:
        """Returns the current hypergradient of an outer problem, and changes nothing.

        Losses are taken on the batches that come next; the inner loss on that of the last inner update, if there was
        one.

        Args:
            problem: Name of the outer problem; may be left out where there is one.
            batches: As for :meth:`step`.

        Returns:
            The hypergradient; ``.grad`` and ``.direct`` are mappings from the problem's parameter names.

        Raises:
            UnknownNameError: No outer problem has this name.
            ConfigError: A method that differentiates inner updates, before there were any.
        """
        feed = Feed(self.streams, batches)
        if self._dependencies is None:
            self._discover(feed)
        name = self._outer_name(problem)
        passes, kept_records = self.passes.copy(), dict(self._records)
        for inner, estimator in self.estimators.items():
            if estimator.needs_trajectory and inner not in self._records:
                raise ConfigError(
                    f"method {estimator.name!r} differentiates the updates of problem {inner!r}, which has made none "
                    "since the engine was made or loaded: take a step first"
                )
        with preserved(self._differentiator.devices), buffers_protected(self._modules):
            for inner in self.dependencies.inner:
                self._records.setdefault(inner, InnerRecord([feed.peek(inner)]))
            result = self._total(self.problems[name], feed.peek(name))
        self._records = kept_records
        self.passes.forward, self.passes.backward = passes.forward, passes.backward
        names = self.problems[name].parameter_names
        infos = list(result.solves.values())
        return Hypergradient(
            grad=dict(zip(names, result.gradient, strict=True)),
            direct=dict(zip(names, result.direct, strict=True)),
            info=infos[0] if len(infos) == 1 else _worst(infos),
            value=float(result.value),
            state=dict(result.states),
        )

    def losses(self, problem: str, batches: Mapping[str, Any] | None = None) -> NestedLosses:
        """Returns the losses of :meth:`hypergradient` as pure functions of tensors, on the batches that it takes."""
        feed = Feed(self.streams, batches)
        batch = feed.peek(problem)
        records = {n: self._records.get(n) or InnerRecord([feed.peek(n)]) for n in self.dependencies.inner}
        return nested_losses(
            self.problems, self._slots, self._differentiator, self.dependencies, problem, batch, records
        )

    def evaluate(self) -> dict[str, float]:
        """Returns what the problems' ``evaluate()`` say, as ``"problem/metric"``.

        Neither buffers nor generators change.
        """
        metrics: dict[str, float] = {}
        with torch.no_grad(), preserved(self._differentiator.devices), buffers_protected(self._modules):
            for name, problem in self.problems.items():
                metrics.update({f"{name}/{key}": float(value) for key, value in problem.evaluate().items()})
        self._call("on_evaluate", metrics)
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

    def __repr__(self) -> str:
        """Lists the problems."""
        return f"Engine([{', '.join(map(repr, self.problems.values()))}], step_count={self.step_count})"

    def _step(self, feed: Feed, report: _Report) -> None:
        dependencies = self.dependencies
        for name in reversed([name for name in self.problems if name in dependencies.inner]):
            self._update_inner(self.problems[name], feed, report)
        for name in dependencies.inner:
            record = self._records[name]
            if self.config.hypergradient_batch == "fresh":
                fresh = [feed.next(name) for _ in range(self.config.num_hypergradient_batches)]
                record = self._records[name] = InnerRecord(fresh, trajectory=record.trajectory)
            wanted = self.estimators[name].num_samples
            if wanted > 1:
                record.samples = [feed.next(name) for _ in range(wanted)]
        gradients = [(self.problems[n], self._total(self.problems[n], feed.next(n))) for n in dependencies.outer]
        for record in self._records.values():
            record.release_graphs()
        for problem, result in gradients:
            report.solves.update(result.solves)
            self._check_and_update(problem, result, report)
            self.estimator_states.setdefault(problem.name, {}).update(result.states)

    def _update_inner(self, problem: Problem, feed: Feed, report: _Report) -> None:
        estimator = self.estimators[problem.name]
        first_recorded = problem.steps
        if estimator.needs_trajectory:
            first_recorded = max(0, problem.steps - (estimator.recorded_steps or problem.steps))
        trajectory: list[RecordedUpdate] = []
        for place in range(problem.steps):
            last = place == problem.steps - 1
            batch = feed.next(problem.name)
            generators = capture(self._differentiator.devices)
            if place < first_recorded:
                result, _ = self._differentiator.plain(problem, batch)
            else:
                above = self.dependencies.responds_to(problem.name)
                earlier = trajectory[-1] if trajectory else None
                result, update = self._differentiator.recorded(
                    problem, batch, generators, estimator, above, earlier, last=last
                )
                trajectory.append(update)
            self._check_and_update(problem, result, report)
        self._records[problem.name] = InnerRecord([batch], generators, trajectory)

    def _check_and_update(self, problem: Problem, result: LossGradient, report: _Report) -> None:
        value, size = float(result.value), float(norm(result.gradient))
        for what, number in (("loss", value), ("gradient's norm", size)):
            if not math.isfinite(number):
                text = f"the {what} of problem {problem.name!r} is {number}, where a finite number was expected"
                raise self._refusal(problem, text)
        problem.update(result.gradient, value)
        report.losses[problem.name], report.norms[problem.name] = value, size
        for key, metric in result.metrics.items():
            report.metrics[f"{problem.name}/{key}"] = _number(metric)

    def _total(self, problem: Problem, batch: Any) -> LossGradient:
        states = self.estimator_states.get(problem.name, {})
        try:
            return self._differentiator.total(
                problem, batch, self.dependencies, self._records, self.estimators, states, self._on_solve
            )
        except NonFiniteError as error:
            raise self._refusal(problem, str(error)) from error

    def _refusal(self, problem: Problem, text: str) -> _NonFiniteStepError:
        stream = self.streams[problem.name]
        batch = f" (batch number {stream.drawn} of its data)" if stream.has_data and stream.drawn else ""
        return _NonFiniteStepError(
            f"step {self.step_count + 1}: {text}{batch}. No parameter was changed. "
            "Look at that batch and the learning rates, or set EngineConfig(on_non_finite='skip').",
            problem.name,
        )

    def _on_solve(self, name: str, again: Callable[[Estimator], Pullback], pulled: Pullback) -> Pullback:
        """Applies the policy for solves that failed."""
        info = pulled.info
        if not info.status.failed and not (info.message and info.method == Unrolled.name):
            return pulled
        text = f"hypergradient through problem {name!r}, step {self.step_count + 1}: {info.explain()}"
        if info.status.failed and self.config.on_solve_failure == "raise":
            raise SolveError(text)
        if (name, info.status.value) not in self._warned:
            self._warned.add((name, info.status.value))
            warnings.warn(f"{text} (said once)", BilevelWarning, stacklevel=2)
        if info.status.failed and self.config.fallback is not None:
            return again(self.config.fallback)
        return pulled

    def _discover_early(self) -> None:
        """Finds dependencies at construction where every problem has data, or can do without."""
        try:
            self._discover(Feed(self.streams))
        except BilevelError:
            raise
        except Exception:
            # A loss that cannot be evaluated without a batch: batches will come with step(), where any error shows.
            if all(stream.has_data for stream in self.streams.values()):
                raise

    def _discover(self, feed: Feed) -> None:
        with preserved(self._differentiator.devices):
            batches = {name: feed.peek(name) for name in self.problems}
            dependencies = discover(list(self.problems.values()), self._slots, batches)
        for name in dependencies.inner:
            estimator = self.problems[name].hypergradient or self.hypergradient_method
            check_method(self.problems[name], estimator, self.config.precision)
        self._dependencies = dependencies

    def _outer_name(self, name: str | None) -> str:
        outer = self.dependencies.outer
        if name is None:
            if len(outer) > 1:
                raise ConfigError(f"hypergradient() needs problem=, one of {', '.join(outer)}")
            return outer[0]
        if name not in outer:
            raise unknown_name("outer problem", name, outer)
        return name

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        device = next(iter(self.problems.values())).parameters[0].device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            try:
                getattr(callback, hook)(self, *arguments)
            except Exception as error:
                raise BilevelError(f"callback {type(callback).__name__} failed in {hook}: {error!r}") from error


class _NonFiniteStepError(NonFiniteError):
    def __init__(self, message: str, problem: str) -> None:
        super().__init__(message)
        self.problem = problem


class _Report:
    """What a step collects for its result."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.solves: dict[str, SolveInfo] = {}


def _check_arguments(problems: Sequence[Problem], config: EngineConfig, callbacks: Sequence[Callback]) -> None:
    if not isinstance(config, EngineConfig):
        raise ConfigError(
            f"config must be an EngineConfig, not {type(config).__name__}; the method goes to hypergradient="
        )
    for problem in problems:
        if not isinstance(problem, Problem):
            raise GraphError(f"problems must be Problem instances, top level first; got a {type(problem).__name__}")
    if len(problems) < 2:
        raise GraphError(f"an engine needs an outer and an inner problem; got {len(problems)}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks must derive from bilevel.callbacks.Callback; got {callback!r}")


def _worst(infos: Sequence[SolveInfo]) -> SolveInfo:
    return next((info for info in infos if info.status.failed), infos[0])


def _number(metric: Any) -> float:
    return float(metric.detach()) if isinstance(metric, torch.Tensor) else float(metric)
