"""Best-response vector–Jacobian products, one family a file."""

from bilevel.hypergrad.amigo import AmIGO
from bilevel.hypergrad.automatic import Automatic
from bilevel.hypergrad.base import Estimator, InnerProblem, InnerStep, Pullback, Response, State, StepGraph
from bilevel.hypergrad.bome import BOME
from bilevel.hypergrad.certificate import Certificate
from bilevel.hypergrad.conjugate_gradient import ConjugateGradient
from bilevel.hypergrad.exact import Exact
from bilevel.hypergrad.f2sa import F2SA
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.hypergrad.fsla import FSLA
from bilevel.hypergrad.function import hypergradient
from bilevel.hypergrad.gmres import GMRES
from bilevel.hypergrad.identity import Identity
from bilevel.hypergrad.implicit import Implicit, Iterative, System
from bilevel.hypergrad.minres import MINRES
from bilevel.hypergrad.neumann import Neumann
from bilevel.hypergrad.nystrom import Nystrom
from bilevel.hypergrad.one_step import OneStep
from bilevel.hypergrad.pzobo import PZOBO
from bilevel.hypergrad.registry import as_estimator, available_methods
from bilevel.hypergrad.sama import SAMA
from bilevel.hypergrad.soba import SOBA
from bilevel.hypergrad.stocbio import StocBiO
from bilevel.hypergrad.ttsa import TTSA
from bilevel.hypergrad.unrolled import Unrolled

__all__ = [
    "BOME",
    "F2SA",
    "FSLA",
    "GMRES",
    "MINRES",
    "PZOBO",
    "SAMA",
    "SOBA",
    "TTSA",
    "AmIGO",
    "Automatic",
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
    "Nystrom",
    "OneStep",
    "Pullback",
    "Response",
    "State",
    "StepGraph",
    "StocBiO",
    "System",
    "Unrolled",
    "as_estimator",
    "available_methods",
    "hypergradient",
]
