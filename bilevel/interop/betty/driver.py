"""Our engine, driven by Betty's clock: one of its steps is one iteration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bilevel.callbacks import Callback
from bilevel.engine import Engine
from bilevel.errors import BilevelError, CheckpointError, ConfigError, LossError
from bilevel.feed import Feed
from bilevel.hypergrad import Estimator
from bilevel.interop.betty.clock import Clock, Turn
from bilevel.interop.betty.configs import PRECISIONS
from bilevel.interop.betty.dependencies import Declared
from bilevel.interop.betty.estimators import BettyMethod
from bilevel.interop.betty.iteration import Iteration, LoopStart
from bilevel.interop.betty.level import Level, Pending
from bilevel.interop.betty.log import flat, is_number
from bilevel.interop.betty.patience import Patience
from bilevel.levels import Dependencies
from bilevel.levels.differentiate import Differentiator
from bilevel.levels.graph import Reading, examine
from bilevel.levels.records import RecordedUpdate
from bilevel.loss_scale import LossScale, LossScaling
from bilevel.notices import Notices
from bilevel.planning import Planner
from bilevel.policy import SolvePolicy
from bilevel.randomness import preserved
from bilevel.result import StepResult
from bilevel.settings import EngineConfig
from bilevel.step import Step

__all__ = ["Driver", "Run"]


@dataclass
class Run:
    """What an engine knows of its present run.

    Attributes:
        patience: The early stopping.
        every: Iterations between validations.
        validate: The engine's validation; None where the user has none.
        start: Iterations that were made before it.
        active: Whether iterations are made by ``run()``, which validates, and not by hand.
    """

    patience: Patience
    every: int = 0
    validate: Callable[[], Mapping[str, Any]] | None = None
    start: int = 0
    active: bool = False


class Driver(Engine):
    """Runs iterations.

    Args:
        levels: The problems, each after those above it.
        graph: What was declared of them.
        clock: Whose turn it is.
        config: Our settings.
        callbacks: Watchers.
        told: Called after every turn with what the problem's loss returned.
        run: What is to be saved of the run.
        around: What a user has around an iteration, which :meth:`iterate` is to be called from; None if nothing.

    Raises:
        GraphError: A loss uses the parameters of a problem to which no dependency leads, or what our engine refuses.
    """

    _fewest = 1  # Betty's programs train a baseline of one problem by the same engine

    def __init__(
        self,
        levels: Sequence[Level],
        graph: Declared,
        clock: Clock,
        config: EngineConfig,
        callbacks: Sequence[Callback],
        told: Callable[[Turn, Mapping[str, Any]], None],
        run: Run,
        around: Callable[[], object] | None = None,
    ) -> None:
        self._around = around
        self._run = run
        self._made: StepResult
        self.present = 0
        self.levels = {level.name: level for level in levels}
        self.clock = clock
        self._graph = graph
        self._told = told
        self._trajectories: dict[str, list[RecordedUpdate]] = {}
        self._starts: dict[str, LoopStart] = {}
        super().__init__(levels, config, callbacks=(Carried(self.levels, run), *callbacks))

    def step(self, batches: Mapping[str, Any] | None = None) -> StepResult:
        """Runs one iteration, with what the user has around it.

        Raises:
            ConfigError: It does not make exactly one iteration.
        """
        if self._around is None or batches is not None:
            return self.iterate(batches)
        before, self.present = self.step_count, self.step_count + 1
        try:
            self._around()
        finally:
            self.present = 0
        if self.step_count != before + 1:
            raise ConfigError(
                f"train_step() made {self.step_count - before} iterations and has to make one: step every lowest "
                "problem in it once, with leaf.step(global_step=self.global_step), or call super().train_step()"
            )
        return self._made

    def iterate(self, batches: Mapping[str, Any] | None = None) -> StepResult:
        """Runs one iteration."""
        self.clock.move_to(self.step_count)
        outside, self.present = self.present, self.step_count + 1
        try:
            self._made = super().step(batches)
            return self._made
        finally:
            self.present = outside
            self.clock.move_to(self.step_count)

    @property
    def devices(self) -> tuple[str, ...]:
        """Where random numbers are drawn."""
        return tuple(self._gradients.devices)

    @property
    def evaluates(self) -> tuple[str, ...]:
        """Whose metrics an evaluation brings: those of ``Engine.validation``."""
        return () if self._run.validate is None else ("validation",)

    def save(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`bilevel.Engine.save`.

        Raises:
            CheckpointError: In the middle of an inner loop whose updates are followed or rolled back: what was kept of
                them is in no file.
        """
        self.clock.move_to(self.step_count)
        within = [name for name in self.clock.open_loops() if self._keeps_loop(name)]
        if within:
            raise CheckpointError(
                f"problem {within[0]!r} is in the middle of an inner loop (iteration {self.step_count}) that is "
                "differentiated update by update or rolled back, and whose updates so far are in no checkpoint: save "
                "where the loop ends, at a multiple of unroll_steps · gradient_accumulation iterations"
            )
        waiting = [name for name in self.clock.waiting() if self._keeps_record(name)]
        if waiting:
            raise CheckpointError(
                f"problem {waiting[0]!r} waits for another one before those above both step (iteration "
                f"{self.step_count}), and what it waits with is in no checkpoint: save after they have stepped"
            )
        super().save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`bilevel.Engine.load`."""
        super().load(path)
        self._trajectories.clear()
        self._starts.clear()
        self.clock.move_to(self.step_count)

    def _keeps_loop(self, name: str) -> bool:
        level = self.levels[name]
        method = level.hypergradient
        followed = method is not None and method.recorded_steps != 1 and bool(self._trajectories.get(name))
        return followed or name in self._starts

    def _keeps_record(self, name: str) -> bool:
        return name not in self._graph.leaves or self.levels[name].accumulate > 1

    def _precision(self, name: str) -> str:
        return PRECISIONS[self.levels[name].user.config.precision]

    def _loss_scale(self, name: str) -> LossScale:
        config = self.levels[name].user.config
        return LossScale(name, LossScaling(initial=config.initial_dynamic_scale, growth=config.scale_factor))

    def _new_planner(self, policy: SolvePolicy) -> Planner:
        default = partial(getattr, self, "hypergradient_method")
        return _Planner(self._graph, self.levels, self._gradients, self.config, policy, default)

    def _new_step(self, differentiator: Differentiator, feed: Feed) -> Step:
        return Iteration(
            **self._step_parts(differentiator, feed),
            trajectories=self._trajectories,
            clock=self.clock,
            levels=self.levels,
            starts=self._starts,
            first_seen=self._first_seen,
            told=self._told,
        )

    def _evaluation_is_due(self) -> bool:
        run = self._run
        return run.active and run.validate is not None and (self.step_count - run.start) % run.every == 0

    def _evaluate_in_step(self, notices: Notices) -> None:
        validate, stats = self._run.validate, dict[str, Any]()
        assert validate is not None
        notices.hook("validation() failed", lambda: stats.update(validate()))
        metrics = {f"validation/{key}": float(value) for key, value in flat(stats).items() if is_number(value)}
        self._tell(notices, "on_evaluate", metrics)

    def _first_seen(self, name: str, batch: Any) -> None:
        planner = self._planner
        assert isinstance(planner, _Planner)
        if name in planner.unread:
            planner.examine(name, batch)

    def _step_tables(self) -> tuple[dict[str, Any], ...]:
        carried = (level.carried for level in self.levels.values())
        return (*super()._step_tables(), self._trajectories, self._starts, *carried)


class _Planner(Planner):
    """Compares what was declared with what the losses use: at once where batches can be looked at early.

    A ``get_batch`` of the user's own cannot be called early without moving on what it draws from, and a loss may need
    what ``on_inner_loop_start`` sets: then the declaration holds, and each loss is looked at in its first turn.
    """

    def __init__(self, graph: Declared, levels: Mapping[str, Level], *arguments: Any) -> None:
        super().__init__(levels, *arguments)
        self._graph = graph
        self._levels = levels
        self.unread: set[str] = set()

    def examine(self, name: str, batch: Any) -> None:
        """Looks at a loss in its first turn.

        Raises:
            GraphError: It uses the parameters of a problem to which no dependency leads.
            ParameterError: It reads parameters past the modules.
            LossError: The problem's method needs second derivatives, and the loss has none.
        """
        assert self._plan is not None
        self.unread.discard(name)
        differentiator, _ = self._plan
        with preserved(self._gradients.devices):
            reading = self._read(name, batch)
        self._graph.warn_of_unused(name, reading.reach)
        reading.check(name, differentiator.dependencies)
        method = differentiator.estimators.get(name)
        if reading.error is not None and method is not None and method.needs_double_backward:
            raise reading.error

    def _check_methods(self, methods: Mapping[str, Estimator], dependencies: Dependencies) -> None:
        super()._check_methods(methods, dependencies)
        for name, method in methods.items():
            if isinstance(method, BettyMethod):
                below, kind = bool(dependencies.lower[name]), type(self._levels[name].optimizer).__name__
                method.check_place(f"problem {name!r}", below=below, optimizer=kind)

    def _dependencies(self, feed: Feed) -> Dependencies:
        # As declared, also where a loss uses less: it may do so later (weights after a warm-up, say).
        graph = self._graph.dependencies()
        if any(level.user.draws_itself for level in self._levels.values()):
            self.unread = set(self._levels)
            return graph
        readings = {}
        for name in self._levels:
            try:
                reading = self._read(name, feed.peek(name))
            except (BilevelError, NotImplementedError):
                raise
            except Exception as error:
                self._levels[name].user.logger.warning(
                    f"The loss of problem {name!r} cannot be evaluated before the first iteration ({error!r}): it is "
                    "looked at then"
                )
                self.unread.add(name)
                continue
            reading.check(name, graph)
            readings[name] = reading
        for name, reading in readings.items():
            self._graph.warn_of_unused(name, reading.reach)
        once = {name: reading.error for name, reading in readings.items() if reading.error is not None}
        return replace(graph, first_derivatives_only=once)

    def _read(self, name: str, batch: Any) -> Reading:
        reading = examine(self._levels[name], list(self._levels.values()), self._gradients.slots, batch)
        self._graph.check_reach(name, reading.reach)
        if not reading.reach:
            raise LossError(
                f"the loss of problem {name!r} depends on the parameters of no problem: nothing would be trained. "
                "Return it without detach() and item(), and not from under torch.no_grad()"
            )
        return reading


class Carried(Callback):
    """Keeps in checkpoints what is Betty's own: unfinished accumulations, epochs, and the counts of the run."""

    def __init__(self, levels: Mapping[str, Level], run: Run) -> None:
        self._levels = levels
        self._run = run

    def state_dict(self) -> dict[str, Any]:
        """Returns sums and counts so far."""
        sums = {}
        for name, level in self._levels.items():
            pending: Pending | None = level.carried.get("pending")
            if pending is not None:
                parts = None if pending.gradients is None else list(pending.gradients)
                sums[name] = {"count": pending.count, "gradients": parts}
        epochs = {name: list(level.carried["epochs"]) for name, level in self._levels.items()}
        patience = self._run.patience
        return {
            "sums": sums,
            "epochs": epochs,
            "start": self._run.start,
            "best": patience.best,
            "counter": patience.counter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes sums and counts back."""
        best, sums = state["best"], state["sums"]
        patience = self._run.patience
        patience.best, patience.counter = None if best is None else float(best), int(state["counter"])
        self._run.start = int(state["start"])
        for name, level in self._levels.items():
            level.carried.clear()
            level.carried["epochs"] = tuple(int(epoch) for epoch in state["epochs"][name])
            if name in sums:
                parts = sums[name]["gradients"]
                moved = None if parts is None else tuple(g.to(p) for g, p in zip(parts, level.parameters, strict=True))
                level.carried["pending"] = Pending(moved, int(sums[name]["count"]))
