"""How far from the known optimum does a method end, on a quadratic problem of chosen condition?

bilevel run examples/analytic.py --set hypergradient.method=neumann --set recipe.conditioning=100
bilevel check examples/analytic.py --set hypergradient=identity
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel import Engine, EngineConfig
from bilevel.config import RunConfig
from bilevel.problems import Quadratic


@dataclass(frozen=True)
class Config:
    inner: int = 20  # variables
    outer: int = 3
    conditioning: float = 10.0  # of the inner Hessian
    inner_steps: int = 20
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=100), recipe=Config())


def build(config):
    recipe = config.recipe
    problem = Quadratic.random(recipe.inner, recipe.outer, conditioning=recipe.conditioning, seed=recipe.seed)
    outer, inner = problem.problems(steps=recipe.inner_steps)

    def distances():
        lam, w = outer.module["value"].detach(), inner.module["value"].detach()
        away = {"to the optimum": (lam, problem.optimum()), "of w to w*(λ)": (w, problem.solution(lam))}
        return {
            name: float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for name, (a, b) in away.items()
        }

    outer.evaluate = distances
    return Engine([outer, inner], config.engine, config.hypergradient)
