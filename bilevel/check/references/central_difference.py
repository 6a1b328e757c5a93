"""Central differences of the outer loss at the solution of the inner problem: the definition of the hypergradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.check.references.base import Nested, ReferenceValue, outer_gradients
from bilevel.check.references.field import flat, normal
from bilevel.check.references.roots import Root, RootSolver
from bilevel.functional import leaves
from bilevel.vector import Tensors

__all__ = ["central_difference", "ridders"]

NUM_VARIABLES = 64
"""Up to so many outer variables are varied one by one."""

NUM_DIRECTIONS = 24
"""With more of them, so many directions are taken, two at least for every parameter tensor."""

_FIRST_STEP = 0.02
_GOAL = 1e-9


def central_difference(nested: Nested, found: Tensors) -> ReferenceValue:
    """Returns ``(F̂(λ + h d) − F̂(λ − h d)) / 2h`` along directions d, where ``F̂(λ) = F(w*(λ), λ)``.

    For every value of λ the inner problems are solved again, to rounding, by root finding in the field that the inner
    optimiser follows (:class:`~bilevel.check.references.roots.RootSolver`). No second derivative and no formula for the
    hypergradient enters. Steps are halved and extrapolated to zero until the error, as the extrapolation estimates it,
    no longer falls (:func:`ridders`).

    Up to 64 outer variables are varied one by one. With more of them, every parameter tensor is varied along the
    direction of ``found`` and along random orthogonal directions, 24 in all (two for every tensor at least). The part
    of the gradient orthogonal to ``found`` then has the norm ``√((m − 1)/k) ‖r‖``, in the mean square, for its
    components r along k random directions of m; it is returned with this norm, so that error, norm and cosine are
    right up to that.

    Args:
        nested: The problems; their given point is where solving starts.
        found: The hypergradient that is checked.

    Cost: one solve of the inner problems, and 4 to 20 more a direction, of some 5 to 15 gradients each.
    """
    response = _Response(nested)
    base = response.solve()
    if base is None:
        value = tuple(torch.full_like(part, math.nan) for part in nested.outer)
        return ReferenceValue(value, math.inf, "no solution of the inner problem", failure=response.failure)
    pieces: list[Tensor] = []
    errors: list[float] = []
    total = 0
    each = max(2, NUM_DIRECTIONS // len(nested.outer))
    every = nested.size <= NUM_VARIABLES
    goal = _GOAL * float(flat([part.double() for part in found]).norm())
    for place, own in enumerate(found):
        estimate = torch.zeros(own.numel(), dtype=torch.float64, device=own.device)
        for direction, weight in _directions(own, None if every else each, place):
            slope, error = ridders(response.along(place, direction), _scale(nested.outer[place]), goal)
            estimate += weight * slope * direction
            errors.append(weight * error)
            total += 1
        pieces.append(estimate.reshape(own.shape))
    ways = "each outer variable" if every else f"{total} directions of {nested.size} (the found one and random ones)"
    error = math.sqrt(sum(e * e for e in errors))
    distance = response.distance()
    return ReferenceValue(
        tuple(pieces),
        error,
        f"inner problem solved again {response.solves} times along {ways}; inner gradient norm "
        f"{response.gradient_norm:.1e}",
        solved=distance,
        failure="" if error < math.inf else response.failure or "the outer loss changes erratically",
    )


def ridders(
    value: Callable[[float], tuple[float, float] | None], step: float, goal: float, *, halvings: int = 12
) -> tuple[float, float]:
    """Returns a derivative at 0 and the estimate of its error, by central differences extrapolated to zero step.

    Differences with steps h, h/2, h/4, … have errors in even powers of h, which Neville's scheme removes one after the
    other; what an extrapolation changes is the estimate of its error (Ridders, Adv. Eng. Softw. 4, 1982). It stops
    where the estimate reaches the goal or rounding, or rises. Steps over which the function is not smooth (differences
    do not come closer to one another as they are halved), or does not exist, are left behind.

    Args:
        value: ``t -> (value, its rounding error)``, or None where there is none.
        step: The first h.
        goal: An error that is small enough.
        halvings: Most halvings.

    Example:
        >>> slope, error = ridders(lambda t: (math.exp(t), 1e-16), 0.1, 1e-12)
        >>> abs(slope - 1) <= error < 1e-10
        True
    """
    best, least = math.nan, math.inf
    rows: list[list[float]] = []
    change = math.inf
    for _ in range(halvings):
        ahead, behind = value(step), value(-step)
        if ahead is None or behind is None:
            if rows:
                break
            step /= 8
            continue
        noise = (ahead[1] + behind[1]) / (2 * step)
        row = [(ahead[0] - behind[0]) / (2 * step)]
        if rows:
            before, change = change, abs(row[0] - rows[-1][0])
            if (
                change > 0.5 * before and change > 8 * noise
            ):  # not smooth over these steps: begin again with shorter ones
                rows, best, least = [], math.nan, math.inf
        for place, coarser in enumerate(rows[-1] if rows else []):
            factor = 4.0 ** (place + 1)
            row.append((factor * row[place] - coarser) / (factor - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - coarser)) + 2 * noise
            if error <= least:
                best, least = row[-1], error
        rows.append(row)
        rises = len(rows) > 3 and abs(row[-1] - rows[-2][-1]) > 2 * least
        if (least <= goal and len(rows) > 2) or least <= 4 * noise or rises:
            break
        step /= 2
    return best, least


@dataclass
class _Response:
    """``λ ↦ F(w*(λ), λ)``."""

    nested: Nested
    solves: int = 0
    gradient_norm: float = 0.0
    failure: str = ""

    def __post_init__(self) -> None:
        self.solvers: dict[str, RootSolver] = {}
        self.base: Mapping[str, Tensors] = {}
        self.cotangents: dict[str, Tensor] = {}

    def solve(self) -> Mapping[str, Tensors] | None:
        """Solves the inner problems from the given point; None where that fails."""
        nested, point = self.nested, dict(self.nested.point)
        for level in reversed(nested.levels):
            above = nested.above(level, point)
            self.solvers[level.name] = solver = RootSolver(level.objective, level.inner, above)
            root = solver.solve(above)
            self._note(level.name, root)
            if not root.converged:
                return None
            point[level.name] = root.inner
        self.base = point
        below, _ = outer_gradients(nested.objective, nested.below(point), nested.outer)
        parts = iter(below)
        for level in nested.levels:
            own = [next(parts) for _ in level.inner]
            active = self.solvers[level.name].active
            self.cotangents[level.name] = flat([own[place] for place in active]).double()
        return point

    def along(self, place: int, direction: Tensor) -> Callable[[float], tuple[float, float] | None]:
        """Returns ``t ↦ F̂(λ + t d)`` with its rounding error, for a direction of one outer parameter."""
        own = self.nested.outer[place].detach()

        def value(t: float) -> tuple[float, float] | None:
            moved = own + t * direction.reshape(own.shape).to(own)
            outer = leaves([moved if i == place else part for i, part in enumerate(self.nested.outer)])
            point: dict[str, Tensors] = {self.nested.name: outer}
            noise = 0.0
            for level in reversed(self.nested.levels):
                above = self.nested.above(level, point)
                root = self.solvers[level.name].again(self.base[level.name], above)
                self._note(level.name, root)
                if not root.converged:
                    return None
                point[level.name] = root.inner
                noise += abs(float(self.cotangents[level.name] @ root.step))
            found = self.nested.value(point)
            self.solves += 1
            return (found, noise + 4e-16 * abs(found)) if math.isfinite(found) else None

        return value

    def distance(self) -> float:
        """How far the solution is from the given point, relatively."""
        given = flat(self.nested.below(self.nested.point)).detach().double()
        solved = flat(self.nested.below(self.base)).detach().double()
        extent = max(float(given.norm()), float(solved.norm()))
        return float((given - solved).norm()) / extent if extent else 0.0

    def _note(self, name: str, root: Root) -> None:
        if root.converged:
            self.gradient_norm = max(self.gradient_norm, root.gradient_norm)
        elif not self.failure:
            self.failure = (
                f"the gradient of {name} could not be brought to zero (norm {root.gradient_norm:.1e} left): there is "
                "no solution near the given point, or its loss is not smooth there"
            )


def _directions(own: Tensor, limit: int | None, seed: int) -> Iterator[tuple[Tensor, float]]:
    """Yields orthonormal directions of one parameter, with the weights of their components in the estimate."""
    size = own.numel()
    if limit is None or size <= limit:
        for row in torch.eye(size, dtype=torch.float64, device=own.device):
            yield row, 1.0
        return
    generator = torch.Generator().manual_seed(seed)
    columns: Sequence[Tensor] = [normal(size, generator, own.device) for _ in range(limit)]
    flattened = own.detach().reshape(-1).double()
    known = float(flattened.norm()) > 0
    if known:
        columns = [flattened, *columns[1:]]
    basis = torch.linalg.qr(torch.stack(list(columns), dim=1))[0]
    count = limit - known
    for place in range(limit):
        yield basis[:, place], 1.0 if known and place == 0 else math.sqrt((size - known) / count)


def _scale(parameter: Tensor) -> float:
    """The first step: a fraction of the parameter's own size."""
    size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
    return _FIRST_STEP * (size if size > 0 else 1.0)
