"""What the first-order penalty methods share: an auxiliary iterate, and a difference of first derivatives."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from bilevel.errors import ConfigError
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State
from bilevel.hypergrad.surroundings import Surroundings
from bilevel.linear import machine_epsilon, rounding_allowance
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors, axpy, dot, is_finite, norm, scale, subtract, zeros_like

__all__ = ["Descent", "Penalty"]

AUXILIARY = "auxiliary"
LARGEST = "largest_eigenvalue"
TOLERATED_ROUNDING = 0.1
TOLERATED_CURVATURE = 1e-3


@dataclass(frozen=True)
class Descent:
    """What one call did with the auxiliary iterate.

    Attributes:
        y: Where it ended.
        slope: ``∂f/∂w(y)``.
        outer_slope: ``∂f/∂λ(y)``.
        step: ξ.
        first: ``‖v + γ ∂f/∂w‖`` where it started.
        start: ``‖y − w‖`` where it started.
    """

    y: Tensors
    slope: Tensors
    outer_slope: Tensors
    step: float
    first: float
    start: float


@dataclass(frozen=True)
class Penalty(Estimator):
    """Base of the methods that descend on ``vᵀy + γ f(y, λ)`` and difference ``∂f/∂λ`` between y and w.

    One iteration is ``y ← y − ξ (v + γ ∂f/∂w(y, λ))``, and the implicit part ``γ (∂f/∂λ(y, λ) − ∂f/∂λ(w, λ))``. A
    subclass supplies γ and ξ. The residual that is reported is ``‖γ (∂f/∂w(y) − ∂f/∂w(w)) + v‖ / ‖v‖``: that of
    ``H q = v`` for the ``q = −γ (y − w)`` which the answer stands for, with the mean of the Hessian between w and y for
    H. It tells of both, that y is not where it should be and that w does not solve the inner problem. It does not tell
    of the bias: how much that mean, and that of the mixed derivative, differ from their values at w.

    Attributes:
        iterations: Steps of y at each call.
        step_size: The length of a step, see the subclass, or ``"auto"``: from the largest eigenvalue of the Hessian,
            which 8 Lanczos products by differences estimate at the first call and again where y runs away.
    """

    iterations: int = field(default=10, kw_only=True)
    step_size: float | str = field(default="auto", kw_only=True)

    needs_double_backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        check_integer(owner, "iterations", self.iterations, minimum=1)
        check_number(owner, "step_size", self.step_size, minimum=0.0, exclusive=True, auto=True)

    @property
    def needs_state(self) -> bool:
        """For y, which goes on from where it was."""
        return True

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _PenaltyResponse(self, problem)

    @abstractmethod
    def multiplier_at(self, v: Tensors, slope: Tensors) -> float:
        """Returns γ where ``∂f/∂w`` is ``slope``."""

    def first_multiplier(self, v: Tensors, slope: Tensors) -> float:
        """Returns γ of the first step of all, where y is still w."""
        return self.multiplier_at(v, slope)

    @abstractmethod
    def step_for(self, largest: float) -> float:
        """Returns ξ of ``step_size="auto"`` for a largest eigenvalue of the Hessian."""

    def step_of(self, step_size: float) -> float:
        """Returns ξ of a given step size."""
        return step_size

    @abstractmethod
    def runs_away(self, descent: Descent, v: Tensors, around: Surroundings) -> bool:
        """Whether y moved as it cannot on a convex inner loss with an admissible step size."""


@dataclass(frozen=True)
class _PenaltyResponse(Response):
    estimator: Penalty
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        around = Surroundings(self.problem)
        v = around.select(cotangent)
        if float(norm(v)) == 0.0:  # the outer loss is flat in the inner parameters
            size = float(norm(around.slope))
            info = SolveInfo(
                Status.CONVERGED, 0.0, 0, around.count, inner_gradient_norm=size, method=self.estimator.name
            )
            return Pullback(zeros_like(self.problem.outer), info, state)
        start = _kept(self.estimator, state, around)
        step = _step(self.estimator, state, around)
        if step.refused is not None:
            return _refusal(self.estimator, self.problem, around, step.refused)
        descent = _descend(self.estimator, around, v, start, step.length)
        if step.largest is not None and LARGEST in state and self.estimator.runs_away(descent, v, around):
            step = _step(self.estimator, {}, around)  # the estimate is out of date
            if step.refused is not None:
                return _refusal(self.estimator, self.problem, around, step.refused)
            descent = _descend(self.estimator, around, v, None, step.length)
        return _answer(self.estimator, around, v, descent, step)


@dataclass(frozen=True)
class _Step:
    """ξ, and what it was made from: the largest eigenvalue, and whether a negative one was seen with it."""

    length: float
    largest: float | None = None
    indefinite: bool = False
    refused: Status | None = None


def _kept(estimator: Penalty, state: State, around: Surroundings) -> Tensors | None:
    known = state.get(AUXILIARY)
    if known is None:
        return None
    if [part.shape for part in known] != [part.shape for part in around.inner]:
        raise ConfigError(
            f"the state of method {estimator.name!r} belongs to another problem: its iterate has shapes "
            f"{[tuple(part.shape) for part in known]}, the inner variables "
            f"{[tuple(part.shape) for part in around.inner]}. Start with state={{}}."
        )
    return tuple(a.to(b) for a, b in zip(known, around.inner, strict=True))


def _step(estimator: Penalty, state: State, around: Surroundings) -> _Step:
    if not isinstance(estimator.step_size, str):
        return _Step(estimator.step_of(estimator.step_size))
    known = state.get(LARGEST)
    if known is not None:
        return _Step(estimator.step_for(float(known[0])), float(known[0]))
    spectrum = around.spectrum()
    if 0.0 < spectrum.largest < math.inf:
        indefinite = spectrum.smallest < -TOLERATED_CURVATURE * spectrum.largest
        return _Step(estimator.step_for(spectrum.largest), spectrum.largest, indefinite)
    status = Status.NEGATIVE_CURVATURE if spectrum.largest < 0.0 else Status.SINGULAR
    return _Step(math.nan, refused=status if math.isfinite(spectrum.largest) else Status.DIVERGED)


def _refusal(estimator: Penalty, problem: InnerProblem, around: Surroundings, status: Status) -> Pullback:
    size = float(norm(around.slope))
    message = "no positive curvature found, and so no step size; the implicit part is left out"
    info = SolveInfo(status, 1.0, 0, around.count, inner_gradient_norm=size, method=estimator.name, message=message)
    return Pullback(zeros_like(problem.outer), info)


def _descend(estimator: Penalty, around: Surroundings, v: Tensors, start: Tensors | None, step: float) -> Descent:
    y, first = around.inner if start is None else start, math.nan
    for place in range(estimator.iterations):
        if start is None and place == 0:
            slope = around.slope
            factor = estimator.first_multiplier(v, slope)
        else:
            slope = around.slope_at(y)
            factor = estimator.multiplier_at(v, slope)
        move = axpy(factor, slope, v)
        first = float(norm(move)) if place == 0 else first
        y = axpy(-step, move, y)
    distance = 0.0 if start is None else float(norm(subtract(start, around.inner)))
    slope, outer_slope = around.slopes_at(y)
    return Descent(y, slope, outer_slope, step, first, distance)


def _answer(estimator: Penalty, around: Surroundings, v: Tensors, descent: Descent, step: _Step) -> Pullback:
    factor, size = estimator.multiplier_at(v, descent.slope), float(norm(v))
    moved, change = subtract(descent.y, around.inner), subtract(descent.slope, around.slope)
    value = scale(factor, subtract(descent.outer_slope, around.outer_slope))
    residual = float(norm(axpy(factor, change, v))) / size
    lost = around.rounding(descent.y)
    message = f"multiplier {factor:.3g}, auxiliary iterate {float(norm(moved)):.2g} away, bias O(1/multiplier)"
    status = Status.STOPPED_AT_CAP
    if not is_finite(value) or not math.isfinite(residual):
        status = Status.DIVERGED
    elif lost > TOLERATED_ROUNDING:
        status = Status.INACCURATE
        message += f", which rounding changes by {lost:.0%}: lower the multiplier"
    elif step.indefinite or _curves_down(moved, change):
        status = Status.NEGATIVE_CURVATURE
    elif estimator.runs_away(descent, v, around):
        status = Status.DIVERGED
    elif residual <= rounding_allowance(math.sqrt(machine_epsilon(around.inner))):
        status = Status.CONVERGED
    unsolved = factor * float(norm(around.slope)) / size
    if unsolved > 1.0:
        message += f"; the inner gradient counts {unsolved:.2g} times the cotangent: take more inner steps"
    state: dict[str, Tensors] = {}
    if status not in (Status.DIVERGED, Status.NEGATIVE_CURVATURE):
        state[AUXILIARY] = descent.y
        if step.largest is not None:
            state[LARGEST] = (torch.tensor(step.largest, dtype=torch.float64),)
    info = SolveInfo(
        status,
        residual,
        iterations=estimator.iterations,
        products=around.count,
        inner_gradient_norm=float(norm(around.slope)),
        method=estimator.name,
        message=message,
    )
    return Pullback(value, info, state)


def _curves_down(moved: Tensors, change: Tensors) -> bool:
    """Whether the mean of the Hessian between w and y has negative curvature along ``y − w``."""
    return float(dot(moved, change)) < -TOLERATED_CURVATURE * float(norm(moved)) * float(norm(change))
