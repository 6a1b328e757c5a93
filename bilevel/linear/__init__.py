"""Solvers of ``H q = v`` from products alone, one a file. Pure functions; the operator's owner counts products."""

from bilevel.linear.base import (
    CompileIteration,
    Iteration,
    Operator,
    Preconditioner,
    Solution,
    damped,
    machine_epsilon,
    rounding_allowance,
)
from bilevel.linear.conjugate_gradient import conjugate_gradient
from bilevel.linear.dense import dense, dense_matrix
from bilevel.linear.gmres import gmres
from bilevel.linear.lanczos import SpectrumEstimate, estimate_spectrum
from bilevel.linear.minres import minres
from bilevel.linear.neumann import neumann
from bilevel.linear.nystrom import NystromApproximation, nystrom
from bilevel.linear.operator_norm import bound_operator_norm
from bilevel.linear.probe import LOST
from bilevel.linear.richardson import richardson

__all__ = [
    "LOST",
    "CompileIteration",
    "Iteration",
    "NystromApproximation",
    "Operator",
    "Preconditioner",
    "Solution",
    "SpectrumEstimate",
    "bound_operator_norm",
    "conjugate_gradient",
    "damped",
    "dense",
    "dense_matrix",
    "estimate_spectrum",
    "gmres",
    "machine_epsilon",
    "minres",
    "neumann",
    "nystrom",
    "richardson",
    "rounding_allowance",
]
