"""What every problem of the comparison supplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Task", "minimise", "of_dtype"]

Block = slice
"""Rows of a data set that a loss is taken on."""
EVERYTHING = slice(None)


class Task(ABC):
    """A bilevel problem: finite sums ``f(w, λ)`` (inner) and ``F(w, λ)`` (outer), and ``h(λ) = F(w*(λ), λ)``.

    Losses are computed in the dtype of ``w``, so that runs may use float32 while h is evaluated in float64.

    Attributes:
        name: For tables.
        num_inner: Terms of f.
        num_outer: Terms of F.
        inner_start: w of the first step.
        outer_start: λ of the first step.
        smoothness: An upper estimate of the largest eigenvalue of ``∂²f/∂w²`` at the start: inner steps are fractions
            of its inverse.
    """

    name: str
    num_inner: int
    num_outer: int
    inner_start: Tensor
    outer_start: Tensor
    smoothness: float

    @abstractmethod
    def inner_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        """Returns f, the mean over a block of its terms."""

    @abstractmethod
    def outer_loss(self, w: Tensor, lam: Tensor, block: Block = EVERYTHING) -> Tensor:
        """Returns F, likewise."""

    @abstractmethod
    def solve(self, lam: Tensor, near: Tensor) -> Tensor:
        """Returns ``w*(λ)`` in float64, from a start ``near`` it."""

    def value(self, lam: Tensor, near: Tensor) -> float:
        """Returns ``h(λ)``, computed in float64; infinite where λ is not finite."""
        if not bool(torch.isfinite(lam).all()):
            return float("inf")
        lam = lam.double()
        return self.outer_loss(self.solve(lam, near), lam).item()

    def lowest(self, starts: list[Tensor]) -> float:
        """Returns the minimum of h, or the lowest value found by descents from ``starts``."""
        raise NotImplementedError

    def metrics(self, w: Tensor) -> Mapping[str, float]:
        """Returns what else a user of the inner solution would look at."""
        return {}


def of_dtype(tensors: dict[torch.dtype, Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a tensor of a dtype out of its copies, making and keeping that copy where it is new."""
    if dtype not in tensors:
        tensors[dtype] = next(iter(tensors.values())).to(dtype)
    return tensors[dtype]


@dataclass(frozen=True)
class Minimum:
    """Where a descent ended."""

    point: Tensor
    value: float


def minimise(
    function: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, *, iterations: int, gtol: float
) -> Minimum:
    """Minimises a function that returns its value and gradient, by L-BFGS in float64."""
    from scipy.optimize import minimize

    def flat(point):
        value, grad = function(torch.from_numpy(point).reshape(start.shape))
        return value, grad.reshape(-1).numpy()

    begin = start.detach().double().reshape(-1).numpy()
    options = {"maxiter": iterations, "gtol": gtol, "ftol": 0.0, "maxcor": 20}
    result = minimize(flat, begin, jac=True, method="L-BFGS-B", options=options)
    return Minimum(torch.from_numpy(result.x).reshape(start.shape), float(result.fun))
