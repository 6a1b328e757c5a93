"""By this library, with the solver's iterations compiled."""

from benchmarks.peers.sides.bilevel.implicit import build_compiled as build

__all__ = ["build"]
