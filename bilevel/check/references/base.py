"""What references are computed of: nested losses in float64, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.functional import Evaluate, Objective, dense_gradient, derivatives, leaves
from bilevel.precision import DoublePrecision
from bilevel.vector import Tensors, add

__all__ = ["Level", "Nested", "PreciseObjective", "Precision", "ReferenceValue", "accumulate", "outer_gradients"]

T = TypeVar("T")


@dataclass
class Precision:
    """How a reference evaluates losses.

    Attributes:
        original: The dtype in which the user's losses normally run.
        double: Whether to run them in float64.
        forced: Functions that computed in lower precision nonetheless.
    """

    original: torch.dtype
    double: bool = True
    forced: dict[str, None] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the reference."""
        return torch.float64 if self.double else self.original

    @property
    def effective(self) -> torch.dtype:
        """The dtype that its numbers are good for."""
        return self.original if self.forced else self.dtype

    def leaves(self, tensors: Tensors) -> Tensors:
        """Returns the tensors as new leaves in the reference's dtype."""
        return leaves([part.detach().to(torch.float64) for part in tensors] if self.double else tensors)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context of one evaluation. Attention takes the back end that has second derivatives."""
        with sdpa_kernel(SDPBackend.MATH):
            if not self.double:
                yield
                return
            mode = DoublePrecision(self.original)
            try:
                with mode:
                    yield
            finally:
                self.forced.update(mode.forced)


class PreciseObjective(Objective):
    """An objective whose evaluations run in the reference's precision."""

    def __init__(self, objective: Objective, precision: Precision) -> None:
        super().__init__(objective.name, objective.replay, objective.passes, objective.reduce)
        self._objective = objective
        self._precision = precision

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`."""

        def precise(evaluate: Evaluate) -> T:
            def once() -> tuple[Tensor, Tensors]:
                with self._precision():
                    return evaluate.with_outputs()

            return body(Evaluate(once))

        return self._objective.within(inner, outer, precise)


@dataclass(frozen=True)
class Level:
    """One inner problem.

    Attributes:
        name: Its name.
        objective: f, of its own variables and those of the levels in ``above``, in that order.
        inner: Its own variables.
        names: Their names.
        above: The levels to whose variables it responds.
    """

    name: str
    objective: Objective
    inner: Tensors
    names: tuple[str, ...]
    above: tuple[str, ...]


@dataclass(frozen=True)
class Nested:
    """An outer problem and the inner ones below it.

    Attributes:
        name: Name of the outer level.
        objective: F, of the variables of all ``levels``, in that order, and the outer ones.
        outer: The outer variables.
        names: Their names.
        levels: The inner problems, each before those to which it is ``above``: the lowest first.
    """

    name: str
    objective: Objective
    outer: Tensors
    names: tuple[str, ...]
    levels: tuple[Level, ...]

    @property
    def point(self) -> dict[str, Tensors]:
        """The variables by level."""
        return {self.name: self.outer, **{level.name: level.inner for level in self.levels}}

    def above(self, level: Level, point: Mapping[str, Tensors]) -> Tensors:
        """Returns what a level responds to, at a point."""
        return tuple(part for name in level.above for part in point[name])

    def below(self, point: Mapping[str, Tensors]) -> Tensors:
        """Returns the variables of all inner problems, at a point."""
        return tuple(part for level in self.levels for part in point[level.name])

    def value(self, point: Mapping[str, Tensors]) -> float:
        """Returns F at a point."""
        below = self.below(point)
        value = self.objective.within(below, point[self.name], lambda evaluate: evaluate().detach())
        return float(self.objective.reduce((value,))[0])

    @property
    def size(self) -> int:
        """The number of outer variables."""
        return sum(part.numel() for part in self.outer)


@dataclass(frozen=True)
class ReferenceValue:
    """A reference and how far it can be trusted.

    Attributes:
        value: The hypergradient.
        error: Estimated size of its error; infinite where it could not be computed.
        details: How it was computed: one line.
        solved: Where the reference solved the inner problems itself, their relative distance from the given point.
        failure: Why it is not to be trusted; empty where it is.
    """

    value: Tensors
    error: float
    details: str
    solved: float | None = None
    failure: str = ""


def accumulate(
    nested: Nested, point: Mapping[str, Tensors], pull: Callable[[Level, Tensors, Tensors], Tensors]
) -> tuple[Tensors, Tensors]:
    """Returns dF/dλ and its part through the inner problems.

    Cotangents are accumulated from the lowest level up. ``pull(level, above, v)`` is ``vᵀ dw*/d(above)``.
    """
    below, direct = outer_gradients(nested.objective, nested.below(point), point[nested.name])
    cotangents: dict[str, Tensors] = {nested.name: direct, **_split(below, nested.levels)}
    for level in nested.levels:
        above = nested.above(level, point)
        value = iter(pull(level, above, cotangents[level.name]))
        for name in level.above:
            part = tuple(next(value) for _ in point[name])
            cotangents[name] = add(cotangents[name], part)
    total = cotangents[nested.name]
    return total, tuple(a - b for a, b in zip(total, direct, strict=True))


def outer_gradients(objective: Objective, inner: Tensors, outer: Tensors) -> tuple[Tensors, Tensors]:
    """Returns ``∂F/∂w`` and ``∂F/∂λ``."""

    def body(evaluate: Evaluate) -> Tensors:
        value = evaluate()
        if not value.requires_grad:
            return tuple(torch.zeros_like(part) for part in inner + outer)
        grads = dense_gradient(derivatives(value, inner + outer), inner + outer)
        return objective.reduce(grads)

    both = objective.within(inner, outer, body)
    return both[: len(inner)], both[len(inner) :]


def _split(flat: Tensors, levels: Sequence[Level]) -> dict[str, Tensors]:
    parts, start = {}, 0
    for level in levels:
        parts[level.name] = flat[start : start + len(level.inner)]
        start += len(level.inner)
    return parts
