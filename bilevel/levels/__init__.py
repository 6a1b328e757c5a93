"""What an engine makes of its problems: who depends on whom, when each is updated, and with which total derivative."""

from bilevel.levels.graph import Dependencies, discover

__all__ = ["Dependencies", "discover"]
