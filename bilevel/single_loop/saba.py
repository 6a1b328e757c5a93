"""SABA: SAGA's variance reduction for all three directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.hypergrad.stochastic import SOLUTION
from bilevel.single_loop.base import Method, Point, State, Update
from bilevel.single_loop.soba import stepped
from bilevel.vector import Tensors, add, axpy, promote, subtract, zeros_like

__all__ = ["SABA"]

# What is kept of every block, inner blocks first.
INNER = ("gradient", "image", "mixed")
OUTER = ("cotangent", "direct")


@dataclass(frozen=True, kw_only=True)
class SABA(Method):
    """SOBA's steps with ``h_b − table_b + Σ_c (|c|/n) table_c`` for a block's h_b, which then becomes its table entry.

    Five tables: ``∂f/∂w``, ``(∂²f/∂w²) q`` and ``(∂²f/∂λ∂w) q`` of the inner blocks, ``∂F/∂w`` and ``∂F/∂λ`` of the
    outer ones. The directions are unbiased and their variance vanishes at the solution: constant steps, and linear
    convergence where the value function is strongly convex (or Polyak–Łojasiewicz). The first tables are one pass over
    all samples. Source: Dagréou, Ablin, Vaiter, Moreau, NeurIPS 2022 (arXiv 2201.13409), section 3.2.

    Cost of an update: 1 forward and 2 backward passes over an inner batch, 1 and 1 over an outer batch. Memory: two
    vectors like w and one like λ for each inner block, one and one for each outer block.
    """

    name: ClassVar[str] = "SABA"

    def start(self, point: Point) -> Mapping[str, Tensors]:
        """See :meth:`Method.start`: q is zero, and the tables are those of the point."""
        q = zeros_like(promote(point.inner))
        inner = [_inner(point, block, q) for block in range(point.oracles.num_inner_blocks)]
        outer = [_outer(point, block) for block in range(point.oracles.num_outer_blocks)]
        weights = (point.oracles.inner_weight, point.oracles.outer_weight)
        memory: dict[str, Tensors] = {SOLUTION: q}
        for names, rows, weight in ((INNER, inner, weights[0]), (OUTER, outer, weights[1])):
            for place, name in enumerate(names):
                table = tuple(torch.stack(parts) for parts in zip(*(row[place] for row in rows), strict=True))
                memory[name] = table
                shares = [weight(block) for block in range(len(rows))]
                memory[f"mean {name}"] = tuple(_mean(part, shares) for part in table)
        return memory

    def advance(self, point: Point, state: State, donate: bool) -> Update:
        """See :meth:`Method.advance`."""
        outer, inner = point.oracles.draw_outer(), point.oracles.draw_inner()
        memory: dict[str, Tensors] = dict(state.memory)
        found: dict[str, Tensors] = {}
        for names, block, values, weight in (
            (INNER, inner, _inner(point, inner, state.memory[SOLUTION]), point.oracles.inner_weight(inner)),
            (OUTER, outer, _outer(point, outer), point.oracles.outer_weight(outer)),
        ):
            for name, value in zip(names, values, strict=True):
                found[name] = _reduced(memory, name, block, value, weight, donate)
        directions = (
            found["gradient"],
            subtract(found["image"], found["cotangent"]),
            subtract(found["direct"], found["mixed"]),
        )
        return stepped(self, point, state, directions, memory)


def _inner(point: Point, block: int, q: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    answer = point.measure(block, q, zeros_like(q))
    return answer.gradient, answer.residual, answer.mixed


def _outer(point: Point, block: int) -> tuple[Tensors, Tensors]:
    v, direct = point.outer_gradients(block)
    return promote(v), promote(direct)


def _mean(table: Tensor, shares: list[float]) -> Tensor:
    weights = torch.tensor(shares, dtype=table.dtype, device=table.device)
    total: Tensor = torch.tensordot(weights, table, dims=1)
    return total


def _reduced(memory: dict[str, Tensors], name: str, block: int, value: Tensors, weight: float, donate: bool) -> Tensors:
    """Returns SAGA's direction, and puts the value into its table."""
    table, mean = memory[name], memory[f"mean {name}"]
    change = subtract(value, tuple(part[block] for part in table))
    if not donate:
        table = tuple(part.clone() for part in table)
    for part, new in zip(table, value, strict=True):
        part[block] = new
    memory[name] = table
    memory[f"mean {name}"] = axpy(weight, change, mean)
    return add(change, mean)
