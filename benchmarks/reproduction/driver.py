"""A method stepped on a task, with the cost of every step counted in gradients of the inner loss.

Estimators run in an engine, as a user would run them; the single-loop methods by their own updates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.reproduction.task import Block, Task
from bilevel import Engine, EngineConfig, Estimator, Problem
from bilevel.errors import BilevelWarning
from bilevel.single_loop import FiniteSum, Method, State

__all__ = ["Driver", "Recipe", "make_driver"]


class Driver(Protocol):
    """Steps a method on a task.

    Attributes:
        failed: Outer steps whose linear solve did not succeed.
        w: The inner variables (a copy).
        lam: The outer variables (a copy).
        cost: Gradients of the full inner loss that the passes so far are worth: a forward and a backward pass over all
            terms each. A pass over other terms, or over those of F, counts by their number.
    """

    @property
    def failed(self) -> int: ...

    @property
    def w(self) -> Tensor: ...

    @property
    def lam(self) -> Tensor: ...

    @property
    def cost(self) -> float: ...

    def step(self) -> None:
        """Takes the inner steps and one outer step."""


@dataclass(frozen=True)
class Recipe:
    """How a method is run on a task.

    Attributes:
        method: The estimator; or a single-loop method, which has step sizes and batches of its own, and is run on
            mini-batches.
        outer_rate: Step size of the outer gradient steps.
        inner_steps: Inner steps, of the length ``1 / smoothness``, for each outer one (in an engine).
    """

    method: Estimator | Method
    outer_rate: float
    inner_steps: int = 10


class _Vector(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())


class _Lower(Problem):
    def __init__(self, task: Task, recipe: Recipe) -> None:
        rate = 1 / task.smoothness
        super().__init__(
            _Vector(task.inner_start),
            optimizer=lambda params: torch.optim.SGD(params, lr=rate),
            steps=recipe.inner_steps,
            name="lower",
        )
        self.task = task

    def loss(self, batch: None) -> Tensor:
        return self.task.inner_loss(self.module.value, self.upper.module.value)


class _Upper(Problem):
    def __init__(self, task: Task, recipe: Recipe) -> None:
        super().__init__(
            _Vector(task.outer_start),
            optimizer=lambda params: torch.optim.SGD(params, lr=recipe.outer_rate),
            name="upper",
        )
        self.task = task
        self.evaluations = 0

    def loss(self, batch: None) -> Tensor:
        self.evaluations += 1
        return self.task.outer_loss(self.lower.module.value, self.module.value)


class _InEngine:
    """An estimator in an engine, on full batches."""

    def __init__(self, task: Task, recipe: Recipe, estimator: Estimator, seed: int) -> None:
        self._upper, self._lower = _Upper(task, recipe), _Lower(task, recipe)
        settings = EngineConfig(seed=seed, progress=False, restore_on_error=False)
        self._engine = Engine([self._upper, self._lower], settings, estimator)
        _ = self._engine.dependencies
        self._before, self._upper.evaluations = self._engine.passes.copy(), 0
        self._outer_share = task.num_outer / task.num_inner
        self.failed = 0

    @property
    def w(self) -> Tensor:
        return self._lower.module.value.detach().clone()

    @property
    def lam(self) -> Tensor:
        return self._upper.module.value.detach().clone()

    @property
    def cost(self) -> float:
        """Every evaluation of F is followed by one backward pass; all other passes are over f."""
        forward, backward = self._engine.passes.since(self._before)
        outer = 2 * self._upper.evaluations
        return (forward + backward - outer + outer * self._outer_share) / 2

    def step(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            result = self._engine.step()
        self.failed += any(solve.status.failed for solve in result.solves.values())


class _SingleLoop:
    """A single-loop method by its own updates, on mini-batches."""

    def __init__(self, task: Task, method: Method, seed: int) -> None:
        def block(indices: Tensor) -> Block:
            return slice(int(indices[0]), int(indices[-1]) + 1)  # successive rows: a view instead of a copy

        self._problem = FiniteSum(
            lambda w, lam, indices: task.inner_loss(w, lam, block(indices)),
            task.num_inner,
            lambda w, lam, indices: task.outer_loss(w, lam, block(indices)),
            task.num_outer,
        )
        self._task, self._method, self._seed = task, method, seed
        self._state: State | None = None

    @property
    def failed(self) -> int:
        return 0 if self._state is None else self._state.failures

    @property
    def w(self) -> Tensor:
        return (self._task.inner_start if self._state is None else self._state.inner).detach().clone()

    @property
    def lam(self) -> Tensor:
        return (self._task.outer_start if self._state is None else self._state.outer).detach().clone()

    @property
    def cost(self) -> float:
        """A gradient is a forward and a backward pass, a product one backward pass more."""
        if self._state is None:
            return 0.0
        counts = self._state.counts
        return (counts.gradients + counts.products / 2) / self._task.num_inner

    def step(self) -> None:
        if self._state is None:  # the first tables belong to the first step
            generator = torch.Generator().manual_seed(self._seed)
            task = self._task
            self._state = self._method.init(self._problem, task.inner_start, task.outer_start, generator)
        self._state = self._method.update(self._problem, self._state, donate=True)


def make_driver(task: Task, recipe: Recipe, seed: int) -> Driver:
    """Returns what steps a recipe on a task."""
    if isinstance(recipe.method, Method):
        return _SingleLoop(task, recipe.method, seed)
    return _InEngine(task, recipe, recipe.method, seed)
