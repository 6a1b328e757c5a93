"""The mixed product ``qᵀ ∂²f/∂w∂λ`` in the three ways that need no Hessian: exactly, and by differences.

Two points come into question: where an inner step ended (``"new"``), and where it started (``"old"``), whose gradient
the step has taken already.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.functional import (
    Evaluate,
    Objective,
    dense_gradient,
    gradient,
    independent,
    leaves,
    pulled_through,
    require_finite,
)
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State, StepGraph, negative
from bilevel.products import TOLERATED_ROUNDING, difference_length, displaced, displacement_error
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, is_finite, length, lengths, promote, scale, subtract, zeros_like

__all__ = [
    "CENTERS",
    "DIFFERENCES",
    "IdentityResponse",
    "MixedProduct",
    "check_center",
    "forward_length",
    "mixed_product",
    "mixed_product_at",
    "pulled_back",
]

_trains = operator.attrgetter("requires_grad")

CENTERS = ("old", "new")
DIFFERENCES = ("exact", "central", "forward")


@dataclass(frozen=True)
class MixedProduct:
    """``qᵀ ∂²f/∂w∂λ`` and how it was taken.

    Attributes:
        value: One tensor for each outer parameter.
        status: ``NOT_APPLICABLE``, or what went wrong.
        products: Products, or the gradient passes of a difference.
        message: ε and what rounding did; which graph was used, where there was a choice.
        gradient: ``∂f/∂w`` where it was seen.
        size: ``‖value‖`` where it was read.
    """

    value: Tensors
    status: Status = Status.NOT_APPLICABLE
    products: int = 0
    message: str = ""
    gradient: Tensors | None = None
    size: float | None = None


def check_center(owner: str, center: str, difference: str) -> None:
    """Raises for a forward difference at the new point.

    Raises:
        ConfigError: See above.
    """
    if difference == "forward" and center == "new":
        raise ConfigError(
            f"{owner}: difference='forward' reuses what the step's own backward pass found, at center='old'. At "
            "center='new' use difference='central', which costs no more there and is more accurate."
        )


def mixed_product_at(
    problem: InnerProblem, step: InnerStep | None, q: Tensors, *, center: str, difference: str, epsilon: float | str
) -> MixedProduct:
    """Returns ``qᵀ ∂²f/∂w∂λ`` at the new inner parameters, or where a step started, on its batch and random numbers.

    Args:
        problem: The inner problem, whose inner parameters are the new ones.
        step: The step; not needed for the new ones.
        q: See :func:`mixed_product`.
        center: One of :data:`CENTERS`.
        difference: See :func:`mixed_product`.
        epsilon: See :func:`mixed_product`.
    """
    if center == "new":
        return mixed_product(problem.objective, problem.inner, problem.outer, q, difference=difference, epsilon=epsilon)
    assert step is not None
    return mixed_product(
        step.objective,
        step.inner,
        problem.outer,
        q,
        difference=difference,
        epsilon=epsilon,
        base=step.outer_gradient,
        graph=step.graph,
    )


def mixed_product(
    objective: Objective,
    inner: Tensors,
    outer: Tensors,
    q: Tensors,
    *,
    difference: str,
    epsilon: float | str = "auto",
    base: Tensors | None = None,
    graph: StepGraph | None = None,
) -> MixedProduct:
    """Returns ``qᵀ ∂²f/∂w∂λ`` at one point.

    ``"exact"`` pulls q back through a graph of ``∂f/∂w``: 1 forward pass, 1 backward pass with graph, 1 product; the
    product alone where the graph is known.
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
        graph: The graph of ``∂f/∂w`` at w, likewise, where it was kept; for ``"exact"``. It is kept further.
    """
    if difference == "exact":
        if graph is None or graph.spent:
            return _exact(objective, inner, outer, q)
        return _kept(objective, graph, outer, q)
    size, weight = lengths(q, [part.detach() for part in inner])
    if size == 0.0:
        return MixedProduct(zeros_like(outer), size=0.0)
    if not math.isfinite(size):  # not a pass with parameters that are NaN: what a loss does with them is not known
        unknown = tuple(torch.full_like(part, math.nan) for part in outer)
        return MixedProduct(unknown, Status.DIVERGED, message="∂F/∂w is not finite", size=math.nan)
    central = difference == "central"
    step = (difference_length if central else forward_length)(epsilon, inner, weight)
    factor = step / size
    lost = displacement_error(inner, q, factor, step, weight, central=central)
    # One displaced copy of the parameters at a time.
    first = promote(_outer_gradient(objective, displaced(inner, q, factor), outer))
    if central:
        second, products = _outer_gradient(objective, displaced(inner, q, -factor), outer), 2
    elif base is None:
        second, products = _outer_gradient(objective, tuple(part.detach() for part in inner), outer), 2
    else:
        second, products = base, 1
    value = scale(size / (2 * step if central else step), subtract(first, promote(second)))
    status = Status.INACCURATE if lost > TOLERATED_ROUNDING else Status.NOT_APPLICABLE
    (found,) = lengths(value)
    if not _is_finite(value, found):
        status = Status.DIVERGED
    if status is Status.DIVERGED or found == 0.0:
        _require_dependence(objective, inner, outer)
    message = f"epsilon {step:.3g}, norm of direction {size:.3g}, rounding of the displacement at most {lost:.0e}"
    return MixedProduct(value, status, products, message, size=found)


def forward_length(epsilon: float | str, inner: Tensors, size: float | None = None) -> float:
    """Returns the length ε of a forward displacement.

    A number is taken as it is; ``"auto"`` is ``u^(1/2) · sqrt(1 + ‖w‖)`` with the round-off u of the parameters' dtype,
    which balances an error of order ε with rounding of order u/ε. ``size`` is ``‖w‖`` where it is known.
    """
    if not isinstance(epsilon, str):
        return epsilon
    roundoff = max(torch.finfo(part.dtype).eps for part in inner)
    size = length(inner) if size is None else size
    return math.sqrt(roundoff) * math.sqrt(1 + size)


def _exact(objective: Objective, inner: Tensors, outer: Tensors, q: Tensors) -> MixedProduct:
    point = inner if all(map(_trains, inner)) else leaves(inner)

    def body(evaluate: Evaluate) -> tuple[Tensor, Tensors, Tensors]:
        value = evaluate()
        pairs = list(zip(gradient(value, point, objective, create_graph=True), q, strict=True))
        grads = tuple([grad for grad, _ in pairs if grad is not None])
        if not grads:
            require_finite(value, objective.name)
            raise independent(objective.name)
        bars = tuple([bar for grad, bar in pairs if grad is not None])
        return value.detach(), pulled_back(objective, grads, bars, outer, retain=False), grads

    value, pulled, grads = objective.within(point, outer, body)
    # Read when all has been queued: a device that is waited for earlier stands still while the next pass is.
    size, number = lengths(pulled, also=[value])
    require_finite(value, objective.name, number)
    found = tuple(map(Tensor.detach, grads))
    return MixedProduct(pulled, _status(pulled, size), 1, gradient=found, size=size)


def _kept(objective: Objective, graph: StepGraph, outer: Tensors, q: Tensors) -> MixedProduct:
    """Pulls q back through a gradient that a step has left, where activation checkpointing finds the step's values."""

    def body(_: Evaluate) -> Tensors:
        return pulled_back(objective, graph.gradient, q, outer, retain=True)

    value = objective.within(graph.inner, outer, body)
    (size,) = lengths(value)
    return MixedProduct(value, _status(value, size), 1, "on the graph of the step's own gradient", size=size)


