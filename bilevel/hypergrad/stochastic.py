"""What the single-loop stochastic methods share: products at one point, each on the batch whose turn it is.

They all take few, cheap steps on ``(H + δI) q = v`` with ``H = ∂²f/∂w²`` of a *batch*, go on from the q of the call
before (or restart), and pull q back through the mixed derivative of a batch.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.compiled import check_compile, graph_kind
from bilevel.errors import ConfigError
from bilevel.hypergrad.base import Estimator, InnerProblem, Pullback, Response, State, negative
from bilevel.linear import Operator, machine_epsilon, rounding_allowance
from bilevel.products import DifferenceProducts, Products, full_precision
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_choice, check_number
from bilevel.vector import Tensors, axpy, dot, is_finite, norm, promote, subtract, zeros_like

__all__ = ["SOLUTION", "Answer", "Batches", "Stochastic", "kept", "started"]

T = TypeVar("T")
SOLUTION = "solution"
TOLERATED_ROUNDING = 0.1


@dataclass(frozen=True)
class Stochastic(Estimator):
    """Base of the stochastic methods; a subclass supplies what it does with the products.

    Attributes:
        step_size: ρ, the length of a step.
        damping: δ ≥ 0; the system is ``(H + δI) q = v``.
        curvature: H: ``"hessian"``, or ``"gauss_newton"``, its positive semi-definite part; the inner loss then returns
            ``{"loss": …, "outputs": …}``.
        products: How products are taken: ``"autodiff"``, or ``"finite_difference"`` of first derivatives (2 forward and
            2 backward passes each), where no double backward exists.
        difference_step: ε of ``"finite_difference"``, see :class:`~bilevel.FiniteDifference`.
        compile: Compile the products: True for ``torch.compile``'s default back end, or the name of another one. The
            first call takes seconds to minutes. The loss must be one graph of tensor operations that draws no random
            numbers.
    """

    step_size: float = 0.1
    damping: float = field(default=0.0, kw_only=True)
    curvature: str = field(default="hessian", kw_only=True)
    products: str = field(default="autodiff", kw_only=True)
    difference_step: float | str = field(default="auto", kw_only=True)
    compile: bool | str = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        object.__setattr__(self, "needs_double_backward", self.products != "finite_difference")
        check_number(owner, "step_size", self.step_size, minimum=0.0, exclusive=True)
        check_number(owner, "damping", self.damping, minimum=0.0)
        check_choice(owner, "curvature", self.curvature, ("hessian", "gauss_newton"))
        check_choice(owner, "products", self.products, ("autodiff", "finite_difference"))
        check_number(owner, "difference_step", self.difference_step, minimum=0.0, exclusive=True, auto=True)
        check_compile(owner, self.compile, self.products, self.curvature)
        if self.products == "autodiff" and self.difference_step != "auto":
            raise ConfigError(f"{owner}.difference_step belongs to products='finite_difference'")
        if self.products == "finite_difference" and self.curvature == "gauss_newton":
            raise ConfigError(
                f"{owner}: curvature='gauss_newton' is taken by autodiff; with products='finite_difference' use "
                "curvature='hessian'"
            )

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Nothing is computed until the pullback."""
        return _StochasticResponse(self, problem)

    @abstractmethod
    def pull(self, batches: Batches, v: Tensors, state: State) -> Pullback:
        """Returns ``−(∂²f/∂λ∂w) q`` for this call's q."""


@dataclass(frozen=True)
class _StochasticResponse(Response):
    estimator: Stochastic
    problem: InnerProblem

    @property
    def point(self) -> Tensors:  # type: ignore[override]
        return self.problem.inner

    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        with full_precision():
            return self._pulled(promote(cotangent), state)

    def _pulled(self, v: Tensors, state: State) -> Pullback:
        if len(self.problem.samples) > 1:
            return self.estimator.pull(Batches(self.estimator, self.problem), v, state)
        # One batch for everything: one graph for everything.
        problem = replace(self.problem, objective=self.problem.sample(0))
        return _open(
            self.estimator,
            problem,
            lambda products: self.estimator.pull(Batches(self.estimator, problem, products), v, state),
        )


def _open(estimator: Stochastic, problem: InnerProblem, body: Callable[[Products], T]) -> T:
    """Returns ``body`` of the products of one batch."""
    inner, outer, objective = problem.inner, problem.outer, problem.objective
    if estimator.products == "finite_difference":
        return body(DifferenceProducts(objective, inner, outer, estimator.difference_step))
    kind = graph_kind(estimator.curvature, estimator.compile)
    return objective.within(inner, outer, lambda evaluate: body(kind(objective, evaluate, inner, outer)))


