"""First derivatives of an inner loss at its point and around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.functional import Evaluate, dense_gradient, gradient, independent, leaves, require_finite
from bilevel.hypergrad.base import InnerProblem
from bilevel.linear import SpectrumEstimate, estimate_spectrum
from bilevel.products import DifferenceProducts
from bilevel.vector import Tensors, norm, promote, subtract

__all__ = ["Surroundings"]

ESTIMATION_PRODUCTS = 8


class Surroundings:
    """First derivatives of the inner loss at w and around it, over the inner variables that reach it.

    Attributes:
        inner: w, in float32 or better.
        slope: ``∂f/∂w(w)``.
        outer_slope: ``∂f/∂λ(w)``.
        count: Gradient passes taken.
    """

    def __init__(self, problem: InnerProblem) -> None:
        self._problem = problem
        self.count = 0
        point = leaves(problem.inner)
        grads = self._pass(point, point + problem.outer, check=True)
        self._active = tuple(grad is not None for grad in grads[: len(point)])
        if not any(self._active):
            raise independent(problem.objective.name)
        self.inner = promote(self.select([part.detach() for part in problem.inner]))
        self.slope, self.outer_slope = self._split(grads)

    def select(self, vector: Sequence[Tensor]) -> Tensors:
        """Returns the parts that reach the loss, in float32 or better, of a vector over all inner variables."""
        return promote([part for part, active in zip(vector, self._active, strict=True) if active])

    def slope_at(self, y: Tensors) -> Tensors:
        """Returns ``∂f/∂w(y)``; 1 forward and 1 backward pass."""
        point = self._spread(y)
        return self.select(dense_gradient(self._pass(point, point), point))

    def slopes_at(self, y: Tensors) -> tuple[Tensors, Tensors]:
        """Returns ``∂f/∂w(y)`` and ``∂f/∂λ(y)``; 1 forward and 1 backward pass."""
        point = self._spread(y)
        return self._split(self._pass(point, point + self._problem.outer))

    def rounding(self, y: Tensors) -> float:
        """Returns the relative error that rounding to the parameters' dtype leaves in ``y − w``."""
        unit = max(torch.finfo(part.dtype).eps for part in self._problem.inner)
        distance = float(norm(subtract(y, self.inner)))
        return unit * float(norm(self.inner)) / distance if distance > 0.0 else math.inf

    def spectrum(self) -> SpectrumEstimate:
        """Estimates the extreme eigenvalues of the Hessian at w."""
        problem = self._problem
        products = DifferenceProducts(problem.objective, problem.inner, problem.outer)
        dimension = sum(part.numel() for part in self.inner)
        spectrum = estimate_spectrum(
            lambda q: promote(products.hessian(q)), self.inner, products=min(ESTIMATION_PRODUCTS, dimension)
        )
        self.count += 1 + 2 * spectrum.products
        return spectrum

    def _pass(self, point: Tensors, inputs: Tensors, *, check: bool = False) -> tuple[Tensor | None, ...]:
        objective = self._problem.objective
        self.count += 1

        def body(evaluate: Evaluate) -> tuple[Tensor | None, ...]:
            value = evaluate()
            if check:
                require_finite(value, objective.name)
            return gradient(value, inputs, objective)

        return objective.within(point, self._problem.outer, body)

    def _split(self, grads: Sequence[Tensor | None]) -> tuple[Tensors, Tensors]:
        inputs = self._problem.inner + self._problem.outer
        dense, count = dense_gradient(grads, inputs), len(self._problem.inner)
        return self.select(dense[:count]), promote(dense[count:])

    def _spread(self, y: Tensors) -> Tensors:
        """Puts w in the places of variables that do not reach the loss; in the parameters' dtypes."""
        rest = iter(y)
        return leaves(
            [
                next(rest).to(part.dtype) if active else part
                for part, active in zip(self._problem.inner, self._active, strict=True)
            ]
        )
