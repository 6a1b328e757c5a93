"""What an optimiser and a scheduler hold: kept in memory for the length of a step, or as data for a file."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from bilevel.stepper import Scheduler

__all__ = ["Copies", "Kept", "alike", "forms", "load_scheduler_state", "once", "scheduler_state"]

_CONSTANTS = frozenset((type(None), bool, int, float, str))


def alike(left: Tensor, right: Tensor) -> bool:
    """Whether one tensor can be copied into the other without a change of either's form."""
    return (
        left.dtype is right.dtype
        and left.shape == right.shape
        and left.layout is right.layout
        and left.device == right.device
    )


def forms(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Returns what :func:`alike` compares, of several tensors."""
    return [(tensor.dtype, tensor.shape, tensor.layout, tensor.device) for tensor in tensors]


def once(into: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both without the entries in which an expanded tensor repeats others: torch writes to none with repeats.

    Args:
        into: What is to be written to.
        value: What it held: of its shape, and with the same repeats.
    """
    if into.layout is torch.strided and 0 in into.stride():
        into, value = into.detach(), value.detach()
        for dimension, (size, stride) in enumerate(zip(into.shape, into.stride(), strict=True)):
            if stride == 0 and size > 1:
                into, value = into.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    return into, value


class Copies:
    """Copies of tensors into others that are :func:`alike`, to be made in one call for each device."""

    def __init__(self) -> None:
        self._into: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, into: Tensor, value: Tensor) -> None:
        """Adds a copy."""
        self._into.append(into)
        self._values.append(value)

    def add_all(self, into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Adds several."""
        self._into += into
        self._values += values

    def make(self) -> None:
        """Makes them."""
        devices = {tensor.device for tensor in self._into}
        with torch.set_grad_enabled(False):  # half the calls of ``no_grad()``
            if len(devices) == 1:
                torch._foreach_copy_(self._into, self._values)
                return
            for device in devices:
                here = [pair for pair in zip(self._into, self._values, strict=True) if pair[0].device == device]
                into, values = zip(*here, strict=True)
                torch._foreach_copy_(into, values)


class Kept:
    """The state of an optimiser and its scheduler now, to go back to.

    Args:
        optimizer: The optimiser.
        scheduler: Its scheduler, if any.
        shared: Objects that callables of the scheduler may hold and that are not part of its state, modules say: they
            are not copied. The optimiser and its parameters are among them always.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Scheduler | None, shared: Iterable[object] = ()) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._state: dict[Any, Any] = {}
        self.take(shared)

    def take(self, shared: Iterable[object] = (), copies: Copies | None = None) -> None:
        """Keeps the state as it is now, in the tensors that held the one before: fresh memory costs several times that.

        Args:
            shared: As for the class.
            copies: Where copies of tensors are added, for the caller to make; they are made here without it.
        """
        self._others: Iterable[object] = shared
        self._shared: dict[int, object] = {}
        self._copies = Copies() if copies is None else copies
        if not self._again(self._optimizer.state):
            self._state = self._copied(dict(self._optimizer.state), self._state)
        self._groups = [(group, self._settings(group)) for group in self._optimizer.param_groups]
        self._schedule = None if self._scheduler is None else self._copied(self._scheduler.state_dict())
        if copies is None:
            self._copies.make()

    def _settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        settings = dict(group)
        del settings["params"]
        for key, value in settings.items():
            if type(value) not in _CONSTANTS:
                settings[key] = self._copied(value)
        return settings

    def _again(self, state: Mapping[Any, Any]) -> bool:
        """Adds the copies where the state is one of tensors as when it was last kept: what most steps find."""
        if len(state) != len(self._state):
            return False
        into: list[Any] = []
        values: list[Any] = []
        # In the order of their making: to look a tensor up takes a call of Python for its hash.
        for (parameter, slots), (same, kept) in zip(state.items(), self._state.items(), strict=True):
            if parameter is not same or type(slots) is not dict or type(kept) is not dict or [*slots] != [*kept]:
                return False
            into += kept.values()
            values += slots.values()
        tensors = set(map(type, into)) <= {Tensor} and all(issubclass(kind, Tensor) for kind in set(map(type, values)))
        if not tensors or forms(into) != forms(values):
            return False
        self._copies.add_all(into, values)
        return True

    def restore(self) -> None:
        """Puts everything back; tensors in place."""
        if self._scheduler is not None:
            # First, because GreedyLR sets learning rates here.
            load_scheduler_state(self._scheduler, self._copied(self._schedule))
        self._put_parts(self._optimizer.state, self._state)
        for group, settings in self._groups:
            self._put_parts(group, {"params": group["params"], **settings})

    def _put_parts(self, live: dict[Any, Any], kept: Mapping[Any, Any]) -> None:
        for key in [key for key in live if key not in kept]:
            del live[key]
        for key, part in kept.items():
            if key not in live or live[key] is not part:
                live[key] = self._put(live.get(key), part)

    def _put(self, live: Any, kept: Any) -> Any:
        if isinstance(kept, dict) and isinstance(live, dict):
            self._put_parts(live, kept)
            return live
        if isinstance(kept, Tensor) and isinstance(live, Tensor) and alike(live, kept):
            place, value = once(live, kept)
            with torch.no_grad():
                place.copy_(value)
            return live
        return self._copied(kept)

    def _copied(self, value: Any, into: Any = None) -> Any:
        """Returns a copy, whose tensors are those of ``into`` where they fit and :meth:`take` then copies into them."""
        kind = type(value)
        if kind in _CONSTANTS or (kind is tuple and all(type(part) in _CONSTANTS for part in value)):
            return value
        if isinstance(value, Tensor):
            if type(into) is not Tensor or not alike(into, value):
                return value.detach().clone()
            self._copies.add(into, value)
            return into
        if kind is dict:
            old = into if isinstance(into, dict) else {}
            return {key: self._copied(part, old.get(key)) for key, part in value.items()}
        if not self._shared:
            held = (p for group in self._optimizer.param_groups for p in group["params"])
            self._shared = {id(part): part for part in (self._optimizer, *held, *self._others)}
        return copy.deepcopy(value, dict(self._shared))


def scheduler_state(scheduler: Scheduler) -> dict[str, Any]:
    """Returns a scheduler's state in containers of its own, which a checkpoint can hold."""
    state = _plain(scheduler.state_dict())
    assert isinstance(state, dict)
    return state


def load_scheduler_state(scheduler: Scheduler, state: Mapping[str, Any]) -> None:
    """Gives a scheduler the state that :func:`scheduler_state` returned, and leaves ``state`` as it is.

    Some schedulers take apart what they are given (``CyclicLR``); others need containers of the kind they had
    (``MultiStepLR`` counts its milestones).
    """
    scheduler.load_state_dict({key: _like(scheduler.state_dict().get(key), part) for key, part in state.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _like(live: Any, saved: Any) -> Any:
    """Returns the saved value in containers of its own; where the live one is a counter, so is this."""
    if isinstance(saved, Mapping):
        parts: Mapping[Any, Any] = live if isinstance(live, Mapping) else {}
        made = {key: _like(parts.get(key), part) for key, part in saved.items()}
        return Counter(made) if isinstance(live, Counter) else made
    if isinstance(saved, list):
        old = live if isinstance(live, list) and len(live) == len(saved) else [None] * len(saved)
        return [_like(*pair) for pair in zip(old, saved, strict=True)]
    return saved
