"""The inner gradient as a vector field, and its derivatives by autograd and by differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import LossError
from bilevel.functional import Evaluate, Objective, dense_gradient, derivatives, independent, leaves
from bilevel.vector import Tensors

__all__ = ["GradientField", "Pull", "flat", "largest_eigenvalue", "like", "normal", "ritz_values"]

T = TypeVar("T")

Pull = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``q -> (Jᵀ q, (∂g/∂λ)ᵀ q)``."""


class GradientField:
    """``g(w, λ) = ∂f/∂w``: what the inner optimiser follows, over the inner variables that reach the loss.

    The solution of an inner problem is where g vanishes, so that what counts is the Jacobian J of g *as a function of
    its values*. Autograd's is another one where the loss holds a ``detach()``.

    Points and directions are flat float64 vectors. Only tensors of a point that differ from the given one are moved.

    Args:
        objective: f.
        inner: w, leaves that require gradients.
        outer: λ, likewise.

    Attributes:
        active: The places of the inner variables that reach the loss.
        value: g at the given point.
        nodes: Names of the operations in the loss's graph, as autograd calls them.

    Raises:
        LossError: No inner variable reaches the loss.
    """

    def __init__(self, objective: Objective, inner: Tensors, outer: Tensors) -> None:
        self.objective = objective
        self.inner = inner
        self.outer = outer

        def body(evaluate: Evaluate) -> tuple[Sequence[Tensor | None], frozenset[str]]:
            value = evaluate()
            return derivatives(value, inner) if value.requires_grad else (), _nodes(value)

        found, self.nodes = objective.within(inner, outer, body)
        self.active = [place for place, part in enumerate(found) if part is not None]
        if not self.active:
            raise independent(objective.name)
        g = flat([part for part in found if part is not None])
        self.dtype = g.dtype
        self.value = objective.reduce((g.to(torch.float64),))[0]

    @property
    def jumping(self) -> tuple[str, ...]:
        """Names of the operations of the loss whose derivatives jump."""
        return tuple(sorted({_JUMPING[node] for node in self.nodes if node in _JUMPING}))

    @property
    def point(self) -> Tensor:
        """The active inner variables."""
        return flat([self.inner[place] for place in self.active]).detach().to(torch.float64)

    @property
    def parameters(self) -> Tensor:
        """The outer variables."""
        return flat(self.outer).detach().to(torch.float64)

    @property
    def epsilon(self) -> float:
        """Round-off of g."""
        return torch.finfo(self.dtype).eps

    def place(self, w: Tensor) -> Tensors:
        """Returns all inner variables with the active ones at ``w``, as new leaves."""
        pieces = iter(like([self.inner[place] for place in self.active], w))
        active = set(self.active)
        return leaves([next(pieces) if place in active else part for place, part in enumerate(self.inner)])

    def at(self, w: Tensor | None = None, outer: Tensors | None = None) -> Tensor:
        """Returns g elsewhere: 1 forward and 1 backward pass."""
        inner = self.inner if w is None else self.place(w)
        lam = self.outer if outer is None else outer

        def body(evaluate: Evaluate) -> Tensor:
            value = evaluate()
            varied = tuple(inner[place] for place in self.active)
            grads = derivatives(value, varied) if value.requires_grad else (None,) * len(varied)
            return flat(dense_gradient(grads, varied)).to(torch.float64)

        return self.objective.reduce((self.objective.within(inner, lam, body),))[0]

    def with_products(self, body: Callable[[Pull], T]) -> T:
        """Returns ``body(pull)`` with transposed products by autograd on one retained graph.

        Raises:
            LossError: An operation has no second derivative.
        """
        varied = tuple(self.inner[place] for place in self.active)

        def inside(evaluate: Evaluate) -> T:
            g = flat(derivatives(evaluate(), varied, create_graph=True))  # type: ignore[arg-type]

            def pull(q: Tensor) -> tuple[Tensor, Tensor]:
                if not g.requires_grad:
                    return torch.zeros_like(q), torch.zeros_like(self.parameters)
                inputs = varied + self.outer
                with second_derivative_errors(self.objective.name):
                    grads = torch.autograd.grad(g, inputs, q.to(g), retain_graph=True, allow_unused=True)
                found = self.objective.reduce(dense_gradient(grads, inputs))
                first, second = found[: len(varied)], found[len(varied) :]
                return flat(first).to(torch.float64), flat(second).to(torch.float64)

            return body(pull)

        return self.objective.within(self.inner, self.outer, inside)

    def jacobian(self) -> Tensor | None:
        """Returns J by autograd, row by row (n products); None for an operation without second derivative."""

        def rows(pull: Pull) -> Tensor:
            return torch.stack([pull(row)[0] for row in torch.eye(len(self.value)).to(self.value)])

        try:
            return self.with_products(rows)
        except LossError:
            return None

    def jacobian_by_differences(self) -> Tensor:
        """Returns J by central differences, column by column (2 n gradients)."""
        basis = torch.eye(len(self.value)).to(self.value)
        return torch.stack([self.along(column) for column in basis], dim=1)

    def mixed_by_differences(self, q: Tensor) -> Tensor:
        """Returns ``(∂g/∂λ)ᵀ q`` by central differences (2 m gradients)."""
        return torch.stack([q @ self.along(column, outer=True) for column in torch.eye(len(self.parameters)).to(q)])

    def along(self, move: Tensor, *, outer: bool = False, size: float | None = None) -> Tensor:
        """Returns the derivative of g along a move of w (or λ) by central differences.

        Args:
            move: The direction.
            outer: Whether it moves λ.
            size: Length of the step, relative to ``1 + ‖w‖``; by default ε^(1/3), where truncation and rounding meet.
        """
        base = self.parameters if outer else self.point
        step = (size or self.epsilon ** (1 / 3)) * (1 + float(base.norm())) / max(float(move.norm()), 1e-300)
        ahead, behind = (self._moved(base + sign * step * move, outer=outer) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    def _moved(self, point: Tensor, *, outer: bool) -> Tensor:
        return self.at(outer=leaves(like(self.outer, point))) if outer else self.at(point)


def flat(vector: Sequence[Tensor]) -> Tensor:
    """Returns a vector's parts behind one another."""
    return torch.cat([part.reshape(-1) for part in vector])


def like(template: Sequence[Tensor], vector: Tensor) -> Tensors:
    """Returns a flat vector in pieces of given shapes and dtypes."""
    pieces = torch.split(vector, [part.numel() for part in template])
    return tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, template, strict=True))


