"""Folding DoRA's W' into base layers of any kind, and taking it out again.

PEFT's variants do the arithmetic; what is added here is what it loses: rows that W' says nothing about, and weights
that other layers hold too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

__all__ = ["merge", "unmerge"]

Rows = Callable[[Any, Tensor], Tensor]
"""``(layer, weight) -> view`` of a weight that has the rows, whose norm DoRA takes, along its first dimension."""


@torch.no_grad()
def merge(variant: type[LoraVariant], rows: Rows, layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """Returns W' by a PEFT variant's ``merge_safe``, and unties the base weight: other layers may hold it.

    Rows with V = 0 or m = 0 become 0, and their V is kept for :func:`unmerge`: W' does not determine it.
    """
    merged: Tensor = variant.merge_safe(layer, adapter, weight)
    base = layer.get_base_layer()
    norm = layer._caches[f"{adapter}-weight_norm"].flatten()
    magnitude = layer.lora_magnitude_vector[adapter].weight.flatten()
    lost = ((norm == 0) | (magnitude == 0)).nonzero().squeeze(1)
    layer._cache_store(_lost_rows(adapter), (lost, rows(layer, base.weight.detach())[lost].clone()))
    rows(layer, merged)[lost] = 0.0
    layer._cache_store(_unmerged(adapter), _WeakParameter(base.weight))
    base.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
    return merged


@torch.no_grad()
def unmerge(variant: type[LoraVariant], rows: Rows, layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """Returns W₀: the very parameter where another layer still holds it, and V/W' arithmetic otherwise."""
    if _lost_rows(adapter) not in layer._caches:  # merged by plain PEFT
        return variant.unmerge(layer, adapter, weight)
    lost, kept = layer._cache_pop(_lost_rows(adapter))
    original: nn.Parameter | None = layer._cache_pop(_unmerged(adapter)).get()
    if original is not None:
        layer._cache_pop(f"{adapter}-weight_norm")
        layer.get_base_layer().weight = original
        return original.detach()
    unmerged: Tensor = variant.unmerge(layer, adapter, weight)
    rows(layer, unmerged)[lost] = kept
    return unmerged


def _lost_rows(adapter: str) -> str:
    return f"{adapter}-lost-rows"


def _unmerged(adapter: str) -> str:
    return f"{adapter}-unmerged-weight"


class _WeakParameter:
    """A parameter, as long as somebody else holds it; empty in copies and pickles."""

    def __init__(self, parameter: Tensor | None = None) -> None:
        self._reference = None if parameter is None else weakref.ref(parameter)

    def get(self) -> nn.Parameter | None:
        value = None if self._reference is None else self._reference()
        return value if isinstance(value, nn.Parameter) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _WeakParameter:
        return _WeakParameter()

    def __reduce__(self) -> tuple[type[_WeakParameter], tuple[()]]:
        return _WeakParameter, ()
