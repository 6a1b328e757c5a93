"""Probes of a pair of losses: what there may be wrong with it, whatever the method."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.check.references import DenseField, GradientField, Hidden, Nested, hidden
from bilevel.check.references.base import outer_gradients
from bilevel.check.references.field import flat, like, normal, ritz_values
from bilevel.errors import LossError
from bilevel.functional import Evaluate, Objective, derivatives, leaves
from bilevel.vector import Tensors

__all__ = ["Diagnosis", "LevelDiagnosis", "Noise", "diagnose", "foreign_generators_preserved", "reduced_precision"]

_STEPS = (1e-5, 1e-7)
_LONG_STEP = 1e-3
_LARGEST_CHANGE = 1e-2
_NUM_EVALUATIONS = 3
_NUM_LANCZOS = 60


@dataclass(frozen=True)
class Noise:
    """Two evaluations of a loss at one point differ, although torch's generators were replayed.

    Attributes:
        loss: Whose loss.
        level: By how much, relatively.
        source: The generator that it drew from, where that is known.
    """

    loss: str
    level: float
    source: str


@dataclass(frozen=True)
class LevelDiagnosis:
    """What is known of one inner problem at the given point.

    Attributes:
        name: Its name.
        gradient_norm: ``‖g‖``, ``g = ∂f/∂w``.
        distance: Of a Newton step, relative to the size of w; NaN where it was not computed.
        asymmetry: ``‖J − Jᵀ‖ / ‖J‖`` of the Jacobian J of g.
        hidden: What autograd's derivative of g misses.
        eigenvalues: Extreme eigenvalues of J's symmetric part.
        estimated: Whether these are Lanczos estimates.
        singular: Whether J is singular to working precision.
        operations: Names of the operations in its loss whose derivatives jump.
        near_kink: Whether differences of g over a thousandth of the size of w show such jumps.
        ignored: Names of the variables that do not reach its loss.
    """

    name: str
    gradient_norm: float
    distance: float
    asymmetry: float
    hidden: Hidden
    eigenvalues: tuple[float, float]
    estimated: bool
    singular: bool
    operations: tuple[str, ...]
    near_kink: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What the probes found.

    Attributes:
        levels: Of every inner problem.
        noise: Losses that are no functions of their arguments.
        outer_hidden: What autograd's gradient of F misses of its differences along random directions, relatively.
        outer_kink: Whether F has a kink at the point.
        disconnected: Outer parameters on which neither F nor any inner gradient depends.
        unseen: Parameters that change F or an inner gradient, while autograd finds no way from them.
        unused: Inner parameters that neither F nor a loss below depends on.
    """

    levels: tuple[LevelDiagnosis, ...]
    noise: tuple[Noise, ...]
    outer_hidden: float
    outer_kink: bool
    disconnected: tuple[str, ...]
    unseen: tuple[str, ...]
    unused: tuple[str, ...]


def diagnose(nested: Nested, fields: Mapping[str, GradientField], dense: Mapping[str, DenseField]) -> Diagnosis:
    """Runs all probes at the given point.

    Args:
        nested: The problems.
        fields: The inner gradient fields.
        dense: Those with a dense Jacobian; what is missing here is estimated from products.

    Cost: some 30 gradients of each inner loss, and 60 products where its Jacobian is not at hand.
    """
    below = nested.below(nested.point)
    named = [(level.objective, level.inner, nested.above(level, nested.point)) for level in nested.levels]
    noise = [_noise(*part) for part in (*named, (nested.objective, below, nested.outer))]
    outer_hidden, outer_kink = _outer(nested)
    disconnected, unseen, unused = _connections(nested, fields, any(found is not None for found in noise))
    return Diagnosis(
        levels=tuple(
            _level(level.name, level.names, fields[level.name], dense.get(level.name)) for level in nested.levels
        ),
        noise=tuple(found for found in noise if found is not None),
        outer_hidden=outer_hidden,
        outer_kink=outer_kink,
        disconnected=disconnected,
        unseen=unseen,
        unused=unused,
    )


def _level(name: str, names: Sequence[str], field: GradientField, dense: DenseField | None) -> LevelDiagnosis:
    missed = hidden(field) if dense is None or dense.hidden is None else dense.hidden
    active = set(field.active)
    return LevelDiagnosis(
        name=name,
        gradient_norm=float(field.value.norm()),
        distance=math.nan if dense is None else dense.distance,
        asymmetry=missed.asymmetry if dense is None else dense.asymmetry,
        hidden=missed,
        eigenvalues=(
            _extremes(field) if dense is None else (float(dense.eigenvalues[0]), float(dense.eigenvalues[-1]))
        ),
        estimated=dense is None,
        singular=dense is not None and dense.singular,
        operations=field.jumping,
        near_kink=_near_kink(field),
        ignored=tuple(name for place, name in enumerate(names) if place not in active),
    )


