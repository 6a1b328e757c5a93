"""Implicit differentiation: linear solver × curvature × way of taking products.

At a minimum of the inner loss ``g(w, λ) = ∂f/∂w = 0``, and so ``vᵀ dw*/dλ = −qᵀ ∂g/∂λ`` with ``(∂g/∂w)ᵀ q = v``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.compiled import CompiledGraph, check_compile, graph_kind
from bilevel.errors import ConfigError
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.hypergrad.certificate import Bound, Certificate, as_certificate
from bilevel.linear import CompileIteration, Iteration, Operator, Solution, damped, machine_epsilon
from bilevel.products import (
    TOLERATED_ROUNDING,
    DifferenceProducts,
    FieldProducts,
    GaussNewtonGraph,
    GradientGraph,
    Products,
    full_precision,
)
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_choice, check_number
from bilevel.vector import Tensors, axpy, is_finite, lengths, promote, scale, subtract

__all__ = ["Implicit", "Iterative", "System", "Variables"]

SOLUTIONS = ("solution", "solution_before", "solution_before_that")
"""Keys of the state, the last solution first."""
EXTRAPOLATION: dict[int, tuple[float, ...]] = {1: (1.0,), 2: (2.0, -1.0), 3: (3.0, -3.0, 1.0)}
"""The next value of a sequence, constant, linear or quadratic, by its last ones."""


@dataclass(frozen=True)
class Variables:
    """All inner variables, and which of them a system is over: those that reach the loss on its batch.

    What a method keeps is over all of them, since on the next batch others may reach the loss (experts, a branch).

    Attributes:
        like: A vector over all inner variables.
        active: Which of them reach the loss.
    """

    like: Tensors
    active: tuple[bool, ...]

    def select(self, parts: Sequence[Tensor]) -> Tensors:
        """Returns the parts of active variables."""
        return tuple([part for part, active in zip(parts, self.active, strict=True) if active])

    def spread(self, parts: Tensors, others: Callable[[int, Tensor], Tensor]) -> Tensors:
        """Returns parts over all variables: those that are given, and others at the places of inactive variables.

        Args:
            parts: One for each active variable.
            others: Returns the part for a place, where a variable like the given one is inactive.
        """
        given = iter(parts)
        pairs = enumerate(zip(self.like, self.active, strict=True))
        return tuple([next(given) if active else others(place, like) for place, (like, active) in pairs])


@dataclass(frozen=True)
class System:
    """The adjoint system ``(H + δI) q = v`` as a solver gets it.

    Attributes:
        operator: The product with ``H + δI``; every call is counted.
        v: The right-hand side, rescaled by a power of two to a norm near 1.
        epsilon: Relative round-off of the products.
        variables: All inner variables, of which the system is over the active ones.
        start: Where the solutions of the calls before lead, in the same scale, where the method starts from it.
        diagonal: What the inner optimiser takes for the diagonal of H, or None.
        state: What the method kept at its last call, when other variables may have been active.
        transposed: Whether products are with the transposed Jacobian of the inner gradient; if not, the system is the
            right one for a symmetric Jacobian only.
        compiled: Compiles an iteration with its product, where products are compiled.
    """

    operator: Operator
    v: Tensors
    epsilon: float
    variables: Variables
    start: Tensors | None = None
    diagonal: Tensors | None = None
    state: State = field(default_factory=dict)
    transposed: bool = True
    compiled: CompileIteration | None = None


@dataclass(frozen=True)
class Implicit(Estimator):
    """Base of the methods that solve the adjoint system; a subclass supplies the solver.

    Attributes:
        curvature: H: ``"hessian"``, or ``"gauss_newton"``, the positive semi-definite part of it; the inner loss then
            returns ``{"loss": …, "outputs": …}``.
        products: How second-order products are taken: ``"autodiff"`` on a retained graph, or ``"finite_difference"`` of
            first derivatives (2 forward and 2 backward passes each), where no double backward exists; or ``"field"``,
            by the dense Jacobian of the inner gradient, where a ``detach()`` in the inner loss hides part of it from
            autograd (2 n passes for n inner variables).
        difference_step: ε of the differences, see :class:`~bilevel.FiniteDifference`.
        certificate: What is known of the losses; an error bound then comes with the answer.
        compile: Compile the products, and with them the iterations of ``conjugate_gradient`` and ``neumann`` without a
            preconditioner: True for ``torch.compile``'s default back end, or the name of another one. The first solve
            takes seconds to minutes. The loss must be one graph of tensor operations that draws no random numbers.
    """

    curvature: str = field(default="hessian", kw_only=True)
    products: str = field(default="autodiff", kw_only=True)
    difference_step: float | str = field(default="auto", kw_only=True)
    certificate: Certificate | None = field(default=None, kw_only=True)
    compile: bool | str = field(default=False, kw_only=True)

    refuses_gauss_newton: ClassVar[str] = ""
    """Why the solver makes no sense with a positive semi-definite curvature; empty where it does."""

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        check_choice(owner, "curvature", self.curvature, ("hessian", "gauss_newton"))
        check_choice(owner, "products", self.products, ("autodiff", "finite_difference", "field"))
        check_number(owner, "difference_step", self.difference_step, minimum=0.0, exclusive=True, auto=True)
        if self.compile in ("true", "True", "false", "False"):  # from the command line, where a field may be a name too
            object.__setattr__(self, "compile", self.compile in ("true", "True"))
        check_compile(owner, self.compile, self.products, self.curvature)
        object.__setattr__(self, "needs_double_backward", self.products != "finite_difference")
        object.__setattr__(self, "certificate", as_certificate(owner, self.certificate))
        if self.curvature == "gauss_newton" and self.refuses_gauss_newton:
            raise ConfigError(f"{owner}(curvature='gauss_newton'): {self.refuses_gauss_newton}")
        if self.products == "autodiff":
            if self.difference_step != "auto":
                raise ConfigError(f"{owner}.difference_step belongs to products='finite_difference' or 'field'")
            return
        if self.curvature == "gauss_newton":
            raise ConfigError(
                f"{owner}: curvature='gauss_newton' is taken by autodiff; with products={self.products!r} use "
                "curvature='hessian'"
            )
        if self.certificate is not None:
            raise ConfigError(
                f"{owner}: a certificate needs products='autodiff', since the error of a difference has no known bound"
            )

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _ImplicitResponse(self, problem)

    @abstractmethod
    def solve(self, system: System) -> tuple[Solution, State]:
        """Solves ``(H + δI) q = v``; returns the solution and what the method wants back at its next call."""

    def regularisation(self) -> float:
        """Returns δ of the system ``(H + δI) q = v`` that is solved and the residual is taken of."""
        return float(getattr(self, "damping", 0.0))

    def judge(self, solution: Solution, residual: float, epsilon: float) -> Status:
        """Returns the status in the light of the true residual."""
        return solution.status

    def starts_from(self) -> int:
        """Returns how many solutions, at most, of the calls before a start is made of; 0 where it is zero."""
        return 0

    def tolerance(self) -> float:
        """Returns the relative residual at which the method stops; 0 where it does not go by it."""
        return float(getattr(self, "rtol", 0.0))


@dataclass(frozen=True)
class Iterative(Implicit):
    """Base of the methods whose solver can start from an earlier solution.

    Attributes:
        warm_start: Start from the solution of the call before, which the state carries. In an engine that is the last
            outer step; as a function pass ``state={}`` at first and each result's ``state`` to the next call.
            ``"linear"`` goes on from the last two, ``2 q₁ − q₂``, and ``"quadratic"`` from the last three,
            ``3 q₁ − 3 q₂ + q₃``: their distance is of second and third order in an outer step, beside √5 and √19 times
            the error of a solution. They are nearer where outer steps are small and alike, on full batches; the state
            keeps two and three vectors. Of inner variables that do not reach the loss on a batch, the last solution is
            kept for when they do.
    """

    warm_start: bool | str = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Validates the shared fields."""
        super().__post_init__()
        if self.warm_start in ("true", "True", "false", "False"):
            object.__setattr__(self, "warm_start", self.warm_start in ("true", "True"))
        if not isinstance(self.warm_start, bool) and self.warm_start not in ("linear", "quadratic"):
            raise ConfigError(
                f"{type(self).__name__}.warm_start must be True, False, 'linear' or 'quadratic', not "
                f"{self.warm_start!r}"
            )

    @property
    def needs_state(self) -> bool:
        """A warm start does."""
        return bool(self.warm_start)

    def starts_from(self) -> int:
        """See :meth:`Implicit.starts_from`."""
        if isinstance(self.warm_start, bool):
            return int(self.warm_start)
        return {"linear": 2, "quadratic": 3}[self.warm_start]


