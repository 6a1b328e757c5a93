"""Problems: the levels of a nested structure, and who depends on whom."""

from bilevel.problems.base import Problem
from bilevel.problems.graph import Dependencies, discover

__all__ = ["Dependencies", "Problem", "discover"]
