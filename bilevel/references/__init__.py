"""Hypergradients that methods are compared with: slow, in float64, and without the methods' code."""

from bilevel.references.base import Level, Nested, PreciseObjective, Precision, ReferenceValue
from bilevel.references.central_difference import central_difference
from bilevel.references.exact import DenseField, dense_fields, exact
from bilevel.references.field import GradientField
from bilevel.references.hidden import TOLERATED_DIFFERENCE, Hidden, hidden
from bilevel.references.unrolled import unrolled

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
