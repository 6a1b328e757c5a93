"""What every linear solver takes and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.result import Status
from bilevel.vector import Tensors, add, axpy, dot, norm, subtract, zeros_like

__all__ = [
    "CompileIteration",
    "Iteration",
    "Operator",
    "Preconditioner",
    "Solution",
    "damped",
    "first_residual",
    "gaussian",
    "inner_product",
    "machine_epsilon",
    "rounding_allowance",
]

Operator = Callable[[Tensors], Tensors]
"""A product ``q ↦ H q`` on tuples of tensors."""

Preconditioner = Callable[[Tensors], Tensors]
"""A product ``v ↦ P⁻¹ v`` with a symmetric positive definite P that resembles H."""


Iteration = Callable[..., Tensors]
"""One iteration of a solver, from tensors to tensors, with the product that it takes inside."""

CompileIteration = Callable[[str, Callable[..., Tensors]], "Iteration | None"]
"""Returns a compiled form of ``body(operator, *tensors)``, kept by its name; None where there can be none."""


@dataclass(frozen=True)
class Solution:
    """What a solver found for ``H q = v``.

    Attributes:
        q: The (approximate) solution.
        status: How the solver ended, as far as it can tell by itself.
        iterations: Products with ``H`` that the solver took, the one for the residual of a start among them.
        message: Anything worth reporting.
    """

    q: Tensors
    status: Status
    iterations: int
    message: str = ""


LARGEST_ALLOWANCE = 1e-2


def damped(operator: Operator, damping: float) -> Operator:
    """Returns ``q ↦ (H + damping · I) q``."""
    if damping == 0.0:
        return operator
    return lambda q: axpy(damping, q, operator(q))


def machine_epsilon(vector: Tensors) -> float:
    """Returns the largest unit round-off of the vector's dtypes."""
    return max(torch.finfo(part.dtype).eps for part in vector)


def rounding_allowance(epsilon: float) -> float:
    """Returns the relative residual that counts as rounding: ``100 ε``, and never more than a hundredth.

    In half precision ``100 ε`` is most of the right-hand side, and no residual of that size is a solution's.
    """
    return min(100 * epsilon, LARGEST_ALLOWANCE)


def first_residual(
    operator: Operator, v: Tensors, start: Tensors | None, *, energy: bool = False
) -> tuple[Tensors, Tensors, int]:
    """Returns where a solver begins, its residual ``v − Hq``, and the products that this took.

    A start that is worse than zero (or not finite) is dropped: one with a larger residual, or with ``energy`` one with
    a larger error in the H-norm, ``‖q − q*‖²_H − ‖q*‖²_H = −qᵀ(v + r)`` with the residual r.
    """
    if start is None:
        return zeros_like(v), v, 0
    residual = subtract(v, operator(start))
    gain = float(dot(start, add(v, residual))) if energy else float(norm(v)) - float(norm(residual))
    if not 0.0 <= gain < math.inf:
        return zeros_like(v), v, 1
    return start, residual, 1


def inner_product(left: Tensors, right: Tensors) -> Tensor:
    """Returns ``Σᵢ ⟨leftᵢ, rightᵢ⟩``, accumulated in float64, by operations that a compiler fuses."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(left, right, strict=True)]).sum()


def gaussian(like: Tensors, generator: torch.Generator) -> Tensors:
    """Returns a vector of standard normal entries: one draw, on the CPU, however the vector is split or held."""
    sizes = [part.numel() for part in like]
    pieces = torch.split(torch.randn(sum(sizes), generator=generator, dtype=torch.float32), sizes)
    return tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, like, strict=True))
