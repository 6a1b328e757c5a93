"""The hypergradient as a plain function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bilevel.errors import LossError, ParameterError
from bilevel.functional import (
    FunctionObjective,
    Objective,
    PassCount,
    PlainLoss,
    dense_gradient,
    gradient,
    leaves,
    require_finite,
)
from bilevel.hypergrad.base import Estimator, InnerProblem, State, refuse_without_state
from bilevel.hypergrad.registry import as_estimator
from bilevel.products import full_precision
from bilevel.randomness import Replay, generator_devices
from bilevel.result import Hypergradient
from bilevel.structure import Structure, flatten
from bilevel.vector import Tensors, add

__all__ = ["Loss", "function_objective", "hypergradient", "variables"]

Loss = Callable[[Any, Any], Any]
"""``(inner_params, outer_params) -> scalar tensor``, or a mapping with ``"loss"`` and the model's ``"outputs"``."""


def hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Any,
    outer_params: Any,
    method: Estimator | str | Mapping[str, Any] = "neumann",
    *,
    state: State | None = None,
) -> Hypergradient:
    """Returns ``dF/dλ = ∂F/∂λ + vᵀ dw*/dλ`` with ``v = ∂F/∂w`` and the best response w* of the inner problem.

    At a minimum w of the inner loss f the implicit part is ``−(∂²f/∂λ∂w) q`` with ``(∂²f/∂w²) q = v``; methods differ
    in how they find q. Nothing that is passed in changes, and no ``.grad`` is touched.

    Args:
        inner_loss: f, a function of ``(inner_params, outer_params)`` with a scalar tensor as its value.
        outer_loss: F, likewise.
        inner_params: w: a tensor, or a sequence or mapping of tensors. Implicit methods take it as the minimum of f.
        outer_params: λ, likewise. A frozen ``nn.Parameter`` is a constant, here and in ``inner_params``.
        method: An estimator, its name, or a mapping with ``method`` and its fields; see ``bilevel methods``.
        state: The ``.state`` of an earlier result with the same method, to reuse what it learnt; ``{}`` at the first
            call of a method that continues from its last one.

    Returns:
        The hypergradient: ``.grad`` and ``.direct`` with the structure of ``outer_params``, ``.info`` with how the
        solve ended.

    Raises:
        LossError: A loss that is no scalar; an inner loss that does not depend on the inner parameters, or an outer
            loss that depends on no parameter.
        NonFiniteError: A loss that is NaN or infinite.
        ParameterError: Parameters that are no real floating-point tensors, or that are inner and outer at once.
        UnknownNameError: An unknown method or field.
        ConfigError: A method that continues from its last call (a warm start, an auxiliary iterate) without ``state``.

    Cost: 1 forward and 1 backward pass of F, and the method's passes of f.

    Example:
        The inner minimum of ``(w − λ)²/2`` is ``w = λ``, so that ``F = w²/2`` has the hypergradient λ:

        >>> import torch
        >>> lam = torch.tensor(3.0)
        >>> result = hypergradient(lambda w, l: (w - l) ** 2 / 2, lambda w, l: w**2 / 2, lam.clone(), lam, "cg")
        >>> result.grad, result.info.status.value
        (tensor(3.), 'converged')
    """
    estimator = as_estimator(method)
    if state is None:
        refuse_without_state(estimator, "pass state={} at the first call, and result.state to the next")
    else:
        _check_state(state)
    with full_precision():  # backward passes follow the caller's autocast as well
        return _hypergradient(inner_loss, outer_loss, inner_params, outer_params, estimator, state)


def _hypergradient(
    inner_loss: Loss, outer_loss: Loss, inner_params: Any, outer_params: Any, estimator: Estimator, state: State | None
) -> Hypergradient:
    inner, inner_structure, outer, outer_structure = variables(inner_params, outer_params)
    passes = PassCount()
    replay = Replay(generator_devices(inner + outer))
    objective = function_objective(inner_loss, "the inner problem", inner_structure, outer_structure, replay, passes)
    response = estimator.respond(InnerProblem(objective, inner, outer))
    upper = function_objective(
        outer_loss,
        "the outer problem",
        inner_structure,
        outer_structure,
        Replay(generator_devices(inner + outer)),
        passes,
    )
    value, cotangent, direct = outer_gradients(upper, response.point, outer)
    pulled = response.pullback(cotangent, state or {})
    return Hypergradient(
        grad=outer_structure.rebuild_gradient(add(direct, pulled.value)),
        direct=outer_structure.rebuild_gradient(direct),
        info=pulled.info,
        value=float(value),
        inner=inner_structure.rebuild([part.detach() for part in response.point]),
        state=pulled.state,
    )


def _check_state(state: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(part, tuple) for part in state.values()):
        raise ParameterError("state must be {} or the .state of an earlier result of the same method")


def variables(inner_params: Any, outer_params: Any) -> tuple[Tensors, Structure, Tensors, Structure]:
    """Returns inner and outer variables as fresh leaves that require gradients, with their structures."""
    inner, inner_structure = flatten(inner_params, "inner")
    outer, outer_structure = flatten(outer_params, "outer")
    shared = {id(part) for part in inner} & {id(part) for part in outer}
    if shared:
        names = [name for part, name in zip(inner, inner_structure.names, strict=True) if id(part) in shared]
        raise ParameterError(
            f"a tensor is an inner and an outer parameter at once: {', '.join(names)}. Clone one of them."
        )
    return leaves(inner), inner_structure, leaves(outer), outer_structure


def function_objective(
    loss: Loss, name: str, inner: Structure, outer: Structure, replay: Replay, passes: PassCount
) -> FunctionObjective:
    """Wraps a user's function of structured parameters as an objective on flat tuples."""

    def plain(w: Tensors, lam: Tensors) -> PlainLoss:
        return PlainLoss(loss, (inner.rebuild(w), outer.rebuild(lam)), getattr(loss, "__code__", type(loss)))

    def function(w: Tensors, lam: Tensors) -> object:
        return loss(inner.rebuild(w), outer.rebuild(lam))

    return FunctionObjective(function, name, replay, passes, plain=plain)


def outer_gradients(objective: Objective, inner: Tensors, outer: Tensors) -> tuple[Tensor, Tensors, Tensors]:
    """Returns F, ``∂F/∂w`` and ``∂F/∂λ``."""

    def body(evaluate: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        value = evaluate()
        require_finite(value, objective.name)
        if not value.requires_grad:
            raise LossError(
                f"the loss of {objective.name} depends neither on the inner nor on the outer parameters: nothing to "
                "differentiate. Check for a detach() or no_grad() between the parameters and the loss."
            )
        return value.detach(), gradient(value, inner + outer, objective)

    value, grads = objective.within(inner, outer, body)
    filled = dense_gradient(grads, inner + outer)
    return value, filled[: len(inner)], filled[len(inner) :]