def _extremes(field: GradientField) -> tuple[float, float]:
    start = normal(len(field.value), torch.Generator().manual_seed(0), field.value.device)
    try:
        return field.with_products(lambda pull: ritz_values(lambda v: pull(v)[0], start, _NUM_LANCZOS))
    except LossError:
        return ritz_values(lambda v: field.along(v), start, _NUM_LANCZOS)


def _near_kink(field: GradientField) -> bool:
    if not field.jumping or field.dtype != torch.float64:
        return False
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        move = normal(len(field.value), generator, field.value.device)
        near, far = (field.along(move, size=size) for size in (_STEPS[0], _LONG_STEP))
        if float((far - near).norm()) > _LARGEST_CHANGE * float(near.norm()):
            return True
    return False


def _noise(objective: Objective, inner: Tensors, outer: Tensors) -> Noise | None:
    before = _foreign_states()
    values = [
        float(objective.within(inner, outer, lambda evaluate: evaluate().detach())) for _ in range(_NUM_EVALUATIONS)
    ]
    spread = max(values) - min(values)
    if not spread > 1e-12 * max(map(abs, values)):
        return None
    after = _foreign_states()
    drawn = [name for name in before if not _same(before[name], after[name])]
    return Noise(objective.name, spread / max(map(abs, values)), " and ".join(drawn))


def _outer(nested: Nested) -> tuple[float, bool]:
    """Compares autograd's gradient of F with its differences, central and one-sided, along random directions."""
    everything = nested.below(nested.point) + nested.outer
    count = len(everything) - len(nested.outer)
    base = flat(everything).detach()
    if base.dtype != torch.float64:
        return math.nan, False
    gradient = flat(
        [part for side in outer_gradients(nested.objective, everything[:count], nested.outer) for part in side]
    )
    generator = torch.Generator().manual_seed(0)

    def value(point: Tensor) -> float:
        moved = leaves(like(everything, point))
        return float(nested.objective.within(moved[:count], moved[count:], lambda evaluate: evaluate().detach()))

    here, extent = value(base), 1 + float(base.norm())
    seen: list[float] = []
    slopes: list[list[float]] = [[], []]
    bends: list[list[float]] = [[], []]
    for _ in range(4):
        move = normal(len(base), generator, base.device)
        move = move / move.norm()
        seen.append(float(gradient @ move))
        for place, size in enumerate(_STEPS):
            step = size * extent
            ahead, behind = value(base + step * move), value(base - step * move)
            slopes[place].append((ahead - behind) / (2 * step))
            bends[place].append((ahead - 2 * here + behind) / step)
    coarse, fine = (math.hypot(*found) for found in bends)
    # Next to a minimum of F, slopes are what a step away from it makes them.
    floors = [1e-2 * coarse + 1e-13 * abs(here) / (size * extent) for size in _STEPS]
    missed = [
        _missed(found, seen) if math.dist(found, seen) > floor else 0.0
        for found, floor in zip(slopes, floors, strict=True)
    ]
    # What bends smoothly bends a hundred times less over a hundredth of the step.
    kink = fine > 0.3 * coarse and fine > 1e-4 * math.hypot(*seen) + floors[1] - 1e-2 * coarse
    return min(missed), kink


def _missed(found: Sequence[float], seen: Sequence[float]) -> float:
    return math.dist(found, seen) / max(math.hypot(*found), math.hypot(*seen))