def pulled_back(objective: Objective, field: Tensors, bars: Tensors, inputs: Tensors, *, retain: bool) -> Tensors:
    """Returns ``(∂g/∂inputs)ᵀ bar`` for a gradient g with its graph, reduced over ranks; counts one backward pass."""
    found = pulled_through(field, bars, inputs, objective.name, retain_graph=retain)
    if found is None:
        return zeros_like(inputs)
    objective.passes.backward += 1
    return objective.reduce(dense_gradient(found, inputs))


def _status(value: Tensors, size: float) -> Status:
    return Status.NOT_APPLICABLE if _is_finite(value, size) else Status.DIVERGED


def _is_finite(value: Tensors, size: float) -> bool:
    """Whether no entry is NaN or infinite, from the norm where that tells: finite entries may have an infinite one."""
    return math.isfinite(size) or is_finite(value)


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
    point = tuple([part.requires_grad_() for part in inner])
    grads = objective.within(point, outer, lambda evaluate: gradient(evaluate(), outer, objective))
    return dense_gradient(grads, outer)


@dataclass(frozen=True)
class IdentityResponse(Response):
    """The response with ``H⁻¹ ≈ I``: minus the mixed product with the cotangent itself.

    Attributes:
        estimator: Whose it is, for its name.
        problem: The inner problem.
        center: See :func:`mixed_product_at`.
        difference: See :func:`mixed_product`.
        epsilon: See :func:`mixed_product`.

    Raises:
        ConfigError: ``center="old"`` where no step was recorded.
    """

    estimator: Estimator
    problem: InnerProblem
    center: str = "new"
    difference: str = "exact"
    epsilon: float | str = "auto"

    def __post_init__(self) -> None:
        """Makes sure that there is an old point."""
        if self.center == "old" and not self.problem.trajectory:
            raise ConfigError(
                f"method {self.estimator} takes its product where the last inner step started, and no engine has "
                "recorded one: as a function use center='new', or OneStep(learning_rate=…), which makes a step"
            )

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        """The inner parameters as they are."""
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        """See :meth:`Response.pullback`."""
        found = self.product(cotangent)
        info = SolveInfo(found.status, products=found.products, method=self.estimator.name, message=found.message)
        return Pullback(negative(found.value), info, state)

    def product(self, cotangent: Tensors) -> MixedProduct:
        """Returns the mixed product with a cotangent."""
        step = self.problem.trajectory[-1] if self.center == "old" else None
        found = mixed_product_at(
            self.problem,
            step,
            promote(cotangent),
            center=self.center,
            difference=self.difference,
            epsilon=self.epsilon,
        )
        if step is None:
            return found
        message = "; ".join(part for part in ("at the inner parameters before the last step", found.message) if part)
        return replace(found, message=message)
