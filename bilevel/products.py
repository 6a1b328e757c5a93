"""Second-order products of an inner loss at one point: what every implicit method is made of.

Ways of taking them behind one interface: autodiff on a retained gradient graph; the Gauss–Newton curvature on the same
graph; differences of first derivatives, where no second ones exist; the dense Jacobian of a gradient field that
autograd does not see whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from bilevel.errors import ConfigError, LossError
from bilevel.functional import (
    Evaluate,
    Objective,
    dense_gradient,
    gradient,
    independent,
    leaves,
    pulled_through,
    require_finite,
)
from bilevel.vector import Tensors, axpy, length, norm, promote, zeros_like

__all__ = [
    "TOLERATED_ROUNDING",
    "DifferenceProducts",
    "FieldProducts",
    "GaussNewtonGraph",
    "GradientGraph",
    "Products",
    "difference_length",
    "displaced",
    "displacement_error",
    "full_precision",
    "lost_to_rounding",
]


LARGEST_FIELD = 5_000
TOLERATED_ROUNDING = 0.1
"""Of a displacement: where rounding changes more of it, a difference says nothing."""


class Products(ABC):
    """Products with the derivatives of the inner gradient ``g = ∂f/∂w`` at one point.

    Inner variables that do not reach the loss are inactive: the inner problem does not move them, so their response is
    zero, and they are left out of every product.

    Attributes:
        value: The loss.
        active: Which inner variables reach the loss.
        gradient: ``g`` over the active variables.
        lost: The largest relative error that rounding has left in a displacement, see :func:`displacement_error`; 0
            where nothing is displaced.
        transposed: Whether the curvature's products are with the transpose of ``∂g/∂w``, as the adjoint system asks;
            where they are not, the answer is right for a symmetric one only.
        message: How they are taken, where that is worth a word.
    """

    value: Tensor
    active: tuple[bool, ...]
    gradient: Tensors
    lost: float = 0.0
    transposed: bool = True
    message: str = ""

    def select(self, vector: Sequence[Tensor]) -> Tensors:
        """Returns the active parts of a vector over all inner variables."""
        return tuple([part for part, active in zip(vector, self.active, strict=True) if active])

    @abstractmethod
    def hessian(self, q: Tensors) -> Tensors:
        """Returns the curvature's product with ``q`` over the active variables."""

    @abstractmethod
    def mixed(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""

    @abstractmethod
    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products, in one pass where that is possible; the last call, unless told otherwise."""

    def roundoff(self) -> float:
        """Returns the relative round-off of a product."""
        return max(torch.finfo(part.dtype).eps for part in self.gradient)


class GradientGraph(Products):
    """The gradient ``g = ∂f/∂w`` at one point with its graph retained, for any number of products.

    Set-up costs one forward and one backward pass; a product then costs about one backward pass of ``g``, where a fresh
    graph would cost two and forward-over-reverse three. Products are *transposed* Jacobian products, ``(∂g/∂w)ᵀ q`` and
    ``(∂g/∂λ)ᵀ q``: what the adjoint system asks for even where a custom backward pass makes ``g`` no gradient. How
    ``g`` depends on w through a ``detach()`` is hidden from autograd; ``hypergradcheck`` measures that.

    Use only inside :meth:`Objective.within`.

    Args:
        objective: Whose gradient.
        evaluate: What ``within`` passes to its body.
        inner: The inner variables, leaves that require gradients.
        outer: The outer variables, likewise.

    Raises:
        LossError: No inner variable reaches the loss.
        NonFiniteError: The loss is NaN or infinite.
    """

    def __init__(self, objective: Objective, evaluate: Evaluate, inner: Tensors, outer: Tensors) -> None:
        self._objective = objective
        self._outer = outer
        value, self._outputs = evaluate.with_outputs()
        grads = gradient(value, inner, objective, create_graph=True)
        require_finite(value, objective.name)  # reads the number, for which a device's queue should be full
        self.value = value.detach()
        self.active = tuple([grad is not None for grad in grads])
        if not any(self.active):
            raise independent(objective.name)
        self._inner = self.select(inner)
        self.gradient = tuple([grad for grad in grads if grad is not None])
        self._loss = value

    def hessian(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂w)ᵀ q`` over the active variables (the Hessian product, where ``g`` is a gradient)."""
        return self._pull(q, self._inner, retain=True)

    def mixed(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q`` and frees the graph."""
        return self._pull(q, self._outer, retain=False)

    def mixed_again(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q`` and keeps the graph."""
        return self._pull(q, self._outer, retain=True)

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products in one backward pass: the true residual comes with the answer. Frees the graph."""
        both = self._pull(q, self._inner + self._outer, retain=not last)
        return both[: len(self._inner)], both[len(self._inner) :]

    def _pull(self, q: Tensors, inputs: Tensors, *, retain: bool) -> Tensors:
        return self._pull_through(self.gradient, q, inputs, retain=retain)

    def _pull_through(self, field: Sequence[Tensor], q: Sequence[Tensor], inputs: Tensors, *, retain: bool) -> Tensors:
        grads = pulled_through(field, q, inputs, self._objective.name, retain_graph=retain)
        if grads is None:
            return zeros_like(inputs)
        self._objective.passes.backward += 1
        return self._objective.reduce(dense_gradient(grads, inputs))


class GaussNewtonGraph(GradientGraph):
    """As :class:`GradientGraph`, with the generalised Gauss–Newton matrix for the Hessian.

    For ``f = ℓ(z(w), w)`` with model outputs z it is ``[Jᵀ I] ∇²ℓ [J; I]`` with ``J = ∂z/∂w``: positive semi-definite
    where ℓ is jointly convex in the outputs and the parameters (Schraudolph 2002; Martens 2020, arXiv 1412.1193,
    section 8). It is what is left of the Hessian without the curvature of the model, ``∂²f/∂w² − ∂²⟨ḡ, z(w)⟩/∂w²`` with
    ``ḡ = ∂ℓ/∂z`` held constant; both gradients lie on one retained graph, and their difference is pulled back in one
    backward pass.

    The inner loss must return a mapping with ``"loss"`` and ``"outputs"``.

    Cost: set-up 1 forward and 3 backward passes; a product 1 backward pass through both gradients.

    Raises:
        LossError: The loss names no outputs, or does not depend on them.
    """

    def __init__(self, objective: Objective, evaluate: Evaluate, inner: Tensors, outer: Tensors) -> None:
        super().__init__(objective, evaluate, inner, outer)
        if not self._outputs:
            raise LossError(
                f"curvature='gauss_newton' needs the model's outputs: let the loss of {objective.name} return "
                "{'loss': loss, 'outputs': logits} instead of the loss alone"
            )
        if not all(part.requires_grad for part in self._outputs):
            raise LossError(f"the 'outputs' of the loss of {objective.name} do not depend on its parameters")
        slopes: Sequence[Tensor | None] = torch.autograd.grad(
            self._loss, self._outputs, retain_graph=True, allow_unused=True
        )
        if all(slope is None for slope in slopes):
            raise LossError(
                f"the loss of {objective.name} was not computed from the 'outputs' it returned: return the very "
                "tensor that the loss function was given"
            )
        pairs = [(z, slope) for z, slope in zip(self._outputs, slopes, strict=True) if slope is not None]
        model = torch.autograd.grad(
            [z for z, _ in pairs], self._inner, [slope for _, slope in pairs], create_graph=True, allow_unused=True
        )
        objective.passes.backward += 2
        self._model_gradient = dense_gradient(model, self._inner)

    def hessian(self, q: Tensors) -> Tensors:
        """Returns the Gauss–Newton matrix's product with ``q``."""
        both = (*q, *(-part for part in q))
        return self._pull_through((*self.gradient, *self._model_gradient), both, self._inner, retain=True)

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products, in two backward passes."""
        return self.hessian(q), self.mixed(q) if last else self.mixed_again(q)

    def full_hessian(self, q: Tensors) -> Tensors:
        """Returns the Hessian's own product with ``q``."""
        return super().hessian(q)


class DifferenceProducts(Products):
    """Products by central differences of first derivatives, for losses that cannot be differentiated twice.

    ``H q ≈ (g(w + h q) − g(w − h q)) / 2h`` and ``(∂g/∂λ)ᵀ q ≈ (∂f/∂λ(w + h q) − ∂f/∂λ(w − h q)) / 2h`` with ``h = ε /
    ‖q‖``. Their error is ``ε² M / 6`` for a bound M of the third derivative, plus rounding of order ``u ‖g‖ / ε``.
    The first is the product with ``∂g/∂w`` itself, not with its transpose: the same where ``g`` is a gradient.

    Cost: set-up 1 forward and 1 backward pass, a product (or both together) 2 and 2.

    Args:
        objective: Whose derivatives.
        inner: The inner variables.
        outer: The outer variables.
        step: ε, the length of a displacement, or ``"auto"``: see :func:`difference_length`.
    """

    transposed = False

    def __init__(self, objective: Objective, inner: Tensors, outer: Tensors, step: float | str = "auto") -> None:
        self._objective = objective
        self._inner = tuple(part.detach() for part in inner)
        self._outer = outer
        self._size = length(self._inner)
        self.length = difference_length(step, inner, self._size)
        point = leaves(inner)

        def body(evaluate: Evaluate) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            value = evaluate()
            require_finite(value, objective.name)
            return value.detach(), gradient(value, point, objective)

        self.value, grads = objective.within(point, outer, body)
        self.active = tuple(grad is not None for grad in grads)
        if not any(self.active):
            raise independent(objective.name)
        self.gradient = tuple(grad for grad in grads if grad is not None)

    def hessian(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂w) q``."""
        return self._difference(q, inner=True, outer=False)[0]

    def mixed(self, q: Tensors) -> Tensors:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        return self._difference(q, inner=False, outer=True)[1]

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products from the same two evaluations."""
        return self._difference(q, inner=True, outer=True)

    def roundoff(self) -> float:
        """Returns ``u^(2/3)``: truncation and rounding, balanced."""
        return float(super().roundoff() ** (2 / 3))

    def _difference(self, q: Tensors, *, inner: bool, outer: bool) -> tuple[Tensors, Tensors]:
        size = length(q)
        if size == 0.0:
            return zeros_like(promote(q)), zeros_like(promote(self._outer))
        direction, factor = self._spread(promote(q)), self.length / size
        self.lost = max(self.lost, displacement_error(self._inner, direction, factor, self.length, self._size))
        ahead, behind = (
            self._derivatives(displaced(self._inner, direction, side), inner=inner, outer=outer)
            for side in (factor, -factor)
        )
        half = size / (2 * self.length)
        result = tuple((a - b) * half for a, b in zip(promote(ahead), promote(behind), strict=True))
        count = sum(self.active) if inner else 0
        return result[:count], result[count:]

    def _spread(self, q: Tensors) -> Tensors:
        """Puts zeros in the places of inactive variables."""
        rest = iter(q)
        return tuple(
            next(rest) if active else torch.zeros_like(part)
            for part, active in zip(self._inner, self.active, strict=True)
        )

    def _derivatives(self, place: Tensors, *, inner: bool, outer: bool) -> Tensors:
        point = leaves(place) if inner else place
        inputs = (self.select(point) if inner else ()) + (self._outer if outer else ())
        grads = self._objective.within(
            point, self._outer, lambda evaluate: gradient(evaluate(), inputs, self._objective)
        )
        return dense_gradient(grads, inputs)


class FieldProducts(GradientGraph):
    """As :class:`GradientGraph`, with the Jacobian J of the gradient *field* g for what autograd takes for it.

    Where the loss holds a ``detach()``, the inner problem follows a field that is no gradient, and how it depends on w
    through the ``detach()`` is hidden from autograd. Its values are not: J is formed by central differences of g, and
    products are with Jᵀ, which the adjoint system asks for. The mixed product ``(∂g/∂λ)ᵀ q`` is autograd's.

    Cost: set-up as for :class:`GradientGraph`, and 2 n forward and 2 n backward passes for n inner variables at the
    first product; n² numbers.

    Raises:
        ConfigError: More than :data:`LARGEST_FIELD` inner variables.
    """

    def __init__(
        self, objective: Objective, evaluate: Evaluate, inner: Tensors, outer: Tensors, step: float | str = "auto"
    ) -> None:
        super().__init__(objective, evaluate, inner, outer)
        self._differences = DifferenceProducts(objective, inner, outer, step)
        self._jacobian: Tensor | None = None

    def hessian(self, q: Tensors) -> Tensors:
        """Returns ``Jᵀ q``."""
        if self._jacobian is None:
            self._jacobian = self._form(q)
        flat = torch.cat([part.reshape(-1) for part in promote(q)]).to(self._jacobian)
        pieces = torch.split(self._jacobian.T @ flat, [part.numel() for part in q])
        return tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, q, strict=True))

    def hessian_and_mixed(self, q: Tensors, *, last: bool = True) -> tuple[Tensors, Tensors]:
        """Returns both products."""
        return self.hessian(q), self.mixed(q) if last else self.mixed_again(q)

    def roundoff(self) -> float:
        """As for differences."""
        return self._differences.roundoff()

    def _form(self, like: Tensors) -> Tensor:
        size = sum(part.numel() for part in like)
        if size > LARGEST_FIELD:
            raise ConfigError(
                f"products='field' forms the dense Jacobian of the inner gradient: {size} inner variables are more "
                f"than its limit of {LARGEST_FIELD}. Let gradients flow where the loss of {self._objective.name} "
                "detaches them, or take products='autodiff', which misses what the detach hides."
            )
        columns = []
        for place, part in enumerate(like):
            for entry in range(part.numel()):
                # Contiguous whatever the layout of the gradients is: those of torch.func.vmap are often transposed.
                basis = [torch.zeros_like(other, memory_format=torch.contiguous_format) for other in like]
                basis[place].view(-1)[entry] = 1
                image = self._differences.hessian(tuple(basis))
                columns.append(torch.cat([piece.reshape(-1).to(torch.float64) for piece in image]))
        self.lost = self._differences.lost
        return torch.stack(columns, dim=1)


