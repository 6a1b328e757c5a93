"""Gradient descent, with momentum and Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel.optim.base import Pulled, Rule
from bilevel.vector import Tensors, add, axpy, scale, zeros_like

__all__ = ["SGD"]


class SGD(Rule):
    """``b ← μ b + (1 − τ) g`` (``b ← g`` at first) and ``w ← w − η b``, or ``w ← w − η (g + μ b)`` with Nesterov."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        super().__init__(group, state, made)
        self.momentum = float(group["momentum"])
        self.dampening = float(group["dampening"])
        self.nesterov = bool(group["nesterov"])
        self.slots = ("momentum_buffer",) if self.momentum else ()

    def pull(self, params: Tensors, memory: Tensors) -> Pulled:
        """See :meth:`Rule.pull`: the update is linear."""
        grads, before, factor = params, memory, -self.learning_rate
        if self.momentum:
            steps = scale(-self.learning_rate, params)
            buffers = axpy(self.momentum if self.nesterov else 1.0, steps, memory)
            through = scale(1 - self.dampening, buffers) if self.made and self.dampening else buffers
            grads, factor = add(steps, through) if self.nesterov else through, 1.0
            before = scale(self.momentum, buffers) if self.made else zeros_like(buffers)
        if self.weight_decay != 0.0:
            params = axpy(self.weight_decay * factor, grads, params)
        return Pulled(params, grads, before, -factor if self.maximize else factor)

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """See :meth:`Rule.update`."""
        if not self.momentum:
            return param.add(grad, alpha=-self.learning_rate), ()
        (buffer,) = memory
        buffer = (buffer * self.momentum).add(grad, alpha=1 - self.dampening) if self.made else grad.clone()
        direction = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return param.add(direction, alpha=-self.learning_rate), (buffer,)