@dataclass(frozen=True)
class _ImplicitResponse(Response):
    estimator: Implicit
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        def solved(products: Products) -> Pullback:
            diagonal = self.problem.diagonal
            diagonal = None if diagonal is None else promote(products.select(diagonal))
            return solve_adjoint(self.estimator, products, promote(cotangent), state, diagonal)

        with full_precision():
            return with_products(self.estimator, self.problem, solved)


def with_products(estimator: Implicit, problem: InnerProblem, body: Callable[[Products], Pullback]) -> Pullback:
    """Returns ``body`` of the products that an estimator asks for."""
    inner, outer, objective = problem.inner, problem.outer, problem.objective
    if estimator.products == "finite_difference":
        return body(DifferenceProducts(objective, inner, outer, estimator.difference_step))
    if estimator.products == "field":
        step = estimator.difference_step
        return objective.within(
            inner, outer, lambda evaluate: body(FieldProducts(objective, evaluate, inner, outer, step))
        )
    kind = graph_kind(estimator.curvature, estimator.compile)
    return objective.within(inner, outer, lambda evaluate: body(kind(objective, evaluate, inner, outer)))


def solve_adjoint(
    estimator: Implicit, products: Products, cotangent: Tensors, state: State, diagonal: Tensors | None = None
) -> Pullback:
    """Solves the adjoint system; the last product gives answer and true residual together."""
    variables = Variables(cotangent, products.active)
    v = variables.select(cotangent)
    known = kept_solutions(estimator, variables, state)
    slope, size = lengths([part.detach() for part in products.gradient], v)
    # Inner products of a tiny or huge cotangent leave the range of float32; a power of two rescales without rounding.
    unit = 2.0 ** max(-100, min(100, math.frexp(size)[1])) if math.isfinite(size) else 1.0
    v = scale(1 / unit, v)
    system, damping = _Counted(lambda q: promote(products.hessian(q)), products), estimator.regularisation()
    epsilon = max(products.roundoff(), machine_epsilon(v))
    given = System(
        damped(system, damping),
        v,
        epsilon,
        variables,
        _start(known, variables, unit) if known else None,
        diagonal,
        state,
        products.transposed,
        system.compiled(damping),
    )
    solution, new, both = _solve(estimator, products, system, given, size)
    kept = {key: part for key, part in new.items() if key not in SOLUTIONS}
    # In the outer loss's own units: its Lipschitz constants are not rescaled.
    bound, extra = _certify(estimator, products, slope, scale(unit, solution.q), scale(unit, v))
    image, mixed = products.hessian_and_mixed(solution.q) if both is None else both
    residual = _relative_residual(axpy(damping, solution.q, promote(image)), v) if size != 0.0 else 0.0
    mixed = scale(unit, mixed)
    status, message = _verdict(estimator, products, solution, residual, epsilon)
    damping_note = f"the residual is that of the system damped by {damping:g}" if damping > 0.0 else ""
    if math.isnan(residual) or not is_finite(mixed):
        status = Status.DIVERGED
    if estimator.starts_from() and not (status.failed and status is not Status.INACCURATE):
        # That of a variable which is inactive now is the best start for the time when it is active again.
        latest = variables.spread(
            scale(unit, solution.q), lambda place, like: known[0][place] if known else torch.zeros_like(like)
        )
        kept |= dict(zip(SOLUTIONS, (latest, *known[: estimator.starts_from() - 1]), strict=False))
    info = SolveInfo(
        status=status,
        residual=residual,
        iterations=solution.iterations,
        products=system.count + extra + (both is None),
        error_bound=bound.value,
        error_bound_basis=bound.basis,
        inner_gradient_norm=slope,
        method=estimator.name,
        message="; ".join(part for part in (message, damping_note, bound.note, products.message) if part),
    )
    return Pullback(negative(mixed), info, kept)


