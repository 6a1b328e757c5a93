"""Random generators.

Replayed between the passes of one derivative, left alone by everything that must change nothing.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["HostGenerators", "Replay", "capture", "generator_devices", "preserved", "restore"]

States = dict[str, Tensor]

_WORDS = 4 * 624 + 4
"""Bytes of a Mersenne twister: its words, and the place in them."""


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
    """The states of NumPy's and Python's global generators, to go back to.

    To ask for them takes some 45 µs, for they make an object of each of 1249 words; most steps draw from neither. So
    their memory is read before, in 2 µs, and they are asked where it has changed since they were last.
    """

    def __init__(self) -> None:
        self._numpy: dict[str, Any] = {}
        self._python: Any = None
        self._seen: tuple[object, ...] | None = None

    def take(self) -> None:
        """Keeps the present states."""
        seen = _memory(np.random.get_state, _bits(), random.getstate) if _is_told() else None
        if seen is None or seen != self._seen:
            # Asked after: what another thread draws in between is in the states, and will be seen.
            self._numpy = np.random.get_state(legacy=False)
            self._python = random.getstate()
            self._seen = seen

    def restore(self) -> None:
        """Puts the generators back into the states that were kept last."""
        np.random.set_state(self._numpy)
        random.setstate(self._python)


_bits: Any = getattr(np.random, "get_bit_generator", None)  # of NumPy 1.24, and not in its stubs


def _memory(
    numpy_state: Callable[..., Any], bits: np.random.BitGenerator, python_state: Callable[[], Any]
) -> tuple[object, ...] | None:
    """Returns all that the states of two Mersenne twisters are made of, as it lies in memory; None where others stand.

    Args:
        numpy_state: The method of NumPy's generator that returns its state.
        bits: What it draws from.
        python_state: As for NumPy.
    """
    numpy, python = (getattr(method, "__self__", None) for method in (numpy_state, python_state))
    if type(numpy) is not np.random.RandomState or type(python) is not random.Random:
        return None
    if type(bits) is not np.random.MT19937:
        return None
    words = ctypes.string_at(bits.ctypes.state_address, _WORDS)
    return words, _body(numpy), _body(python), vars(python)["gauss_next"]


def _body(instance: object) -> bytes:
    """Returns the memory of an instance of a class that is written in C, less what every object has."""
    head = object.__basicsize__
    return ctypes.string_at(id(instance) + head, type(instance).__basicsize__ - head)


@functools.cache
def _is_told() -> bool:
    """Whether this interpreter's generators hold their states where :func:`_memory` looks, by two of our own."""
    if sys.implementation.name != "cpython" or _bits is None:
        return False
    bits = np.random.MT19937(0)
    numpy, python = np.random.RandomState(bits), random.Random(0)
    draws: list[Callable[[], object]] = [numpy.standard_normal] * 2
    draws += [numpy.random_sample, python.random, lambda: python.gauss(0.0, 1.0)]
    seen = [_memory(numpy.get_state, bits, python.getstate)]
    for draw in draws:  # the second normal number comes with the first, and only a mark says that it is gone
        draw()
        seen.append(_memory(numpy.get_state, bits, python.getstate))
    if None in seen or len(set(seen)) < len(seen):
        return False
    words, _, body, _ = seen[-1] or ()
    state, (_, own, _) = bits.state["state"], python.getstate()
    whole = state["key"].tobytes() + np.int32(state["pos"]).tobytes()
    return words == whole and np.array(own[:-1], np.uint32).tobytes() in body  # type: ignore[operator]


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
