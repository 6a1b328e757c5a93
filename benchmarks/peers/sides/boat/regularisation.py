"""(a) by this library."""

from benchmarks.peers.sides.boat.implicit import build

__all__ = ["build"]
