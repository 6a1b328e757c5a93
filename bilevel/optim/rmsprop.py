"""RMSprop and the rules it grew from: Adagrad, Adadelta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Rule, root
from bilevel.vector import Tensors

__all__ = ["Adadelta", "Adagrad", "RMSprop"]


class RMSprop(Rule):
    """``s ← α s + (1 − α) g²`` and ``w ← w − η g / (√s + ε)``.

    Centred: ``s − m²`` for s with ``m ← α m + (1 − α) g``. With momentum: ``b ← μ b + g / (√s + ε)``, ``w ← w − η b``.
    """

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.alpha, self.eps = float(group["alpha"]), float(group["eps"])
        self.momentum, self.centered = float(group["momentum"]), bool(group["centered"])
        more = [("grad_avg", self.centered), ("momentum_buffer", self.momentum > 0)]
        self.slots = ("square_avg", *(name for name, held in more if held))

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        rest = list(memory)
        square = (rest.pop(0) * self.alpha).addcmul(grad, grad, value=1 - self.alpha)
        after, variance = [square], square
        if self.centered:
            mean = torch.lerp(rest.pop(0), grad, 1 - self.alpha)
            after.append(mean)
            variance = square.addcmul(mean, mean, value=-1)
        denominator = root(variance) + self.eps
        if not self.momentum > 0:
            return param.addcdiv(grad, denominator, value=-self.learning_rate), tuple(after)
        buffer = (rest.pop(0) * self.momentum).addcdiv(grad, denominator)
        return param.add(buffer, alpha=-self.learning_rate), (*after, buffer)


class Adagrad(Rule):
    """``s ← s + g²`` and ``w ← w − η / (1 + (t − 1) η') · g / (√s + ε)``."""

    slots = ("sum",)

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.eps = float(group["eps"])
        self.rate = self.learning_rate / (1 + made * float(group["lr_decay"]))

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        total = memory[0].addcmul(grad, grad, value=1)
        return param.addcdiv(grad, root(total) + self.eps, value=-self.rate), (total,)


class Adadelta(Rule):
    """``s ← ρ s + (1 − ρ) g²``, ``δ = g √(d + ε) / √(s + ε)``, ``d ← ρ d + (1 − ρ) δ²``, ``w ← w − η δ``."""

    slots = ("square_avg", "acc_delta")

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.rho, self.eps = float(group["rho"]), float(group["eps"])

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        square = (memory[0] * self.rho).addcmul(grad, grad, value=1 - self.rho)
        delta = root(memory[1] + self.eps) / root(square + self.eps) * grad
        moved = (memory[1] * self.rho).addcmul(delta, delta, value=1 - self.rho)
        return param.add(delta, alpha=-self.learning_rate), (square, moved)
