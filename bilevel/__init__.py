"""Nested optimisation: outer problems whose losses depend on the solutions of inner problems."""

from bilevel.argmin import argmin
from bilevel.callbacks import Callback
from bilevel.check import hypergradcheck
from bilevel.config import RunConfig, dump_config, load_config
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
    as_estimator,
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
    "RunConfig",
    "SolveInfo",
    "Status",
    "StepResult",
    "Unrolled",
    "argmin",
    "as_estimator",
    "dump_config",
    "hypergradcheck",
    "hypergradient",
    "load_config",
]
