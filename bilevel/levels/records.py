"""What is kept of updates until the problem above has been updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bilevel.hypergrad import State
from bilevel.levels.step_graph import KeptGraph
from bilevel.optim import Update
from bilevel.randomness import Replay, States
from bilevel.result import Hypergradient, SolveInfo, Status
from bilevel.slots import BufferValues
from bilevel.vector import Tensors

__all__ = ["InnerRecord", "LossGradient", "RecordedUpdate", "Settled"]


@dataclass(frozen=True)
class Settled:
    """A problem below another one, as it was when that one was updated.

    Attributes:
        record: What its response is taken on.
        values: Its parameters' values then.
    """

    record: InnerRecord
    values: Tensors


@dataclass(slots=True)
class RecordedUpdate:
    """One inner update: see :class:`~bilevel.hypergrad.InnerStep`.

    The loss is held as its batches, and the generators' states and the values of all buffers before it, and the outer
    gradient by problem, with how often each of these problems' parameters had been changed in place.

    Attributes:
        first: Whether it is the first update since the problem above was updated.
        below: The problems below, where there are any.
    """

    batches: Sequence[Any]
    generators: States
    inner: Tensors
    memory: Tensors
    update: Update
    buffers: BufferValues
    gradient: Tensors | None = None
    outer_gradient: Mapping[str, Tensors] = field(default_factory=dict)
    graph: KeptGraph | None = None
    outer_versions: Mapping[int, int] = field(default_factory=dict)
    first: bool = False
    below: Mapping[str, Settled] = field(default_factory=dict)


@dataclass
class InnerRecord:
    """What is kept of an inner problem's updates until the problem above is updated.

    Attributes:
        batches: The batches on which the hypergradient takes the inner loss, averaged.
        generators: Generator states to replay, or what replays those that the first pass draws from; None to draw live.
        trajectory: The updates, where the method needs them.
        samples: Further batches, for methods that want separate ones.
    """

    batches: Sequence[Any]
    generators: States | Replay | None = None
    trajectory: list[RecordedUpdate] = field(default_factory=list)
    samples: Sequence[Any] = ()

    def release_graphs(self) -> None:
        """Frees what was kept for the present outer parameters; from here on updates are evaluated again."""
        for step in self.trajectory:
            for settled in step.below.values():
                settled.record.release_graphs()
            step.graph, step.outer_gradient = None, {}


@dataclass(frozen=True)
class LossGradient:
    """A loss and its (total) derivative with respect to its problem's own parameters.

    Attributes:
        value: The loss, detached.
        metrics: Other values that the loss returned.
        gradient: The total derivative.
        direct: The derivative at fixed inner parameters.
        others: The total derivative with respect to other problems' parameters, where it was asked for.
        solves: Reports by inner problem.
        states: New estimator states by inner problem.
        overflow: Whether gradients overflowed in float16: nothing but ``value`` and ``metrics`` means anything then.
        number: The loss as a number, where it was read.
    """

    value: Tensor
    metrics: Mapping[str, Any]
    gradient: Tensors
    direct: Tensors
    others: Mapping[str, Tensors] = field(default_factory=dict)
    solves: Mapping[str, SolveInfo] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    overflow: bool = False
    number: float | None = None

    def as_hypergradient(self, names: Sequence[str]) -> Hypergradient:
        """Returns it as users see it, with the names of the problem's parameters."""
        infos = list(self.solves.values()) or [SolveInfo(Status.NOT_APPLICABLE, message="no problem below takes part")]
        return Hypergradient(
            grad=dict(zip(names, self.gradient, strict=True)),
            direct=dict(zip(names, self.direct, strict=True)),
            info=next((info for info in infos if info.status.failed), infos[0]),
            value=float(self.value) if self.number is None else self.number,
            state=dict(self.states),
        )