def _solve(
    estimator: Implicit, products: Products, system: _Counted, given: System, size: float
) -> tuple[Solution, State, tuple[Tensors, Tensors] | None]:
    """Returns the solution, what the method keeps, and both products of the solution where they were taken.

    A start may be the solution already: both of its products then cost one pass, and are the answer. If it is not, the
    product with H is what every solver would begin with, and is kept for that.

    Args:
        estimator: The method.
        products: Those at the inner parameters.
        system: The undamped product, counted.
        given: The system.
        size: The norm of the cotangent.
    """
    if size == 0.0:  # the outer loss is flat in the inner parameters
        return Solution(given.v, Status.CONVERGED, 0), given.state, None
    if not math.isfinite(size):  # every solver's start at zero would swallow a NaN
        return Solution(given.v, Status.DIVERGED, 0, "∂F/∂w is not finite"), given.state, None
    start = given.start
    if start is not None and estimator.tolerance() > 0.0:
        both = products.hessian_and_mixed(start, last=False)
        image = promote(both[0])
        system.know(start, image)
        damping = estimator.regularisation()
        if _relative_residual(axpy(damping, start, image), given.v) <= estimator.tolerance():
            return Solution(start, Status.CONVERGED, 1), given.state, both
    return (*estimator.solve(given), None)


