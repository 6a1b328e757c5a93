"""Implicit differentiation: a linear solver on products from one retained gradient graph.

At a minimum of the inner loss ``g(w, λ) = ∂f/∂w = 0``, and so ``vᵀ dw*/dλ = −qᵀ ∂g/∂λ`` with ``(∂g/∂w)ᵀ q = v``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from bilevel.functional import Evaluate, GradientGraph
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.linear import Operator, Solution, machine_epsilon
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, axpy, is_finite, norm, promote, scale, subtract

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit(Estimator):
    """Base of the methods that solve the adjoint system; a subclass supplies the solver."""

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _ImplicitResponse(self, problem)

    @abstractmethod
    def solve(self, operator: Operator, v: Tensors, state: State, epsilon: float) -> tuple[Solution, State]:
        """Solves ``H q = v`` for the (undamped) ``operator``, whose products have relative round-off ``epsilon``."""

    def regularisation(self) -> float:
        """Returns δ of the system ``(H + δI) q = v`` that :meth:`solve` solves and the residual is taken of."""
        return 0.0

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """Returns the status in the light of the true residual."""
        return solution.status


@dataclass(frozen=True)
class _ImplicitResponse(Response):
    estimator: Implicit
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        inner, outer = self.problem.inner, self.problem.outer

        def body(evaluate: Evaluate) -> Pullback:
            graph = GradientGraph(self.problem.objective, evaluate, inner, outer)
            return solve_adjoint(self.estimator, graph, promote(graph.select(cotangent)), state)

        return self.problem.objective.within(inner, outer, body)


def solve_adjoint(estimator: Implicit, graph: GradientGraph, v: Tensors, state: State) -> Pullback:
    """Solves the adjoint system on a gradient graph; the last product gives answer and true residual together."""
    products = 0

    def operator(q: Tensors) -> Tensors:
        nonlocal products
        products += 1
        return promote(graph.hessian(q))

    epsilon = max(machine_epsilon(graph.gradient), machine_epsilon(v))
    size = float(norm(v))
    # Inner products of a tiny or huge cotangent leave the range of float32; a power of two rescales without rounding.
    unit = 2.0 ** max(-100, min(100, math.frexp(size)[1])) if math.isfinite(size) else 1.0
    v = scale(1 / unit, v)
    if size == 0.0:  # the outer loss is flat in the inner parameters
        solution, state = Solution(v, Status.CONVERGED, 0), dict(state)
    else:
        solution, state = estimator.solve(operator, v, state, epsilon)
    image, mixed = graph.hessian_and_mixed(solution.q)
    image = axpy(estimator.regularisation(), solution.q, promote(image))
    residual = float(norm(subtract(image, v))) / float(norm(v)) if size > 0.0 else 0.0
    mixed = scale(unit, mixed)
    status = estimator.judge(solution, residual, epsilon)
    if math.isnan(residual) or not is_finite(mixed):
        status = Status.DIVERGED
    message = solution.message
    if solution.status is Status.CONVERGED and status is Status.STOPPED_AT_CAP:
        message = (
            "rounding keeps the true residual above the tolerance: more products will not help, more precision will"
        )
    info = SolveInfo(
        status=status,
        residual=residual,
        iterations=solution.iterations,
        products=products + 1,
        method=estimator.name,
        message=message,
    )
    return Pullback(negative(mixed), info, state)
