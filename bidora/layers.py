"""DoRA layers of all kinds as one: a matrix W₀, factors A and B, magnitudes m, and the norm of W₀ + s·BA by rows.

| layer | W₀ as stored | rows | columns | A | B | m |
|---|---|---|---|---|---|---|
| Linear | (out, in); Conv1D (in, out) | out | in | (r, in) | (out, r) | (out,) |
| Conv1d, Conv2d, Conv3d | (out, in, k…) | out | in·k… | (r, in, k…) | (out, r, 1…) | (1, out, 1…) |
| Embedding | (tokens, dim) | dim | tokens | (r, tokens) | (dim, r) | (dim,) |

Shapes and names are PEFT's, and so is the embedding's norm: over the tokens, with one magnitude a dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from torch import Tensor

from bidora.dora import FROZEN_CACHE, dora_scale, layer_row_norm
from bidora.frozen import FrozenCache
from bidora.norm import accumulation_dtype, row_norm, squared_row_norm

__all__ = [
    "DoraLayer",
    "adapter_tensors",
    "as_matrices",
    "direction_names",
    "layer_matrices",
    "layer_norm",
    "layer_squared_norm",
    "layer_weight",
    "remembered",
    "weight_rows",
]

DoraLayer: TypeAlias = Linear | Conv1d | Conv2d | Conv3d | Embedding
"""A layer of PEFT's that can have the exact forward."""


def weight_rows(layer: Any, weight: Tensor) -> Tensor:
    """Returns a layer's weight with its rows along the first dimension: the weight, or a transposed view."""
    # an Embedding has the flag of its configuration, which is not about it
    return weight.T if isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False) else weight


def adapter_tensors(layer: Any, adapter: str) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Returns an adapter's ``(A, B, m), s`` in PEFT's shapes."""
    magnitude = layer.lora_magnitude_vector[adapter].weight
    if isinstance(layer, Embedding):
        factors = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return (*factors, magnitude), float(layer.scaling[adapter])


def direction_names(layer: Any, adapter: str) -> tuple[str, str]:
    """Returns the names of A and B in a layer."""
    if isinstance(layer, Embedding):
        return f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
    return f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"


def as_matrices(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a convolution's ``W₀ (out, in·k…), A (r, in·k…), B (out, r)``, and matrices as they are.

    Columns are in the weight's order in memory, so that those in ``channels_last`` are views too.
    """
    if weight.ndim > 2 and not weight.is_contiguous():
        weight, lora_A = weight.movedim(1, -1), lora_A.movedim(1, -1)
    return weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1)


def layer_matrices(layer: DoraLayer, adapter: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float]:
    """Returns a layer's ``W₀ (rows, columns), (A (r, columns), B (rows, r), m (rows,)), s``."""
    (lora_A, lora_B, magnitude), scaling = adapter_tensors(layer, adapter)
    weight, lora_A, lora_B = as_matrices(weight_rows(layer, _base_weight(layer)), lora_A, lora_B)
    return weight, (lora_A, lora_B, magnitude.flatten()), scaling


def layer_norm(layer: DoraLayer, adapter: str) -> Tensor:
    """Returns ‖V‖ by rows of a layer, (rows,), exactly as its forward pass computes it."""
    if isinstance(layer, Linear):
        return layer_row_norm(layer, adapter)
    weight, (lora_A, lora_B, _), scaling = layer_matrices(layer, adapter)
    squared_norm = layer_squared_norm(layer, accumulation_dtype(weight, lora_A, lora_B))
    return row_norm(weight, lora_A, lora_B, scaling, squared_norm=squared_norm)


def layer_weight(layer: DoraLayer, adapter: str) -> Tensor:
    """Returns W' = m ⊙ V/‖V‖ of an unmerged layer as a dense (rows, columns) matrix, for analysis."""
    (lora_A, lora_B, magnitude), scaling = adapter_tensors(layer, adapter)
    weight = weight_rows(layer, _base_weight(layer)).flatten(1)
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    A, B = lora_A.flatten(1).to(dtype), lora_B.flatten(1).to(dtype)
    V = torch.addmm(weight.to(dtype), B, A, alpha=scaling)
    return dora_scale(magnitude.flatten(), layer_norm(layer, adapter)).unsqueeze(1) * V


def layer_squared_norm(layer: DoraLayer, dtype: torch.dtype) -> Tensor:
    """Returns ‖W₀‖² by rows of a layer, (rows,), computed once while W₀ is frozen and unchanged."""
    return remembered(layer, f"squared row norm, {dtype}", lambda weight: squared_row_norm(weight, dtype))


def remembered(layer: DoraLayer, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns ``compute(W₀)`` of a layer's matrix W₀, computed once while W₀ is frozen and unchanged."""
    cache: FrozenCache = layer._caches.setdefault(FROZEN_CACHE, FrozenCache())
    weight = _base_weight(layer)

    def value() -> Tensor:
        rows = weight_rows(layer, weight)
        return compute(as_matrices(rows, rows, rows)[0])

    return cache.get(name, weight, value)


def _base_weight(layer: DoraLayer) -> Tensor:
    return cast(Tensor, layer.get_base_layer().weight)
