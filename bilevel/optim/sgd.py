"""Gradient descent, with momentum and Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Rule
from bilevel.vector import Tensors

__all__ = ["SGD"]


class SGD(Rule):
    """``b ← μ b + (1 − τ) g`` (``b ← g`` at first) and ``w ← w − η b``, or ``w ← w − η (g + μ b)`` with Nesterov."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.momentum = float(group["momentum"])
        self.dampening = float(group["dampening"])
        self.nesterov = bool(group["nesterov"])
        self.slots = ("momentum_buffer",) if self.momentum else ()

    def pull(self, param: Tensor, memory: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """See :meth:`Rule.pull`: the update is linear."""
        grad, before = -self.learning_rate * param, memory
        if self.momentum:
            direction, (buffer,) = grad, memory
            buffer = buffer.add(direction, alpha=self.momentum if self.nesterov else 1.0)
            through = buffer * (1 - self.dampening) if self.made else buffer
            grad = direction + through if self.nesterov else through
            before = (buffer * self.momentum if self.made else torch.zeros_like(buffer),)
        if self.weight_decay != 0.0:
            param = param.add(grad, alpha=self.weight_decay)
        return param, -grad if self.maximize else grad, before

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        if not self.momentum:
            return param.add(grad, alpha=-self.learning_rate), ()
        (buffer,) = memory
        buffer = (buffer * self.momentum).add(grad, alpha=1 - self.dampening) if self.made else grad.clone()
        direction = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return param.add(direction, alpha=-self.learning_rate), (buffer,)
