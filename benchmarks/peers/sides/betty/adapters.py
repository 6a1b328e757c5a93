"""(e) by Betty."""

from benchmarks.peers.sides.betty.implicit import build

__all__ = ["build"]
