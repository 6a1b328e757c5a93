"""(b) by this library."""

from benchmarks.peers.sides.betty.implicit import build

__all__ = ["build"]
