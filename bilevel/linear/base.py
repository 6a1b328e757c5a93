"""What every linear solver takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.result import Status
from bilevel.vector import Tensors, axpy

__all__ = ["Operator", "Solution", "damped", "machine_epsilon"]

Operator = Callable[[Tensors], Tensors]
"""A product ``q ↦ H q`` on tuples of tensors."""


@dataclass(frozen=True)
class Solution:
    """What a solver found for ``H q = v``.

    Attributes:
        q: The (approximate) solution.
        status: How the solver ended, as far as it can tell by itself.
        iterations: Products with ``H`` that the solver took in its main loop.
        message: Anything worth reporting.
    """

    q: Tensors
    status: Status
    iterations: int
    message: str = ""


def damped(operator: Operator, damping: float) -> Operator:
    """Returns ``q ↦ (H + damping · I) q``."""
    if damping == 0.0:
        return operator
    return lambda q: axpy(damping, q, operator(q))


def machine_epsilon(vector: Tensors) -> float:
    """Returns the largest unit round-off of the vector's dtypes."""
    return max(torch.finfo(part.dtype).eps for part in vector)
