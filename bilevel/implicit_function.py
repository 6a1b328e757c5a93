"""The implicit function theorem in operations that autograd can differentiate any number of times.

Let w* solve ``g(w, λ) = ∂f/∂w = 0`` and ``H = ∂g/∂w``. The pullback of a cotangent v through ``λ ↦ w*`` is

    r(v, w*, λ) = −(∂g/∂λ)ᵀ q        with        H q = v.

Each part of r can be differentiated: w* depends on λ by this very rule; the mixed product by autograd; and q by its
system, ``dq = H⁻¹(dv − dH q)``, so that a cotangent q̄ on q gives, with ``H p = q̄``,

    v̄ = p        and        (w̄, λ̄) = −∂/∂(w, λ) ⟨p, H(w, λ) q⟩.

p is a solution of the same system as q, and is differentiated in the same way. Source: Blondel et al., NeurIPS 2022
(arXiv 2105.15183), section 2.1; the linear solve as an operation of its own as in JAX's ``lax.custom_linear_solve``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bilevel.double_backward import second_derivative_errors
from bilevel.errors import LossError
from bilevel.functional import (
    Evaluate,
    FunctionObjective,
    Objective,
    dense_gradient,
    gradient,
    independent,
    leaves,
    require_finite,
)
from bilevel.hypergrad import Estimator, InnerProblem
from bilevel.randomness import Replay
from bilevel.result import SolveInfo, Status
from bilevel.vector import Tensors, dot, norm, promote

__all__ = ["AdjointRule", "obstacle", "refuse_derivatives"]

# Methods whose q solves H q = v to a tolerance (or converges to that solution), as differentiating the system assumes.
SOLVERS = ("conjugate_gradient", "exact", "gmres", "minres", "neumann")
# Of round-off, in units of the factors of an inner product.
SLACK = 1e3


def obstacle(estimator: Estimator) -> str:
    """Returns why a method's pullback cannot be differentiated again; empty where it can."""
    choices = ", ".join(repr(name) for name in SOLVERS)
    if estimator.name not in SOLVERS:
        return (
            f"method {estimator.name!r} solves no system whose solution could be differentiated again; use one of "
            f"{choices}"
        )
    for field, needed in (("curvature", "hessian"), ("products", "autodiff")):
        value = estimator.describe().get(field, needed)
        if value != needed:
            return f"method {estimator.name!r} has {field}={value!r}, and its derivative needs {field}={needed!r}"
    if estimator.needs_diagonal:
        return (
            f"method {estimator.name!r} reads what the inner problem's optimiser keeps (preconditioner='optimizer'), "
            "which is not known where its solution is differentiated again; use 'nystrom' or 'none'"
        )
    return ""


