"""Hypergradients that methods are compared with: slow, in float64, and without the methods' code."""

from bilevel.check.references.base import Level, Nested, PreciseObjective, Precision, ReferenceValue
from bilevel.check.references.central_difference import central_difference
from bilevel.check.references.exact import DenseField, dense_fields, exact
from bilevel.check.references.field import GradientField
from bilevel.check.references.hidden import TOLERATED_DIFFERENCE, Hidden, hidden
from bilevel.check.references.unrolled import unrolled

__all__ = [
    "TOLERATED_DIFFERENCE",
    "DenseField",
    "GradientField",
    "Hidden",
    "Level",
    "Nested",
    "PreciseObjective",
    "Precision",
    "ReferenceValue",
    "central_difference",
    "dense_fields",
    "exact",
    "hidden",
    "unrolled",
]
