"""Programs written for Betty 0.2.1, on this engine: only the import changes.

    from bilevel.interop.betty import Config, Engine, EngineConfig, Env, ImplicitProblem

Betty's modules are here under their names too: ``configs``, ``engine``, ``envs``, ``problems``.
"""

from bilevel.interop.betty.configs import Config, EngineConfig
from bilevel.interop.betty.engine import Engine
from bilevel.interop.betty.envs import Env
from bilevel.interop.betty.problems import HigherIterativeProblem, ImplicitProblem, IterativeProblem, Problem

__all__ = [
    "Config",
    "Engine",
    "EngineConfig",
    "Env",
    "HigherIterativeProblem",
    "ImplicitProblem",
    "IterativeProblem",
    "Problem",
]