def _connections(
    nested: Nested, fields: Mapping[str, GradientField], noisy: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns the names of disconnected outer, unseen, and unused inner parameters.

    What has a zero derivative is moved: where nothing changes, it is disconnected (or unused); where something does,
    and autograd has no path from it, it is unseen.
    """
    point = nested.point
    below = nested.below(point)
    to_inner, direct = outer_gradients(nested.objective, below, nested.outer)
    paths = _paths(nested.objective, below, nested.outer)
    counts, reached = [bool(part.any()) for part in direct], list(paths[len(below) :])
    for level in nested.levels:
        if nested.name not in level.above:
            continue
        start = sum(len(point[name]) for name in level.above[: level.above.index(nested.name)])
        own = slice(start, start + len(nested.outer))
        known = _paths(level.objective, level.inner, nested.above(level, point))[len(level.inner) :][own]
        for place, part in enumerate(_mixed(fields[level.name])[own]):
            counts[place] |= bool(part.any())
            reached[place] |= known[place]
    names: dict[str, list[str]] = {"disconnected": [], "unseen": [], "unused": []}
    for place, name in enumerate(nested.names):
        if not counts[place]:
            moves = not noisy and _moves(nested, nested.name, place)
            if not moves or not reached[place]:
                names["unseen" if moves else "disconnected"].append(name)
    inner = ((level, place) for level in nested.levels for place in range(len(level.inner)))
    read = {name for level in nested.levels for name in level.above}  # by a level below, whose response F may depend on
    for (level, place), part, path in zip(inner, to_inner, paths, strict=False):
        if not bool(part.any()):
            moves = not noisy and _moves(nested, level.name, place, outer_only=True)
            prefix = f"{level.name}." if len(nested.levels) > 1 else ""
            if moves and not path:
                names["unseen"].append(prefix + level.names[place])
            elif not moves and level.name not in read:
                names["unused"].append(prefix + level.names[place])
    return tuple(names["disconnected"]), tuple(names["unseen"]), tuple(names["unused"])


def _paths(objective: Objective, inner: Tensors, outer: Tensors) -> list[bool]:
    """Whether autograd has a path from each variable to a loss."""

    def body(evaluate: Evaluate) -> list[bool]:
        value = evaluate()
        if not value.requires_grad:
            return [False] * len(inner + outer)
        return [part is not None for part in derivatives(value, inner + outer)]

    return objective.within(inner, outer, body)


def _mixed(field: GradientField) -> Tensors:
    """Returns ``qᵀ ∂g/∂(above)`` for a random q: zero where g does not depend on a variable."""
    q = normal(len(field.value), torch.Generator().manual_seed(2), field.value.device)
    try:
        return like(field.outer, field.with_products(lambda pull: pull(q)[1]))
    except LossError:
        return like(field.outer, field.mixed_by_differences(q))


def _moves(nested: Nested, name: str, place: int, *, outer_only: bool = False) -> bool:
    """Whether F, or an inner gradient, changes when one parameter does."""
    generator = torch.Generator().manual_seed(3)
    own = nested.point[name][place]
    shift = normal(own.numel(), generator, own.device).reshape(own.shape).to(own)
    size = 1e-3 * (1 + float(own.detach().norm())) / max(float(shift.norm()), 1e-300)
    moved = leaves([p + size * shift if i == place else p for i, p in enumerate(nested.point[name])])
    point = {**nested.point, name: moved}
    before, after = nested.value(nested.point), nested.value(point)
    if abs(after - before) > 1e-12 * max(abs(before), abs(after)):
        return True
    if outer_only:
        return False
    for level in nested.levels:
        if name in level.above:
            fields = [
                GradientField(level.objective, level.inner, nested.above(level, p)) for p in (nested.point, point)
            ]
            if float((fields[0].value - fields[1].value).norm()) > 1e-9 * float(fields[0].value.norm()) + 1e-14:
                return True
    return False


def reduced_precision(tensors: Sequence[Tensor], nodes: frozenset[str]) -> tuple[str, ...]:
    """Returns what makes a method compute in less than float32: half-precision parameters, TF32 on a GPU.

    Args:
        tensors: All parameters.
        nodes: The operations of the losses (:attr:`~bilevel.check.references.GradientField.nodes`).
    """
    half = {part.dtype for part in tensors} & {torch.float16, torch.bfloat16}
    found = [f"parameters in {str(dtype).removeprefix('torch.')}" for dtype in sorted(half, key=str)]
    if any(part.device.type == "cuda" and part.dtype == torch.float32 for part in tensors):
        if torch.backends.cuda.matmul.allow_tf32:
            found.append("TF32 in matrix products (torch.backends.cuda.matmul.allow_tf32)")
        if torch.backends.cudnn.allow_tf32 and any("Conv" in node or "Cudnn" in node for node in nodes):
            found.append("TF32 in convolutions (torch.backends.cudnn.allow_tf32)")
    return tuple(found)


@contextmanager
def foreign_generators_preserved() -> Iterator[None]:
    """Leaves Python's and NumPy's global generators as they were."""
    states = _foreign_states()
    try:
        yield
    finally:
        for name, state in states.items():
            _FOREIGN[name][1](state)


def _numpy() -> Any:
    return sys.modules["numpy"].random


_FOREIGN: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "Python's random": (random.getstate, random.setstate),
    "numpy.random": (lambda: _numpy().get_state(), lambda state: _numpy().set_state(state)),
}


def _foreign_states() -> dict[str, Any]:
    return {name: get() for name, (get, _) in _FOREIGN.items() if name != "numpy.random" or "numpy" in sys.modules}


def _same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)
