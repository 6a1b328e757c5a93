"""The dense float64 hypergradient: what every method is compared with.

It shares no code with the estimators beyond the objective itself: the Jacobian of the inner gradient is formed row by
row with plain autograd, so that neither its symmetry nor a solver is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import ConfigError, LossError
from bilevel.functional import Evaluate, Objective, dense_gradient, derivatives, independent, leaves
from bilevel.precision import DoublePrecision
from bilevel.vector import Tensors

__all__ = ["ExactResponse", "PreciseObjective", "Precision", "best_response", "outer_gradients"]

T = TypeVar("T")

LARGEST_DIMENSION = 5_000
TOLERATED_DIFFERENCE = 1e-3


@dataclass
class Precision:
    """How a reference evaluates losses.

    Attributes:
        original: The dtype in which the user's losses normally run.
        double: Whether to run them in float64.
        forced: Functions that computed in lower precision nonetheless.
    """

    original: torch.dtype
    double: bool = True
    forced: dict[str, None] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the reference."""
        return torch.float64 if self.double else self.original

    def leaves(self, tensors: Tensors) -> Tensors:
        """Returns the tensors as new leaves in the reference's dtype."""
        return leaves([part.detach().to(torch.float64) for part in tensors] if self.double else tensors)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context of one evaluation. Attention takes the back end that has second derivatives."""
        with sdpa_kernel(SDPBackend.MATH):
            if not self.double:
                yield
                return
            mode = DoublePrecision(self.original)
            try:
                with mode:
                    yield
            finally:
                self.forced.update(mode.forced)


class PreciseObjective(Objective):
    """An objective whose evaluations run in the reference's precision."""

    def __init__(self, objective: Objective, precision: Precision) -> None:
        super().__init__(objective.name, objective.replay, objective.passes, objective.reduce)
        self._objective = objective
        self._precision = precision

    def within(self, inner: Tensors, outer: Tensors, body: Callable[[Evaluate], T]) -> T:
        """See :meth:`Objective.within`."""

        def precise(evaluate: Evaluate) -> T:
            def once() -> Tensor:
                with self._precision():
                    return evaluate()

            return body(once)

        return self._objective.within(inner, outer, precise)


@dataclass(frozen=True)
class ExactResponse:
    """An exact best-response product and what is known of its point.

    Attributes:
        value: ``vᵀ dw*/dλ``.
        gradient_norm: ``‖∂f/∂w‖``: zero where the inner problem is solved.
        distance: ``‖J⁻¹ ∂f/∂w‖ / ‖w‖``, a Newton step: about how far the solution is, relative to its size.
        asymmetry: ``‖J − Jᵀ‖ / ‖J‖`` of the Jacobian J of the inner gradient.
        eigenvalues: Smallest and largest eigenvalue of J's symmetric part.
        singular: Whether J is singular to working precision; the least-squares solution was used.
        hidden: What autograd's derivative of the inner gradient along a random direction misses, relatively.
    """

    value: Tensors
    gradient_norm: float
    distance: float
    asymmetry: float
    eigenvalues: tuple[float, float]
    singular: bool
    hidden: float


def outer_gradients(objective: Objective, inner: Tensors, outer: Tensors) -> tuple[Tensors, Tensors]:
    """Returns ``∂F/∂w`` and ``∂F/∂λ``."""

    def body(evaluate: Evaluate) -> Tensors:
        return _gradient(evaluate(), inner + outer)

    both = objective.within(inner, outer, body)
    return both[: len(inner)], both[len(inner) :]


