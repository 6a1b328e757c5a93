"""A solver whose result autograd can differentiate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, ParameterError, warn
from bilevel.functional import FunctionObjective, Objective, PassCount, leaves, transform_errors
from bilevel.hypergrad import Estimator, InnerProblem, as_estimator
from bilevel.hypergrad.base import refuse_without_state
from bilevel.hypergrad.function import Loss
from bilevel.implicit_function import AdjointRule, obstacle, refuse_derivatives
from bilevel.randomness import Replay, generator_devices
from bilevel.result import SolveInfo
from bilevel.structure import Structure, flatten
from bilevel.vector import Tensors, is_finite

__all__ = ["argmin"]

Solver = Callable[[Any], Any]
"""``outer_params -> inner_params``."""


def argmin(
    inner_loss: Loss, method: Estimator | str | Mapping[str, Any] = "conjugate_gradient"
) -> Callable[[Solver], Solver]:
    """Makes a decorator that lets autograd differentiate a solver's result with respect to what it was given.

    With ``w*(λ) = argmin_w f(w, λ)``, whatever computed it, the backward pass takes

        vᵀ dw*/dλ = −qᵀ ∂²f/∂w∂λ        with        (∂²f/∂w²) q = v

    for the cotangent v that arrives, by the given method (Krantz and Parks, The Implicit Function Theorem, 2002; as a
    decorator Blondel et al., NeurIPS 2022, arXiv 2105.15183). The solver itself is not differentiated: it may loop, use
    optimisers and break off, and it must return a minimum of the inner loss for the derivative to be right.
    ``Unrolled`` differentiates gradient steps of its own, which start from the solver's result; their end is what the
    decorated function returns.

    Args:
        inner_loss: f, a function of ``(inner_params, outer_params)`` with a scalar tensor as its value.
        method: An estimator, its name, or a mapping with ``method`` and its fields; see ``bilevel methods``.

    Returns:
        A decorator for solvers ``outer_params -> inner_params``. Both are a tensor, or sequences and mappings of
        tensors. The solver sees detached outer parameters, with gradients enabled; what it returns is copied. The
        result requires gradients if an outer parameter does. An entry of either that is a frozen ``nn.Parameter`` is a
        constant and passes through.

    The decorated function raises:
        NonFiniteError: The solver's result, or the inner loss at it, is NaN or infinite.
        ParameterError: The solver, or its caller, passed something that is no structure of real floating-point tensors;
            or the call is inside a ``torch.func`` transform.
        LossError: The inner loss (in the backward pass) is no scalar or does not depend on the inner parameters.

    A solve that fails in a backward pass gives a ``BilevelWarning`` with its report and remedy. As in
    :func:`~bilevel.hypergradient`, all passes of one derivative see the same random numbers, drawn in the first
    backward pass.

    Derivatives can be differentiated again, any number of times, by the same rule (see
    :mod:`bilevel.implicit_function`), with the methods that solve the adjoint system by autodiff products:
    ``conjugate_gradient``, ``exact``, ``minres``, ``gmres``, and ``neumann`` as an approximation. So a loss that calls
    a decorated solver is an inner loss of :func:`~bilevel.hypergradient` or of another ``argmin``: levels nest, and the
    curvature of a level includes the response of those below. Other methods give first derivatives; differentiating
    those raises ``LossError``, and so does an inner loss that closes over a tensor that requires gradients.

    Cost: the solver in the forward pass, the method's passes of f in the backward pass. With ``create_graph=True`` 1
    forward pass, 1 backward pass with graph and 1 product more; differentiating once more takes another solve, and 1
    forward and 3 backward passes for the derivative of the Hessian.

    Example:
        Ridge regression: the solution's dependence on the regularisation, compared with the formula.

        >>> X, y = torch.eye(2), torch.tensor([2.0, 4.0])
        >>> def loss(w, log_decay):
        ...     return (X @ w - y).square().sum() / 2 + log_decay.exp() * w.square().sum() / 2
        >>> @argmin(loss)
        ... def fit(log_decay):
        ...     return torch.linalg.solve(X.T @ X + log_decay.exp() * torch.eye(2), X.T @ y)
        >>> log_decay = torch.tensor(0.0, requires_grad=True)
        >>> fit(log_decay)
        tensor([1., 2.], grad_fn=<...>)
        >>> fit(log_decay).sum().backward()
        >>> log_decay.grad                          # d/dδ of Σ yᵢ / (1 + eᵟ)
        tensor(-1.5000)
    """
    estimator = as_estimator(method)
    refuse_without_state(
        estimator,
        "argmin differentiates every call by itself and keeps nothing. Take warm_start=False, or a stateless method",
    )
    if not callable(inner_loss):
        raise ParameterError(
            f"argmin needs the inner loss as its first argument, a function of (inner_params, outer_params); "
            f"got a {type(inner_loss).__name__}. Write @argmin(inner_loss, method=...)."
        )

    def decorate(solver: Solver) -> Solver:
        name = getattr(solver, "__name__", type(solver).__name__)

        @functools.wraps(solver)
        def solve(outer_params: Any) -> Any:
            outer, structure = flatten(outer_params, "outer")
            call = _Call(inner_loss, estimator, solver, name, structure)
            with transform_errors():
                found: Tensors = _Solution.apply(call, *outer)  # type: ignore[no-untyped-call]
            assert call.inner_structure is not None
            return call.inner_structure.rebuild(found)

        return solve

    return decorate


class _Call:
    """One call of a decorated solver: what the forward and the backward pass share beside tensors."""

    def __init__(self, loss: Loss, estimator: Estimator, solver: Solver, name: str, outer: Structure) -> None:
        self.estimator = estimator
        self.name = name
        self.inner_structure: Structure | None = None
        self._loss = loss
        self._solver = solver
        self._outer_structure = outer

    def solve(self, outer: Tensors) -> Tensors:
        """Runs the solver on detached outer parameters and returns copies of its result's variables."""
        with torch.enable_grad():
            result = self._solver(self._outer_structure.rebuild([part.detach() for part in outer]))
        try:
            found, structure = flatten(result, "inner")
            copies = tuple(part.detach().clone() for part in found)
            # The copies' own structure: the result's tensors may hold the whole graph of the solver.
            inner, self.inner_structure = flatten(structure.rebuild(copies), "inner")
        except ParameterError as error:
            raise ParameterError(f"solver {self.name!r} returned no inner parameters: {error}") from error
        if not is_finite(inner):
            raise NonFiniteError(
                f"solver {self.name!r} returned NaN or infinity: expected finite inner parameters. "
                "Look at its learning rate."
            )
        return inner

    def report(self, info: SolveInfo) -> None:
        """Warns of a solve that failed."""
        if info.status.failed:
            text = f"derivative of solver {self.name!r}: {info.explain()}"
            warn(text)

    def objective(self, outer: Tensors, active: tuple[int, ...]) -> Objective:
        """Returns the inner loss as a function of the inner and of the ``active`` outer variables."""
        assert self.inner_structure is not None
        inner_structure = self.inner_structure
        constants = [part.detach() for part in outer]

        def loss(inner: Tensors, varied: Tensors) -> object:
            everything = list(constants)
            for place, part in zip(active, varied, strict=True):
                everything[place] = part
            return self._loss(inner_structure.rebuild(inner), self._outer_structure.rebuild(everything))

        replay = Replay(generator_devices(outer))
        return FunctionObjective(loss, f"the inner problem of {self.name!r}", replay, PassCount())


