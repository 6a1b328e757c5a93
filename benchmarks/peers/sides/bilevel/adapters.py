"""(e) by this library."""

from benchmarks.peers.sides.bilevel.implicit import build

__all__ = ["build"]
