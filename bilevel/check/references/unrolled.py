"""Reverse mode through as many steps of the inner problem as it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.check.references.base import Level, Nested, ReferenceValue, accumulate
from bilevel.check.references.field import GradientField, Pull, flat, largest_eigenvalue, like, normal, ritz_values
from bilevel.errors import LossError
from bilevel.vector import Tensors

__all__ = ["unrolled"]

LARGEST_NUM_STEPS = 20_000
_ASYMMETRY = 1e-6
_NUM_LANCZOS = 60
_PATIENCE = 600
_NUM_ATTEMPTS = 4
_GLANCE = 1_000
_SMALL = 1e-11


@dataclass(frozen=True)
class _Pace:
    """The steps ``y = w_t + β (w_t − w_{t−1})``, ``w_{t+1} = y − α g(y, λ)``.

    Attributes:
        size: α.
        momentum: β.
        smallest: Estimate of the smallest eigenvalue of J; 0 where it is unknown or not positive.
    """

    size: float
    momentum: float
    smallest: float


@dataclass(frozen=True)
class _Descent:
    field: GradientField
    pace: _Pace
    steps: int
    converged: bool

    @property
    def distance(self) -> float:
        """A bound of the relative distance from the solution: ``‖g‖ / (μ ‖w‖)``."""
        size = float(self.field.value.norm())
        if size == 0.0:
            return 0.0
        extent = self.pace.smallest * max(float(self.field.point.norm()), 1e-300)
        return size / extent if extent > 0 else math.inf


def unrolled(nested: Nested) -> ReferenceValue:
    """Returns the derivative of F at the end of many gradient steps on the inner loss, by reverse mode through them.

    The steps start at the given point and are accelerated (Nesterov's constant momentum, for the extreme eigenvalues of
    J that Lanczos finds at the start; plain steps for a J that is not symmetric). They go on until the inner gradient
    is at rounding. All steps after that are taken at the solution, and the sweep back runs through these: one product
    each, until the cotangent has died out, so that the steps before have no part in the result (Christianson,
    Optimization Methods and Software 3, 1994). What is left of it, and of the inner gradient, is the reference's error.

    It sees what autograd sees: not what a ``detach()`` hides.
    """
    point = dict(nested.point)
    descents: dict[str, _Descent] = {}
    try:
        for level in reversed(nested.levels):
            descent = descents[level.name] = _descend(level, point[level.name], nested.above(level, point))
            point[level.name] = descent.field.inner
            if not descent.converged:
                return _nothing(nested, "no solution of the inner problem", _not_solved(level.name, descent))
    except LossError as error:
        return _nothing(nested, "no second derivative", str(error))
    sweeps: dict[str, tuple[int, float]] = {}

    def pull(level: Level, above: Tensors, cotangent: Tensors) -> Tensors:
        descent = descents[level.name]
        v = flat([cotangent[place] for place in descent.field.active]).double()
        mixed, steps, left = _sweep(descent, v)
        sweeps[level.name] = steps, left
        return like(above, mixed)

    value, implicit = accumulate(nested, point, pull)
    left, failure = max(left for _, left in sweeps.values()), ""
    if not left < 1e-2:
        name = max(sweeps, key=lambda name: sweeps[name][1])
        failure = (
            f"the sweep back through {sweeps[name][0]} steps on {name} has not come to an end: its inner Hessian is "
            "too ill-conditioned, or not positive definite"
        )
    missing = (left + 10 * max(descent.distance for descent in descents.values())) * float(flat(implicit).norm())
    solved = _distance(nested.point, point, nested)
    return ReferenceValue(value, math.inf if failure else missing, _details(descents, sweeps), solved, failure)


def _descend(level: Level, inner: Tensors, above: Tensors) -> _Descent:
    """Steps to where the inner gradient is rounding; shorter ones where they diverge."""
    start = GradientField(level.objective, inner, above)
    pace = _pace(start)
    for _ in range(_NUM_ATTEMPTS):
        found = _run(start, pace)
        if found is not None:
            return found
        pace = _Pace(pace.size / 4, 0.0, pace.smallest)
    return _Descent(start, pace, 0, converged=False)


def _run(start: GradientField, pace: _Pace) -> _Descent | None:
    w = before = start.point
    largest = 1 / pace.size
    first = best = float(start.value.norm())
    best_at, momentum, earlier = 0, 1.0, math.inf
    for count in range(LARGEST_NUM_STEPS):
        y = w + (pace.momentum * momentum) * (w - before)
        g = start.at(y)
        size = float(g.norm())
        if not size <= 1e4 * first + 1e-300:
            return None
        floor = 64 * start.epsilon * largest * float(y.norm())
        # At rounding: below what one digit of w makes of g, or no longer falling.
        if size <= floor or (count - best_at > 500 and best <= 1e-7 * first):
            return _arrived(start, y, pace, count, converged=True)
        hopeless = count % _GLANCE == 0 and _hopeless(earlier, best, floor, count)
        if hopeless or count - best_at > _PATIENCE:
            return None
        if count % _GLANCE == 0:
            earlier = best
        if size < 0.99 * best:
            best, best_at = size, count
        before, w = w, y - pace.size * g
        momentum = 0.0 if float(g @ (w - before)) > 0 else 1.0  # uphill: restart
    return _arrived(start, w, pace, LARGEST_NUM_STEPS, converged=False)


def _arrived(start: GradientField, w: Tensor, pace: _Pace, steps: int, *, converged: bool) -> _Descent:
    end = GradientField(start.objective, start.place(w), start.outer)
    there = _pace(end)
    momentum = there.momentum if pace.momentum else 0.0
    return _Descent(end, _Pace(min(pace.size, there.size), momentum, there.smallest), steps, converged)


def _pace(field: GradientField) -> _Pace:
    """Chooses α and β from the spectrum at a point."""
    generator = torch.Generator().manual_seed(0)
    vectors = [normal(len(field.value), generator, field.value.device) for _ in range(2)]

    def measure(pull: Pull) -> tuple[float, float, float]:
        left, right = (pull(vector)[0] for vector in vectors)
        difference = abs(float(vectors[0] @ right) - float(vectors[1] @ left))
        scale = float(left.norm()) * float(vectors[1].norm()) + 1e-300
        if difference > _ASYMMETRY * scale:
            return 0.0, largest_eigenvalue(lambda v: pull(v)[0], vectors[0], 100), difference / scale
        low, high = ritz_values(lambda v: pull(v)[0], vectors[0], _NUM_LANCZOS)
        return low, high, 0.0

    low, high, asymmetry = field.with_products(measure)
    if not math.isfinite(high) or high <= 0:
        return _Pace(1.0, 0.0, 0.0)
    size = 1 / (1.05 * high)
    if asymmetry or low <= 0:
        return _Pace(size, 0.0, 1e-3 * high if asymmetry else 0.0)
    root = math.sqrt(size * low)
    return _Pace(size, (1 - root) / (1 + root), low)


def _sweep(descent: _Descent, v: Tensor) -> tuple[Tensor, int, float]:
    """Pulls a cotangent of the last step back through the steps at the solution.

    ``w_{t+1} = y − α g(y, λ)``, ``y = (1 + β) w_t − β w_{t−1}``: with cotangents a of w_{t+1} and b of w_t,
    ``ȳ = a − α Jᵀ a``, and a becomes ``b + (1 + β) ȳ``, b becomes ``−β ȳ``. λ receives ``−α (∂g/∂λ)ᵀ a`` of every step.

    Returns:
        The cotangent of λ, the number of steps, and how much of the answer is missing, relatively.
    """
    field, pace = descent.field, descent.pace
    size = float(v.norm())
    if size == 0.0:
        return torch.zeros_like(field.parameters), 0, 0.0

    def body(pull: Pull) -> tuple[Tensor, int, float]:
        for shorter in range(_NUM_ATTEMPTS):
            alpha, beta = pace.size / 4**shorter, 0.0 if shorter else pace.momentum
            a, b, count = v, torch.zeros_like(v), 0
            q, total, before = torch.zeros_like(v), torch.zeros_like(field.parameters), math.inf
            while count < LARGEST_NUM_STEPS:
                count += 1
                image, mixed = pull(a)
                q, total = q + alpha * a, total - alpha * mixed
                y = a - alpha * image
                a, b = b + (1 + beta) * y, -beta * y
                rest = float(a.norm()) + float(b.norm())
                if not rest <= 1e3 * size or rest <= _SMALL * size:
                    break
                if count % _GLANCE == 0:
                    if _hopeless(before, rest, _SMALL * size, count):
                        break
                    before = rest
            if rest <= 1e3 * size:
                break
        if not rest <= 1e3 * size:
            return total, count, math.inf
        residual = float((pull(q)[0] - v).norm())
        # an error bound of q, of which the answer is a linear function
        return total, count, residual / (pace.smallest * float(q.norm())) if pace.smallest > 0 else math.inf

    return field.with_products(body)


def _hopeless(before: float, now: float, goal: float, count: int) -> bool:
    """Whether, at the rate of the last steps, the goal lies far beyond the largest number of steps."""
    if not before < math.inf or now <= goal:
        return False
    rate = math.log(now / before) / _GLANCE
    return rate >= 0 or count + math.log(goal / now) / rate > 2 * LARGEST_NUM_STEPS


def _nothing(nested: Nested, details: str, failure: str) -> ReferenceValue:
    value = tuple(torch.full_like(part, math.nan) for part in nested.outer)
    return ReferenceValue(value, math.inf, details, failure=failure)


def _not_solved(name: str, descent: _Descent) -> str:
    size = float(descent.field.value.norm())
    if descent.steps == 0:
        return (
            f"gradient steps on {name} diverge or stall, however short (down to {descent.pace.size:.1e}): its loss has "
            "no minimum near the given point, or is not smooth there"
        )
    return f"{descent.steps} gradient steps on {name} leave an inner gradient of norm {size:.1e}"


def _details(descents: Mapping[str, _Descent], sweeps: Mapping[str, tuple[int, float]]) -> str:
    parts = []
    for name, descent in descents.items():
        kind = "accelerated " if descent.pace.momentum else ""
        own = f"{name}: " if len(descents) > 1 else ""
        back = f" and {sweeps[name][0]} at the solution, differentiated" if name in sweeps else ""
        parts.append(
            f"{own}{descent.steps} {kind}steps of size {descent.pace.size:.2g} to the solution{back}; inner gradient "
            f"norm {float(descent.field.value.norm()):.1e}"
        )
    return "; ".join(parts)


def _distance(given: Mapping[str, Tensors], solved: Mapping[str, Tensors], nested: Nested) -> float:
    before, after = (flat(nested.below(point)).detach().double() for point in (given, solved))
    extent = max(float(before.norm()), float(after.norm()))
    return float((before - after).norm()) / extent if extent else 0.0
