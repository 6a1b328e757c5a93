"""Random generators.

Replayed between the passes of one derivative, left alone by everything that must change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["HostGenerators", "Replay", "capture", "generator_devices", "preserved", "restore"]

States = dict[str, Tensor]


def generator_devices(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """Returns the devices whose default generators passes over ``tensors`` may draw from; the CPU always."""
    found = {str(tensor.device) for tensor in tensors}
    return ("cpu", *sorted(found - {"cpu", "meta"}))


def capture(devices: Iterable[str]) -> States:
    """Returns the state of each device's default generator."""
    return {
        device: torch.get_rng_state() if device == "cpu" else _module(device).get_rng_state(*_place(device))
        for device in devices
    }


def restore(states: States) -> None:
    """Puts the generators back into ``states``."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            _module(device).set_rng_state(state, *_place(device))


@contextmanager
def preserved(devices: Iterable[str]) -> Iterator[None]:
    """Leaves the generators as they were, whatever the body draws."""
    states = capture(devices)
    try:
        yield
    finally:
        restore(states)


class HostGenerators:
    """The states of NumPy's and Python's global generators, to go back to."""

    def __init__(self) -> None:
        self._numpy: dict[str, Any] = {}
        self._python: Any = None

    def take(self) -> None:
        """Keeps the present states."""
        self._numpy = np.random.get_state(legacy=False)
        self._python = random.getstate()

    def restore(self) -> None:
        """Puts the generators back into the states that were kept last."""
        np.random.set_state(self._numpy)
        random.setstate(self._python)


class Replay:
    """Lets every pass of one derivative draw the same random numbers.

    The first pass draws live, and so advances the generators; each further one starts from the state that the first
    had and leaves the generators where it found them. A ``Replay`` that is given a state starts from it in all passes.
    """

    def __init__(self, devices: Iterable[str], states: States | None = None) -> None:
        self._devices = tuple(devices)
        self._states = states

    def __call__(self) -> AbstractContextManager[None]:
        """Runs the body as one of the passes."""
        return _Pass(self)

    def begin(self) -> States | None:
        """Starts a pass; returns what :func:`restore` needs at its end."""
        if self._states is None:
            self._states = capture(self._devices)
            return None
        before = capture(self._devices)
        restore(self._states)
        return before


class _Pass(AbstractContextManager[None]):
    __slots__ = ("_before", "_replay")

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def __enter__(self) -> None:
        self._before = self._replay.begin()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            restore(self._before)


def _module(device: str) -> Any:
    return torch.get_device_module(device.split(":")[0])


def _place(device: str) -> tuple[str, ...]:
    # torch.mps has one generator and takes no device argument.
    return () if device.startswith("mps") else (device,)
