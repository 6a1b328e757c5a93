"""What is evaluated for all tasks without ``torch.func.vmap``: networks that are sequences of layers, and their losses.

``vmap`` finds out anew for each operation which of its arguments differ between tasks. For networks of a few thousand
parameters that takes as long as the operations do. Of what is known here, the operations on stacked tensors are
called at once. The numbers are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["Layers", "direct_losses", "layers_of", "outputs_of"]

Layers = list[tuple[str, nn.Module]]

_BY_ELEMENT = frozenset(
    {
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardtanh,
        nn.Identity,
        nn.LeakyReLU,
        nn.LogSigmoid,
        nn.Mish,
        nn.ReLU,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softsign,
        nn.Tanh,
    }
)
_CLASSES = torch.int64, torch.uint8
_IGNORED = -100
"""The class that the cross-entropy leaves out by default."""


def layers_of(network: nn.Module, inputs: Tensor) -> Layers | None:
    """Returns the layers of a sequence, with the prefixes of their parameters' names; None where one is not known here.

    Known are linear layers, ``Flatten``, dropout that drops nothing and functions of each element, as torch made them:
    no subclasses, no hooks.

    Args:
        network: The network.
        inputs: ``(M, n, …)``.
    """
    if inputs.dim() < 3 or _autocasts(inputs.device.type) or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    found = list(_flat("", network))
    if not all(_is_known(layer) for _, layer in found):
        return None
    parameters = [id(part) for _, layer in found for part in layer._parameters.values() if part is not None]
    return found if len(set(parameters)) == len(parameters) else None  # a shared one has a name of one layer only


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _flat(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential or _is_hooked(module):
        yield prefix, module
        return
    for name, part in module._modules.items():
        assert part is not None
        yield from _flat(f"{prefix}{name}.", part)


def _is_known(layer: nn.Module) -> bool:
    if _is_hooked(layer):
        return False
    if type(layer) is nn.Dropout:
        return layer.p == 0.0 or not layer.training
    if type(layer) is nn.Linear:
        return {"weight", "bias"} <= layer._parameters.keys()  # else somebody has put plain tensors in their places
    return type(layer) in _BY_ELEMENT or type(layer) is nn.Flatten


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def outputs_of(layers: Layers, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Returns the sequence's outputs ``(M, n, …)``.

    Args:
        layers: See :func:`layers_of`.
        values: By the names of the network's parameters, of the parameter's shape or ``(M, *shape)``.
        inputs: ``(M, n, …)``.
    """
    x = inputs
    for prefix, layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = (values.get(prefix + name, layer._parameters[name]) for name in ("weight", "bias"))
            assert weight is not None
            x = _linear(x, weight, bias)
        elif isinstance(layer, nn.Flatten):
            first, last = (place if place < 0 else place + 1 for place in (layer.start_dim, layer.end_dim))
            x = x.flatten(first, last)
        else:
            x = layer(x)  # dropout, too, which is off
    return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dim() == 2:
        bias = bias.unsqueeze(1)
    if weight.dim() == 2:
        if bias is None or bias.dim() == 1:
            return F.linear(x, weight, bias)
        return F.linear(x, weight) + bias.view(len(bias), *[1] * (x.dim() - 2), -1)
    # One vector of a task, where all of its inputs were flattened together; else rows of any shape.
    rows, turned = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2), weight.transpose(1, 2)
    found = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias, rows, turned)
    return found if x.dim() == 3 else found.view(*x.shape[:-1], weight.shape[1])


def direct_losses(criterion: Callable[..., Tensor], outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Returns ``criterion(outputs[i], targets[i])`` for every task, ``(M,)``; None for a criterion not known here."""
    if criterion is F.mse_loss and outputs.dim() > 1 and outputs.shape == targets.shape:
        return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)
    # Numbers of classes of other types are taken by the form of the operation that vmap calls, and by no other.
    classes = outputs.dim() == 3 and outputs.shape[:2] == targets.shape and targets.dtype in _CLASSES
    if criterion is F.cross_entropy and classes:
        found = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return found.sum(1) / (targets != _IGNORED).sum(1)
    return None
