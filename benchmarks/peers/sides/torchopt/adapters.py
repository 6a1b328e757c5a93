"""(e) by TorchOpt."""

from benchmarks.peers.sides.torchopt.implicit import build

__all__ = ["build"]
