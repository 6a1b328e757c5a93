"""Structures of nested problems: chains, several below one, one below several, and mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["STRUCTURES", "Structure", "chain"]


@dataclass(frozen=True)
class Structure:
    """Who reads whom, and who is below whom, stated and not derived.

    Attributes:
        reads: For each problem, top level first, the others that its loss reads.
        below: For each problem, all that are below it, directly or through others; the lowest have none.
    """

    reads: Mapping[str, tuple[str, ...]]
    below: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The problems, top level first."""
        return tuple(self.reads)

    @property
    def outer(self) -> tuple[str, ...]:
        """Those that are below none."""
        return tuple(name for name in self.names if not any(name in lower for lower in self.below.values()))

    @property
    def parents(self) -> tuple[str, ...]:
        """Those that have problems below them."""
        return tuple(name for name in self.names if self.below[name])


def chain(levels: int, *, reads: str = "all") -> Structure:
    """Levels one over the other; every loss reads every vector, or those next to its own only (``"neighbours"``)."""
    names = "abcdefgh"[:levels]
    seen = {
        name: tuple(other for other in names if other != name and (reads == "all" or abs(ord(other) - ord(name)) == 1))
        for name in names
    }
    return Structure(seen, {name: tuple(names[place + 1 :]) for place, name in enumerate(names)})


def _structure(reads: str, below: str) -> Structure:
    """``"a: b c; b: a"`` as a mapping, twice."""
    tables = []
    for text in (reads, below):
        pairs = (entry.split(":") for entry in text.split(";"))
        tables.append({name.strip(): tuple(others.split()) for name, others in pairs})
    return Structure(tables[0], {name: tables[1].get(name, ()) for name in tables[0]})


STRUCTURES: Mapping[str, Structure] = {
    "two_levels": _structure("a: b; b: a", "a: b"),
    "three_levels": chain(3),
    "three_levels_next_only": chain(3, reads="neighbours"),
    "four_levels": chain(4),
    "four_levels_next_only": chain(4, reads="neighbours"),
    "top_reads_lowest": _structure("a: b c; b: a c; c: b", "a: b c; b: c"),
    "lowest_reads_top": _structure("a: b; b: a c; c: a b", "a: b c; b: c"),
    "only_lowest_reads_top": _structure("a: b; b: c; c: a b", "a: b c; b: c"),
    "middle_seen_through_lowest": _structure("a: c; b: a c; c: b", "a: b c; b: c"),
    "two_inner": _structure("a: b c; b: a; c: a", "a: b c"),
    "sibling_responds": _structure("a: b c; b: a; c: a b", "a: b c"),
    "sibling_responds_upwards": _structure("a: b c; b: a c; c: a", "a: b c"),
    "two_outer": _structure("p: c; q: c; c: p q", "p: c; q: c"),
    "two_outer_over_a_chain": _structure("p: b c; q: b; b: p q c; c: b p", "p: b c; q: b c; b: c"),
    "middle_beside_inner": _structure("a: b d; b: a c; c: a b; d: a", "a: b c d; b: c"),
    "two_middles_two_lowest": _structure(
        "a: b1 b2; b1: a c1; b2: a b1 c2; c1: b1; c2: a b2", "a: b1 b2 c1 c2; b1: c1; b2: c2"
    ),
    # b1 and b2 answer each other through c: an equilibrium of both is what a is over
    "two_middles_one_lowest": _structure("a: b1 b2 c; b1: a c; b2: a c; c: b1 b2", "a: b1 b2 c; b1: c; b2: c"),
    "two_lowest_under_a_middle": _structure("a: b c; b: a c d; c: a b; d: b c", "a: b c d; b: c d"),
}
