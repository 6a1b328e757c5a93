"""Training passes: a problem's loss and its gradient at fixed parameters of all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.faults import Activity, Work
from bilevel.functional import PassCount, Reduce, dense_gradient, derivatives, gradients_on
from bilevel.levels.metrics import mean_metrics
from bilevel.loss_scale import LossScale
from bilevel.problems.base import Problem
from bilevel.randomness import generator_devices
from bilevel.slots import ParameterSlots
from bilevel.vector import Tensors

__all__ = ["Gradients", "Taken"]


@dataclass(frozen=True)
class Taken:
    """A training pass over one batch or several.

    Attributes:
        value: The loss, detached.
        metrics: Other values that the loss returned.
        parts: The gradient by problem.
        found: The same as autograd returned it, None for parameters that the loss does not depend on.
        overflow: Whether gradients overflowed in float16: the update is to be left out.
    """

    value: Tensor
    metrics: Mapping[str, Any]
    parts: Mapping[str, Tensors]
    found: Mapping[str, Sequence[Tensor | None]]
    overflow: bool = False

    @property
    def reached(self) -> frozenset[str]:
        """The problems whose parameters the loss depends on."""
        return frozenset([name for name, part in self.found.items() if any(map(_is_there, part))])


class Gradients:
    """Takes training passes.

    Args:
        problems: By name, top level first.
        slots: Where their modules hold parameters.
        passes: Where passes are counted.
        reduce: The mean over data-parallel ranks, or nothing.
        activity: Told what is going on.
        autocast: Makes the context for a problem's training passes, from its name.
        scales: Loss scales by problem, where training passes are in float16.
    """

    def __init__(
        self,
        problems: Mapping[str, Problem],
        slots: ParameterSlots,
        passes: PassCount,
        reduce: Reduce,
        activity: Activity,
        autocast: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
        scales: Mapping[str, LossScale] | None = None,
    ) -> None:
        self.problems = problems
        self.slots = slots
        self.passes = passes
        self.reduce = reduce
        self.activity = activity
        self._autocast = autocast
        self._scales = scales or {}
        self.devices = generator_devices(p for problem in problems.values() for p in problem.parameters)
        self._joined: dict[tuple[str, ...], Tensors] = {}
        self._sizes = {name: len(problem.parameters) for name, problem in problems.items()}

    def take(self, problem: Problem, batches: Sequence[Any], names: Sequence[str]) -> Taken:
        """Returns a problem's loss and its gradient for the parameters of the problems in ``names``.

        Cost: 1 forward and 1 backward pass a batch.
        """
        inputs = self.parameters(names)
        value, more, total = self._one(problem, batches[0], inputs)
        count = len(batches)
        if count > 1:
            values, metrics = [value], [more]
            for batch in batches[1:]:
                value, more, grads = self._one(problem, batch, inputs)
                values.append(value)
                metrics.append(more)
                pairs = zip(total, grads, strict=True)
                total = [b if a is None else a if b is None else a + b for a, b in pairs]
            value, more = torch.stack(values).mean(), mean_metrics(metrics)
        flat, overflow = self.reduce(dense_gradient(total, inputs)), False
        scale = self._scales.get(problem.name)
        if scale is not None:
            unscaled = scale.unscaled(flat)
            flat, overflow = (flat, True) if unscaled is None else (unscaled, False)
        if count > 1:
            flat = tuple(part / count for part in flat)
        return Taken(value, more, self.split(flat, names), self.split(total, names), overflow)

    def autocasts(self, name: str) -> bool:
        """Whether a problem's training passes run under autocast, the engine's or the user's."""
        with self._autocast(name):
            return any(torch.is_autocast_enabled(device.partition(":")[0]) for device in self.devices)

    def split(self, flat: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        """Returns the parts of a vector over the parameters of several problems."""
        if len(names) == 1:
            return {names[0]: flat}
        parts, start = {}, 0
        for name in names:
            stop = start + self._sizes[name]
            parts[name], start = flat[start:stop], stop
        return parts

    def parameters(self, names: Sequence[str]) -> Tensors:
        """Returns the parameters of problems, which own the same ones always."""
        key = tuple(names)
        if key not in self._joined:
            self._joined[key] = tuple([p for name in key for p in self.problems[name].parameters])
        return self._joined[key]

    def _one(
        self, problem: Problem, batch: Any, inputs: Tensors
    ) -> tuple[Tensor, Mapping[str, Any], Sequence[Tensor | None]]:
        with self.activity(Work.FORWARD, problem.name), gradients_on(), self._autocast(problem.name):
            value, metrics = problem.evaluate_loss(batch)
        self.passes.forward += 1
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if value.requires_grad:
            scale = self._scales.get(problem.name)
            with self.activity(Work.BACKWARD, problem.name):
                scaled = value if scale is None else scale.scaled(value)
                grads = derivatives(scaled, inputs, name=f"problem {problem.name!r}")
            self.passes.backward += 1
        return value.detach(), metrics, grads


def _is_there(grad: Tensor | None) -> bool:
    return grad is not None