def best_response(objective: Objective, inner: Tensors, outer: Tensors, cotangent: Tensors) -> ExactResponse:
    """Returns ``vᵀ dw*/dλ = −qᵀ ∂g/∂λ`` with ``Jᵀ q = v``, ``g = ∂f/∂w`` and its dense Jacobian J.

    The solution of an inner problem is where its *gradient* vanishes, so that J is the derivative of g as a function of
    its values. Autograd's differs from it where the loss holds a ``detach()``. A pair of gradients along a random
    direction tells, in float64, and J and ``qᵀ ∂g/∂λ`` are then taken by central differences of g; so they are where
    an operation has no second derivative.

    Costs n backward passes (2 n gradients by differences, and 2 m more for m outer variables), O(n²) memory and O(n³)
    operations for n inner variables.

    Raises:
        ConfigError: n exceeds 5,000.
        LossError: The inner loss does not depend on the inner variables.
    """
    size = sum(part.numel() for part in inner)
    if size > LARGEST_DIMENSION:
        raise ConfigError(
            f"reference 'exact' forms the dense Jacobian of the gradient of {objective.name}: {size} inner variables "
            f"are more than its limit of {LARGEST_DIMENSION}. Check the same losses on a smaller model, or with fewer "
            "inner parameters."
        )
    field = _Field(objective, inner, outer)
    g, J = field.by_autograd()
    mixed: Callable[[Tensor], Tensors] = field.product
    hidden = math.nan
    if J is not None and g.dtype == torch.float64:
        hidden = field.hidden(J)
    if J is None or hidden > TOLERATED_DIFFERENCE:
        J, mixed = field.by_differences(inner), field.differences_of_products
    v = torch.cat([cotangent[place].reshape(-1) for place in field.active]).to(torch.float64)
    eigenvalues = torch.linalg.eigvalsh(0.5 * (J + J.T))
    q, step, singular = _solve(J, v, g.to(torch.float64), eigenvalues, torch.finfo(g.dtype).eps)
    w = _flat([inner[place] for place in field.active]).detach().to(torch.float64)
    extent = max(float(w.norm()), float((w - step).norm()))
    return ExactResponse(
        value=tuple(-part for part in mixed(q)),
        gradient_norm=float(g.norm()),
        distance=float(step.norm()) / extent if extent else 0.0,
        asymmetry=float((J - J.T).norm() / J.norm().clamp_min(1e-300)),
        eigenvalues=(float(eigenvalues[0]), float(eigenvalues[-1])),
        singular=singular,
        hidden=hidden,
    )