def full_precision() -> AbstractContextManager[object]:
    """Turns autocast off, whoever turned it on: passes backward follow it as well as passes forward."""
    devices = [device for device in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(device)]
    if not devices:
        return nullcontext()
    stack = ExitStack()
    for device in devices:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def difference_length(step: float | str, inner: Tensors, size: float | None = None) -> float:
    """Returns the length ε of a displacement.

    A number is taken as it is; ``"auto"`` is ``u^(1/3) · sqrt(1 + ‖w‖)`` with the round-off u of the parameters' dtype,
    which balances the errors of truncation and rounding. ``size`` is ``‖w‖`` where it is known.
    """
    if not isinstance(step, str):
        return step
    roundoff = max(torch.finfo(dtype).eps for dtype in {part.dtype for part in inner})
    size = length(inner) if size is None else size
    return float(roundoff ** (1 / 3) * math.sqrt(1 + size))


def displaced(inner: Tensors, direction: Tensors, factor: float) -> Tensors:
    """Returns ``w + factor · direction`` in the parameters' dtypes."""
    with torch.no_grad():
        moved = axpy(factor, direction, inner)
    pairs = zip(moved, inner, strict=True)
    return tuple([there if there.dtype is part.dtype else there.to(part.dtype) for there, part in pairs])


