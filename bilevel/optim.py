"""Optimiser updates as differentiable functions: what unrolling needs.

An update maps (parameters, gradients, memory) to (parameters, memory), where memory holds the optimiser's state
tensors. Hyper-parameters are those that the user's optimiser had at that step, for every parameter by its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.errors import ConfigError
from bilevel.vector import Tensors

__all__ = ["GradientDescent", "Update", "curvature_of", "update_of"]

Update = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


@dataclass(frozen=True)
class GradientDescent:
    """``w ← w − η g``, without memory."""

    learning_rate: float

    def __call__(self, params: Tensors, grads: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        """Returns the updated parameters and no memory."""
        return tuple(p - self.learning_rate * g for p, g in zip(params, grads, strict=True)), memory


def update_of(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[Update, Tensors]:
    """Returns the next update of a torch optimiser as a differentiable function, and a copy of its memory.

    Args:
        optimizer: ``torch.optim.SGD`` (momentum, Nesterov, weight decay), ``Adam`` or ``AdamW``, exactly these classes.
        params: The parameters, in the order of the tuples that the function will get.

    Raises:
        ConfigError: Another optimiser, or an option whose derivative is not implemented.
    """
    kind = type(optimizer)
    if kind not in _RULES:
        known = ", ".join(cls.__name__ for cls in _RULES)
        raise ConfigError(
            f"method 'unrolled' differentiates through the inner optimiser's updates and knows {known}; "
            f"the inner problem uses {kind.__name__}. Use one of them, or an implicit method."
        )
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        if group.get("amsgrad"):
            raise ConfigError("method 'unrolled' cannot differentiate through amsgrad=True: set it to False")
    rules = [_RULES[kind](settings[id(p)], optimizer.state.get(p, {})) for p in params]
    memory = tuple(t for p, rule in zip(params, rules, strict=True) for t in rule.memory_of(p))
    return _PerParameter(tuple(rules)), memory


def curvature_of(optimizer: Optimizer, params: Sequence[Tensor]) -> Tensors | None:
    """Returns what an adaptive optimiser divides gradients by, a positive diagonal that stands for the curvature.

    ``√(s / (1 − β₂ᵗ)) + ε`` of Adam and AdamW with the second moment s, ``√s + ε`` of RMSprop (with the variance for s
    where centred) and Adagrad. None for other optimisers, and before their first update.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)):
        return None
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for p in params:
        state, group = optimizer.state.get(p, {}), settings[id(p)]
        if isinstance(optimizer, torch.optim.Adagrad):
            square = state.get("sum")
        elif isinstance(optimizer, torch.optim.RMSprop):
            square = state.get("square_avg")
            mean = state.get("grad_avg")
            square = square - mean.square() if square is not None and mean is not None else square
        else:
            square = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
            if square is not None:
                square = square / (1 - group["betas"][1] ** float(state["step"]))
        if square is None:
            return None
        found.append(square.clamp_min(0).sqrt() + group["eps"])
    return tuple(found)


@dataclass(frozen=True)
class _PerParameter:
    rules: tuple[_SGD | _Adam, ...]

    def __call__(self, params: Tensors, grads: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        new_params: list[Tensor] = []
        new_memory: list[Tensor] = []
        rest = iter(memory)
        for rule, param, grad in zip(self.rules, params, grads, strict=True):
            slots = tuple(next(rest) for _ in range(rule.num_slots))
            param, slots = rule.update(param, -grad if rule.maximize else grad, slots)
            new_params.append(param)
            new_memory.extend(slots)
        return tuple(new_params), tuple(new_memory)


class _Rule:
    """One parameter's update with its hyper-parameters and the state that the optimiser holds for it now."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.learning_rate = float(group["lr"])
        self.weight_decay = float(group["weight_decay"])
        self.maximize = bool(group.get("maximize", False))
        self.state = {key: value.detach().clone() for key, value in state.items() if isinstance(value, Tensor)}


class _SGD(_Rule):
    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        super().__init__(group, state)
        self.momentum = float(group["momentum"])
        self.dampening = float(group["dampening"])
        self.nesterov = bool(group["nesterov"])
        self.first = self.state.get("momentum_buffer") is None
        self.num_slots = 1 if self.momentum else 0

    def memory_of(self, param: Tensor) -> Tensors:
        if not self.num_slots:
            return ()
        return (torch.zeros_like(param).detach() if self.first else self.state["momentum_buffer"],)

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        direction = grad + self.weight_decay * param
        if self.momentum:
            # torch fills the buffer with the first gradient undamped
            weight = 1.0 if self.first else 1.0 - self.dampening
            buffer = self.momentum * memory[0] + weight * direction
            memory = (buffer,)
            direction = direction + self.momentum * buffer if self.nesterov else buffer
        return param - self.learning_rate * direction, memory


class _Adam(_Rule):
    decoupled = False

    def __init__(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        super().__init__(group, state)
        self.betas = tuple(float(beta) for beta in group["betas"])
        self.eps = float(group["eps"])
        self.decoupled = self.decoupled or bool(group.get("decoupled_weight_decay", False))
        self.step = int(self.state["step"]) + 1 if "step" in self.state else 1
        self.num_slots = 2

    def memory_of(self, param: Tensor) -> Tensors:
        zeros = torch.zeros_like(param).detach()
        return self.state.get("exp_avg", zeros), self.state.get("exp_avg_sq", zeros)

    def update(self, param: Tensor, grad: Tensor, memory: Tensors) -> tuple[Tensor, Tensors]:
        first_beta, second_beta = self.betas
        if self.decoupled:
            param = param * (1 - self.learning_rate * self.weight_decay)
        else:
            grad = grad + self.weight_decay * param
        mean = first_beta * memory[0] + (1 - first_beta) * grad
        square = second_beta * memory[1] + (1 - second_beta) * grad * grad
        # The root's derivative is infinite at zero, where the gradient has always been zero: its limit there is zero.
        positive = square > 0
        root = torch.where(
            positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square)
        )
        denominator = root / math.sqrt(1 - second_beta**self.step) + self.eps
        return param - self.learning_rate / (1 - first_beta**self.step) * mean / denominator, (mean, square)


class _AdamW(_Adam):
    decoupled = True


_RULES: Mapping[type[Optimizer], type[_SGD] | type[_Adam]] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _Adam,
    torch.optim.AdamW: _AdamW,
}
