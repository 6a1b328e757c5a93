"""How the tests call bidora's command line."""

from __future__ import annotations

from bidora.cli import main

TINY = ["--max-rows", "12", "--max-length", "8", "--steps", "2", "--search-steps", "2", "--batch-size", "4"]


def run(*words: object) -> int:
    """Runs a command in this process; returns its exit status."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
