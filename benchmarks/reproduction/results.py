"""What the runs say: suboptimality over a budget, with the median and the range over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Curve", "Spread", "broke", "curve", "final", "reached", "spread"]

Cell = Mapping[str, Any]
"""One method on one problem, as in the results file."""


@dataclass(frozen=True)
class Spread:
    """Median and range."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A median over seeds with its range, at the marks of the budget that every seed reached."""

    cost: list[float]
    seconds: list[float]
    gap: list[Spread]


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and range."""
    return Spread(median(values), min(values), max(values))


def gaps(run: Mapping[str, Any], minimum: float) -> list[float]:
    """Returns ``(h(λ) − h*) / (h(λ₀) − h*)`` at every mark."""
    start = run["value"][0] - minimum
    return [(value - minimum) / start for value in run["value"]]


def curve(cell: Cell, minima: Mapping[str, float]) -> Curve:
    """Returns a method's curve on a problem; it ends where the first seed's budget does.

    A step can pass several marks at once, and is then what stands for all of them. A run that broke counts as infinite
    from there on.
    """
    runs = cell["runs"]
    ends = [run["points"][-1] for run in runs if not broke(run)]
    last = min(ends) if ends else max((run["points"][-1] for run in runs), default=-1)
    cost, seconds, values = [], [], []
    before: list[int] = []
    for mark in sorted({point for run in runs for point in run["points"] if point <= last}):
        places = [sum(point < mark for point in run["points"]) for run in runs]
        if places == before:
            continue
        before = places
        at = [(run, place) for run, place in zip(runs, places, strict=True) if place < len(run["points"])]
        found = [gaps(run, minima[str(run["seed"])])[place] for run, place in at]
        cost.append(median(run["cost"][place] for run, place in at))
        seconds.append(median(run["seconds"][place] for run, place in at))
        values.append(spread(found + [math.inf] * (len(runs) - len(at))))
    return Curve(cost, seconds, values)


def broke(run: Mapping[str, Any]) -> bool:
    """Whether a run ended in numbers that are not finite."""
    return run["ended"].startswith("diverged") or not math.isfinite(run["value"][-1])


def final(cell: Cell, minima: Mapping[str, float]) -> Spread:
    """Returns the suboptimality where the budget ended; infinite for a run that broke."""
    ends = []
    for run in cell["runs"]:
        end = gaps(run, minima[str(run["seed"])])[-1]
        ends.append(math.inf if broke(run) else end)
    return spread(ends)


def reached(cell: Cell, minima: Mapping[str, float], target: float, axis: str) -> float:
    """Returns the median cost (or seconds) at which the suboptimality first falls below a target; infinite if never.

    Between marks the curve is a straight line on logarithmic axes.
    """
    found = []
    for run in cell["runs"]:
        values, at = gaps(run, minima[str(run["seed"])]), run[axis]
        where = next((place for place, value in enumerate(values) if value <= target), None)
        if where is None:
            found.append(math.inf)
        elif where <= 1:  # the first mark: nothing to interpolate from
            found.append(at[where])
        else:
            high, low = math.log(values[where - 1]), math.log(max(values[where], 1e-300))
            share = (high - math.log(target)) / (high - low)
            found.append(math.exp((1 - share) * math.log(at[where - 1]) + share * math.log(at[where])))
    return median(found)
