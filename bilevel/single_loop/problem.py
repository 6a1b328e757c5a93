"""Bilevel problems that are finite sums, and access to them batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.functional import FunctionObjective, PassCount
from bilevel.randomness import Replay, generator_devices
from bilevel.structure import Structure
from bilevel.validation import check_integer
from bilevel.vector import Tensors

__all__ = ["Counts", "FiniteSum", "Oracles", "SampleLoss"]

SampleLoss = Callable[[Any, Any, Tensor], Any]
"""``(inner_params, outer_params, indices) -> scalar tensor``: the mean loss over the samples with these indices."""


@dataclass(frozen=True)
class FiniteSum:
    """``min F(w*(λ), λ)`` with ``F = Σⱼ Fⱼ / m``, ``w*(λ) = argmin f(w, λ)``, ``f = Σᵢ fᵢ / n``.

    Attributes:
        inner_loss: The mean of fᵢ over a batch, a function of ``(inner_params, outer_params, indices)``; the indices
            are a one-dimensional integer tensor. It must draw no random numbers.
        num_inner: n.
        outer_loss: The mean of Fⱼ over a batch, likewise.
        num_outer: m.
    """

    inner_loss: SampleLoss
    num_inner: int
    outer_loss: SampleLoss
    num_outer: int

    def __post_init__(self) -> None:
        """Validates the sizes."""
        check_integer("FiniteSum", "num_inner", self.num_inner, minimum=1)
        check_integer("FiniteSum", "num_outer", self.num_outer, minimum=1)


@dataclass(frozen=True)
class Counts:
    """What a run has cost.

    Attributes:
        gradients: First-order evaluations of a sample's loss, inner or outer (a batch of b counts b).
        products: Second-order products with a sample's inner loss; a Hessian and a mixed product in one backward pass
            count once.
        forward: Forward passes over a batch.
        backward: Backward passes over a batch.
    """

    gradients: int = 0
    products: int = 0
    forward: int = 0
    backward: int = 0


@dataclass
class Oracles:
    """Access to a finite sum for the length of one update: draws batches, and counts what is evaluated.

    Samples are cut into blocks of ``batch`` successive ones (the last may be shorter), and a block is drawn with a
    probability proportional to its size: batch means are unbiased whatever the sizes.

    Args:
        problem: The finite sum.
        structures: How inner and outer parameters are held.
        batches: Samples in an inner and in an outer block; None for all.
        generator: For the draws.
        like: Inner parameters; indices go to their device.
    """

    problem: FiniteSum
    structures: tuple[Structure, Structure]
    batches: tuple[int | None, int | None]
    generator: torch.Generator
    like: Tensors
    _ledger: list[tuple[PassCount, int]] = field(default_factory=list)

    @property
    def num_inner_blocks(self) -> int:
        """How many inner blocks there are."""
        return math.ceil(self.problem.num_inner / self._size(0))

    @property
    def num_outer_blocks(self) -> int:
        """How many outer blocks there are."""
        return math.ceil(self.problem.num_outer / self._size(1))

    def draw_inner(self) -> int:
        """Returns the place of a random inner block."""
        return self._draw(0)

    def draw_outer(self) -> int:
        """Returns the place of a random outer block."""
        return self._draw(1)

    def inner_weight(self, block: int) -> float:
        """Returns the share of the samples that are in an inner block."""
        return len(self._indices(0, block)) / self.problem.num_inner

    def outer_weight(self, block: int) -> float:
        """Returns the share of the samples that are in an outer block."""
        return len(self._indices(1, block)) / self.problem.num_outer

    def inner(self, block: int | None) -> FunctionObjective:
        """Returns the inner loss on a block; on all samples for None."""
        return self._objective(0, block, self.problem.inner_loss, "the inner problem")

    def outer(self, block: int | None) -> FunctionObjective:
        """Returns the outer loss on a block; on all samples for None."""
        return self._objective(1, block, self.problem.outer_loss, "the outer problem")

    def counted(self, before: Counts) -> Counts:
        """Returns the counts after this update."""
        return Counts(
            before.gradients + sum(passes.forward * size for passes, size in self._ledger),
            before.products + sum((passes.backward - passes.forward) * size for passes, size in self._ledger),
            before.forward + sum(passes.forward for passes, _ in self._ledger),
            before.backward + sum(passes.backward for passes, _ in self._ledger),
        )

    def _total(self, level: int) -> int:
        return (self.problem.num_inner, self.problem.num_outer)[level]

    def _size(self, level: int) -> int:
        return min(self.batches[level] or self._total(level), self._total(level))

    def _draw(self, level: int) -> int:
        if self._size(level) == self._total(level):
            return 0
        return int(torch.randint(self._total(level), (), generator=self.generator)) // self._size(level)

    def _indices(self, level: int, block: int | None) -> range:
        size, total = self._size(level), self._total(level)
        return range(total) if block is None else range(block * size, min((block + 1) * size, total))

    def _objective(self, level: int, block: int | None, loss: SampleLoss, name: str) -> FunctionObjective:
        chosen = self._indices(level, block)
        indices = torch.arange(chosen.start, chosen.stop, device=self.like[0].device)
        inner, outer = self.structures
        passes = PassCount()
        self._ledger.append((passes, len(chosen)))
        return FunctionObjective(
            lambda w, lam: loss(inner.rebuild(w), outer.rebuild(lam), indices),
            name,
            Replay(generator_devices(self.like)),
            passes,
        )
