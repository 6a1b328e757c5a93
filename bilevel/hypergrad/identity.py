"""The identity for the inverse Hessian, with the exact mixed product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.functional import Evaluate
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.products import GradientGraph
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, is_finite

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(Estimator):
    """``H⁻¹ ≈ I``: ``vᵀ dw*/dλ ≈ −vᵀ ∂²f/∂w∂λ``, by one exact mixed product.

    The quantity that :class:`~bilevel.FiniteDifference` approximates, without its ε. Source: Luketina et al., ICML
    2016 (arXiv 1511.06727), T1–T2 with the step size left to the outer learning rate.

    Cost: 1 forward and 1 backward pass with graph, 1 product.
    """

    name: ClassVar[str] = "identity"
    summary: ClassVar[str] = "identity for the inverse Hessian, exact mixed product"
    cost: ClassVar[str] = "1 forward, 1 backward with graph, 1 product"
    needs: ClassVar[str] = "double backward"
    storage: ClassVar[str] = "the gradient's graph"
    purpose: ClassVar[str] = "large models trained a step or a few per outer step; a direction, not a length"

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _IdentityResponse(problem)


@dataclass(frozen=True)
class _IdentityResponse(Response):
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        inner, outer = self.problem.inner, self.problem.outer

        def body(evaluate: Evaluate) -> Tensors:
            graph = GradientGraph(self.problem.objective, evaluate, inner, outer)
            return graph.mixed(graph.select(cotangent))

        mixed = self.problem.objective.within(inner, outer, body)
        status = Status.NOT_APPLICABLE if is_finite(mixed) else Status.DIVERGED
        return Pullback(negative(mixed), SolveInfo(status, products=1, method=Identity.name), state)
