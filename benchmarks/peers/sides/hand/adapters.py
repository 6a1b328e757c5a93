"""(e) by hand."""

from benchmarks.peers.sides.hand.implicit import build

__all__ = ["build"]
