"""Any method against a reference, on the user's own problem; what may explain a difference."""

from bilevel.check.comparison import REFERENCES
from bilevel.check.gradcheck import hypergradcheck
from bilevel.check.report import HypergradientReport, ParameterComparison

__all__ = ["REFERENCES", "HypergradientReport", "ParameterComparison", "hypergradcheck"]
