"""Our engine, driven by Betty's clock: one of its steps is one iteration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bilevel.callbacks import Callback
from bilevel.engine import Engine
from bilevel.errors import CheckpointError
from bilevel.feed import Feed
from bilevel.interop.betty.clock import Clock, Turn
from bilevel.interop.betty.configs import PRECISIONS
from bilevel.interop.betty.dependencies import Declared
from bilevel.interop.betty.iteration import Iteration, LoopStart
from bilevel.interop.betty.level import Level, Pending
from bilevel.interop.betty.patience import Patience
from bilevel.loss_scale import LossScale, LossScaling
from bilevel.problems.differentiate import Differentiator
from bilevel.problems.records import RecordedUpdate
from bilevel.result import StepResult
from bilevel.settings import EngineConfig
from bilevel.step import Step

__all__ = ["Driver"]


class Driver(Engine):
    """Runs iterations.

    Args:
        levels: The problems, each after those above it.
        graph: What was declared of them.
        clock: Whose turn it is.
        config: Our settings.
        callbacks: Watchers.
        told: Called after every turn with what the problem's loss returned.
        patience: The early stopping, whose count is saved with the state.

    Raises:
        GraphError: A loss uses the parameters of a problem to which no dependency leads, or what our engine refuses.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        graph: Declared,
        clock: Clock,
        config: EngineConfig,
        callbacks: Sequence[Callback],
        told: Callable[[Turn, Mapping[str, Any]], None],
        patience: Patience,
    ) -> None:
        self.levels = {level.name: level for level in levels}
        self.clock = clock
        self._graph = graph
        self._told = told
        self._trajectories: dict[str, list[RecordedUpdate]] = {}
        self._starts: dict[str, LoopStart] = {}
        self._checked = False
        super().__init__(levels, config, callbacks=(*callbacks, Carried(self.levels, patience)))

    def step(self, batches: Mapping[str, Any] | None = None) -> StepResult:
        """Runs one iteration."""
        self.clock.move_to(self.step_count)
        return super().step(batches)

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
        super().save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`bilevel.Engine.load`."""
        super().load(path)
        self._trajectories.clear()
        self._starts.clear()
        for name, level in self.levels.items():
            level.epoch = self.streams[name].epoch
        self.clock.move_to(self.step_count)

    def check(self) -> None:
        """Compares what was declared with what the losses use, once that is known.

        Raises:
            GraphError: They differ.
        """
        if not self._checked:
            self._graph.check(self.dependencies)
            self._checked = True

    def _keeps_loop(self, name: str) -> bool:
        level = self.levels[name]
        method = level.hypergradient
        return level.rolls_back or (method is not None and method.needs_trajectory)

    def _precision(self, name: str) -> str:
        return PRECISIONS[self.levels[name].user.config.precision]

    def _loss_scale(self, name: str) -> LossScale:
        config = self.levels[name].user.config
        return LossScale(name, LossScaling(initial=config.initial_dynamic_scale, growth=config.scale_factor))

    def _new_step(self, differentiator: Differentiator, feed: Feed) -> Step:
        self.check()
        plain = super()._new_step(differentiator, feed)
        return Iteration(
            plain.number,
            differentiator,
            plain.config,
            feed,
            plain.records,
            plain.states,
            plain.place,
            plain.show,
            plain.scales,
            trajectories=self._trajectories,
            clock=self.clock,
            levels=self.levels,
            starts=self._starts,
            told=self._told,
        )

    def _step_tables(self) -> tuple[dict[str, Any], ...]:
        pending = (level.pending for level in self.levels.values())
        return (*super()._step_tables(), self._trajectories, self._starts, *pending)


class Carried(Callback):
    """Keeps in checkpoints what is Betty's own: unfinished accumulations, and the count of the early stopping."""

    def __init__(self, levels: Mapping[str, Level], patience: Patience) -> None:
        self._levels = levels
        self._patience = patience

    def state_dict(self) -> dict[str, Any]:
        """Returns sums and counts so far."""
        sums = {}
        for name, level in self._levels.items():
            for pending in level.pending.values():
                parts = None if pending.gradients is None else list(pending.gradients)
                sums[name] = {"count": pending.count, "gradients": parts}
        return {"sums": sums, "best": self._patience.best, "counter": self._patience.counter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes sums and counts back."""
        best, sums = state["best"], state["sums"]
        self._patience.best, self._patience.counter = None if best is None else float(best), int(state["counter"])
        for name, level in self._levels.items():
            level.pending.clear()
            if name in sums:
                parts = sums[name]["gradients"]
                moved = None if parts is None else tuple(g.to(p) for g, p in zip(parts, level.parameters, strict=True))
                level.pending["gradients"] = Pending(moved, int(sums[name]["count"]))
