"""One run of a method on a problem, and the search for its outer step size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reproduction.driver import Driver, Recipe, make_driver
from benchmarks.reproduction.methods import Entry, SingleLoop
from benchmarks.reproduction.suite import SUITE, Case
from benchmarks.reproduction.task import Task
from bilevel import BilevelError

__all__ = ["Run", "make_task", "run", "tune"]

FACTOR = math.sqrt(10)
NUM_POINTS = 14
FIRST = 0.01  # share of the budget at the first point


@dataclass
class Run:
    """What a run recorded.

    Attributes:
        seed: Its seed.
        points: Which of the budget's marks each entry belongs to; the start is -1.
        cost: Gradients of the full inner loss so far.
        seconds: CPU time so far.
        value: ``h(λ)``.
        metrics: The task's metrics.
        steps: Outer steps.
        failed_solves: Outer steps whose linear solve failed.
        ended: Why it ended before its budget; empty where it did not.
    """

    seed: int
    points: list[int] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    failed_solves: int = 0
    ended: str = ""

    @property
    def score(self) -> float:
        """The last value, infinite for a run that broke."""
        broke = self.ended.startswith("diverged") or not math.isfinite(self.value[-1])
        return math.inf if broke else self.value[-1]


@lru_cache(maxsize=3)
def make_task(name: str, folder: Path | None, seed: int) -> Task:
    """Returns a problem of the suite."""
    return SUITE[name].make(folder, seed)


def run(task: Task, case: Case, recipe: Recipe, seed: int, *, final_only: bool = False) -> Run:
    """Runs a method until its budget of cost or CPU time is spent; h is evaluated afterwards, off the clock."""
    marks = [case.budget * FIRST ** (1 - place / (NUM_POINTS - 1)) for place in range(NUM_POINTS)]
    found, seconds, point = Run(seed), 0.0, -1
    states: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(seed)

    def record(driver: Driver) -> None:
        found.points.append(point)
        found.cost.append(driver.cost)
        found.seconds.append(seconds)
        states.append((driver.lam, driver.w))

    driver = make_driver(task, recipe, seed)
    record(driver)
    while driver.cost < case.budget and seconds < case.seconds:
        started = time.process_time()
        try:
            driver.step()
        except BilevelError as error:
            found.ended = f"diverged: {str(error).splitlines()[0]}"
            break
        seconds += time.process_time() - started
        found.steps += 1
        reached = sum(driver.cost >= mark * (1 - 1e-9) for mark in marks) - 1
        if reached > point:
            point = reached
            record(driver)
    if found.steps and not found.ended and driver.cost < case.budget:
        found.ended = f"stopped after {case.seconds:g} s"
        if point < NUM_POINTS - 1:
            point += 1
            record(driver)
    found.failed_solves = driver.failed
    _evaluate(task, found, states[-1:] if final_only else states)
    return found


def _evaluate(task: Task, found: Run, states: list[tuple[Tensor, Tensor]]) -> None:
    for lam, w in states:
        found.value.append(task.value(lam, w if bool(torch.isfinite(w).all()) else torch.zeros_like(w)))
        for key, value in task.metrics(w).items():
            found.metrics.setdefault(key, []).append(value)


def tune(
    make: Callable[[int], Task], case: Case, entry: Entry | SingleLoop, *, tries: int
) -> tuple[float, Mapping[float, float]]:
    """Searches the outer step size on a grid of half decades for the lowest final value, the worst of the tuning seeds.

    From the case's start it goes on in the direction that improves, until it gets worse.

    Returns:
        The best step size, and the final value of each that was tried (infinite where a run broke).
    """
    scores: dict[int, float] = {}

    def one(seed: int, place: int) -> float:
        task = make(seed)
        return run(task, case, entry.recipe(task, case.outer_rate * FACTOR**place), seed, final_only=True).score

    def score(place: int) -> float:
        if place not in scores and len(scores) < tries:
            worst = -math.inf
            for seed in case.tuning_seeds:
                if worst < math.inf:
                    worst = max(worst, one(seed, place))
            scores[place] = worst
        return scores.get(place, math.inf)

    best = 0
    while score(best) == math.inf and len(scores) < tries:  # too long: shorten until it runs
        best -= 1
    direction = 1 if score(best + 1) < score(best) else -1
    while score(best + direction) < score(best):
        best += direction
    return case.outer_rate * FACTOR**best, {
        case.outer_rate * FACTOR**place: value for place, value in sorted(scores.items())
    }
