"""Random generators that a stream has for itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Generators"]


class Generators:
    """States of torch's CPU generator, NumPy's and Python's, and of those that the user gave to a loader."""

    def __init__(self, states: tuple[Tensor, Any, Any], own: tuple[Tensor, ...] = ()) -> None:
        self._states = states
        self._own = own

    @classmethod
    def seeded(cls, seed: int) -> Generators:
        """Makes the states that follow from a seed."""
        generator = torch.Generator().manual_seed(seed)
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        return cls((generator.get_state(), numpy_state, random.Random(seed).getstate()))

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Generators:
        """Makes what :meth:`state_dict` described."""
        kind, keys, position, has_gauss, gauss = state["numpy"]
        version, internal, gauss_next = state["python"]
        numpy_state = (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
        return cls((state["torch"], numpy_state, (version, tuple(internal.tolist()), gauss_next)), tuple(state["own"]))

    def state_dict(self) -> dict[str, Any]:
        """Returns the states as tensors, numbers and strings."""
        torch_state, numpy_state, python_state = self._states
        kind, keys, position, has_gauss, gauss = numpy_state
        version, internal, gauss_next = python_state
        return {
            "torch": torch_state,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
            "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
            "own": list(self._own),
        }

    def copy(self) -> Generators:
        """Returns generators that go on from here independently."""
        return Generators(self._states, self._own)

    def seed(self) -> int:
        """Draws a seed."""
        with self.installed():
            return int(torch.randint(2**62, ()))

    def seed_own(self, own: Sequence[torch.Generator]) -> None:
        """Draws new states for generators that belong to the user; :meth:`installed` puts them in."""
        seeds = [self.seed() for _ in own]
        self._own = tuple(
            torch.Generator(device=generator.device).manual_seed(seed).get_state()
            for generator, seed in zip(own, seeds, strict=True)
        )

    @contextmanager
    def installed(self, own: Sequence[torch.Generator] = ()) -> Iterator[None]:
        """Makes these the global generators, and those of ``own``, for the body; keeps what it leaves them in."""
        outside, own_outside = _current(), [generator.get_state() for generator in own]
        _install(self._states, own, self._own)
        try:
            yield
        finally:
            self._states = _current()
            if own:
                self._own = tuple(generator.get_state() for generator in own)
            _install(outside, own, own_outside)


def _current() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _install(states: tuple[Tensor, Any, Any], own: Sequence[torch.Generator], own_states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    for generator, state in zip(own, own_states, strict=bool(own)):
        generator.set_state(state)
