"""The problems with their budgets: what is one line to add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.reproduction.cleaning import Cleaning
from benchmarks.reproduction.quadratics import Quadratics
from benchmarks.reproduction.regression import Regularisation
from benchmarks.reproduction.task import Task

__all__ = ["SUITE", "Case"]

Make = Callable[[Path | None, int], Task]


@dataclass(frozen=True)
class Case:
    """A problem and how long methods may work on it.

    Attributes:
        title: For people.
        make: Makes the problem from the data folder and a seed.
        budget: Cost at which a run ends, in gradients of the full inner loss.
        seconds: CPU time at which a run ends.
        target: Suboptimality whose cost the tables name.
        outer_rate: Where the search for the outer step size starts.
        seeds: Seeds that are reported; the step size is chosen on others.
        quantity: What the seed draws.
        shared_minimum: Whether all seeds have one value function.
        tuning_seeds: On which the step size is chosen, by the worst of them.
        tuned_on: The problem whose step sizes are taken, where it has been run.
    """

    title: str
    make: Make
    budget: float
    seconds: float
    target: float
    outer_rate: float
    seeds: tuple[int, ...]
    quantity: str
    shared_minimum: bool = False
    tuning_seeds: tuple[int, ...] = (0,)
    tuned_on: str = ""

    def quick(self) -> Case:
        """Returns a case that takes a moment."""
        return replace(self, budget=self.budget / 10, seconds=min(self.seconds, 0.3), seeds=self.seeds[:2])


def _quadratics(folder: Path | None, seed: int) -> Task:
    return Quadratics(seed)


def _regularisation(name: str, folder: Path | None, seed: int) -> Task:
    return Regularisation.load(folder, name, seed)


def _cleaning(ratio: float, folder: Path | None, seed: int) -> Task:
    return Cleaning.load(folder, ratio, seed)


SUITE: dict[str, Case] = {
    "quadratics": Case("random quadratics", _quadratics, 1000, 1.5, 0.01, 0.3, (1, 2, 3, 4, 5), "the two losses"),
    "ijcnn1": Case(
        "regularisation selection, ijcnn1",
        partial(_regularisation, "ijcnn1"),
        1000,
        1.5,
        0.3,
        100.0,
        (1, 2, 3),
        "start and order of the rows",
        shared_minimum=True,
        tuning_seeds=(0, 10),
    ),
    "a9a": Case(
        "regularisation selection, a9a",
        partial(_regularisation, "adult_a9a"),
        200,
        1.5,
        0.3,
        100.0,
        (1, 2, 3),
        "start and order of the rows",
        shared_minimum=True,
        tuning_seeds=(0, 10),
    ),
    "cleaning50": Case(
        "data cleaning, MNIST, 50 % of labels drawn again",
        partial(_cleaning, 0.5),
        200,
        1.5,
        0.03,
        1e4,
        (1, 2, 3),
        "split and labels",
    ),
    "cleaning80": Case(
        "data cleaning, MNIST, 80 % of labels drawn again",
        partial(_cleaning, 0.8),
        200,
        1.5,
        0.03,
        1e4,
        (1, 2, 3),
        "split and labels",
        tuned_on="cleaning50",
    ),
}
