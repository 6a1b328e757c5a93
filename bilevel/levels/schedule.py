"""Who is updated when: the rounds of one outer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bilevel.levels.graph import Dependencies

__all__ = ["Round", "schedule"]


@dataclass(frozen=True)
class Round:
    """Problems of one depth that share problems below them, and are updated together.

    Attributes:
        members: The problems, top level first.
        before: The rounds below, in the order in which they are run before every update.
        again: Rounds further below that a member's loss reads itself: they are run once more after ``before``, so that
            the loss sees their response to what ``before`` has changed.
    """

    members: tuple[str, ...]
    before: tuple[Round, ...]
    again: tuple[Round, ...] = ()


def schedule(dependencies: Dependencies) -> Round:
    """Returns the round of the outer problems, with all that comes before."""
    return _round(dependencies.outer, dependencies)


def _round(members: Sequence[str], dependencies: Dependencies) -> Round:
    order = {name: place for place, name in enumerate(dependencies.reach)}
    depth = dependencies.depth(members[0])
    below = set().union(*(dependencies.lower[name] for name in members))
    next_level = [name for name in order if name in below and dependencies.depth(name) == depth + 1]
    # The last listed first.
    groups = sorted(_sharing(next_level, dependencies), key=lambda group: -max(order[name] for name in group))
    before = tuple(_round(group, dependencies) for group in groups)
    read = {name for member in members for name in dependencies.lower[member] & dependencies.reach[member]}
    deeper = sorted((name for name in read if dependencies.depth(name) > depth + 1), key=dependencies.depth)
    again = dict.fromkeys(_find(before, name) for name in deeper)
    return Round(tuple(sorted(members, key=order.__getitem__)), before, tuple(again))


def _sharing(names: Sequence[str], dependencies: Dependencies) -> list[list[str]]:
    """Joins problems that have a problem below them in common."""
    groups: list[list[str]] = []
    for name in names:
        shared = [
            group for group in groups if any(dependencies.lower[name] & dependencies.lower[other] for other in group)
        ]
        groups = [group for group in groups if group not in shared]
        groups.append([*(other for group in shared for other in group), name])
    return groups


def _find(rounds: Sequence[Round], name: str) -> Round:
    found = [one for one in rounds if name in one.members] or [
        _find(one.before, name) for one in rounds if _holds(one, name)
    ]
    return found[0]


def _holds(one: Round, name: str) -> bool:
    return name in one.members or any(_holds(lower, name) for lower in one.before)
