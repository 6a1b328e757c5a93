"""Gradient descent, with momentum and Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        if not self.momentum:
            return param.add(grad, alpha=-self.learning_rate), ()
        (buffer,) = memory
        buffer = (buffer * self.momentum).add(grad, alpha=1 - self.dampening) if self.made else grad.clone()
        direction = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return param.add(direction, alpha=-self.learning_rate), (buffer,)
