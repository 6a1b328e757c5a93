"""An optimiser's next update as a differentiable function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.errors import ConfigError
from bilevel.optim.adam import Adam, Adamax, AdamW, NAdam, RAdam
from bilevel.optim.base import Pulled, Rule, Update
from bilevel.optim.rmsprop import Adadelta, Adagrad, RMSprop
from bilevel.optim.sgd import SGD
from bilevel.vector import Tensors, scale

__all__ = ["OPTIMIZERS", "clipped", "default_update", "learning_rates", "projected", "pulled_linear", "update_of"]

_RULES: Mapping[type[Optimizer], type[Rule]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adamax: Adamax,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
}

OPTIMIZERS: Mapping[str, tuple[type[Optimizer], Mapping[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}
"""The optimisers that have a name, with torch's defaults for what is not said here."""


@dataclass(frozen=True)
class _PerParameter:
    rules: tuple[Rule, ...]

    def pull(self, params: Tensors, memory: Tensors) -> Pulled | None:
        start = place = 0
        found: list[Pulled] = []
        for _, alike in itertools.groupby(self.rules, key=id):
            rule, *others = alike
            stop = start + 1 + len(others)
            end = place + (stop - start) * len(rule.slots)
            pulled = rule.pull(params[start:stop], memory[place:end])
            if pulled is None:
                return None
            found.append(pulled)
            start, place = stop, end
        if len(found) == 1:
            return found[0]
        if len({pulled.factor for pulled in found}) > 1:
            found = [Pulled(one, scale(factor, grads), slots) for one, grads, slots, factor in found]
        before, grads, slots = (
            tuple(itertools.chain(*parts)) for parts in zip(*[one[:3] for one in found], strict=True)
        )
        return Pulled(before, grads, slots, found[0].factor)

    def __call__(self, params: Tensors, grads: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        new_params: list[Tensor] = []
        new_memory: list[Tensor] = []
        rest = iter(memory)
        for rule, param, grad in zip(self.rules, params, grads, strict=True):
            param, slots = rule(param, grad, tuple(next(rest) for _ in rule.slots))
            new_params.append(param)
            new_memory.extend(slots)
        return tuple(new_params), tuple(new_memory)


@dataclass(frozen=True)
class _Clipped:
    update: Update
    max_norm: float

    def __call__(self, params: Tensors, grads: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        size = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        factor = (self.max_norm / (size + 1e-6)).clamp(max=1.0)
        return self.update(params, tuple(grad * factor for grad in grads), memory)


@dataclass(frozen=True)
class _Projected:
    update: Update
    project: Callable[[Tensors], Tensors]

    def __call__(self, params: Tensors, grads: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        new_params, new_memory = self.update(params, grads, memory)
        return tuple(self.project(new_params)), new_memory


def update_of(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[Update, Tensors]:
    """Returns the next update of a torch optimiser as a differentiable function, and a copy of its memory.

    Its numbers are the optimiser's own, whichever of torch's implementations (``foreach``, ``fused``, ``capturable``)
    makes them. Hyper-parameters that are tensors are taken at their present values, as constants.

    Args:
        optimizer: One of torch's SGD (momentum, dampening, Nesterov), Adam, AdamW, RMSprop (momentum, centred),
            Adagrad, Adadelta, Adamax, NAdam, RAdam: exactly these classes.
        params: The parameters, in the order of the tuples that the function will get.

    Raises:
        ConfigError: Another optimiser, one with ``differentiable=True`` or with hooks on its step, or a hyper-parameter
            that requires gradients.
    """
    kind = type(optimizer)
    if kind not in _RULES:
        known = ", ".join(cls.__name__ for cls in _RULES)
        raise ConfigError(
            "a method that differentiates or repeats the inner optimiser's updates ('unrolled', 'pzobo', 'sama', "
            f"'one_step') knows those of {known}; the inner problem uses {kind.__name__}. Use one of them, or an "
            "implicit method."
        )
    _refuse_options(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rules: list[Rule] = []
    memory: list[Tensor] = []
    shared: dict[tuple[int, int], Rule] = {}
    for p in params:
        state, group = optimizer.state.get(p, {}), groups[id(p)]
        made = _updates_made(state) if state else 0
        rule = shared.get((id(group), made))
        if rule is None:
            rule = _RULES[kind](group, state, made)
            if rule.shared:
                shared[id(group), made] = rule
        rules.append(rule)
        if rule.slots:
            memory += rule.memory_of(p, state)
    return _PerParameter(tuple(rules)), tuple(memory)


def clipped(update: Update, max_norm: float) -> Update:
    """Returns an update that clips the gradient's norm first: ``U(w, g · min(1, c / (‖g‖ + 1e-6)), m)``, as torch does.

    Differentiable where the norm is not ``c``.
    """
    return _Clipped(update, max_norm)


def projected(update: Update, project: Callable[[Tensors], Tensors]) -> Update:
    """Returns an update that ends with a projection: ``(P(w'), m')`` with ``(w', m') = U(w, g, m)``."""
    return _Projected(update, project)


def pulled_linear(update: Update, params: Tensors, memory: Tensors) -> Pulled | None:
    """Pulls cotangents back through an update that is linear in parameters, gradients and memory (SGD's).

    Args:
        update: The update.
        params: Cotangents of the new parameters.
        memory: Cotangents of the new memory.

    Returns:
        Cotangents of the parameters, gradients and memory before it; None for other updates, which are differentiated.
    """
    return update.pull(params, memory) if isinstance(update, _PerParameter) else None


def default_update(name: str, learning_rate: float, made: int, params: Tensors) -> tuple[Update, Tensors]:
    """Returns the update number ``made + 1`` of an optimiser of :data:`OPTIMIZERS`, and the memory before the first.

    Args:
        name: Its name.
        learning_rate: η; everything else is torch's default.
        made: How many updates were made before.
        params: Tensors of the parameters' shapes.
    """
    kind, settings = OPTIMIZERS[name]
    group = {**kind([torch.zeros(1)], lr=learning_rate, **settings).defaults}  # type: ignore[call-arg]
    rules = (_RULES[kind](group, {}, made),) * len(params)
    memory = tuple(slot for rule, p in zip(rules, params, strict=True) for slot in rule.memory_of(p, {}))
    return _PerParameter(rules), memory


def learning_rates(update: Update) -> tuple[float, ...]:
    """Returns the learning rate of each parameter in an update of :func:`update_of`, negative where it maximises."""
    assert isinstance(update, _PerParameter)
    return tuple(-rule.learning_rate if rule.maximize else rule.learning_rate for rule in update.rules)


def _updates_made(state: Mapping[str, Any]) -> int:
    if "step" in state:
        return int(state["step"])
    return 0 if state.get("momentum_buffer") is None else 1  # SGD counts nothing; only its first update is special


def _refuse_options(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise ConfigError(
                f"{name}(differentiable=True) is torch's own way of unrolling and cannot step an engine's parameters: "
                "leave it out"
            )
        for key, value in group.items():
            if value is None or isinstance(value, (float, bool, int)) or key == "params":
                continue
            entries = value if isinstance(value, (tuple, list)) else [value]
            if any(isinstance(entry, Tensor) and entry.requires_grad for entry in entries):
                raise ConfigError(
                    f"the option {key!r} of {name} requires gradients, but hyper-parameters of the inner optimiser are "
                    f"constants here: pass {key}.detach() or a number"
                )
    hooks = [key for key in ("pre", "post") if getattr(optimizer, f"_optimizer_step_{key}_hooks", None)]
    if hooks:
        raise ConfigError(
            f"{name} has a step {hooks[0]}-hook, whose effect on the updates is unknown: remove it, or use a method "
            "that does not follow the inner optimiser's updates"
        )