@dataclass(frozen=True)
class AdjointRule:
    """``r(v, w, λ) = −(∂g/∂λ)ᵀ H⁻¹ v`` of one inner loss, as a differentiable operation.

    Attributes:
        objective: The inner loss f.
        estimator: How systems with H are solved; one without an :func:`obstacle`.
        report: Told of every solve.
        closed: Whether to refuse a loss that reads tensors which require gradients beside its variables.
    """

    objective: Objective
    estimator: Estimator
    report: Callable[[SolveInfo], None]
    closed: bool = True

    def pullback(self, cotangent: Tensors, inner: Tensors, outer: Tensors) -> Tensors:
        """Returns r, which autograd can differentiate with respect to everything that is passed in.

        Cost: 1 forward and 1 backward pass with graph and 1 product, and the passes of the method.

        Raises:
            LossError: The loss is independent of ``inner``, or reads a tensor that requires gradients and is not among
                ``inner`` and ``outer``: its share of the derivative would be missing.
        """
        w, lam = _variables(inner), _variables(outer)

        def body(evaluate: Evaluate) -> Tensors:
            field, active = self._field(evaluate, w, lam)
            masked = tuple(v if used else torch.zeros_like(v) for v, used in zip(cotangent, active, strict=True))
            q = self.solve(masked, inner, outer, active, [])
            return tuple(-part for part in self._pull(field, q, lam))

        return self.objective.within(w, lam, body)

    def solve(
        self, v: Tensors, inner: Tensors, outer: Tensors, active: Sequence[bool], infos: list[SolveInfo]
    ) -> Tensors:
        """Returns the differentiable ``q = H⁻¹ v``, zero for inactive variables; appends the solve's report."""
        q: Tensors = _AdjointSolution.apply(self, tuple(active), infos, len(v), *v, *inner, *outer)  # type: ignore[no-untyped-call]
        return q

    def solve_once(
        self, v: Tensors, inner: Tensors, outer: Tensors, active: Sequence[bool]
    ) -> tuple[Tensors, SolveInfo]:
        """Solves ``H q = v`` by the method's own pullback.

        The response of the tilted loss ``f(w, λ) − ⟨w, z⟩`` to z is ``dw*/dz = H⁻¹``: its pullback of v is q, for any
        method, with the method's report.
        """
        point = leaves(inner)
        tilt = leaves([torch.zeros_like(part) for part in promote(point)])
        constants = tuple(part.detach() for part in outer)

        def tilted(w: Tensors, z: Tensors) -> Tensor:
            value = self.objective.within(w, constants, lambda evaluate: evaluate())
            return value - dot(_selected(promote(w), active), _selected(z, active))

        objective = FunctionObjective(tilted, self.objective.name, Replay(("cpu",)), self.objective.passes)
        pulled = self.estimator.respond(InnerProblem(objective, point, tilt)).pullback(v, {})
        self.report(pulled.info)
        return pulled.value, pulled.info

    def curvature_gradient(self, p: Tensors, q: Tensors, inner: Tensors, outer: Tensors) -> Tensors:
        """Returns ``∂/∂(w, λ) ⟨p, H(w, λ) q⟩``, differentiable where gradients are enabled."""
        w, lam = _variables(inner), _variables(outer)

        def body(evaluate: Evaluate) -> Tensors:
            field, _ = self._field(evaluate, w, lam)
            with torch.enable_grad():
                value = dot(promote(p), promote(self._pull(field, q, w, create_graph=True)))
            return self._derivatives([value], None, w + lam)

        return self.objective.within(w, lam, body)

    def _field(
        self, evaluate: Evaluate, w: Tensors, lam: Tensors
    ) -> tuple[tuple[Tensor | None, ...], tuple[bool, ...]]:
        """Returns g (None for a variable that does not reach the loss) and which variables do."""
        value = evaluate()
        require_finite(value, self.objective.name)
        if self.closed:
            _refuse_closures(value, w + lam, self.objective.name)
        field = gradient(value, w, self.objective, create_graph=True)
        active = tuple(part is not None for part in field)
        if not any(active):
            raise independent(self.objective.name)
        return field, active

    def _pull(
        self, field: Sequence[Tensor | None], q: Tensors, inputs: Tensors, *, create_graph: bool | None = None
    ) -> Tensors:
        pairs = [(g, part.to(g.dtype)) for g, part in zip(field, q, strict=True) if g is not None and g.requires_grad]
        return self._derivatives([g for g, _ in pairs], [part for _, part in pairs], inputs, create_graph=create_graph)

    def _derivatives(
        self,
        values: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None,
        inputs: Tensors,
        *,
        create_graph: bool | None = None,
    ) -> Tensors:
        values = [value for value in values if value.requires_grad]
        if not values or not inputs:  # a quadratic or linear loss: what is asked for vanishes
            return tuple(torch.zeros_like(part) for part in inputs)
        keep = torch.is_grad_enabled() if create_graph is None else create_graph
        with second_derivative_errors(self.objective.name):
            grads = torch.autograd.grad(values, inputs, cotangents, create_graph=keep, allow_unused=True)
        self.objective.passes.backward += 1
        return dense_gradient(grads, inputs)


