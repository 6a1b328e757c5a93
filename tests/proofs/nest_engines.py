"""Nests as problems of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Engine, EngineConfig, Exact, Hypergradient, Problem
from tests.proofs.nests import Nest

__all__ = ["Level", "engine_of", "flat", "hypergradient_of", "values_of"]


class Level(Problem):
    """One problem of a nest; its vector is held as two parameters where it has more than one entry."""

    def __init__(self, nest: Nest, name: str, z: Tensor, **settings: Any) -> None:
        self.nest = nest
        vector = nest.part(z, name).detach()
        parts = [vector] if len(vector) == 1 else [vector[:1], vector[1:]]
        super().__init__(nn.ParameterList([part.clone() for part in parts]), name=name, **settings)

    def loss(self, batch: Any) -> Tensor:
        """The nest's loss, of the vectors that it reads and of zeros for the others."""
        seen = (self.name, *self.nest.structure.reads[self.name])
        zeros = {name: torch.zeros(size, dtype=torch.float64) for name, size in self.nest.sizes.items()}
        problems = {other: self if other == self.name else getattr(self, other) for other in seen}
        read = {other: torch.cat(list(problem.module)).double() for other, problem in problems.items()}
        return self.nest.losses[self.name](self.nest.join({**zeros, **read}))


def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=rate)


def engine_of(
    nest: Nest,
    z: Tensor,
    methods: Mapping[str, Any] | Any = "exact",
    *,
    rates: Mapping[str, float] | None = None,
    steps: Mapping[str, int] | None = None,
    config: EngineConfig | None = None,
    **settings: Mapping[str, Any],
) -> Engine:
    """An engine of a nest that stands at z.

    Args:
        nest: The nest.
        z: All vectors; with float32 the parameters are held in that precision.
        methods: One for all problems, or by name.
        rates: Learning rates of SGD by name; 0 by default.
        steps: Updates by name; 1 by default.
        config: Settings; by default responses are differentiated again by dense solves.
        settings: Further settings of problems, by name.
    """
    by_name = methods if isinstance(methods, Mapping) and "method" not in methods else {}
    everywhere = "exact" if isinstance(methods, Mapping) and by_name is methods else methods
    problems = []
    for name in nest.structure.names:
        more = {"optimizer": sgd((rates or {}).get(name, 0.0)), **settings.get(name, {})}
        if name in by_name:
            more["hypergradient"] = by_name[name]
        problems.append(Level(nest, name, z, steps=(steps or {}).get(name, 1), **more))
    return Engine(problems, config or EngineConfig(progress=False, nested_solver=Exact()), hypergradient=everywhere)


def flat(result: Hypergradient) -> Tensor:
    """The hypergradient as one vector."""
    return torch.cat([part.detach().double() for part in result.grad.values()])


def hypergradient_of(engine: Engine, name: str) -> Tensor:
    return flat(engine.hypergradient(name))


def values_of(engine: Engine) -> Tensor:
    """z, as the engine's problems hold it."""
    return torch.cat([p.detach().double() for problem in engine.problems.values() for p in problem.parameters])