def _relative_residual(image: Tensors, v: Tensors) -> float:
    """Returns ``‖H q − v‖ / ‖v‖``."""
    residual, size = lengths(subtract(image, v), v)
    return residual / size


class _Counted:
    def __init__(self, product: Operator, products: Products | None = None) -> None:
        self._product = product
        self._products = products
        self._known: tuple[Tensors, Tensors] | None = None
        self.count = 0

    def know(self, q: Tensors, image: Tensors) -> None:
        """Counts a product that was taken elsewhere, and returns it where it is asked for next."""
        self.count += 1
        self._known = q, image

    def compiled(self, damping: float) -> CompileIteration | None:
        """Returns what compiles an iteration with the damped product, where products are compiled."""
        products = self._products
        if not isinstance(products, CompiledGraph):
            return None

        def make(name: str, body: Callable[..., Tensors]) -> Iteration | None:
            step = products.iteration(
                f"{name}, damping {damping!r}", lambda operator, *tensors: body(damped(operator, damping), *tensors)
            )
            return None if step is None else lambda *tensors: self._counted(step(*tensors))

        return make

    def _counted(self, found: Tensors) -> Tensors:
        self.count += 1
        return found

    def __call__(self, q: Tensors) -> Tensors:
        known, self._known = self._known, None
        if known is not None and known[0] is q:
            return known[1]
        self.count += 1
        return self._product(q)


def _start(known: Sequence[Tensors], variables: Variables, unit: float) -> Tensors:
    """Returns the value that the last solutions lead to, latest first."""
    first, *others = EXTRAPOLATION[len(known)]
    start = scale(first / unit, variables.select(known[0]))
    for factor, solution in zip(others, known[1:], strict=True):
        start = axpy(factor / unit, variables.select(solution), start)
    return start


def kept_solutions(estimator: Implicit, variables: Variables, state: State) -> list[Tensors]:
    """Returns those solutions of the calls before that a start is made of, latest first."""
    found = []
    for key in SOLUTIONS[: estimator.starts_from()]:
        vector = kept_vector(estimator, key, variables, state)
        if vector is None:
            break
        found.append(vector)
    return found


def kept_vector(estimator: Implicit, key: str, variables: Variables, state: State) -> Tensors | None:
    """Returns a vector over all inner variables that the state holds, in their dtypes and on their devices, or None.

    Raises:
        ConfigError: It has other shapes: it belongs to another problem.
    """
    known = state.get(key)
    if known is None:
        return None
    if [part.shape for part in known] != [part.shape for part in variables.like]:
        raise another_problem(
            estimator,
            f"its solution has shapes {[tuple(part.shape) for part in known]}, the inner variables "
            f"{[tuple(part.shape) for part in variables.like]}",
        )
    return tuple(a.to(b) for a, b in zip(known, variables.like, strict=True))


def another_problem(estimator: Implicit, difference: str) -> ConfigError:
    """Returns the error for a state that does not fit; one of before states were over all inner variables may not."""
    return ConfigError(
        f"the state of method {estimator.name!r} belongs to another problem: {difference}. Start with state={{}} (in "
        "an engine: engine.estimator_states.clear())."
    )


def _certify(estimator: Implicit, products: Products, slope: float, q: Tensors, v: Tensors) -> tuple[Bound, int]:
    """Returns the error bound, and the products that it took."""
    if estimator.certificate is None or not is_finite(q):
        return Bound(None), 0
    assert isinstance(products, GradientGraph)
    hessian = products.full_hessian if isinstance(products, GaussNewtonGraph) else products.hessian
    second, mixed = _Counted(lambda q: promote(hessian(q))), _Counted(products.mixed_again)
    return estimator.certificate.bound(second, mixed, slope, q, v), second.count + mixed.count


def _verdict(
    estimator: Implicit, products: Products, solution: Solution, residual: float, epsilon: float
) -> tuple[Status, str]:
    status = estimator.judge(solution, residual, epsilon)
    if products.lost > TOLERATED_ROUNDING:  # what else went wrong is rounding too
        lost = f"rounding changes the displacements of the difference products by {products.lost:.0%}"
        return Status.INACCURATE, lost
    if solution.status is Status.CONVERGED and status is Status.STOPPED_AT_CAP:
        return status, (
            "rounding keeps the true residual above the tolerance: more products will not help, more precision will"
        )
    return status, solution.message
