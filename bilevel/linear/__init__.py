"""Solvers of ``H q = v`` from products alone, one a file. Pure functions; the operator's owner counts products."""

from bilevel.linear.base import Operator, Solution, damped, machine_epsilon
from bilevel.linear.conjugate_gradient import LOST, conjugate_gradient
from bilevel.linear.dense import dense, dense_matrix
from bilevel.linear.neumann import SpectrumEstimate, estimate_spectrum, neumann

__all__ = [
    "LOST",
    "Operator",
    "Solution",
    "SpectrumEstimate",
    "conjugate_gradient",
    "damped",
    "dense",
    "dense_matrix",
    "estimate_spectrum",
    "machine_epsilon",
    "neumann",
]
