"""Bilevel problems whose solution and hypergradient are known in closed form: to test methods with."""

from bilevel.problems.analytic.base import Analytic, Variable, with_spectrum
from bilevel.problems.analytic.nested import NestedQuadratic
from bilevel.problems.analytic.quadratic import Quadratic
from bilevel.problems.analytic.ridge import Ridge

__all__ = ["Analytic", "NestedQuadratic", "Quadratic", "Ridge", "Variable", "with_spectrum"]
