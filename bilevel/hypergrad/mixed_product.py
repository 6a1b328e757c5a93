"""The mixed product ``qᵀ ∂²f/∂w∂λ`` in the three ways that need no Hessian: exactly, and by differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.functional import (
    Evaluate,
    Objective,
    dense_gradient,
    gradient,
    independent,
    leaves,
    require_finite,
)
from bilevel.products import TOLERATED_ROUNDING, GradientGraph, difference_length, displaced, displacement_error
from bilevel.result import Status
from bilevel.vector import Tensors, is_finite, norm, promote, zeros_like

__all__ = ["DIFFERENCES", "MixedProduct", "forward_length", "mixed_product"]

DIFFERENCES = ("exact", "central", "forward")


@dataclass(frozen=True)
class MixedProduct:
    """``qᵀ ∂²f/∂w∂λ`` and how it was taken.

    Attributes:
        value: One tensor for each outer parameter.
        status: ``NOT_APPLICABLE``, or what went wrong.
        products: Products, or the gradient passes of a difference.
        message: ε and what rounding did.
        inner_gradient_norm: ``‖∂f/∂w‖`` where it was seen.
    """

    value: Tensors
    status: Status = Status.NOT_APPLICABLE
    products: int = 0
    message: str = ""
    inner_gradient_norm: float = math.nan


def mixed_product(
    objective: Objective,
    inner: Tensors,
    outer: Tensors,
    q: Tensors,
    *,
    difference: str,
    epsilon: float | str = "auto",
    base: Tensors | None = None,
) -> MixedProduct:
    """Returns ``qᵀ ∂²f/∂w∂λ`` at one point.

    ``"exact"`` pulls q back through a graph of ``∂f/∂w``: 1 forward pass, 1 backward pass with graph, 1 product.
    ``"central"`` is ``(∂f/∂λ(w + hq) − ∂f/∂λ(w − hq)) / 2h`` with ``h = ε / ‖q‖``: 2 forward and 2 backward passes, an
    error of ``‖q‖ ε² M₃ / 6`` for a bound M₃ of the third derivative of ``∂f/∂λ`` along ``q / ‖q‖``. ``"forward"`` is
    ``(∂f/∂λ(w + hq) − ∂f/∂λ(w)) / h``: 1 and 1 where ``∂f/∂λ(w)`` is known, an error of ``‖q‖ ε M₂ / 2``. Rounding adds
    an error of order ``u ‖q‖ ‖∂f/∂λ‖ / ε`` to both.

    Args:
        objective: f.
        inner: w.
        outer: λ.
        q: The direction, in float32 or better.
        difference: One of :data:`DIFFERENCES`.
        epsilon: ε, the length of the displacement, or ``"auto"``.
        base: ``∂f/∂λ`` at w on the same batch with the same random numbers, where it is known; for ``"forward"``.
    """
    if difference == "exact":
        return _exact(objective, inner, outer, q)
    size = float(norm(q))
    if size == 0.0:
        return MixedProduct(zeros_like(outer))
    central = difference == "central"
    weight = float(norm([part.detach() for part in inner]))
    length = (difference_length if central else forward_length)(epsilon, inner, weight)
    factor = length / size
    lost = displacement_error(inner, q, factor, length, weight, central=central)
    # One displaced copy of the parameters at a time.
    first = promote(_outer_gradient(objective, displaced(inner, q, factor), outer))
    if central:
        second, products = _outer_gradient(objective, displaced(inner, q, -factor), outer), 2
    elif base is None:
        second, products = _outer_gradient(objective, tuple(part.detach() for part in inner), outer), 2
    else:
        second, products = base, 1
    quotient = size / (2 * length if central else length)
    value = tuple((a - b) * quotient for a, b in zip(first, promote(second), strict=True))
    status = Status.INACCURATE if lost > TOLERATED_ROUNDING else Status.NOT_APPLICABLE
    if not is_finite(value):
        status = Status.DIVERGED
    if status is Status.DIVERGED or float(norm(value)) == 0.0:
        _require_dependence(objective, inner, outer)
    message = f"epsilon {length:.3g}, norm of direction {size:.3g}, rounding of the displacement at most {lost:.0e}"
    return MixedProduct(value, status, products, message)


def forward_length(epsilon: float | str, inner: Tensors, size: float | None = None) -> float:
    """Returns the length ε of a forward displacement.

    A number is taken as it is; ``"auto"`` is ``u^(1/2) · sqrt(1 + ‖w‖)`` with the round-off u of the parameters' dtype,
    which balances an error of order ε with rounding of order u/ε. ``size`` is ``‖w‖`` where it is known.
    """
    if not isinstance(epsilon, str):
        return epsilon
    roundoff = max(torch.finfo(part.dtype).eps for part in inner)
    size = float(norm([part.detach() for part in inner])) if size is None else size
    return math.sqrt(roundoff) * math.sqrt(1 + size)


def _exact(objective: Objective, inner: Tensors, outer: Tensors, q: Tensors) -> MixedProduct:
    point = leaves(inner)

    def body(evaluate: Evaluate) -> tuple[Tensors, float]:
        graph = GradientGraph(objective, evaluate, point, outer)
        size = float(norm([part.detach() for part in graph.gradient]))
        return graph.mixed(graph.select(q)), size

    value, size = objective.within(point, outer, body)
    status = Status.NOT_APPLICABLE if is_finite(value) else Status.DIVERGED
    return MixedProduct(value, status, 1, inner_gradient_norm=size)


def _require_dependence(objective: Objective, inner: Tensors, outer: Tensors) -> None:
    """Tells why differences vanish or are not finite, where the inner loss itself is at fault; one more pass."""
    point = leaves(inner)

    def body(evaluate: Evaluate) -> None:
        value = evaluate()
        require_finite(value, objective.name)
        if all(grad is None for grad in gradient(value, point, objective)):
            raise independent(objective.name)

    objective.within(point, outer, body)


def _outer_gradient(objective: Objective, inner: Tensors, outer: Tensors) -> Tensors:
    # Parameters, as the loss knows them: it may ask for requires_grad, or differentiate by them itself.
    point = tuple(part.requires_grad_() for part in inner)
    grads = objective.within(point, outer, lambda evaluate: gradient(evaluate(), outer, objective))
    return dense_gradient(grads, outer)
