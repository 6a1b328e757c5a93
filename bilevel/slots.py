"""Where modules hold parameters and buffers, and what a pass finds there instead of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.vector import Tensors

__all__ = ["BufferValues", "ParameterSlots", "buffers_apart", "buffers_protected", "called_at"]


@dataclass(frozen=True)
class BufferValues:
    """Copies of all buffers at one moment, by module.

    Attributes:
        stamps: Identity and version of each buffer.
        values: The copies.
    """

    stamps: tuple[tuple[tuple[int, int], ...], ...]
    values: tuple[Tensors, ...]


def _held_buffers(module: nn.Module) -> Tensors:
    return tuple(buffer for buffer in module._buffers.values() if buffer is not None)


class ParameterSlots:
    """Where in a set of modules every parameter and buffer is held, each module visited once.

    ``torch.func.functional_call`` on one root would do as well where no two problems share modules; with a module (or a
    part of one) held by two problems it sees the same slot under two names and restores the wrong tensor. Slots are
    keyed by the parameter itself, so tied and shared parameters are swapped everywhere at once, and nothing is walked
    per pass.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        unique = {id(part): part for module in modules for part in module.modules()}.values()
        self._parameters: dict[int, list[tuple[nn.Module, str]]] = {}
        for part in unique:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    self._parameters.setdefault(id(parameter), []).append((part, name))
        self._places: dict[tuple[int, ...], tuple[tuple[int, nn.Module, str], ...]] = {}
        self._with_buffers = tuple(part for part in unique if part._buffers)
        self.has_buffers = bool(self._with_buffers)
        """Whether any module has buffers, which registering one later does not change."""
        self.evaluating = 0
        """How many evaluations of losses are going on."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether some module holds this parameter."""
        return id(parameter) in self._parameters

    def swapped(self, live: Sequence[Tensor], given: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Puts ``given`` in the places of ``live`` parameters; what is there already costs nothing.

        The places hold afterwards what they held before, also where they were swapped then.
        """
        if len(live) != len(given):
            raise ValueError(f"{len(given)} tensors are to take the places of {len(live)} parameters")
        return _Swapped(self._places_of(live), given)

    def _places_of(self, live: Sequence[Tensor]) -> tuple[tuple[int, nn.Module, str], ...]:
        """Returns the slots of parameters, each with the parameter's place in the sequence."""
        key = tuple(map(id, live))
        if key not in self._places:
            self._places[key] = tuple((at, *slot) for at, number in enumerate(key) for slot in self._parameters[number])
        return self._places[key]

    @contextmanager
    def buffers_apart(self) -> Iterator[None]:
        """Lets the body work on copies of all buffers, and then gives the buffers the copies' values."""
        with buffers_apart(self._with_buffers):
            yield

    def buffer_values(self, earlier: BufferValues | None = None) -> BufferValues:
        """Returns copies of all buffers, for :meth:`buffers_protected`.

        A module whose buffers are as they were in ``earlier`` shares the copies. Their versions are looked at first,
        and then their values: autograd is not told of what batch norm does to its statistics, nor of writing through
        ``.data``. Cost: where versions are the same, a comparison in the place of a copy.
        """
        stamps: list[tuple[tuple[int, int], ...]] = []
        values: list[Tensors] = []
        for place, module in enumerate(self._with_buffers):
            held = _held_buffers(module)
            stamps.append(tuple((id(buffer), buffer._version) for buffer in held))
            shared = earlier is not None and earlier.stamps[place] == stamps[place]
            if earlier is not None and shared and all(map(_is_equal, held, earlier.values[place])):
                values.append(earlier.values[place])
            else:
                values.append(tuple(buffer.detach().clone() for buffer in held))
        return BufferValues(tuple(stamps), tuple(values))

    @contextmanager
    def buffers_protected(self, values: BufferValues | None = None) -> Iterator[None]:
        """Lets the body work on copies of all buffers (batch-norm statistics), and drops the copies.

        Args:
            values: What the copies hold; the buffers' present values by default.
        """
        with buffers_protected(self._with_buffers):
            if values is not None:
                for module, kept in zip(self._with_buffers, values.values, strict=True):
                    for buffer, value in zip(_held_buffers(module), kept, strict=True):
                        buffer.detach().copy_(value)
            yield


class _Swapped(AbstractContextManager[None]):
    __slots__ = ("_given", "_moved", "_places")

    def __init__(self, places: Sequence[tuple[int, nn.Module, str]], given: Sequence[Tensor]) -> None:
        self._places = places
        self._given = given
        self._moved: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        try:
            given = self._given
            for at, module, name in self._places:
                table: dict[str, Any] = module._parameters  # ``functional_call`` writes plain tensors there too
                held, tensor = table[name], given[at]
                if held is not tensor:
                    self._moved.append((table, name, held))
                    table[name] = tensor
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for table, name, held in reversed(self._moved):
            table[name] = held


@contextmanager
def buffers_protected(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets the body work on copies of the modules' own buffers, and drops the copies."""
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


@contextmanager
def buffers_apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Lets the body work on copies of the modules' own buffers, and then gives the buffers the copies' values.

    A graph that the body makes holds the copies, so that later passes, which change the buffers in place, leave it
    valid. An expanded buffer, which torch lets nobody change in place, is its own copy.
    """
    kept = [(module, dict(module._buffers)) for module in modules if module._buffers]
    copies = {id(b): b if _is_expanded(b) else b.clone() for _, bs in kept for b in bs.values() if b is not None}
    try:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else copies[id(buffer)]
        yield
    finally:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                current = module._buffers[name]
                if buffer is None or current is None or current is buffer or current is not copies[id(buffer)]:
                    continue  # the body put another tensor there: it stays
                with torch.no_grad():
                    buffer.copy_(current)
                module._buffers[name] = buffer


def _is_equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a copy can stand for a tensor; of sparse ones it is not known, since torch compares not all layouts."""
    return tensor.layout is torch.strided and torch.equal(tensor, copy)


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def called_at(
    module: nn.Module, values: Mapping[str, Tensor], arguments: tuple[Any, ...], named: Mapping[str, Any] | None = None
) -> Any:
    """Calls a module with other tensors in the places of its parameters and buffers, by ``functional_call``.

    Where one module is held in two places, that swaps twice, and puts back first what it found last: the values would
    stay (torch 2.13).

    Args:
        module: The module; it holds afterwards what it held before.
        values: By the names of its parameters and buffers.
        arguments: What it is called with.
        named: Likewise, by keyword.
    """
    tables: list[dict[str, Any]] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    before = [dict(table) for table in tables]
    try:
        return functional_call(module, dict(values), arguments, dict(named or {}))
    finally:
        given = set(map(id, values.values()))
        for table, held in zip(tables, before, strict=True):
            table.update({name: held[name] for name, tensor in table.items() if name in held and id(tensor) in given})
