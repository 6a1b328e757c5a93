"""What a stream draws from: something that can be iterated epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from bilevel.data.generators import Generators

__all__ = ["Source"]


class Source:
    """An iterable of batches.

    Args:
        batches: The user's object.
    """

    num_workers: int = 0
    """Processes that load."""
    keeps_state: bool = False
    """Whether :meth:`state` says where the iterator stands."""
    keeps_state_at_start: bool = False
    """Whether it does so before an epoch's first batch."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        # An iterator gives what it gives once: it is never begun again.
        self.restartable = not isinstance(batches, Iterator)
        # A sequence draws nothing while it is iterated.
        self.draws = not isinstance(batches, Sequence)
        self.own_generators: tuple[torch.Generator, ...] = ()

    def begin(self, epoch: int, generators: Generators, state: dict[str, Any] | None = None) -> Iterator[Any]:
        """Returns an iterator over an epoch.

        Args:
            epoch: How many epochs came before.
            generators: What it draws with; advanced.
            state: What :meth:`state` returned, to go on from there.
        """
        if not self.draws:
            return iter(self.batches)
        with generators.installed():
            return iter(self.batches)

    def advance(self, iterator: Iterator[Any], generators: Generators, end: object) -> Any:
        """Returns the next batch, or ``end`` after the last one."""
        if not self.draws:
            return next(iterator, end)
        with generators.installed(self.own_generators):
            return next(iterator, end)

    def state(self) -> dict[str, Any]:
        """Returns where the present iterator stands; to be taken between two batches."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    def abandon(self) -> None:
        """Forgets the present iterator, which is broken or no longer wanted."""

    def caveat(self, epoch: int) -> str:
        """Returns why batches may differ where this epoch is begun again; empty if they cannot."""
        return ""
