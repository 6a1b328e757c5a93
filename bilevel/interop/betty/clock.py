"""Who steps when: Betty's counting, apart from what a step does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from bilevel.interop.betty.dependencies import Declared

__all__ = ["Clock", "Pace", "Turn"]


@dataclass(frozen=True)
class Pace:
    """How often the problems above one step.

    Attributes:
        period: Steps of the problem for one step of those above it: ``unroll_steps · gradient_accumulation``.
        warmup: Its steps after which those above may step at all.
    """

    period: int
    warmup: int


@dataclass(frozen=True)
class Turn:
    """One step of a problem.

    Attributes:
        name: The problem.
        count: Its steps so far, this one included.
        place: Its steps since the problems above it last stepped, this one not included: 0 begins an inner loop.
    """

    name: str
    count: int
    place: int


class Clock:
    """Steps of all problems, iteration by iteration: a function of the number of iterations alone.

    In an iteration every problem with none below it makes one step. After a step whose count is a multiple of the
    problem's period, and beyond its warm-up, each problem above is told; it steps once all those below it have told it.

    Args:
        graph: Who is above whom.
        paces: By problem.
    """

    def __init__(self, graph: Declared, paces: Mapping[str, Pace]) -> None:
        self._graph = graph
        self._paces = paces
        self._begin()

    def _begin(self) -> None:
        self.iteration = 0
        self._ticking = False
        self.counts = dict.fromkeys(self._graph.names, 0)
        self._places = dict.fromkeys(self._graph.names, 0)
        self._told: dict[str, set[str]] = {name: set() for name in self._graph.names}

    def move_to(self, iteration: int) -> None:
        """Goes to where the clock stands after a number of iterations, by going through them."""
        if self._ticking or iteration < self.iteration:
            self._begin()
        while self.iteration < iteration:
            for _ in self.tick():
                pass

    def tick(self) -> Iterator[Turn]:
        """Yields the steps of the next iteration, each before the problems above it are told.

        Every turn must be taken from the iterator for the iteration to count; where that does not happen,
        :meth:`move_to` finds the way back.
        """
        self._ticking = True
        for leaf in self._graph.leaves:
            yield from self._turn(leaf)
        self.iteration += 1
        self._ticking = False

    def loop(self, turn: Turn) -> tuple[int, int]:
        """Returns the length of the inner loop in which a turn is, and how many of its steps are no warm-up."""
        pace = self._paces[turn.name]
        first = (pace.warmup // pace.period + 1) * pace.period
        return (first if turn.count <= first else pace.period), pace.period

    @contextmanager
    def before(self, turn: Turn) -> Iterator[None]:
        """Lets the body see the problem's count without this turn."""
        self.counts[turn.name] -= 1
        try:
            yield
        finally:
            self.counts[turn.name] += 1

    def children(self, name: str) -> tuple[str, ...]:
        """Returns the problems that step before one."""
        return self._graph.children[name]

    def open_loops(self) -> list[str]:
        """Returns the problems that stand within an inner loop."""
        return [name for name, place in self._places.items() if place > 0]

    def waiting(self) -> list[str]:
        """Returns the problems that have told one above, which waits for another one."""
        return list(dict.fromkeys(name for told in self._told.values() for name in told))

    def _turn(self, name: str) -> Iterator[Turn]:
        if len(self._told[name]) < len(self._graph.children[name]):
            return
        self.counts[name] += 1
        yield Turn(name, self.counts[name], self._places[name])
        self._places[name] += 1
        pace = self._paces[name]
        if self.counts[name] % pace.period == 0 and self.counts[name] > pace.warmup:
            self._places[name] = 0
            for parent in self._graph.parents[name]:
                self._told[parent].add(name)
                yield from self._turn(parent)
        self._told[name] = set()
