"""The declared graph: which problem is over which, checked before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bilevel.errors import BilevelWarning, ConfigError, GraphError, unknown_name
from bilevel.levels import Dependencies
from bilevel.levels.graph import dependencies_of

__all__ = ["Declared", "declared"]

KINDS = ("u2l", "l2u")


class Named(Protocol):
    """A problem, as far as its place in the graph goes."""

    @property
    def name(self) -> str:
        """Under which the others know it."""


@dataclass(frozen=True)
class Declared:
    """What ``u2l`` and ``l2u`` say, by names.

    Attributes:
        names: All problems, each after those above it.
        parents: By problem, those whose losses use its parameters and that step after it (its values in ``l2u``), in
            the order declared.
        children: By problem, those whose parameters its loss uses and that step before it.
        lowers: By problem, those whose losses use its parameters (its values in ``u2l``).
        paths: By problem, the chains along which its hypergradient flows: from its loss down through the problems that
            it uses, to one whose loss uses its parameters.
    """

    names: tuple[str, ...]
    parents: Mapping[str, tuple[str, ...]]
    children: Mapping[str, tuple[str, ...]]
    lowers: Mapping[str, tuple[str, ...]]
    paths: Mapping[str, tuple[tuple[str, ...], ...]]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The problems with none below them: each makes one step an iteration."""
        return tuple(name for name in self.children if not self.children[name])

    def dependencies(self) -> Dependencies:
        """Returns who depends on whom if every loss uses the parameters of exactly those that it is declared with.

        Raises:
            GraphError: They are no nested structure.
        """
        if len(self.names) == 1:  # a baseline
            (name,) = self.names
            return Dependencies({name: frozenset({name})}, {}, {name: frozenset()}, (name,), ())
        reach = {name: frozenset({name, *self._used_by(name)}) for name in self.names}
        return dependencies_of(self.names, reach, {})

    def check_reach(self, name: str, reach: Iterable[str]) -> None:
        """Raises where a loss uses what the declaration leaves out.

        Args:
            name: The problem whose loss it is.
            reach: The problems whose parameters reach it.

        Raises:
            GraphError: A ``training_step`` uses the parameters of a problem to which no dependency leads.
        """
        missing = [other for other in self.names if other in reach and other not in {name, *self._used_by(name)}]
        if not missing:
            return
        other = missing[0]
        above = f"dependencies['u2l'] with {other}: [{name}]"
        below = f"dependencies['l2u'] with {other}: [{name}]"
        if other in _closure(name, self.parents):
            remedy = f"complete {above}"
        elif other in _closure(name, self.children):
            remedy = f"complete {below}"
        else:
            remedy = f"complete {above} if {other!r} is above {name!r}, or {below} if it is below"
        raise GraphError(
            f"missing dependency: training_step of {name!r} uses the parameters of {other!r}, which is not declared: "
            f"{remedy}. If {other!r} is to be a constant there, use it under torch.no_grad()."
        )

    def warn_of_unused(self, name: str, reach: Iterable[str]) -> None:
        """Warns where a loss does not use the parameters of a problem that it is declared to use: it may do so later.

        Args:
            name: The problem whose loss it is.
            reach: The problems whose parameters reach it.
        """
        unused = [other for other in self._used_by(name) if other not in reach]
        if unused:
            warnings.warn(
                f"training_step of {name!r} is declared to use the parameters of {unused[0]!r}, and does not where it "
                "was looked at: no hypergradient flows there as long as that is so. If it is meant to use them, call "
                "that problem or read its module without detach() and outside of torch.no_grad()",
                BilevelWarning,
                stacklevel=2,
            )

    def _used_by(self, name: str) -> tuple[str, ...]:
        """Returns the problems whose parameters a loss is declared to use."""
        return (*self.children[name], *(other for other in self.names if name in self.lowers[other]))


Edges = Mapping[str, Mapping[Any, Iterable[Any]]]


def declared(problems: Sequence[Named], dependencies: Edges) -> Declared:
    """Reads ``{"u2l": {upper: [lower, …]}, "l2u": {lower: [upper, …]}}``.

    Args:
        problems: All problems of the engine.
        dependencies: The declaration.

    Raises:
        ConfigError: No such mapping; the message names the field.
        UnknownNameError: Another field than ``u2l`` and ``l2u``.
        GraphError: A problem that is not among the engine's, an edge of a problem to itself, a cycle, an edge downwards
            with no way up again, or a problem that no hypergradient reaches.
    """
    edges = {kind: _edges(kind, problems, dependencies) for kind in _checked_kinds(dependencies)}
    order = [problem.name for problem in problems]
    up, down = edges["l2u"], edges["u2l"]
    parents = {name: up.get(name, ()) for name in order}
    children = {name: tuple(low for low in up if name in up[low]) for name in order}
    _refuse_cycle(order, parents)
    lowers = {name: down.get(name, ()) for name in order}
    paths = {name: _paths(name, lowers[name], parents) for name in order}
    _refuse_idle(order, paths)
    return Declared(_topological(order, parents), parents, children, lowers, paths)


