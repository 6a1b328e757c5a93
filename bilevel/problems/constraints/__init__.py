"""Inner problems with simple constraints: updates that end with a projection, and the derivative of where they lead."""

from bilevel.problems.constraints.problem import Constrained, ConstrainedTraining
from bilevel.problems.constraints.sets import Ball, Box, Constraint, Simplex

__all__ = ["Ball", "Box", "Constrained", "ConstrainedTraining", "Constraint", "Simplex"]
