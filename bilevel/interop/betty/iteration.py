"""One iteration: a batch of every lowest problem, and of those above that are due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.faults import Work
from bilevel.interop.betty.clock import Clock, Turn
from bilevel.interop.betty.level import Dated, Level
from bilevel.levels.records import LossGradient
from bilevel.levels.schedule import Round
from bilevel.optimizer_state import Kept
from bilevel.problems import Problem
from bilevel.step import Report, Step

__all__ = ["Iteration", "LoopStart"]


@dataclass
class LoopStart:
    """Where an inner loop began, to go back to.

    Attributes:
        values: Parameters and buffers of the module, each with a copy.
        optimizer: What the optimiser held.
        batches: Those of the last update.
    """

    values: list[tuple[Tensor, Tensor]]
    optimizer: Kept
    batches: list[Any] = field(default_factory=list)


@dataclass
class Iteration(Step):
    """A step of the engine that follows the clock instead of rounds.

    Attributes:
        clock: Says whose turn it is; moved on.
        levels: The problems, by name.
        starts: Where the inner loops began that are to be rolled back, by problem; changed.
        first_seen: Called with a problem's name and every batch of its, before that is used.
        told: Called after every turn with what the problem's loss returned.
    """

    clock: Clock = field(kw_only=True)
    levels: Mapping[str, Level] = field(kw_only=True)
    starts: dict[str, LoopStart] = field(kw_only=True)
    first_seen: Callable[[str, Any], None] = field(kw_only=True)
    told: Callable[[Turn, Mapping[str, Any]], None] = field(kw_only=True)
    instead: ClassVar[str] = ""

    def run(self, whole: Round) -> Report:
        """Makes the turns of one iteration."""
        for turn in self.clock.tick():
            self._take(turn)
        for record in self.records.values():
            record.release_graphs()
        return self.report

    def _take(self, turn: Turn) -> None:
        level = self.levels[turn.name]
        length, period = self.clock.loop(turn)
        if turn.place == 0:
            with self.clock.before(turn):
                level.restart()
            self.trajectories[turn.name] = []
        if level.rolls_back and turn.place == length - period:  # warm-up is behind it, and stays
            self._remember(level)
        if turn.count % level.accumulate:
            return  # the batches of an update are drawn with its last one
        place, count = self._place_to_record(level, turn, length)
        self._count = turn.count - level.accumulate
        self._update([turn.name], place, {turn.name: count})
        self.told(turn, self._values)
        for child in self.clock.children(turn.name):
            if self.levels[child].rolls_back:
                self._roll_back(self.levels[child])

    def _place_to_record(self, level: Level, turn: Turn, length: int) -> tuple[int, int]:
        """Returns which of how many updates this is, for what is recorded of them.

        Where at most one update is followed, each is recorded as if it were the last: one that waits for another
        problem moves on meanwhile.
        """
        method = level.hypergradient
        if method is None or not method.needs_trajectory or method.recorded_steps == 1:
            self.trajectories[turn.name] = []
            return level.steps - 1, level.steps
        # A list of this iteration's own: where it is undone, the one before is as it was.
        self.trajectories[turn.name] = list(self.trajectories[turn.name])
        return turn.place // level.accumulate, length // level.accumulate

    def _check_and_update(self, problem: Problem, result: LossGradient) -> None:
        self._values = {"loss": result.value.item(), **result.metrics}
        overflows = self.report.overflows.get(problem.name, 0)
        super()._check_and_update(problem, result)
        if self.report.overflows.get(problem.name, 0) > overflows:
            self.levels[problem.name].leave_out(self._values)

    def _draw_for_products(self, names: Sequence[str]) -> None:
        kept, count = dict(self.starts), self._count
        super()._draw_for_products(names)
        self.starts.update(kept)  # these batches are not those of an update
        self._count = count

    def _next(self, name: str) -> Any:
        level = self.levels[name]
        batch = self._drawn(level) if level.user.draws_itself else super()._next(name)
        level.begin_epoch(self.feed.stream(name), batch)
        self.first_seen(name, batch)
        self._count += 1
        batch = Dated(batch, self._count, self.number + 1)
        if name in self.starts:
            kept = self.starts[name]
            self.starts[name] = LoopStart(
                kept.values, kept.optimizer, [*kept.batches, batch][-level.batches_an_update :]
            )
        return batch

    def _drawn(self, level: Level) -> Any:
        """Returns a batch of the user's own, drawn with the generators that losses draw from, as in Betty."""
        with self._activity(Work.DATA, level.name):
            return level.user.get_batch()

    def _remember(self, level: Level) -> None:
        module = level.module
        live = [*level.parameters, *module.buffers()]
        assert level.optimizer is not None
        self.starts[level.name] = LoopStart(
            [(tensor, tensor.detach().clone()) for tensor in live], Kept(level.optimizer, None, module.modules())
        )

    def _roll_back(self, level: Level) -> None:
        """Takes the loop's updates back, and makes the last one again."""
        start = self.starts[level.name]
        with torch.no_grad():
            for tensor, kept in start.values:
                tensor.copy_(kept)
        start.optimizer.restore()
        losses, norms = dict(self.report.losses), dict(self.report.norms)
        for place in range(0, len(start.batches), level.accumulate):
            batches = start.batches[place : place + level.accumulate]
            try:
                result = self.differentiator.total(level, batches, self.records, self.states, self._responding())
            except NonFiniteError as error:
                raise self._refusal(level, str(error)) from error
            self._check_and_update(level, result)
        assert level.stepper is not None
        level.stepper.advance_scheduler(self._values)
        self.report.losses, self.report.norms = losses, norms
        del self.starts[level.name]
