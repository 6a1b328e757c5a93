"""(b) by this library."""

from benchmarks.peers.sides.torchopt.implicit import build

__all__ = ["build"]
