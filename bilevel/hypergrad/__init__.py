"""Best-response vector–Jacobian products, one family a file."""

from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State, StepGraph
from bilevel.hypergrad.certificate import Certificate
from bilevel.hypergrad.conjugate_gradient import ConjugateGradient
from bilevel.hypergrad.exact import Exact
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.hypergrad.function import hypergradient
from bilevel.hypergrad.identity import Identity
from bilevel.hypergrad.implicit import Implicit, Iterative, System
from bilevel.hypergrad.neumann import Neumann
from bilevel.hypergrad.registry import as_estimator, available_methods
from bilevel.hypergrad.unrolled import Unrolled

__all__ = [
    "Certificate",
    "ConjugateGradient",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "Identity",
    "Implicit",
    "InnerProblem",
    "InnerStep",
    "Iterative",
    "Neumann",
    "Pullback",
    "Response",
    "State",
    "StepGraph",
    "System",
    "Unrolled",
    "as_estimator",
    "available_methods",
    "hypergradient",
]