def normal(size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Returns normal numbers; drawn on the CPU, so that they are the same on every device."""
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)


def ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> tuple[float, float]:
    """Returns the extreme Ritz values of a symmetric matrix: Lanczos with full orthogonalisation.

    They are the extreme eigenvalues where ``products`` reaches the dimension, and lie between them otherwise.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    while len(diagonal) < min(products, len(start)):
        image = product(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        span = torch.stack(basis)
        for _ in range(2):
            image = image - span.T @ (span @ image)
        size = float(image.norm())
        if not size > 1e-10 * max(map(abs, diagonal)):
            break
        off.append(size)
        basis.append(image / size)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beta = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
    if len(beta):
        matrix = matrix + torch.diag(beta, 1) + torch.diag(beta, -1)
    if not bool(torch.isfinite(matrix).all()):
        return math.nan, math.nan
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


def largest_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, products: int) -> float:
    """Returns an estimate of the spectral radius by the power method: for matrices that are not symmetric."""
    vector, size = start / start.norm(), 0.0
    for _ in range(products):
        image = product(vector)
        size = float(image.norm())
        if not 0 < size < math.inf:
            break
        vector = image / size
    return size


_JUMPING = {
    "Abs": "abs",
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "PreluKernel": "prelu",
    "Threshold": "threshold",
    "Hardtanh": "hardtanh",
    "Hardswish": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "Hardshrink": "hardshrink",
    "Softshrink": "softshrink",
    "Clamp": "clamp",
    "ClampMin": "clamp",
    "ClampMax": "clamp",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "Max": "max",
    "Min": "min",
    "Amax": "amax",
    "Amin": "amin",
    "MaxPool2DWithIndices": "max_pool",
    "AdaptiveMaxPool2D": "max_pool",
    "Sort": "sort",
    "Topk": "topk",
    "Median": "median",
    "Sign": "sign",
    "Sgn": "sign",
    "Round": "round",
    "Floor": "floor",
    "Ceil": "ceil",
}


def _nodes(value: Tensor) -> frozenset[str]:
    """The names of a loss's operations in its graph: ``"Relu"`` of ``ReluBackward0``."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return frozenset(type(node).__name__.rstrip("0123456789").removesuffix("Backward") for node in seen)
