"""The state before a step, to go back to where the step is refused."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bilevel.data import BatchStream
from bilevel.functional import PassCount
from bilevel.loss_scale import LossScale
from bilevel.optimizer_state import Copies, Kept, forms, once
from bilevel.problems import Problem
from bilevel.randomness import HostGenerators, States, capture, restore

__all__ = ["Snapshot"]

_trains = operator.attrgetter("requires_grad")


@dataclass
class _Taken:
    """What one step may change, beside tensors."""

    updates: list[int]
    buffers: list[dict[str, Tensor | None]]
    modes: list[bool]
    trainable: list[bool]
    scales: dict[str, dict[str, Any]]
    tables: list[tuple[dict[str, Any], dict[str, Any]]]
    passes: PassCount
    generators: States


class Snapshot:
    """Copies of all that a step may change, taken again before every step.

    Parameters that nobody owns are not copied.

    Args:
        problems: Whose state.
        modules: All their modules.
        devices: Where losses draw random numbers.
        streams: The problems' data.
        scales: Loss scales.
        passes: The count of passes.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        modules: Iterable[nn.Module],
        devices: Sequence[str],
        streams: Mapping[str, BatchStream],
        scales: Mapping[str, LossScale],
        passes: PassCount,
    ) -> None:
        self._problems = problems
        self._modules = tuple(modules)
        self._with_buffers = tuple(module for module in self._modules if module._buffers)
        self._devices = devices
        self._streams = streams
        self._scales = scales
        self._passes = passes
        self._owned = [p for problem in problems for p in problem.parameters]
        self._live: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._forms: list[tuple[Any, ...]] = []
        self._optimizers: dict[str, Kept] = {}
        self._host = HostGenerators()
        self._taken: _Taken | None = None

    def take(self, tables: Sequence[dict[str, Any]]) -> None:
        """Copies the state as it is now.

        Args:
            tables: Further state that a step changes, by name: their entries are kept, not copied; those that are
                dictionaries are copied.
        """
        self._taken, copies = None, Copies()
        self._copy_tensors(copies)
        self._copy_optimizers(copies)
        copies.make()
        self._host.take()
        for stream in self._streams.values():
            stream.mark()
        self._taken = _Taken(
            [problem.num_updates for problem in self._problems],
            [dict(module._buffers) for module in self._with_buffers],
            [module.training for module in self._modules],
            list(map(_trains, self._owned)),
            {name: scale.state_dict() for name, scale in self._scales.items()},
            [(table, _copied(table)) for table in tables],
            self._passes.copy(),
            capture(self._devices),
        )

    def drop(self) -> None:
        """Lets go of what a step that went well no longer needs."""
        self._taken = None

    def restore(self, *, data_moves_on: bool = False) -> None:
        """Puts everything back, in place.

        Args:
            data_moves_on: Leave the data and the generators where they are: the same draws would lead to the same end.
        """
        taken = self._taken
        if taken is None:  # it was not completed: nothing has changed since
            return
        for module, buffers in zip(self._with_buffers, taken.buffers, strict=True):
            module._buffers.clear()
            module._buffers.update(buffers)
        for p, trainable in zip(self._owned, taken.trainable, strict=True):
            p.requires_grad_(trainable)
        copies = Copies()
        for live, kept in zip(self._live, self._kept, strict=True):
            copies.add(*once(live, kept))
        copies.make()
        for state in self._optimizers.values():
            state.restore()
        for problem, updates in zip(self._problems, taken.updates, strict=True):
            problem.num_updates = updates
        for module, training in zip(self._modules, taken.modes, strict=True):
            module.training = training
        for name, scale in taken.scales.items():
            self._scales[name].load_state_dict(scale)
        for table, before in taken.tables:
            table.clear()
            table.update(before)
        self._passes.forward, self._passes.backward = taken.passes.forward, taken.passes.backward
        if not data_moves_on:
            for stream in self._streams.values():
                stream.rewind()
            restore(taken.generators)
            self._host.restore()
        self.drop()

    def _copy_tensors(self, copies: Copies) -> None:
        """Copies parameters and buffers into tensors that stay: fresh memory costs several times the copy."""
        live = _with_buffers(self._owned, self._with_buffers) if self._with_buffers else self._owned
        same = len(live) == len(self._live) and all(map(operator.is_, live, self._live))
        present = forms(live)
        if not same or present != self._forms:
            self._live, self._kept = live, [tensor.detach().clone() for tensor in live]
            self._forms = present
            return
        copies.add_all(self._kept, live)

    def _copy_optimizers(self, copies: Copies) -> None:
        """As for parameters."""
        for problem in self._problems:
            if problem.name in self._optimizers:
                self._optimizers[problem.name].take(problem.module.modules(), copies)
            elif problem.optimizer is not None:
                modules = problem.module.modules()
                self._optimizers[problem.name] = Kept(problem.optimizer, problem.scheduler, modules)


def _with_buffers(parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> list[Tensor]:
    found = {id(p): p for p in parameters}
    for module in modules:
        found.update({id(b): b for b in module._buffers.values() if b is not None})
    return list(found.values())


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(entry) if isinstance(entry, dict) else entry for name, entry in table.items()}