def displacement_error(
    inner: Tensors, direction: Tensors, factor: float, length: float, size: float, *, central: bool = True
) -> float:
    """Returns the relative error that rounding to the parameters' dtype leaves in a displacement, or a bound of it.

    Rounding changes ``w ± m`` by at most ``u ‖w ± m‖ + t √n``, with the dtype's round-off u, its smallest normal number
    t, and n entries. Where that is at most :data:`TOLERATED_ROUNDING` of ``‖m‖``, it is returned; elsewhere the error
    itself, which takes the displaced parameters.

    Args:
        inner: w.
        direction: The direction of the displacement ``m = factor · direction``.
        factor: Its factor.
        length: ``‖m‖``.
        size: ``‖w‖``.
        central: Whether w is displaced to both sides.
    """
    numbers = [torch.finfo(dtype) for dtype in {part.dtype for part in inner}]
    entries = sum([part.numel() for part in inner])
    relative, absolute = max(n.eps for n in numbers), max(n.tiny for n in numbers) * math.sqrt(entries)
    bound = relative * (1 + size / length) + absolute / length
    if bound <= TOLERATED_ROUNDING:
        return bound
    ahead = displaced(inner, direction, factor)
    behind = displaced(inner, direction, -factor) if central else inner
    return lost_to_rounding(ahead, behind, direction, 2 * factor if central else factor)


def lost_to_rounding(ahead: Tensors, behind: Tensors, direction: Tensors, factor: float = 2.0) -> float:
    """Returns the relative error of ``ahead − behind = factor · direction``."""
    triples = zip(ahead, behind, direction, strict=True)
    errors = [(a.to(move.dtype) - b.detach().to(move.dtype)).sub_(move, alpha=factor) for a, b, move in triples]
    return float(norm(errors) / (factor * norm(direction)))
