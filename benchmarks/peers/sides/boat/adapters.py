"""(e) by BOAT."""

from benchmarks.peers.sides.boat.implicit import build

__all__ = ["build"]
