"""What every rule of an optimiser promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.vector import Tensors

__all__ = ["Pulled", "Rule", "Update", "root"]

Update = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
"""``(parameters, gradients, memory) -> (parameters, memory)``."""


class Pulled(NamedTuple):
    """Cotangents of what an update took, from those of what it returned.

    Attributes:
        params: Of the parameters.
        grads: Of the gradients, but for ``factor``.
        memory: Of the memory.
        factor: What those of the gradients are still to be multiplied by. What is linear in them may be multiplied
            instead, together with the addition that comes after it.
    """

    params: Tensors
    grads: Tensors
    memory: Tensors
    factor: float = 1.0


class Rule(ABC):
    """The next update of a parameter, with the hyper-parameters of its group at this moment.

    Args:
        group: The parameter's group of the optimiser, or the optimiser's defaults.
        state: What the optimiser holds for the parameter.
        made: How many updates it has made of it.
    """

    slots: tuple[str, ...] = ()
    """Names of the state tensors that make up the memory."""
    shared: ClassVar[bool] = True
    """Whether parameters of one group with equally many updates have the same rule: it reads no more of the state."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any], made: int) -> None:
        self.learning_rate = float(group["lr"])
        self.weight_decay = float(group.get("weight_decay", 0.0))
        self.decoupled = bool(group.get("decoupled_weight_decay", False))
        self.maximize = bool(group.get("maximize", False))
        self.made = made

    @property
    def step(self) -> int:
        """Number of the update, counted from 1."""
        return self.made + 1

    def memory_of(self, param: Tensor, state: Mapping[str, Any]) -> Tensors:
        """Returns copies of the state tensors; zeros before the first update."""
        return tuple(self._slot(param, state.get(name)) for name in self.slots)

    @staticmethod
    def _slot(param: Tensor, held: Tensor | None) -> Tensor:
        return torch.zeros_like(param).detach() if held is None else held.detach().clone()

    def __call__(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the updated parameter and memory."""
        if self.maximize:
            grad = -grad
        if self.weight_decay != 0.0:
            if self.decoupled:
                param = param * (1 - self.learning_rate * self.weight_decay)
            else:
                grad = grad.add(param, alpha=self.weight_decay)
        return self.update(param, grad, memory)

    def pull(self, params: Tensors, memory: Tensors) -> Pulled | None:
        """Returns the cotangents of parameters, gradients and memory before the update, from those of what it returned.

        None where they depend on more than the hyper-parameters: the update is not linear, and is differentiated.

        Args:
            params: The cotangents of several new parameters.
            memory: Those of their new memory, parameter by parameter.
        """
        return None

    @abstractmethod
    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the updated parameter and memory; weight decay is in ``param`` and ``grad`` already."""


def root(square: Tensor) -> Tensor:
    """Returns ``√s`` with the derivative 0 at ``s = 0``, where the true one is infinite.

    A second moment is zero where every gradient so far was zero. There ``√s`` is ``c |g|`` as a function of the
    gradient g that comes next, with a kink at 0; zero is the mean of its two slopes. Autograd's own chain rule would
    give ``∞ · 0``, not a number, and spoil every derivative that passes through.
    """
    vanished = square == 0
    return torch.where(vanished, torch.zeros_like(square), torch.where(vanished, 1.0, square).sqrt())
