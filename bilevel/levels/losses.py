"""An outer problem's losses as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.functional import ModuleObjective, Objective, PassCount
from bilevel.levels.differentiate import Differentiator
from bilevel.levels.records import InnerRecord
from bilevel.randomness import Replay

__all__ = ["NestedLosses", "nested_losses"]


@dataclass(frozen=True)
class NestedLosses:
    """The losses that one hypergradient is made of.

    Attributes:
        outer: F, of the parameters of the problems in ``inner``, in that order, and of the outer problem's own.
        inner: By inner problem, each before those that it responds to: its total loss, of its own parameters and those
            of ``above``.
        above: By inner problem: the problems that it responds to.
    """

    outer: Objective
    inner: Mapping[str, Objective]
    above: Mapping[str, tuple[str, ...]]


def nested_losses(
    differentiator: Differentiator,
    outer: str,
    batches: Sequence[Any],
    records: Mapping[str, InnerRecord],
    active: frozenset[str],
) -> NestedLosses:
    """Returns the losses below a problem.

    Args:
        differentiator: Makes the inner objectives.
        outer: Name of the problem.
        batches: Its batches.
        records: What to take the inner losses on.
        active: The problems that respond.
    """
    parts, dependencies = differentiator.gradients, differentiator.dependencies
    problem = parts.problems[outer]
    names = [name for block in dependencies.below(outer) for name in block if name in active]

    def loss() -> Tensor:
        values = [problem.evaluate_loss(batch)[0] for batch in batches]
        return values[0] if len(values) == 1 else torch.stack(values).mean()

    objective = ModuleObjective(
        loss,
        parts.slots,
        tuple(part for name in names for part in parts.problems[name].parameters),
        problem.parameters,
        f"problem {outer!r}",
        Replay(parts.devices),
        PassCount(),
    )
    known = {outer, *names}
    above = {name: tuple(other for other in dependencies.responds_to(name) if other in known) for name in names}
    inner = {
        name: differentiator.inner_problem(name, above[name], records[name], records, active).objective
        for name in names
    }
    return NestedLosses(objective, inner, above)
