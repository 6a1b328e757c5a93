"""Levels: which problem's parameters reach which loss, found by evaluating each loss once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import GraphError, ParameterError
from bilevel.functional import ParameterSlots, leaves
from bilevel.problems.base import Problem

__all__ = ["Dependencies", "check_ownership", "discover"]


@dataclass(frozen=True)
class Dependencies:
    """Who depends on whom.

    Attributes:
        reach: For every problem, top level first, the problems whose parameters reach its loss.
        outer: The problems that are differentiated through others.
        inner: The problems that outer ones are differentiated through, in the order in which cotangents are
            accumulated: each comes before the problems that it responds to.
    """

    reach: Mapping[str, frozenset[str]]
    outer: tuple[str, ...]
    inner: tuple[str, ...]

    def responds_to(self, name: str) -> tuple[str, ...]:
        """Returns the problems whose parameters move the best response of an inner problem."""
        return tuple(other for other in self.reach if other != name and other in self.reach[name])

    def describe(self) -> str:
        """Returns one line a problem: ``cleaner: loss depends on classifier``."""
        lines = []
        for name, reach in self.reach.items():
            role = "outer" if name in self.outer else "inner"
            others = ", ".join(other for other in self.reach if other in reach and other != name)
            lines.append(f"{name} ({role}): loss depends on {others}")
        return "\n".join(lines)


def check_ownership(problems: Sequence[Problem]) -> None:
    """Raises unless names are distinct and every parameter has one owner."""
    names = [problem.name for problem in problems]
    for name in names:
        if names.count(name) > 1:
            raise GraphError(f"two problems are named {name!r}: give one of them name=")
    owners: dict[int, tuple[str, str]] = {}
    for problem in problems:
        for key, parameter in zip(problem.parameter_names, problem.parameters, strict=True):
            if id(parameter) in owners:
                other, other_key = owners[id(parameter)]
                raise GraphError(
                    f"problems {other!r} and {problem.name!r} both own one parameter ({other_key!r}, {key!r}): every "
                    "parameter is "
                    "trained by one problem. Restrict one of them with params= or by its optimizer."
                )
            owners[id(parameter)] = (problem.name, key)


def discover(problems: Sequence[Problem], slots: ParameterSlots, batches: Mapping[str, Any]) -> Dependencies:
    """Evaluates every loss once, at copies of all owned parameters, and sees which of them reach it.

    Args:
        problems: Top level first.
        slots: Where the modules hold their parameters.
        batches: A batch for every problem.

    Raises:
        GraphError: A problem that depends on nothing above it, or that nothing above depends on; a cycle; more than
            two levels.
        ParameterError: An inner problem's parameter object is read directly, where swapped values would not be seen.
    """
    reach: dict[str, frozenset[str]] = {}
    bypassed: dict[str, set[str]] = {}
    for problem in problems:
        reach[problem.name], bypassed[problem.name] = _reach(problem, problems, slots, batches[problem.name])
    dependencies = _levels([problem.name for problem in problems], reach)
    for name, direct in bypassed.items():
        wrong = direct & set(dependencies.inner)
        if wrong:
            raise ParameterError(
                f"the loss of problem {name!r} reads parameters of {sorted(wrong)} from variables instead of modules, "
                "so that they "
                "cannot be evaluated at other values. Read them as self.module.<name> or by calling the problem."
            )
    return dependencies


def _reach(
    problem: Problem, problems: Sequence[Problem], slots: ParameterSlots, batch: Any
) -> tuple[frozenset[str], set[str]]:
    """Returns whose parameters reach a loss, and whose do so past the modules."""
    live = tuple(p for other in problems for p in other.parameters)
    owner = [other.name for other in problems for _ in other.parameters]
    copies = leaves(live)
    with slots.buffers_protected(), slots.swapped(live, copies), torch.enable_grad():
        loss, _ = problem.evaluate_loss(batch)
        found: Sequence[Tensor | None] = [None] * (2 * len(live))
        if loss.requires_grad:
            found = torch.autograd.grad(loss, copies + live, allow_unused=True)
    swapped = {name for name, grad in zip(owner, found[: len(live)], strict=True) if grad is not None}
    direct = {name for name, grad in zip(owner, found[len(live) :], strict=True) if grad is not None}
    return frozenset(swapped | direct), direct


def _levels(names: Sequence[str], reach: Mapping[str, frozenset[str]]) -> Dependencies:
    place = {name: index for index, name in enumerate(names)}
    above = {name: [other for other in reach[name] if place[other] < place[name]] for name in names}
    below = {
        name: [other for other in reach[name] if place[other] > place[name] and name in reach[other]] for name in names
    }
    reached_from_above = {other for name in names for other in reach[name] if place[other] > place[name]}
    for name in names:
        if name in reached_from_above and not above[name] and not below[name]:
            raise GraphError(
                f"the loss of inner problem {name!r} does not depend on the parameters of any problem above it "
                f"({', '.join(names[: place[name]])}): there is nothing to differentiate. Use the outer parameters in "
                "its loss, "
                "without detach()."
            )
    for name in (*names[1:], names[0]):  # the most telling message first
        if not below[name] and name not in reached_from_above:
            raise GraphError(_isolated(name, names, place))
    inner = [name for name in names if name in reached_from_above and above[name]]
    outer = [name for name in names if name not in inner]
    for name in inner:
        if below[name]:
            raise GraphError(
                f"problem {name!r} is inner to {above[name]} and outer to {below[name]}: more than two levels need "
                "the curvature of the "
                "middle level's response, which this version does not compute. Merge two levels, or nest "
                "hypergradient() calls."
            )
    return Dependencies(dict(reach), tuple(outer), _accumulation_order(inner, reach))


def _isolated(name: str, names: Sequence[str], place: Mapping[str, int]) -> str:
    if place[name] == 0:
        return (
            f"the loss of outer problem {name!r} does not depend on the parameters of a problem below it that depends "
            f"on {name!r} "
            f"(below: {', '.join(names[1:]) or 'none'}). List problems top level first, and call the inner problem in "
            "the outer loss."
        )
    return (
        f"no problem above {name!r} depends on its parameters (above: {', '.join(names[: place[name]])}): nothing is "
        "learnt "
        "through it. Call it in the loss of the problem above, without detach(), or leave it out."
    )


def _accumulation_order(inner: Sequence[str], reach: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """Orders inner problems so that each comes before those it responds to."""
    rest, order = list(inner), []
    while rest:
        free = [name for name in rest if not any(name in reach[other] for other in rest if other != name)]
        if not free:
            raise GraphError(f"problems {', '.join(rest)} depend on each other in a cycle: join them into one problem")
        order.extend(free)
        rest = [name for name in rest if name not in free]
    return tuple(order)
