"""Zeroth-order differentiation of the inner updates: they are repeated at perturbed outer parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.functional import gradient, leaves
from bilevel.hypergrad.base import InnerProblem, InnerStep, Pullback, Response, State
from bilevel.hypergrad.inner_updates import InnerUpdates, Trajectory, take_step
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_choice, check_integer, check_number
from bilevel.vector import Tensors, add, dot, is_finite, norm, promote, scale, subtract, zeros_like

__all__ = ["PZOBO"]

GENERATOR = "generator"
"""Key of the directions' generator in the state."""
TOLERATED_ROUNDING = 0.1


@dataclass(frozen=True)
class PZOBO(InnerUpdates):
    """Partial zeroth-order hypergradient: the response by forward differences, everything else exactly.

    With Q random directions ``z_j`` in the space of the outer parameters,

        vᵀ dw_T/dλ ≈ 1/Q Σ_j ⟨(w_T(λ + h z_j) − w_T(λ)) / h, v⟩ z_j

    where ``w_T(·)`` is the end of the inner updates from the same start, on the same batches, with the same random
    numbers. As ``E z zᵀ = I``, the mean is the derivative of the updates (what :class:`~bilevel.Unrolled` computes) up
    to the smoothing: the error is at most ``h M ‖z‖³ ‖v‖ / 2`` a direction, for a bound M of the second derivative of
    ``w_T``. With Gaussian directions the variance is about ``(P + 1) / Q`` times the squared norm of the answer for P
    outer variables. First derivatives only. Source: Sow, Ji, Liang, NeurIPS 2022 (arXiv 2203.01123), equations 5 and 6.

    Attributes:
        num_directions: Q, or ``"all"`` for as many as there are outer variables (orthogonal directions only).
        smoothing: h, or ``"auto"``: ``√u · sqrt(1 + ‖λ‖) / √P`` with the round-off u of the parameters' dtype, so that
            displacements have about the length that balances the errors of smoothing and of rounding.
        steps: As a function, the gradient steps to take from ``inner_params``. In an engine, how many of the last inner
            updates to repeat; None for all since the last outer update.
        learning_rate: η of those steps, as a function; in an engine the inner problem's own optimiser makes them.
        directions: ``"gaussian"``: independent standard normal entries. ``"orthogonal"``: ``√P`` times orthonormal
            vectors, uniformly distributed: never worse in expectation, and exact but for the smoothing with
            ``num_directions="all"``.
        seed: Where the directions' generator starts. Its state goes out and in with the method's state: calls that
            follow one another take new directions, the same state gives the same bits.
        optimizer: Who makes the steps, as a function; see :class:`~bilevel.Unrolled`.

    Where rounding changes the displacement of the outer parameters, or the difference of the inner ones, by more than a
    tenth, the status is ``INACCURATE``; so it is where no displacement moves the inner parameters although the outer
    ones reach the inner loss (1 forward and 1 backward pass more, to find out). Updates that leave the range of numbers
    are ``DIVERGED``.

    Raises:
        ConfigError: ``"all"`` with Gaussian directions; more orthogonal directions than outer variables.

    Cost: ``Q + 1`` times T forward and backward passes; as a function T of each of them make the steps.
    """

    num_directions: int | str = 10
    smoothing: float | str = "auto"
    steps: int | None = None
    learning_rate: float | None = None
    directions: str = field(default="gaussian", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    optimizer: str = field(default="sgd", kw_only=True)

    name: ClassVar[str] = "pzobo"
    summary: ClassVar[str] = "the inner updates repeated at perturbed outer parameters (zeroth-order response)"
    cost: ClassVar[str] = "per step: (1 + num_directions) forward and backward passes"
    needs: ClassVar[str] = "first derivatives only; one copy of parameters and optimiser memory per step"
    storage: ClassVar[str] = "parameters and optimiser memory of every step"
    purpose: ClassVar[str] = "few outer parameters and inner losses without second derivatives"
    needs_double_backward: ClassVar[bool] = False
    follows_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validates the fields, alone and together."""
        self.check_updates()
        if self.num_directions != "all":
            check_integer("PZOBO", "num_directions", self.num_directions, minimum=1)
        check_number("PZOBO", "smoothing", self.smoothing, minimum=0.0, exclusive=True, auto=True)
        check_choice("PZOBO", "directions", self.directions, ("gaussian", "orthogonal"))
        check_integer("PZOBO", "seed", self.seed, minimum=0)
        if self.num_directions == "all" and self.directions == "gaussian":
            raise ConfigError(
                "PZOBO(num_directions='all') takes a full basis of orthogonal directions: set directions='orthogonal', "
                "or give a number of Gaussian ones"
            )

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Takes the gradient steps, where no trajectory was recorded."""
        if problem.trajectory:
            return _PerturbedResponse(self, problem, self.recorded(problem), repeat=True)
        return _PerturbedResponse(self, problem, self.made(problem), repeat=False)


@dataclass(frozen=True)
class _PerturbedResponse(Response):
    """``repeat``: whether the unperturbed updates are made again. Who recorded them may have rounded otherwise."""

    estimator: PZOBO
    problem: InnerProblem
    trajectory: Trajectory
    repeat: bool

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.trajectory.point

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        v, outer = promote(cotangent), tuple(part.detach() for part in promote(self.problem.outer))
        generator = _generator(self.estimator.seed, state)
        directions = _directions(self.estimator, outer, generator)
        mu = _smoothing(self.estimator, self.problem, sum(part.numel() for part in outer))
        steps = self.trajectory.steps
        start = self.problem.start
        base = promote(_repeat(steps, self.problem.outer, start) if self.repeat else [p.detach() for p in self.point])
        total, lost, moved = zeros_like(outer), 0.0, 0.0
        for direction in directions:
            move = scale(mu, direction)
            place = tuple((a + b).to(c.dtype) for a, b, c in zip(outer, move, self.problem.outer, strict=True))
            lost = max(lost, _relative(subtract(subtract(promote(place), outer), move), move))
            difference = subtract(promote(_repeat(steps, leaves(place), start)), base)
            moved = max(moved, float(norm(difference)))
            slope = dot(scale(1 / mu, difference), v) / len(directions)
            total = add(total, scale(slope, direction))
        if moved > 0.0:
            roundoff = max(torch.finfo(part.dtype).eps for part in self.point)
            lost = max(lost, roundoff * float(norm(base)) / moved)
        elif start is not None or _influences(steps[-1], self.problem.outer):
            lost = 1.0
        status = Status.INACCURATE if lost > TOLERATED_ROUNDING else Status.NOT_APPLICABLE
        status = status if is_finite(total) else Status.DIVERGED
        notes = [self.trajectory.message, f"smoothing {mu:.3g}, {len(directions)} directions, rounding {lost:.0e}"]
        info = SolveInfo(
            status,
            iterations=len(steps),
            products=len(steps) * (len(directions) + self.repeat),
            method=self.estimator.name,
            message="; ".join(note for note in notes if note),
        )
        return Pullback(tuple(part.detach() for part in total), info, {GENERATOR: (generator.get_state(),)})


def _repeat(steps: Sequence[InnerStep], outer: Tensors, start: Sequence[int] | None) -> Tensors:
    """Returns where the updates end with other outer parameters, each on its own batch."""
    inner, memory = steps[0].inner, steps[0].memory
    if start is not None:
        inner = tuple(outer[place].detach() for place in start)
    for step in steps:
        taken = take_step(replace(step, inner=inner, memory=memory, graph=None), outer)
        inner, memory = taken.inner, taken.memory
    return inner


def _influences(step: InnerStep, outer: Tensors) -> bool:
    """Whether the outer parameters reach the loss of a step."""
    objective = step.objective
    found = objective.within(step.inner, outer, lambda evaluate: gradient(evaluate(), outer, objective))
    return any(grad is not None for grad in found)


def _generator(seed: int, state: State) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    if GENERATOR in state:
        (kept,) = state[GENERATOR]
        generator.set_state(kept.cpu())
    return generator


def _directions(estimator: PZOBO, outer: Tensors, generator: torch.Generator) -> list[Tensors]:
    """Returns the directions: one draw on the CPU, however the outer parameters are split or held."""
    size = sum(part.numel() for part in outer)
    number = size if estimator.num_directions == "all" else int(estimator.num_directions)
    if estimator.directions == "orthogonal" and number > size:
        raise ConfigError(
            f"PZOBO(num_directions={number}, directions='orthogonal'): there are only {size} outer variables; "
            "'all' takes as many directions"
        )
    rows = torch.randn(number, size, generator=generator, dtype=torch.float64)
    if estimator.directions == "orthogonal":
        # The factor with a positive diagonal makes Q uniformly distributed (Mezzadri, Notices of the AMS 54, 2007).
        basis, triangle = torch.linalg.qr(rows.T)
        rows = math.sqrt(size) * (basis * triangle.diagonal().sign()).T
    sizes = [part.numel() for part in outer]
    return [
        tuple(piece.reshape(part.shape).to(part) for piece, part in zip(torch.split(row, sizes), outer, strict=True))
        for row in rows
    ]


def _smoothing(estimator: PZOBO, problem: InnerProblem, size: int) -> float:
    if not isinstance(estimator.smoothing, str):
        return float(estimator.smoothing)
    roundoff = max(torch.finfo(part.dtype).eps for part in problem.inner + problem.outer)
    length = math.sqrt(roundoff) * math.sqrt(1 + float(norm([part.detach() for part in problem.outer])))
    return length / math.sqrt(max(size, 1))


def _relative(error: Sequence[Tensor], of: Sequence[Tensor]) -> float:
    size = float(norm(of))
    return float(norm(error)) / size if size > 0.0 else 0.0