class _Field:
    """The inner gradient g(w, λ) over the inner variables that reach the loss, and its derivatives."""

    def __init__(self, objective: Objective, inner: Tensors, outer: Tensors) -> None:
        self._objective = objective
        self._inner = inner
        self._outer = outer
        self.active: list[int] = []

    def by_autograd(self) -> tuple[Tensor, Tensor | None]:
        """Returns g and its Jacobian in float64, row by row; None for an operation without second derivative."""

        def body(evaluate: Evaluate) -> tuple[Tensor, Tensor | None]:
            found = self._gradients(evaluate(), create_graph=True)
            self.active = [place for place, part in enumerate(found) if part is not None]
            if not self.active:
                raise independent(self._objective.name)
            g = _flat([part for part in found if part is not None])
            varied = tuple(self._inner[place] for place in self.active)
            try:
                with second_derivative_errors(self._objective.name):
                    rows = [_flat(_gradient(entry, varied, retain=True)) for entry in g]
            except LossError:
                return g.detach(), None
            return g.detach(), torch.stack(rows).to(torch.float64)

        return self._objective.within(self._inner, self._outer, body)

    def by_differences(self, along: Tensors) -> Tensor:
        """Returns the derivatives of g by all of ``along`` (inner or outer variables) as the columns of a matrix."""
        columns = []
        for place in self.active if along is self._inner else range(len(along)):
            for entry in range(along[place].numel()):
                basis = [torch.zeros_like(part) for part in along]
                basis[place].view(-1)[entry] = 1
                columns.append(self._along(tuple(basis), inner=along is self._inner))
        return torch.stack(columns, dim=1)

    def differences_of_products(self, q: Tensor) -> Tensors:
        """Returns ``qᵀ ∂g/∂λ`` by differences of g."""
        pieces = torch.split(q @ self.by_differences(self._outer), [part.numel() for part in self._outer])
        return tuple(piece.reshape(part.shape) for piece, part in zip(pieces, self._outer, strict=True))

    def hidden(self, J: Tensor) -> float:
        """Returns the larger relative difference, along w and along λ, between autograd and differences of g."""
        generator = torch.Generator().manual_seed(0)
        moves_inner = [_normal(part, generator) for part in self._inner]
        moves_outer = tuple(_normal(part, generator) for part in self._outer)
        q = torch.randn(len(J), generator=generator, dtype=torch.float64).to(J.device)
        seen = J @ _flat([moves_inner[place] for place in self.active])
        first = _relative(self._along(tuple(moves_inner), inner=True) - seen, seen)
        seen_product = _flat(self.product(q)).to(J) @ _flat(moves_outer).to(J)
        change = self._along(moves_outer, inner=False)
        return max(first, _relative(q @ change - seen_product, change * q.norm()))

    def _along(self, move: Tensors, *, inner: bool) -> Tensor:
        base = self._inner if inner else self._outer
        step = torch.finfo(torch.float64).eps ** (1 / 3) * math.sqrt(1 + float(_flat(base).detach().norm()))
        step /= max(float(_flat(move).norm()), 1e-300)
        ahead, behind = (
            self._at(tuple(part.detach() + sign * step * d for part, d in zip(base, move, strict=True)), inner=inner)
            for sign in (1, -1)
        )
        difference: Tensor = (ahead - behind) / (2 * step)
        return difference

    def _at(self, point: Tensors, *, inner: bool) -> Tensor:
        varied = leaves(point)
        w, lam = (varied, self._outer) if inner else (self._inner, varied)

        def body(evaluate: Evaluate) -> Tensor:
            value = evaluate()
            grads = _gradient(value, tuple(w[place] for place in self.active))
            return _flat(grads).to(torch.float64)

        return self._objective.within(w, lam, body)

    def product(self, q: Tensor) -> Tensors:
        """Returns ``qᵀ ∂g/∂λ`` by autograd."""

        def body(evaluate: Evaluate) -> Tensors:
            g = _flat([part for part in self._gradients(evaluate(), create_graph=True) if part is not None])
            with second_derivative_errors(self._objective.name):
                return _gradient(g @ q.to(g), self._outer)

        return self._objective.within(self._inner, self._outer, body)

    def _gradients(self, value: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        return derivatives(value, self._inner, create_graph=create_graph) if value.requires_grad else ()


def _solve(J: Tensor, v: Tensor, g: Tensor, eigenvalues: Tensor, epsilon: float) -> tuple[Tensor, Tensor, bool]:
    """Returns ``J⁻ᵀ v`` and ``J⁻¹ g``, of minimum norm where J is singular."""
    sizes = eigenvalues.abs()
    cutoff = len(v) * epsilon
    # A definite symmetric part makes J regular; only otherwise are singular values worth their price.
    if bool((eigenvalues > 0).all()) and float(sizes.min()) > cutoff * float(sizes.max()):
        factor = torch.linalg.lu_factor(J)
        adjoint = torch.linalg.lu_solve(*factor, v[:, None], adjoint=True)
        return adjoint[:, 0], torch.linalg.lu_solve(*factor, g[:, None])[:, 0], False
    U, S, Vh = torch.linalg.svd(J)
    keep = cutoff * S[0] < S
    inverse = torch.where(keep, 1 / torch.where(keep, S, torch.ones_like(S)), torch.zeros_like(S))
    return U @ (inverse * (Vh @ v)), Vh.T @ (inverse * (U.T @ g)), not bool(keep.all())


def _gradient(value: Tensor, inputs: Tensors, *, retain: bool = False) -> Tensors:
    if not value.requires_grad:
        return tuple(torch.zeros_like(part) for part in inputs)
    return dense_gradient(torch.autograd.grad(value, inputs, retain_graph=retain, allow_unused=True), inputs)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _relative(difference: Tensor, scale: Tensor) -> float:
    error, size = float(difference.norm()), float(scale.norm())
    return error / size if size > 0 else (0.0 if error < 1e-8 else math.inf)


def _flat(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])
