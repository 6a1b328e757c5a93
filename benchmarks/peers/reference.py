"""Float64 hypergradients of a task in the functional form, by plain torch: what the methods compute, and the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.peers.side import Method, Reference, Task

__all__ = ["IndefiniteError", "Point", "exact_solve", "implicit", "new_inner"]

RTOL, CAP = 1e-11, 20_000
_SOLVED: dict[bytes, Tensor] = {}  # by the gradients of both losses: the methods of a workload share a point
Operator = Callable[[Tensor], Tensor]


class IndefiniteError(ValueError):
    """There is no minimum here whose movement an implicit hypergradient could describe."""


class Point:
    """The derivatives of a float64 task at one point."""

    def __init__(self, task: Task, inner: Sequence[Tensor], outer: Sequence[Tensor]) -> None:
        self.inner = [part.detach().clone().requires_grad_() for part in inner]
        self.outer = [part.detach().clone().requires_grad_() for part in outer]
        self.gradient = grad(task.inner_loss(self.inner, self.outer), self.inner, create_graph=True)
        value = task.outer_loss(self.inner, self.outer)
        both = torch.autograd.grad(value, [*self.inner, *self.outer], allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(both, [*self.inner, *self.outer], strict=True)
        ]
        self.v, self.direct = flat(filled[: len(self.inner)]), flat(filled[len(self.inner) :])

    def hessian(self, q: Tensor) -> Tensor:
        """Returns ``(∂²f/∂w²) q``."""
        return flat(self._product(q, self.inner))

    def total(self, q: Tensor) -> Tensor:
        """Returns ``∂F/∂λ − qᵀ ∂²f/∂w∂λ``."""
        return self.direct - flat(self._product(q, self.outer))

    def _product(self, q: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(self.gradient, inputs, unflat(q, self.inner), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]


def implicit(task: Task, method: Method) -> Reference:
    """Returns the references of an implicit method at the inner parameters of the first outer step."""
    old, point = Point(task, task.inner, task.outer), Point(task, new_inner(task), task.outer)
    count = method.products

    def with_products(number: int, at: Point) -> Tensor:
        return at.total(approximate(at, method, number))

    own = with_products(count, point)
    exact = point.total(solved(point))
    others = {
        "the direct part alone": point.direct,
        "the value at the inner parameters before the inner step": with_products(count, old),
        "the exact product at H⁻¹ ≈ I": point.total(point.v),
    }
    if count:
        others[f"what {count - 1} products give"] = with_products(count - 1, point)
        others[f"what {count + 1} products give"] = with_products(count + 1, point)
    if point.direct.any():
        part = point.direct + task.rate * (own - point.direct)
        others["the direct part and the inner learning rate times the implicit one"] = part
    if method.kind == "conjugate_gradient":
        stale = conjugate_gradient(point.hessian, point.v, count, 0.0, stale=True)
        others["what the recursion gives that updates its direction with the residual before"] = point.total(stale)
    others = {name: value for name, value in others.items() if not torch.allclose(value, own, rtol=1e-9, atol=0.0)}
    factors = {"it carries the inner learning rate": task.rate}
    return Reference(own.numpy(), exact.numpy(), {name: value.numpy() for name, value in others.items()}, factors)


def approximate(point: Point, method: Method, products: int) -> Tensor:
    """Returns what the method takes for ``H⁻¹ v``."""
    if method.kind in ("identity", "finite_difference"):
        return point.v
    if method.kind == "neumann":
        term = total = point.v
        for _ in range(products):
            term = term - method.step_size * point.hessian(term)
            total = total + term
        return method.step_size * total
    if method.kind == "conjugate_gradient":
        return conjugate_gradient(point.hessian, point.v, products, 0.0)
    raise ValueError(f"no reference for a method of kind {method.kind!r}")


def conjugate_gradient(operator: Operator, v: Tensor, cap: int, rtol: float, *, stale: bool = False) -> Tensor:
    """Hestenes and Stiefel's recursion, from zero; ``stale`` makes a mistake that a library makes."""
    q, r, p = torch.zeros_like(v), v, v
    rr = r @ r
    for _ in range(cap):
        if rr.sqrt() <= rtol * v.norm():
            break
        image = operator(p)
        curvature = p @ image
        if curvature <= 0 and not stale:
            raise IndefiniteError("the inner Hessian is not positive definite at the workload's point")
        before, q, r = r, q + rr / curvature * p, r - rr / curvature * image
        new = r @ r
        p, rr = (before if stale else r) + new / rr * p, new
    return q


def exact_solve(operator: Operator, v: Tensor, rtol: float = RTOL) -> Tensor:
    """Returns ``H⁻¹ v`` to a relative residual, which is checked."""
    q = conjugate_gradient(operator, v, CAP, rtol)
    residual = float((operator(q) - v).norm() / v.norm())
    if residual > 10 * rtol:
        raise ValueError(f"the reference's solve ended at a residual of {residual:.1e}")
    return q


def solved(point: Point, rtol: float = RTOL) -> Tensor:
    """Returns ``H⁻¹ ∂F/∂w`` of a point, computed once."""
    key = hashlib.sha256(flat(point.gradient).numpy().tobytes() + point.v.numpy().tobytes()).digest()
    if key not in _SOLVED:
        _SOLVED[key] = exact_solve(point.hessian, point.v, rtol)
    return _SOLVED[key]


def new_inner(task: Task) -> list[Tensor]:
    """Returns the inner parameters after the inner steps of an outer step."""
    inner = [part.detach() for part in task.inner]
    for _ in range(task.steps):
        here = [part.requires_grad_() for part in (part.clone() for part in inner)]
        steps = grad(task.inner_loss(here, task.outer), here)
        inner = [part.detach() - task.rate * step for part, step in zip(here, steps, strict=True)]
    return inner


def grad(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(inputs), create_graph=create_graph))


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = vector.split([part.numel() for part in like])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, like, strict=True)]
