"""Problems: the levels of a nested structure, as users declare them, and ready-made ones, one family a file."""

from bilevel.data import Indexed
from bilevel.problems.base import Problem
from bilevel.problems.supervised import Training, Validation, counterpart

__all__ = ["Indexed", "Problem", "Training", "Validation", "counterpart"]
