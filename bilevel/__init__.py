"""Nested optimisation: outer problems whose losses depend on the solutions of inner problems."""

from bilevel.callbacks import Callback
from bilevel.engine import Engine
from bilevel.errors import BilevelError
from bilevel.hypergrad import (
    ConjugateGradient,
    Estimator,
    Exact,
    FiniteDifference,
    Identity,
    Neumann,
    Unrolled,
    hypergradient,
)
from bilevel.problems import Problem
from bilevel.result import Hypergradient, SolveInfo, Status, StepResult
from bilevel.settings import EngineConfig

__all__ = [
    "BilevelError",
    "Callback",
    "ConjugateGradient",
    "Engine",
    "EngineConfig",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "Hypergradient",
    "Identity",
    "Neumann",
    "Problem",
    "SolveInfo",
    "Status",
    "StepResult",
    "Unrolled",
    "hypergradient",
]
