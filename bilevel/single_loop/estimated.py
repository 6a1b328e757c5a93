"""Methods that take their steps one after another, each at the newest point, with an estimator for the outer one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bilevel.functional import dense_gradient, gradient, leaves
from bilevel.hypergrad.base import Pullback
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.single_loop.base import Method, Point, State, Update, descended
from bilevel.validation import check_integer
from bilevel.vector import Tensors, add, promote

__all__ = ["Estimated"]


@dataclass(frozen=True, kw_only=True)
class Estimated(Method):
    """Takes ``inner_steps`` gradient steps on w, then an estimator's hypergradient there, then a step on λ.

    Every inner step and every product that the estimator asks for is on a batch of its own.

    Attributes:
        inner_steps: Gradient steps on w for each on λ.
    """

    inner_steps: int = 1

    def __post_init__(self) -> None:
        """Validates the fields; those of the estimator by making one."""
        super().__post_init__()
        check_integer(type(self).__name__, "inner_steps", self.inner_steps, minimum=1)
        self.estimator(0)

    @abstractmethod
    def estimator(self, step: int) -> Stochastic:
        """Returns the estimator of this step."""

    def advance(self, point: Point, state: State, donate: bool) -> Update:
        """See :meth:`Method.advance`."""
        length, _, outer_length = self.lengths(state.step)
        for _ in range(self.inner_steps):
            point = replace(point, inner=descended(length, _inner_gradient(point), point.inner))
        v, direct, memory = self.upper(point, state)
        pulled = self.pulled(point, v, state)
        outer = descended(outer_length, add(direct, pulled.value), point.outer)
        return Update(point.inner, outer, {**pulled.state, **memory}, failed=pulled.info.status.failed)

    def upper(self, point: Point, state: State) -> tuple[Tensors, Tensors, Mapping[str, Tensors]]:
        """Returns ``∂F/∂w``, the step's ``∂F/∂λ``, and what to keep."""
        v, direct = point.outer_gradients(point.oracles.draw_outer())
        return promote(v), promote(direct), {}

    def pulled(self, point: Point, v: Tensors, state: State) -> Pullback:
        """Returns the estimator's product, on fresh batches."""
        estimator, oracles = self.estimator(state.step), point.oracles
        alone = oracles.num_inner_blocks == 1
        blocks: list[int | None] = [oracles.draw_inner() for _ in range(1 if alone else estimator.num_samples)]
        return estimator.respond(point.problem(blocks)).pullback(v, state.memory)


def _inner_gradient(point: Point) -> Tensors:
    objective, w = point.oracles.inner(point.oracles.draw_inner()), leaves(point.inner)
    grads = objective.within(w, point.outer, lambda evaluate: gradient(evaluate(), w, objective))
    return promote(dense_gradient(grads, w))
