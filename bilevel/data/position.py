"""Where a stream stands in its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel.data.encoding import decode, encode
from bilevel.data.generators import Generators

__all__ = ["Anchor", "Position"]


@dataclass(frozen=True, eq=False)
class Anchor:
    """A loader's own state, from which it goes on without drawing what came before."""

    at: Position
    """Where it was taken; without an anchor itself."""
    generators: Generators
    loader: dict[str, Any]
    num_workers: int

    def state_dict(self, where: str) -> dict[str, Any]:
        """Returns what a checkpoint can hold.

        Raises:
            CheckpointError: The loader's state holds something that a checkpoint cannot.
        """
        return {
            "at": self.at.state_dict(where),
            "random": self.generators.state_dict(),
            "loader": encode(self.loader, where),
            "num_workers": self.num_workers,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Anchor:
        """Makes what :meth:`state_dict` described."""
        at, generators = Position.from_state_dict(state["at"]), Generators.from_state_dict(state["random"])
        return cls(at, generators, decode(state["loader"]), int(state["num_workers"]))


@dataclass(frozen=True, eq=False)
class Position:
    """A place between two batches.

    It is found again by beginning the epoch with the generators that it began with, and passing over the batches that
    had been taken; or, where there is an anchor, in this epoch or the one before, by passing over those since.
    """

    epoch: int
    """How many epochs came before this one."""
    taken: int
    """How many of this epoch's batches have been taken."""
    drawn: int
    """How many batches have been taken since the beginning of the first epoch."""
    start: Generators
    anchor: Anchor | None = None

    def from_where(self) -> Position:
        """Returns the position that this one is reached from."""
        if self.anchor is not None:
            return self.anchor.at
        return Position(self.epoch, 0, self.drawn - self.taken, self.start)

    def after_one(self) -> Position:
        """Returns the position after one more batch of the epoch."""
        return Position(self.epoch, self.taken + 1, self.drawn + 1, self.start, self.anchor)

    def state_dict(self, where: str) -> dict[str, Any]:
        """Returns what a checkpoint can hold.

        Raises:
            CheckpointError: The loader's state holds something that a checkpoint cannot.
        """
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "drawn": self.drawn,
            "random": self.start.state_dict(),
            "anchor": None if self.anchor is None else self.anchor.state_dict(where),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Position:
        """Makes what :meth:`state_dict` described."""
        start = Generators.from_state_dict(state["random"])
        anchor = None if state["anchor"] is None else Anchor.from_state_dict(state["anchor"])
        return cls(int(state["epoch"]), int(state["taken"]), int(state["drawn"]), start, anchor)
