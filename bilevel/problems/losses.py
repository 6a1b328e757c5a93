"""An outer problem's losses as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.functional import ModuleObjective, Objective, ParameterSlots, PassCount
from bilevel.problems.base import Problem
from bilevel.problems.differentiate import Differentiator, InnerRecord
from bilevel.problems.graph import Dependencies
from bilevel.randomness import Replay

__all__ = ["NestedLosses", "nested_losses"]


@dataclass(frozen=True)
class NestedLosses:
    """The losses that one hypergradient is made of.

    Attributes:
        outer: F, of the parameters of the problems in ``inner``, in that order, and of the outer problem's own.
        inner: By inner problem, each before those that it responds to: f, of its own parameters and those of ``above``.
        above: By inner problem: the problems that it responds to.
    """

    outer: Objective
    inner: Mapping[str, Objective]
    above: Mapping[str, tuple[str, ...]]


def nested_losses(
    problems: Mapping[str, Problem],
    slots: ParameterSlots,
    differentiator: Differentiator,
    dependencies: Dependencies,
    outer: str,
    batch: Any,
    records: Mapping[str, InnerRecord],
) -> NestedLosses:
    """Returns the losses below an outer problem.

    Args:
        problems: All problems by name.
        slots: Where their modules hold parameters.
        differentiator: Makes the inner objectives.
        dependencies: Who depends on whom.
        outer: Name of the outer problem.
        batch: Its batch.
        records: What to take the inner losses on.
    """
    names = [name for name in dependencies.inner if differentiator.affects(name, outer, dependencies)]
    objective = ModuleObjective(
        lambda: problems[outer].evaluate_loss(batch)[0],
        slots,
        tuple(part for name in names for part in problems[name].parameters),
        problems[outer].parameters,
        f"problem {outer!r}",
        Replay(differentiator.devices),
        PassCount(),
    )
    known = {outer, *names}
    above = {name: tuple(other for other in dependencies.responds_to(name) if other in known) for name in names}
    inner = {name: differentiator.inner_problem(name, above[name], records[name]).objective for name in names}
    return NestedLosses(objective, inner, above)
