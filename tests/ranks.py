"""What tests of several ranks share."""

from __future__ import annotations

import socket

__all__ = ["free_port"]


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
