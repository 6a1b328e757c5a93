"""Adam and its variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.optim.base import Rule, root
from bilevel.vector import Tensors

__all__ = ["Adam", "AdamW", "Adamax", "NAdam", "RAdam"]


class _Moments(Rule):
    """Base of the rules with a first and a second moment: ``m ← β₁ m + (1 − β₁) g``, ``s ← β₂ s + (1 − β₂) g²``."""

    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.betas = tuple(float(beta) for beta in group["betas"])
        self.eps = float(group["eps"])

    @property
    def corrections(self) -> tuple[float, float]:
        """``1 − β₁ᵗ`` and ``1 − β₂ᵗ``."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step

    def moments(self, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensor]:
        """Returns the new moments."""
        mean, square = memory[:2]
        mean = torch.lerp(mean, grad, 1 - self.betas[0])
        return mean, (square * self.betas[1]).addcmul(grad, grad, value=1 - self.betas[1])


class Adam(_Moments):
    """``w ← w − η / (1 − β₁ᵗ) · m / (√(s / (1 − β₂ᵗ)) + ε)``, with the largest s so far for s under AMSGrad.

    Where AMSGrad's two candidates are equal the derivative is the mean of theirs.
    """

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.amsgrad = bool(group["amsgrad"])
        if self.amsgrad:
            self.slots = (*self.slots, "max_exp_avg_sq")

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        mean, square = self.moments(grad, memory)
        after: Tensors = (mean, square)
        if self.amsgrad:
            square = torch.maximum(memory[2], square)
            after = (*after, square)
        first, second = self.corrections
        denominator = root(square) / second**0.5 + self.eps
        return param.addcdiv(mean, denominator, value=-self.learning_rate / first), after


class AdamW(Adam):
    """Adam with ``w ← (1 − η λ) w`` before the update for its weight decay."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.decoupled = True


class Adamax(Rule):
    """``u ← max(β₂ u, |g| + ε)`` and ``w ← w − η / (1 − β₁ᵗ) · m / u``. ``|g|`` has the derivative 0 at 0."""

    slots = ("exp_avg", "exp_inf")

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.betas = tuple(float(beta) for beta in group["betas"])
        self.eps = float(group["eps"])

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        mean = torch.lerp(memory[0], grad, 1 - self.betas[0])
        largest = torch.maximum(memory[1] * self.betas[1], grad.abs() + self.eps)
        rate = self.learning_rate / (1 - self.betas[0] ** self.step)
        # A gradient that has always been zero, and ε = 0: torch divides zero by zero there.
        return param.addcdiv(mean, largest, value=-rate), (mean, largest)


class NAdam(_Moments):
    """Adam with Nesterov's momentum: ``μ_t = β₁ (1 − 0.96^(t ψ) / 2)`` for the first moment's coefficients."""

    shared: ClassVar[bool] = False

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        decay, first = float(group["momentum_decay"]), self.betas[0]
        now, after = (first * (1.0 - 0.5 * 0.96 ** (step * decay)) for step in (self.step, self.step + 1))
        held = state.get("mu_product")
        # The product is held in one dtype and rounded to it at every update.
        product = torch.ones((), dtype=_product_dtype()) if held is None else held.detach().clone()
        product = float(product.mul_(now))
        self.weights = (
            -self.learning_rate * (1 - now) / (1 - product),
            -self.learning_rate * after / (1 - product * after),
        )

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        mean, square = self.moments(grad, memory)
        denominator = root(square / self.corrections[1]) + self.eps
        param = param.addcdiv(grad, denominator, value=self.weights[0])
        return param.addcdiv(mean, denominator, value=self.weights[1]), (mean, square)


class RAdam(_Moments):
    """Adam whose step is rectified by the variance of ``1/√s``; plain momentum while that variance is infinite."""

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        mean, square = self.moments(grad, memory)
        first, second = self.corrections
        corrected = mean / first
        longest = 2 / (1 - self.betas[1]) - 1
        length = longest - 2 * self.step * self.betas[1] ** self.step / second
        if length <= 5.0:
            return param - corrected * self.learning_rate, (mean, square)
        rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        adaptive = math.sqrt(second) / (root(square) + self.eps)
        return param - corrected * self.learning_rate * adaptive * rectified, (mean, square)


def _product_dtype() -> torch.dtype:
    """Returns the dtype in which torch holds counts and products."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
