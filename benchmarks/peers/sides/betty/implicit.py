"""Implicit methods for any task in the functional form, by Betty 0.2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from betty.configs import Config
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Task
from benchmarks.peers.sides.betty.engine import BATCH, EngineSide
from benchmarks.peers.sides.hand.implicit import put


class Library(EngineSide):
    """Two ``ImplicitProblem``."""

    def __init__(self, task: Task, method: Method) -> None:
        class Outer(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                return task.outer_loss(list(self.inner.module), list(self.module))

        class Inner(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                return task.inner_loss(list(self.module), list(self.outer.module))

        modules = [nn.ParameterList([part.clone() for part in parts]) for parts in (task.outer, task.inner)]
        optimizers = KeepingSGD(modules[0], lr=task.outer_rate), torch.optim.SGD(modules[1], lr=task.rate)
        config, self.note = settings(method, task.steps)
        outer_config = Config(log_step=-1, retain_graph=task.direct)
        if task.direct:
            self.note = "an outer loss that depends on its own parameters needs retain_graph=True, or it crashes"
        outer = Outer("outer", outer_config, modules[0], optimizers[0], None, BATCH)
        inner = Inner("inner", config, modules[1], optimizers[1], None, BATCH)
        self.start(outer, [inner], task.steps, cuda=task.inner[0].is_cuda)
        self.parameters = [*modules[1], *modules[0]]

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put(self.parameters, [*inner, *outer])


def settings(method: Method, steps: int) -> tuple[Config, str]:
    """Returns Betty's names for a method, and what a reader should know."""
    common = {"log_step": -1, "unroll_steps": steps}
    if method.kind == "finite_difference":
        return Config(type="darts", **common), ""
    if method.kind == "identity":
        note = "the exact product is Betty's Neumann series with 0 iterations and α = 1"
        return Config(type="neumann", neumann_iterations=0, neumann_alpha=1.0, **common), note
    if method.kind == "neumann":
        return Config(type="neumann", neumann_iterations=method.products, neumann_alpha=method.step_size, **common), ""
    if method.kind == "conjugate_gradient":
        return Config(type="cg", cg_iterations=method.products, cg_alpha=1.0, **common), ""
    raise NotOffered(f"no method for {method.kind}")


build = Library
