"""SOBA: stochastic directions for w, q and λ at one point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.stochastic import SOLUTION
from bilevel.single_loop.base import Method, Point, State, Update, descended
from bilevel.vector import Tensors, promote, subtract, zeros_like

__all__ = ["SOBA", "stepped"]


@dataclass(frozen=True, kw_only=True)
class SOBA(Method):
    """Steps along ``D_w = ∂f/∂w``, ``D_q = (∂²f/∂w²) q − ∂F/∂w``, ``D_λ = ∂F/∂λ − (∂²f/∂λ∂w) q`` of one batch each.

    All three are taken at the same (w, q, λ). Their noise does not vanish at the solution: with constant steps the
    iterates stall at a distance from it, and with the decreasing ones of the default (t^(−2/5) and t^(−3/5)) they
    converge slowly. On full batches the estimator :class:`bilevel.hypergrad.soba.SOBA` makes the same steps. Source:
    Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022 (arXiv 2201.13409), equations 5 to 7 and section 3.1.

    Cost of an update: 1 forward and 2 backward passes over an inner batch, 1 and 1 over an outer batch.
    """

    inner_decay: float = 0.4
    outer_decay: float = 0.6

    name: ClassVar[str] = "SOBA"

    def start(self, point: Point) -> Mapping[str, Tensors]:
        """See :meth:`Method.start`: q is zero."""
        return {SOLUTION: zeros_like(promote(point.inner))}

    def advance(self, point: Point, state: State, donate: bool) -> Update:
        """See :meth:`Method.advance`."""
        v, direct = point.outer_gradients(point.oracles.draw_outer())
        answer = point.measure(point.oracles.draw_inner(), state.memory[SOLUTION], promote(v))
        directions = (answer.gradient, answer.residual, subtract(direct, answer.mixed))
        return stepped(self, point, state, directions, {})


def stepped(
    method: Method,
    point: Point,
    state: State,
    directions: tuple[Tensors, Tensors, Tensors],
    memory: Mapping[str, Tensors],
) -> Update:
    """Moves w, q and λ against their directions."""
    inner, linear, outer = (
        descended(length, direction, x)
        for length, direction, x in zip(
            method.lengths(state.step), directions, (point.inner, state.memory[SOLUTION], point.outer), strict=True
        )
    )
    return Update(inner, outer, {**memory, SOLUTION: linear})
