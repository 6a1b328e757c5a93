"""Nested optimisation: outer problems whose losses depend on the solutions of inner problems."""

from bilevel.argmin import argmin
from bilevel.callbacks import Callback
from bilevel.check import hypergradcheck
from bilevel.config import RunConfig, dump_config, load_config
from bilevel.engine import Engine
from bilevel.errors import BilevelError
from bilevel.hypergrad import (
    BOME,
    F2SA,
    FSLA,
    GMRES,
    MINRES,
    PZOBO,
    SAMA,
    SOBA,
    TTSA,
    AmIGO,
    Automatic,
    Certificate,
    ConjugateGradient,
    Estimator,
    Exact,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    OneStep,
    StocBiO,
    Unrolled,
    as_estimator,
    hypergradient,
)
from bilevel.problems import Problem
from bilevel.result import Hypergradient, SolveInfo, Status, StepResult
from bilevel.settings import EngineConfig

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
    "BilevelError",
    "Callback",
    "Certificate",
    "ConjugateGradient",
    "Engine",
    "EngineConfig",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "Hypergradient",
    "Identity",
    "Neumann",
    "Nystrom",
    "OneStep",
    "Problem",
    "RunConfig",
    "SolveInfo",
    "Status",
    "StepResult",
    "StocBiO",
    "Unrolled",
    "argmin",
    "as_estimator",
    "dump_config",
    "hypergradcheck",
    "hypergradient",
    "load_config",
]
