"""Vectors of several small tensors, held as one tensor each while a solver works on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.linear.base import Operator, Preconditioner, Solution
from bilevel.vector import Tensors

__all__ = ["Joined"]

LARGEST = 2**18
"""Entries up to which vectors are joined: those of larger ones keep an operation busy for longer than it takes to call
it, and a copy of every product would be felt."""


def _joined(parts: Tensors) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _parted(joined: Tensor, like: Tensors) -> Tensors:
    pieces = torch.split(joined, [part.numel() for part in like])
    return tuple([piece.view(part.shape) for piece, part in zip(pieces, like, strict=True)])


# The same in one call each. Not public.
_flatten: Callable[[Tensors], Tensor] = getattr(torch._utils, "_flatten_dense_tensors", _joined)
_unflatten: Callable[[Tensor, Tensors], Sequence[Tensor]] = getattr(torch._utils, "_unflatten_dense_tensors", _parted)


class Joined:
    """The vectors of a system as one tensor each.

    A reduction over six tensors takes 20 µs for small ones, and that over one tensor 3: an iteration of conjugate
    gradients makes five to seven of them. What is added is a copy of each product.

    Args:
        like: A vector of the system.
    """

    def __init__(self, like: Tensors) -> None:
        self._like = like
        self._known: tuple[Tensors, Tensors] | None = None

    @classmethod
    def of(cls, like: Tensors) -> Joined | None:
        """Returns how vectors like the given one are joined; None where they are one tensor, or better left apart."""
        sizes = [part.numel() for part in like]
        # Of an empty tensor, torch's call forgets the shape (it did up to some version before 2.13).
        if len(like) < 2 or not all(sizes) or sum(sizes) > LARGEST:
            return None
        first = like[0]
        fit = [
            type(part) is Tensor
            and part.layout is torch.strided
            and part.dtype is first.dtype
            and part.device == first.device
            for part in like
        ]
        return cls(like) if all(fit) else None

    def join(self, parts: Tensors) -> Tensors:
        """Returns a vector as a tuple of one tensor."""
        return (_flatten(parts),)

    def split(self, vector: Tensors) -> Tensors:
        """Returns a joined vector in its parts, which are views of it."""
        if self._known is not None and vector is self._known[0]:
            return self._known[1]
        return tuple(_unflatten(vector[0], self._like))

    def solved(
        self,
        solver: Callable[..., Solution],
        operator: Operator,
        v: Tensors,
        start: Tensors | None,
        preconditioner: Preconditioner | None,
        **settings: Any,
    ) -> Solution:
        """Returns what a solver finds for joined vectors, in parts.

        Args:
            solver: Takes the four that follow, and the settings.
            operator: The product, of vectors in parts.
            v: The right-hand side.
            start: Where to start from. The operator sees the very same tuple, whose product may be known already.
            preconditioner: As the operator.
            settings: Whatever else the solver takes.
        """
        begin = None
        if start is not None:
            begin = self.join(start)
            self._known = begin, start
        found = solver(
            self._around(operator),
            self.join(v),
            start=begin,
            preconditioner=None if preconditioner is None else self._around(preconditioner),
            **settings,
        )
        return replace(found, q=self.split(found.q))

    def _around(self, function: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        return lambda vector: self.join(function(self.split(vector)))
