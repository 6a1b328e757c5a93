"""The derivative of one step of the inner optimiser, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from bilevel.errors import ConfigError
from bilevel.functional import dense_gradient, leaves
from bilevel.hypergrad.base import InnerProblem, InnerStep, Response
from bilevel.hypergrad.mixed_product import MixedProduct
from bilevel.hypergrad.single_step import SingleStep, SingleStepResponse, taken
from bilevel.optim import OPTIMIZERS, default_update
from bilevel.result import Status
from bilevel.validation import check_choice, check_number
from bilevel.vector import Tensors, add, norm, promote

__all__ = ["SAMA"]

DOMINANCE = 1e-2
"""Share of the direction's length below which the living coordinates get a difference of their own."""


@dataclass(frozen=True)
class SAMA(SingleStep):
    """Differentiates the inner optimiser's step ``w⁺ = w − U(g)``: ``vᵀ dw⁺/dλ = −((∂U/∂g)ᵀ v)ᵀ ∂²f/∂w∂λ``.

    The cotangent is pulled back through the optimiser's own update, at the gradient and the state of the step that was
    made: exactly, by autograd, with momentum, bias correction and decoupled weight decay as they are. The state before
    the step counts as constant. With ``center="old"`` and ``difference="exact"`` it is ``Unrolled(steps=1)``.

    Source: Choe et al., NeurIPS 2023 (arXiv 2310.05674), equations 3 to 5: identity for the Hessian in the implicit
    derivative of the optimiser's fixed point, and a central difference at the new point. Three things differ. The
    published closed form of ``∂U/∂g`` for Adam is replaced by the derivative of the update itself. The published code
    leaves the bias correction out, which is 5.8 × too large at the fifth step. The published algorithm also moves the
    inner parameters along v after each outer step, which an estimator does not do.

    Where Adam has seen nothing but zero gradients in a coordinate (an embedding that did not occur), it divides by its
    ε alone: ``∂U/∂g`` is about ``10⁵`` to ``10⁸`` times the learning rate there, and a displacement along the direction
    would move nothing else. Where such coordinates make up more than 99 % of the direction's length the rest gets a
    difference of its own. The error of a difference is proportional to the direction's length, which the message tells.

    Attributes:
        center: ``"new"`` or ``"old"``, see :class:`~bilevel.hypergrad.single_step.SingleStep`.
        difference: ``"central"``, ``"exact"`` or ``"forward"``, likewise.
        epsilon: ε of the differences, likewise.
        optimizer: As a function, the optimiser whose first step is meant, by name, with torch's defaults; in an engine
            the inner problem's own is used, and this is refused.
        learning_rate: η of that optimiser.

    Cost in an engine: ``"exact"`` 1 forward and 1 backward pass with graph, 1 product; ``"central"`` 2 forward and 2
    backward passes to the outer parameters only; ``"forward"`` 1 and 1 (see :class:`~bilevel.OneStep`). Twice the
    differences where vanished coordinates dominate. As a function 1 forward and 1 backward pass more for the gradient.

    Raises:
        ConfigError: A field out of range; ``difference="forward"`` with ``center="new"``; an optimiser whose update is
            not known; as a function, no optimiser.
    """

    center: str = field(default="new", kw_only=True)
    difference: str = field(default="central", kw_only=True)
    optimizer: str | None = field(default=None, kw_only=True)
    learning_rate: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "sama"
    summary: ClassVar[str] = "one step of the inner optimiser itself, mixed product by differences (SAMA)"
    cost: ClassVar[str] = "central: 2 forward, 2 backward; forward: 1 and 1; exact: 1, 1 with graph and 1 product"
    needs: ClassVar[str] = "first derivatives only (double backward for difference='exact'); a torch optimiser"
    storage: ClassVar[str] = "the parameters twice, one recorded step"
    purpose: ClassVar[str] = (
        "one or few steps of Adam and its kin per outer step: the derivative of the update that was made"
    )
    needs_double_backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validates the fields, alone and together."""
        super().__post_init__()
        if self.optimizer is not None:
            check_choice("SAMA", "optimizer", self.optimizer, tuple(OPTIMIZERS))
        if self.learning_rate is not None:
            check_number("SAMA", "learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        if (self.optimizer is None) != (self.learning_rate is None):
            missing = "optimizer" if self.optimizer is None else "learning_rate"
            raise ConfigError(f"SAMA.optimizer and SAMA.learning_rate belong together: {missing} is missing")

    def respond(self, problem: InnerProblem) -> Response:
        """See :meth:`Estimator.respond`. Takes the gradient of the step, where no step was recorded."""
        if problem.trajectory:
            if self.optimizer is not None:
                raise ConfigError(
                    "SAMA.optimizer and SAMA.learning_rate are for use as a function: in an engine the inner problem's "
                    "own optimizer made the step. Leave them out."
                )
            return SingleStepResponse(self, problem, problem.trajectory[-1], problem.inner)
        if self.optimizer is None or self.learning_rate is None:
            raise ConfigError(
                "method 'sama' follows a step of the inner optimiser, which an engine records (take a step first). As "
                "a function it takes an optimiser's first step: SAMA(optimizer='adam', learning_rate=0.001)."
            )
        update, memory = default_update(self.optimizer, self.learning_rate, 0, problem.inner)
        step, point = taken(self, problem, update, memory)
        return SingleStepResponse(self, problem, step, point)

    def direction(self, step: InnerStep | None, v: Tensors) -> Tensors:
        """See :meth:`SingleStep.direction`: one backward pass of the update, none of the loss."""
        assert step is not None
        assert step.gradient is not None
        grads = leaves(step.gradient)
        with torch.enable_grad():
            end, _ = step.update(step.inner, grads, step.memory)
        pairs = [(new, bar.to(new.dtype)) for new, bar in zip(end, v, strict=True) if new.requires_grad]
        outputs, bars = zip(*pairs, strict=True)
        return promote(dense_gradient(torch.autograd.grad(outputs, grads, bars, allow_unused=True), grads))

    def product(self, problem: InnerProblem, step: InnerStep | None, q: Tensors) -> MixedProduct:
        """See :meth:`SingleStep.product`: in two parts, where vanished coordinates drown the others."""
        assert step is not None
        assert step.gradient is not None
        if self.difference != "exact":
            alive = tuple(torch.where(g == 0, 0.0, part) for g, part in zip(step.gradient, q, strict=True))
            if 0.0 < float(norm(alive)) < DOMINANCE * float(norm(q)):
                rest = tuple(part - other for part, other in zip(q, alive, strict=True))
                parts = [super(SAMA, self).product(problem, step, part) for part in (alive, rest)]
                return _joined(*parts)
        return super().product(problem, step, q)


def _joined(first: MixedProduct, second: MixedProduct) -> MixedProduct:
    status = max((first.status, second.status), key=lambda status: (status is Status.DIVERGED, status.failed))
    return MixedProduct(
        add(first.value, second.value),
        status,
        first.products + second.products,
        f"{first.message}; coordinates with zero gradient apart: {second.message}",
    )
