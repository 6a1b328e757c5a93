"""The conjugate gradient method, with and without a preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear.base import (
    CompileIteration,
    Iteration,
    Operator,
    Preconditioner,
    Solution,
    first_residual,
    inner_product,
    machine_epsilon,
)
from bilevel.linear.joined import Joined
from bilevel.linear.probe import Probe
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, dot, norm, zeros_like

__all__ = ["conjugate_gradient"]

# In units of the round-off, relative to the largest product seen.
FLAT = 10.0


def conjugate_gradient(
    operator: Operator,
    v: Tensors,
    *,
    max_iterations: int,
    rtol: float,
    epsilon: float | None = None,
    start: Tensors | None = None,
    preconditioner: Preconditioner | None = None,
    compiled: CompileIteration | None = None,
) -> Solution:
    """Solves ``H q = v`` for a symmetric positive definite H (Hestenes and Stiefel 1952).

    After k iterations the error in the H-norm is at most ``2 ((√κ − 1)/(√κ + 1))ᵏ`` of the start's, κ the condition
    number of H, or of ``P^(−1/2) H P^(−1/2)`` with a preconditioner (Saad, Iterative methods for sparse linear systems,
    algorithm 9.1).

    Args:
        operator: The product with H.
        v: The right-hand side.
        max_iterations: Cap on iterations, one product each; a start takes one more, for its residual.
        rtol: Stops once ``‖H q − v‖ ≤ rtol ‖v‖``; 0 runs to the cap, or to the dtype's round-off.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        start: The first iterate; zero without it, or where its error in the H-norm is larger than that of zero.
        preconditioner: ``r ↦ P⁻¹ r`` with P symmetric positive definite. Stopping goes by the residual itself.
        compiled: Compiles an iteration, where there is no preconditioner: one graph and one look at numbers each.

    Returns:
        The solution. On a direction p with pᵀHp ≤ 0 the iterate before it is returned, with status
        ``NEGATIVE_CURVATURE``, or ``SINGULAR`` where Hp is rounding only. ``NOT_SYMMETRIC`` where ``pᵀ(Hp')`` and
        ``p'ᵀ(Hp)`` differ for two successive directions: a probe that costs no product. ``DIVERGED`` where a product
        is not finite, or P shows not to be positive definite.
    """
    joined = Joined.of(v) if compiled is None else None
    if joined is not None:
        settings = {"max_iterations": max_iterations, "rtol": rtol, "epsilon": epsilon}
        return joined.solved(conjugate_gradient, operator, v, start, preconditioner, **settings)
    q, residual, products = first_residual(operator, v, start, energy=True)
    goal = float(dot(v, v))
    direction, energy, squared = _precondition(preconditioner, residual)
    state = _State(q, residual, direction, energy, squared)
    probe = Probe(epsilon or machine_epsilon(v))
    advance = _advance(operator, preconditioner, probe, compiled, v)
    # The recursion's residual keeps falling below what q can represent; going on only collects rounding (and NaN).
    target = max(rtol, 0.01 * probe.epsilon) ** 2 * goal
    status, message = Status.STOPPED_AT_CAP, ""
    for _ in range(max_iterations):
        if state.squared <= target:
            break
        if not state.energy > 0.0:
            status, message = Status.DIVERGED, "the preconditioner is not positive definite, or not finite"
            break
        stop, follow = advance(state)
        products += 1
        if stop is not None:
            status = stop
            break
        state = follow()
    if status is Status.STOPPED_AT_CAP and state.squared <= target:
        status = Status.CONVERGED
    return probe.solution(state.q, status, products, goal**0.5, message)


@dataclass(frozen=True)
class _State:
    """An iterate.

    Attributes:
        q: The solution so far.
        residual: r.
        direction: p.
        energy: ``rᵀ P⁻¹ r``.
        squared: ``rᵀr``.
    """

    q: Tensors
    residual: Tensors
    direction: Tensors
    energy: float
    squared: float


Advance = Callable[[_State], tuple[Status | None, Callable[[], _State]]]
"""Takes the product of an iteration: why to stop before its update, or what makes it."""


def _advance(
    operator: Operator,
    preconditioner: Preconditioner | None,
    probe: Probe,
    compiled: CompileIteration | None,
    v: Tensors,
) -> Advance:
    # The product with P⁻¹ is no part of a compiled iteration.
    step = None if compiled is None or preconditioner is not None else compiled("conjugate_gradient", _iteration)
    if step is not None:
        return _compiled(step, probe, v)

    def advance(state: _State) -> tuple[Status | None, Callable[[], _State]]:
        product = operator(state.direction)
        curvature, stop = _look(probe, state.direction, product)

        def follow() -> _State:
            step = state.energy / curvature
            q = axpy(step, state.direction, state.q)
            residual = axpy(-step, product, state.residual)
            scaled, energy, squared = _precondition(preconditioner, residual)
            return _State(q, residual, axpy(energy / state.energy, state.direction, scaled), energy, squared)

        return stop, follow

    return advance


def _compiled(step: Iteration, probe: Probe, v: Tensors) -> Advance:
    count = len(v)
    before: Tensors = (*zeros_like(v), *zeros_like(v))  # the direction before, and its product
    first = True

    def advance(state: _State) -> tuple[Status | None, Callable[[], _State]]:
        nonlocal before, first
        squared = torch.tensor(state.squared, dtype=torch.float64, device=v[0].device)
        *found, numbers = step(squared, *state.q, *state.residual, *state.direction, *before)
        curvature, length, size, crossed, after = numbers.tolist()
        q, residual, direction, product = (tuple(found[at : at + count]) for at in range(0, 4 * count, count))
        stop = _judge(probe, state.direction, product, curvature, length, size, [] if first else [crossed])
        before, first = (*state.direction, *product), False
        return stop, lambda: _State(q, residual, direction, after, after)

    return advance


def _iteration(operator: Operator, squared: Tensor, *tensors: Tensor) -> Tensors:
    """An iteration in tensors alone: the new q, r and p, the product ``Hp``, and the numbers that decisions need.

    Inner products accumulate in float64.
    """
    count = len(tensors) // 5
    q, residual, direction, before, product_before = (tensors[at : at + count] for at in range(0, 5 * count, count))
    product = operator(direction)
    curvature = inner_product(direction, product)
    step = squared / curvature
    q = axpy(step, direction, q)
    residual = axpy(-step, product, residual)
    after = inner_product(residual, residual)
    crossed = inner_product(before, product) - inner_product(direction, product_before)
    length, size = inner_product(direction, direction).sqrt(), inner_product(product, product).sqrt()
    direction = axpy(after / squared, direction, residual)
    return (*q, *residual, *direction, *product, torch.stack([curvature, length, size, crossed, after]))


def _precondition(preconditioner: Preconditioner | None, residual: Tensors) -> tuple[Tensors, float, float]:
    """Returns ``z = P⁻¹ r``, ``rᵀz`` and ``rᵀr``."""
    if preconditioner is None:
        squared = float(dot(residual, residual))
        return residual, squared, squared
    scaled = preconditioner(residual)
    energy, squared = torch.stack([dot(residual, scaled), dot(residual, residual)]).tolist()
    return scaled, energy, squared


def _look(probe: Probe, direction: Tensors, product: Tensors) -> tuple[float, Status | None]:
    """Returns the curvature pᵀHp, and a status where conjugate gradients must stop."""
    numbers = [dot(direction, product), norm(direction), norm(product), *probe.crossed(direction, product)]
    curvature, length, size, *crossed = torch.stack(numbers).tolist()
    return curvature, _judge(probe, direction, product, curvature, length, size, crossed)


def _judge(
    probe: Probe,
    direction: Tensors,
    product: Tensors,
    curvature: float,
    length: float,
    size: float,
    crossed: list[float],
) -> Status | None:
    if curvature != curvature or size == float("inf"):
        return Status.DIVERGED
    probe.record(direction, product, length, size, crossed)
    flat = FLAT * probe.epsilon * probe.largest * length**2
    if curvature > flat:
        return None
    # ‖Hp‖² ≤ λmax pᵀHp where H is semi-definite: a flat direction then has a vanishing product
    vanishes = size <= 10 * probe.epsilon**0.5 * probe.largest * length
    return Status.SINGULAR if vanishes and abs(curvature) <= flat else Status.NEGATIVE_CURVATURE