class _Solution(torch.autograd.Function):
    """The solver forward, its estimator's pullback backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *outer: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inner = call.solve(outer)
        ctx.active = tuple(place for place, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        ctx.objective = call.objective(outer, ctx.active)
        varied = leaves([outer[place] for place in ctx.active])
        response = call.estimator.respond(InnerProblem(ctx.objective, leaves(inner), varied))
        point = tuple(part.detach() for part in response.point)
        ctx.call, ctx.response = call, response
        # Saved also so that autograd notices when one of them is changed in place before the backward pass.
        ctx.save_for_backward(*outer, *point)
        return point

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        outer, point = saved[: -len(cotangents)], saved[-len(cotangents) :]
        cotangent = tuple(torch.zeros_like(p) if v is None else v for p, v in zip(point, cotangents, strict=True))
        varied = tuple(outer[place] for place in ctx.active)
        reason = obstacle(call.estimator)
        if torch.is_grad_enabled() and not reason:  # create_graph=True
            value = AdjointRule(ctx.objective, call.estimator, call.report).pullback(cotangent, point, varied)
        else:
            with torch.no_grad():
                pulled = ctx.response.pullback(cotangent, {})
            call.report(pulled.info)
            value = pulled.value
        if torch.is_grad_enabled() and reason:
            message = f"the derivative of solver {call.name!r} cannot be differentiated: {reason}"
            value = refuse_derivatives(value, message, (*cotangent, *varied))
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, grad in zip(ctx.active, value, strict=True):
            grads[place + 1] = grad
        return tuple(grads)