class _AdjointSolution(torch.autograd.Function):
    """``(v, w, λ) ↦ q`` with ``H(w, λ) q = v``."""

    @staticmethod
    def forward(
        ctx: Any, rule: AdjointRule, active: tuple[bool, ...], infos: list[SolveInfo], count: int, *tensors: Tensor
    ) -> Tensors:
        q, ctx.info = rule.solve_once(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], active)
        infos.append(ctx.info)
        ctx.rule, ctx.active, ctx.count = rule, active, count
        ctx.save_for_backward(*tensors, *q)
        return q

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved, count, rule = ctx.saved_tensors, ctx.count, ctx.rule
        v, inner, outer, q = saved[:count], saved[count : 2 * count], saved[2 * count : -count], saved[-count:]
        masked = tuple(c if used else torch.zeros_like(c) for c, used in zip(cotangents, ctx.active, strict=True))
        infos: list[SolveInfo] = []
        p = rule.solve(masked, inner, outer, ctx.active, infos)
        _probe_symmetry(rule, (p, v, ctx.info), (q, masked, infos[0]))
        points: tuple[Tensor | None, ...] = (None,) * (len(inner) + len(outer))
        if any(ctx.needs_input_grad[4 + count :]):
            points = tuple(-part for part in rule.curvature_gradient(p, q, inner, outer))
        return None, None, None, None, *p, *points


def _probe_symmetry(
    rule: AdjointRule, left: tuple[Tensors, Tensors, SolveInfo], right: tuple[Tensors, Tensors, SolveInfo]
) -> None:
    """Reports an asymmetric H: ``⟨p, v⟩ = ⟨p, Hq⟩`` and ``⟨q, q̄⟩ = ⟨q, Hp⟩`` are equal up to the solves' residuals.

    p would have to solve the transposed system of q; both solves here take the same products.
    """
    sides = [
        (float(dot(promote(a), promote(b)).detach()), float(norm(a).detach() * norm(b).detach()))
        for a, b, _ in (left, right)
    ]
    roundoff = SLACK * max(torch.finfo(part.dtype).eps for part in left[0])
    slack = sum(size * (info.residual + roundoff) for (_, size), (*_, info) in zip(sides, (left, right), strict=True))
    if abs(sides[0][0] - sides[1][0]) > slack:
        message = "second derivatives of a solution need a symmetric Jacobian of the inner gradient, and are wrong here"
        rule.report(SolveInfo(Status.NOT_SYMMETRIC, method=rule.estimator.name, message=message))


def _selected(tensors: Sequence[Tensor], active: Sequence[bool]) -> list[Tensor]:
    return [part for part, used in zip(tensors, active, strict=True) if used]


def _variables(tensors: Tensors) -> Tensors:
    """Returns views at which partial derivatives are taken.

    The inner solution is a function of the outer parameters, and autograd would follow it: from a view of its own, λ
    reaches the loss directly only.
    """
    if not torch.is_grad_enabled():
        return leaves(tensors)
    return tuple(part.view_as(part) if part.requires_grad else part.detach().requires_grad_() for part in tensors)


def _refuse_closures(value: Tensor, inputs: Tensors, name: str) -> None:
    known = {part.grad_fn for part in inputs if part.grad_fn is not None}
    for node in _above(value.grad_fn, known):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not any(variable is part for part in inputs):
            raise LossError(
                f"the loss of {name} reads a tensor of shape {tuple(variable.shape)} that requires gradients and is "
                "not among the parameters: in a second derivative its share would be missing. Pass it with the outer "
                "parameters, or detach() it if it is a constant."
            )


def _above(root: Node | None, known: set[Node]) -> Iterator[Node]:
    seen: set[Node] = set(known)
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
            yield node


def refuse_derivatives(values: Tensors, message: str, sources: Sequence[Tensor]) -> Tensors:
    """Returns ``values`` as functions of ``sources`` whose derivatives raise :class:`LossError` with a message.

    Autograd leaves out what depends on ``once_differentiable`` results without a word where it is asked for particular
    inputs; a node that is connected to them is found.
    """
    found: Tensors = _Refused.apply(message, len(values), *values, *sources)  # type: ignore[no-untyped-call]
    return found


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> Tensors:
        ctx.message = message
        return tuple(part.view_as(part) for part in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise LossError(ctx.message)
