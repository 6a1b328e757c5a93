"""SRBA: SARAH's recursive variance reduction for all three directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from bilevel.hypergrad.stochastic import SOLUTION
from bilevel.single_loop.base import Method, Point, State, Update
from bilevel.single_loop.soba import stepped
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors, add, norm, promote, scale, subtract, zeros_like

__all__ = ["SRBA"]

DIRECTIONS = ("direction w", "direction q", "direction λ")
OLD = ("old w", "old q", "old λ")


@dataclass(frozen=True, kw_only=True)
class SRBA(Method):
    """SOBA's steps with ``Δₜ = Dᵢ(uₜ) − Dᵢ(uₜ₋₁) + Δₜ₋₁`` for the directions D of a batch i at ``u = (w, q, λ)``.

    Every ``period`` updates ``Δₜ = D(uₜ)`` is taken on all samples. Constant steps. To reach a stationary point to ε
    it takes of the order of ``√(n + m) / ε + n + m`` oracle calls, which no method beats (in order). Source: Dagréou,
    Moreau, Vaiter, Ablin 2023 (arXiv 2302.08766), algorithm 1.

    Attributes:
        period: Updates from one full evaluation to the next; None for the number of inner and outer batches.
        radius: q is projected to the ball of this radius, as the paper's analysis asks; None for no projection.

    Cost of an update: 2 forward and 4 backward passes over an inner batch, 2 and 2 over an outer batch; every period
        half as many over all samples.
    """

    period: int | None = None
    radius: float | None = None

    name: ClassVar[str] = "SRBA"

    def __post_init__(self) -> None:
        """Validates the fields."""
        super().__post_init__()
        if self.period is not None:
            check_integer("SRBA", "period", self.period, minimum=1)
        if self.radius is not None:
            check_number("SRBA", "radius", self.radius, minimum=0.0, exclusive=True)

    def start(self, point: Point) -> Mapping[str, Tensors]:
        """See :meth:`Method.start`: q is zero. The first update takes the full evaluation."""
        return {SOLUTION: zeros_like(promote(point.inner))}

    def advance(self, point: Point, state: State, donate: bool) -> Update:
        """See :meth:`Method.advance`."""
        oracles, q = point.oracles, state.memory[SOLUTION]
        period = self.period or oracles.num_inner_blocks + oracles.num_outer_blocks
        if state.step % period == 0:
            directions = _directions(point, None, None, q)
        else:
            outer, inner = oracles.draw_outer(), oracles.draw_inner()
            w, before, lam = (state.memory[name] for name in OLD)
            old = _directions(replace(point, inner=w, outer=lam), inner, outer, before)
            new = _directions(point, inner, outer, q)
            last = tuple(state.memory[name] for name in DIRECTIONS)
            first, second, third = (add(subtract(a, b), c) for a, b, c in zip(new, old, last, strict=True))
            directions = first, second, third
        kept = {
            **dict(zip(DIRECTIONS, directions, strict=True)),
            **dict(zip(OLD, (point.inner, q, point.outer), strict=True)),
        }
        made = stepped(self, point, state, directions, kept)
        return replace(made, memory={**made.memory, SOLUTION: self._projected(made.memory[SOLUTION])})

    def _projected(self, q: Tensors) -> Tensors:
        size = 0.0 if self.radius is None else float(norm(q))
        return q if self.radius is None or size <= self.radius else scale(self.radius / size, q)


def _directions(point: Point, inner: int | None, outer: int | None, q: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    v, direct = point.outer_gradients(outer)
    answer = point.measure(inner, q, promote(v))
    return answer.gradient, answer.residual, subtract(promote(direct), answer.mixed)
