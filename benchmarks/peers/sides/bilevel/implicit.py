"""Implicit methods for any task in the functional form, by this library's engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.side import KeepingSGD, Method, NotOffered, Task
from benchmarks.peers.sides.bilevel.engine import EngineSide
from benchmarks.peers.sides.hand.implicit import put
from bilevel import (
    ConjugateGradient,
    Estimator,
    FiniteDifference,
    Identity,
    Neumann,
    Problem,
    as_estimator,
)


class Outer(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.task.outer_loss(list(self.inner.module), list(self.module))


class Inner(Problem):
    def loss(self, batch: Any) -> Tensor:
        return self.task.inner_loss(list(self.module), list(self.outer.module))


class Library(EngineSide):
    """The problems hold plain lists of parameters."""

    def __init__(self, task: Task, method: Estimator) -> None:
        modules = [nn.ParameterList([part.clone() for part in parts]) for parts in (task.outer, task.inner)]
        outer = Outer(modules[0], optimizer=lambda params: KeepingSGD(params, lr=task.outer_rate))
        inner = Inner(modules[1], optimizer=lambda params: torch.optim.SGD(params, lr=task.rate), steps=task.steps)
        outer.task = inner.task = task  # type: ignore[attr-defined]
        super().__init__(outer, inner, method)
        self.parameters = [*modules[1], *modules[0]]

    def forget(self) -> None:
        self.engine.estimator_states.clear()

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        put(self.parameters, [*inner, *outer])


def estimator(method: Method) -> Estimator:
    """Returns this library's name for a method; ``options`` holds fields that no other library has."""
    if method.options:
        return as_estimator({"method": method.kind, **method.options})
    if method.kind == "identity":
        return Identity()
    if method.kind == "finite_difference":
        return FiniteDifference()
    if method.kind == "neumann":
        return Neumann(terms=method.products, step_size=method.step_size)
    if method.kind == "conjugate_gradient":
        return ConjugateGradient(max_iterations=method.products, rtol=0.0)
    raise NotOffered(f"no method for {method.kind}")


def build(task: Task, method: Method) -> Library:
    side = Library(task, estimator(method))
    side.countable = not method.options.get("compile")
    return side


def build_compiled(task: Task, method: Method) -> Library:
    """Returns the engine with ``compile=True``, for the methods that solve a system."""
    if method.kind not in ("neumann", "conjugate_gradient"):
        raise NotOffered("compiles solves only")
    side = Library(task, replace(estimator(method), compile=True))
    side.countable, side.note = False, "the first step compiles and is not timed"
    return side