def _checked_kinds(dependencies: object) -> Sequence[str]:
    if not isinstance(dependencies, Mapping):
        raise ConfigError(
            "dependencies must be a mapping {'u2l': {upper: [lower, ...]}, 'l2u': {lower: [upper, ...]}}, not "
            f"{dependencies!r}"
        )
    for kind in dependencies:
        if kind not in KINDS:
            raise unknown_name("field of dependencies:", str(kind), KINDS)
    for kind in KINDS:
        if kind not in dependencies:
            raise ConfigError(
                f"missing dependency: dependencies has no field {kind!r}. Both are needed: 'u2l' says which lower "
                "losses use an upper problem's parameters, 'l2u' which upper losses use a lower problem's"
            )
    return KINDS


def _edges(kind: str, problems: Sequence[Named], dependencies: Edges) -> dict[str, tuple[str, ...]]:
    known = {id(problem) for problem in problems}
    given = dependencies[kind]
    if not isinstance(given, Mapping):
        raise ConfigError(f"dependencies[{kind!r}] must be a mapping from problems to lists of problems, not {given!r}")
    edges: dict[str, tuple[str, ...]] = {}
    for key, values in given.items():
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise ConfigError(f"dependencies[{kind!r}][{_shown(key)}] must be a list of problems, not {_shown(values)}")
        for problem in (key, *values):
            if id(problem) not in known:
                choices = ", ".join(repr(other.name) for other in problems)
                raise GraphError(
                    f"dependencies[{kind!r}] names {_shown(problem)}, which is none of the engine's problems: {choices}"
                )
        names = tuple(dict.fromkeys(value.name for value in values))
        if key.name in names:
            raise GraphError(f"cyclic dependency: dependencies[{kind!r}] makes {key.name!r} depend on itself")
        edges[key.name] = names
    return edges


def _refuse_cycle(order: Sequence[str], parents: Mapping[str, Sequence[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            cycle = " → ".join((*chain[chain.index(name) :], name))
            raise GraphError(
                f"cyclic dependency: dependencies['l2u'] leads from {name!r} back to it ({cycle}). A lower problem "
                "steps before the upper ones; take one of these edges out, or put it into 'u2l' alone."
            )
        if name not in done:
            for parent in parents[name]:
                visit(parent, (*chain, name))
            done.add(name)

    for name in order:
        visit(name, ())


def _paths(name: str, lowers: Sequence[str], parents: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Returns the ways up from every problem in ``lowers`` to one, downwards: ``(name, …, lower, name)``."""
    found: list[tuple[str, ...]] = []

    def climb(chain: tuple[str, ...]) -> None:
        for parent in parents[chain[-1]]:
            if parent == name:
                found.append((name, *reversed(chain), name))
            else:
                climb((*chain, parent))

    for lower in lowers:
        before = len(found)
        climb((lower,))
        if len(found) == before:
            raise GraphError(
                f"missing dependency: dependencies['u2l'] says that the loss of {lower!r} uses the parameters of "
                f"{name!r}, but no chain in dependencies['l2u'] leads from {lower!r} up to {name!r}, along which a "
                f"hypergradient would come back. Add {lower}: [{name}] to it."
            )
    return tuple(found)


def _refuse_idle(order: Sequence[str], paths: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Raises for a problem through which and to which no hypergradient flows."""
    reached = {name for several in paths.values() for path in several for name in path}
    idle = [name for name in order if name not in reached]
    if idle and len(order) > 1:  # one problem alone is a baseline: nothing is missing
        raise GraphError(
            f"missing dependency: no hypergradient flows to or through problem {idle[0]!r}. dependencies['u2l'] must "
            "name, for every upper problem, the lower ones whose losses use its parameters, and dependencies['l2u'], "
            "for every lower one, the upper ones whose losses use its parameters. Or train it without the engine."
        )


def _topological(order: Sequence[str], parents: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    placed: list[str] = []

    def place(name: str) -> None:
        if name not in placed:
            for parent in parents[name]:
                place(parent)
            placed.append(name)

    for name in order:
        place(name)
    return tuple(placed)


def _closure(name: str, edges: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    stack = [name]
    while stack:
        for other in edges[stack.pop()]:
            if other not in found:
                found.add(other)
                stack.append(other)
    return found


def _shown(value: object) -> str:
    return repr(getattr(value, "name", value))
