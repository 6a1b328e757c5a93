"""The methods with their settings: a new one is one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reproduction.driver import Recipe
from benchmarks.reproduction.task import Task
from bilevel import as_estimator
from bilevel.single_loop import FSLA, SABA, SOBA, SRBA, TTSA, AmIGO, Method, StocBiO

__all__ = ["ENTRIES", "FAMILIES", "Entry", "SingleLoop"]

FAMILIES = {
    "identity": "identity for the inverse Hessian, and the last inner step alone",
    "solve": "linear solve on full batches",
    "updates": "all inner updates; penalties; zeroth order",
    "stochastic": "single loop on mini-batches",
}
SHARE = 16
"""A mini-batch holds one in so many of the terms."""


@dataclass(frozen=True)
class Entry:
    """An estimator as it is run.

    Attributes:
        family: One of :data:`FAMILIES`, a panel of the plots.
        method: Name and fields of the estimator.
        scaled: Fields in units of the largest eigenvalue L of the inner Hessian (a damping, say).
        inner_steps: Inner steps, with the length 1/L, for each outer one.
        left_out: Problems that it is not run on, and why.
    """

    family: str
    method: Mapping[str, Any]
    scaled: Mapping[str, float] = field(default_factory=dict)
    inner_steps: int = 10
    left_out: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, task: Task, outer_rate: float) -> Recipe:
        """Returns how to run it."""
        scaled = {key: value * task.smoothness for key, value in self.scaled.items()}
        return Recipe(as_estimator({**self.method, **scaled}), outer_rate, self.inner_steps)


@dataclass(frozen=True)
class SingleLoop:
    """A single-loop method as it is run: mini-batches, steps of half the length 1/L on w and q, published decays.

    Attributes:
        method: Its class.
        fields: Of the class.
    """

    method: type[Method]
    fields: Mapping[str, Any] = field(default_factory=dict)
    family: str = "stochastic"
    left_out: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, task: Task, outer_rate: float) -> Recipe:
        """Returns how to run it."""
        step = 0.5 / task.smoothness
        batches = {"inner_batch": max(task.num_inner // SHARE, 1), "outer_batch": max(task.num_outer // SHARE, 1)}
        lengths = {"inner_step": step, "linear_step": step, "outer_step": outer_rate}
        return Recipe(self.method(**lengths, **batches, **self.fields), outer_rate)


_TOO_MANY = "7840 inner variables: one hypergradient takes 7841 products, 15 times the budget"
_CAP = {"max_iterations": 10}

ENTRIES: dict[str, Entry | SingleLoop] = {
    "finite_difference": Entry("identity", {"method": "finite_difference"}),
    "identity": Entry("identity", {"method": "identity"}),
    "one_step": Entry("identity", {"method": "one_step"}),
    "sama": Entry("identity", {"method": "sama"}),
    "neumann": Entry("solve", {"method": "neumann", "terms": 10}),
    "conjugate_gradient": Entry("solve", {"method": "conjugate_gradient", **_CAP}),
    "conjugate_gradient (warm)": Entry(
        "solve", {"method": "conjugate_gradient", "max_iterations": 2, "warm_start": True}, inner_steps=3
    ),
    "minres": Entry("solve", {"method": "minres", **_CAP}),
    "gmres": Entry("solve", {"method": "gmres", **_CAP}),
    "nystrom": Entry("solve", {"method": "nystrom", "rank": 10}, scaled={"damping": 0.1}),
    "exact": Entry("solve", {"method": "exact"}, left_out={"cleaning50": _TOO_MANY, "cleaning80": _TOO_MANY}),
    "unrolled": Entry("updates", {"method": "unrolled", "memory": "graph"}),
    "unrolled (replay)": Entry("updates", {"method": "unrolled", "memory": "replay"}),
    "f2sa": Entry("updates", {"method": "f2sa", "multiplier": 10.0}),
    "bome": Entry("updates", {"method": "bome"}),
    "pzobo": Entry("updates", {"method": "pzobo", "num_directions": 10}),
    "soba": SingleLoop(SOBA, {"linear_decay": 0.4}),
    "saba": SingleLoop(SABA),
    "srba": SingleLoop(SRBA),
    "fsla": SingleLoop(FSLA, {"linear_decay": 0.5}),
    "ttsa": SingleLoop(TTSA),
    "amigo": SingleLoop(AmIGO),
    "stocbio": SingleLoop(StocBiO),
}