@dataclass(frozen=True)
class Answer:
    """What the last product of a call tells, all on one batch.

    Attributes:
        q: The q that was pulled back, with zeros for inner variables that do not reach the loss.
        v: The right-hand side, likewise.
        residual: ``(H + δI) q − v``.
        mixed: ``(∂²f/∂λ∂w) q``.
        gradient: ``∂f/∂w``.
    """

    q: Tensors
    v: Tensors
    residual: Tensors
    mixed: Tensors
    gradient: Tensors


class Batches:
    """Products with ``H + δI`` and the mixed derivative at one point, on the inner problem's separate batches.

    Vectors have one part for every inner variable. Those that do not reach the loss have no response; products are
    zero there.

    Args:
        estimator: Says which products to take.
        problem: The inner problem.
        shared: The products of its only batch, already open; without them every product opens its own batch, which
            costs 1 forward and 1 backward pass.

    Attributes:
        problem: The inner problem.
        count: Products taken.
    """

    def __init__(self, estimator: Stochastic, problem: InnerProblem, shared: Products | None = None) -> None:
        self.problem = problem
        self.count = 0
        self._estimator = estimator
        self._shared = shared
        self._seen: list[Tensor] = []
        self._epsilon = 0.0
        self._lost = 0.0
        self._messages: dict[str, None] = {}
        self._gradient_norm = math.nan

    def on(self, place: int, body: Callable[[Products], T]) -> T:
        """Returns ``body`` of the products of a batch."""
        if self._shared is not None:
            return self._body(self._shared, body)
        problem = replace(self.problem, objective=self.problem.sample(place))
        return _open(self._estimator, problem, lambda products: self._body(products, body))

    def image(self, place: int, q: Tensors) -> Tensors:
        """Returns ``(H + δI) q`` on a batch."""
        return self.on(place, lambda products: self._image(products, q))

    def in_turn(self) -> Operator:
        """Returns the product with ``H + δI`` of the next batch at every call, from the first one on."""
        places = itertools.count()
        return lambda q: self.image(next(places), q)

    def fixed(self, place: int, body: Callable[[Operator, Callable[[Tensors], Tensors]], T]) -> T:
        """Returns ``body`` of one batch, opened once: the product with ``H + δI``, and the projection to its range.

        The projection puts zeros for inner variables that do not reach the loss: without it there is no solution.
        """

        def inside(products: Products) -> T:
            def reached(q: Tensors) -> Tensors:
                return _spread(products.select(q), products.active, q)

            return body(lambda q: self._image(products, q), reached)

        return self.on(place, inside)

    def answer(self, place: int, q: Tensors, v: Tensors) -> Answer:
        """Pulls q back on a batch, and takes its residual in the same backward pass; the last call on this batch."""

        def body(products: Products) -> Answer:
            part = products.select(q)
            image, mixed = products.hessian_and_mixed(part)
            full = self._recorded(products, part, axpy(self._estimator.damping, part, promote(image)))
            slope = tuple(g.detach() for g in products.gradient)
            reached, full, target, gradient = (
                _spread(x, products.active, q) for x in (part, full, promote(products.select(v)), promote(slope))
            )
            self._gradient_norm = float(norm(slope))
            return Answer(reached, target, subtract(full, target), promote(mixed), gradient)

        return self.on(place, body)

    def mixed_at(self, place: int, inner: Tensors, outer: Tensors, q: Tensors) -> Tensors:
        """Returns ``(∂²f/∂λ∂w) q`` of a batch at another point."""
        problem = replace(self.problem, objective=self.problem.sample(place), inner=inner, outer=outer)
        self.count += 1

        def body(products: Products) -> Tensors:
            mixed = promote(products.mixed(products.select(q)))
            self._note(products)
            return mixed

        return _open(self._estimator, problem, body)

    def pullback(
        self,
        answer: Answer,
        state: State,
        *,
        iterations: int,
        always: State | None = None,
        value: Tensors | None = None,
        contracts: bool = False,
        stepped: bool = True,
        status: Status = Status.STOPPED_AT_CAP,
        message: str = "",
    ) -> Pullback:
        """Returns the answer with its report.

        Args:
            answer: The last product.
            state: For the next call; dropped where the iteration diverges, so that the next call starts afresh.
            iterations: Steps that led to q.
            always: What the next call wants in any case.
            value: What to return instead of ``−mixed``.
            contracts: Whether they started at zero, so that on one batch a residual above ‖v‖ proves divergence.
            stepped: Whether they had the length ρ.
            status: What the solver said.
            message: What else is worth knowing.
        """
        value = negative(answer.mixed) if value is None else value
        size, length = float(norm(answer.residual)), float(norm(answer.v))
        relative = size / length if length > 0.0 else (0.0 if size == 0.0 else math.inf)
        finite = is_finite(value) and math.isfinite(size)
        contracts = contracts and self._shared is not None
        status, reason = self._verdict(relative, contracts, stepped, status) if finite else (Status.DIVERGED, "")
        info = SolveInfo(
            status,
            residual=relative,
            iterations=iterations,
            products=self.count,
            inner_gradient_norm=self._gradient_norm,
            method=self._estimator.name,
            message="; ".join(part for part in (message, reason, *self._messages) if part),
        )
        return Pullback(value, info, {**({} if status is Status.DIVERGED else state), **(always or {})})

    def _body(self, products: Products, body: Callable[[Products], T]) -> T:
        result = body(products)
        self._note(products)
        return result

    def _note(self, products: Products) -> None:
        self._epsilon = max(self._epsilon, products.roundoff())
        self._lost = max(self._lost, products.lost)
        if products.message:
            self._messages[products.message] = None

    def _image(self, products: Products, q: Tensors) -> Tensors:
        part = products.select(q)
        image = axpy(self._estimator.damping, part, promote(products.hessian(part)))
        return _spread(self._recorded(products, part, image), products.active, q)

    def _recorded(self, products: Products, q: Tensors, image: Tensors) -> Tensors:
        self.count += 1
        self._seen += [norm(q), norm(image), dot(q, image).to(dtype=torch.float64)]
        return image

    def _verdict(self, relative: float, contracts: bool, stepped: bool, status: Status) -> tuple[Status, str]:
        """Returns a status that the products prove, and why.

        A step with ρ multiplies the error by ``I − ρH``: for a symmetric H a product with ``ρ ‖Hq‖ > 2 ‖q‖`` proves
        that ``ρ > 2/λmax`` on that batch. From zero on one batch, ``‖Hq − v‖ = ‖(I − ρH)ᵏ v‖ > ‖v‖`` does as well.
        """
        if self._lost > TOLERATED_ROUNDING:
            lost = f"rounding changes the displacements of the difference products by {self._lost:.0%}"
            return Status.INACCURATE, lost
        epsilon = max(self._epsilon, *(machine_epsilon((part,)) for part in promote(self.problem.inner)))
        if relative <= rounding_allowance(epsilon):
            return Status.CONVERGED, ""
        if status.failed:
            return status, ""
        seen = torch.stack(self._seen).reshape(-1, 3).tolist()
        largest = max((image / length for length, image, _ in seen if length > 0.0), default=0.0)
        if any(curvature < -10 * epsilon * largest * length**2 for length, _, curvature in seen):
            return Status.NEGATIVE_CURVATURE, ""
        overshoots = stepped and self._estimator.step_size * largest > 2 * (1 + 1e-6)
        if relative > 1 + 1e-6 and (contracts or overshoots):
            limit = f"λmax is at least {largest:.2g} on a batch: step_size must be below {2 / largest:.2g}"
            return Status.DIVERGED, limit if overshoots else ""
        return status, ""


def kept(estimator: Estimator, state: State, key: str, like: Tensors) -> Tensors | None:
    """Returns what the state holds under a name, in the dtypes and on the devices of ``like``; None where nothing.

    Raises:
        ConfigError: It has other shapes: it belongs to another problem.
    """
    known = state.get(key)
    if known is None:
        return None
    if [part.shape for part in known] != [part.shape for part in like]:
        raise ConfigError(
            f"the state of method {estimator.name!r} belongs to another problem: its {key} has shapes "
            f"{[tuple(part.shape) for part in known]}, where {[tuple(part.shape) for part in like]} were expected. "
            "Start with state={}."
        )
    return tuple(a.to(b) for a, b in zip(known, like, strict=True))


def started(estimator: Estimator, state: State, v: Tensors) -> tuple[Tensors, bool]:
    """Returns the q to go on from, and whether it is a start at zero."""
    known = kept(estimator, state, SOLUTION, v)
    return (zeros_like(v), True) if known is None else (known, False)


def _spread(parts: Tensors, active: tuple[bool, ...], like: Tensors) -> Tensors:
    """Puts zeros in the places of inactive variables."""
    rest = iter(parts)
    return tuple(next(rest) if on else torch.zeros_like(part) for part, on in zip(like, active, strict=True))
