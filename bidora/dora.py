"""The exact DoRA forward pass, as functions of tensors and as a PEFT LoRA variant.

    W' = m ⊙ V/‖V‖        with        V = W₀ + s·BA

and the norm taken by rows, over the input dimension. Unlike in DoRA's paper and in PEFT the norm is *not* detached:
with a detached norm the inner gradient is no gradient of any loss, its Jacobian is not symmetric, and second-order
products are wrong.

Shapes everywhere: W₀ (out, in), A (r, in), B (out, r), m (out,), x (…, in).

A row with V = 0 has no direction. Its unit direction is *defined* as the constant 0: the row's output is the bias,
and all its derivatives are 0, of any order. At the start m = ‖W₀‖ is 0 there too, so the adapted model equals the base
model, and the zero gradients keep it so. Plain PEFT divides by the norm and gives NaN for such rows, unless V is tiny
instead of zero: :func:`bidora.get_bidora_model` sees to that.

Source: Liu et al. 2024 (arXiv 2402.09353), equation 5, without the detaching of section 4.3.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from bidora.frozen import FrozenCache
from bidora.norm import accumulation_dtype, row_norm, squared_row_norm

__all__ = [
    "FROZEN_CACHE",
    "ExactDoraVariant",
    "dora_layers",
    "dora_linear",
    "dora_linear_with_dropout",
    "dora_scale",
    "dora_tensors",
    "dora_weight",
    "layer_row_norm",
    "remembered",
]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    base_result: Tensor | None = None,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Returns ``x W'ᵀ + bias = (m/‖V‖) ⊙ (x W₀ᵀ + s·(x Aᵀ) Bᵀ) + bias``.

    Twice differentiable in x, A, B and m. Multiply-adds for n rows of x, beyond those of the base layer:
    ``r·(n·in + n·out + out·in + r·in + r·out)``, and one pass over the (n, out) output.

    Args:
        x: Input, (…, in).
        weight: W₀, (out, in); a transposed view for layers that store (in, out).
        lora_A: A, (r, in).
        lora_B: B, (out, r).
        magnitude: m, (out,).
        scaling: s.
        bias: (out,), or None.
        base_result: ``x W₀ᵀ + bias`` where it is known.
        squared_norm: ‖W₀‖² by rows where it is known; see :func:`bidora.norm.squared_row_norm`.

    Returns:
        (…, out), in the promoted dtype of the base result and the factors.
    """
    scale = dora_scale(magnitude, row_norm(weight, lora_A, lora_B, scaling, squared_norm=squared_norm))
    if base_result is None:
        base_result = F.linear(x.to(weight.dtype), weight, bias)
    # g ⊙ (W₀x + b) + (1 − g) ⊙ b: the base result comes with its bias, and taking that off first would cost a pass.
    # With g = 1 and B = 0 this is the base result to the last bit.
    shift = None if bias is None else (1 - scale) * bias
    return torch.addcmul(_low_rank(x, lora_A, lora_B, scaling * scale, shift), base_result, scale)


def dora_linear_with_dropout(
    dropped: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    base_result: Tensor,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Returns ``base_result + drop(x) (W' − W₀)ᵀ``: PEFT's meaning of dropout on a DoRA layer.

    Costs a second product with W₀.

    Args:
        dropped: The layer's input after dropout, (…, in).
        weight: W₀, (out, in).
        lora_A: A, (r, in).
        lora_B: B, (out, r).
        magnitude: m, (out,).
        scaling: s.
        base_result: ``x W₀ᵀ + bias`` of the input *before* dropout.
        squared_norm: ‖W₀‖² by rows where it is known.
    """
    scale = dora_scale(magnitude, row_norm(weight, lora_A, lora_B, scaling, squared_norm=squared_norm))
    base = F.linear(dropped.to(weight.dtype), weight)
    return base_result + torch.addcmul(_low_rank(dropped, lora_A, lora_B, scaling * scale, None), base, scale - 1)


def dora_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Returns m/‖V‖, (out,), with 0 and zero derivatives for zero rows."""
    zero = norm == 0
    # both branches of a `where` are differentiated: the one not taken has to be finite too
    return torch.where(zero, 0.0, magnitude / torch.where(zero, 1.0, norm))


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor, factor: Tensor, shift: Tensor | None) -> Tensor:
    hidden = F.linear(x, lora_A)
    # the factor goes into the (out, r) matrix, not onto the (n, out) result
    rows = factor.unsqueeze(1) * lora_B
    return F.linear(hidden, rows.to(hidden.dtype), None if shift is None else shift.to(hidden.dtype))


FROZEN_CACHE = "bidora-frozen"
"""Where a layer keeps its :class:`~bidora.frozen.FrozenCache`: in PEFT's ``_caches``, which no state dict has."""


class ExactDoraVariant(DoraLinearVariant):
    """DoRA on nn.Linear and transformers' Conv1D with the norm differentiated, zero rows, and tied weights.

    Implements PEFT's ``LoraVariant``; parameters, initialisation and file format are PEFT's.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output, given the base layer's."""
        weight, factors, scaling = dora_tensors(module, active_adapter)
        squared_norm = _squared_norm(module, accumulation_dtype(weight, *factors))
        dropout = module.lora_dropout[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            return dora_linear_with_dropout(
                dropout(x), weight, *factors, scaling, base_result=result, squared_norm=squared_norm
            )
        bias = _base_layer(module).bias
        return dora_linear(x, weight, *factors, scaling, bias, base_result=result, squared_norm=squared_norm)

    @staticmethod
    @torch.no_grad()
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W', and unties the base weight so that PEFT does not write it into other layers."""
        merged: Tensor = DoraLinearVariant.merge_safe(module, active_adapter, orig_weight)
        base = _base_layer(module)
        norm = module._caches[f"{active_adapter}-weight_norm"]
        # W' does not determine V in these rows, so V has to be kept
        lost = ((norm == 0) | (module.lora_magnitude_vector[active_adapter].weight == 0)).nonzero().squeeze(1)
        module._cache_store(_lost_rows(active_adapter), (lost, _rows(module, base.weight.detach())[lost].clone()))
        _rows(module, merged)[lost] = 0.0
        module._cache_store(_unmerged(active_adapter), _WeakParameter(base.weight))
        base.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        return merged

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Replaces the base weight by W'."""
        merged = ExactDoraVariant.merge_safe(module, active_adapter, orig_weight)
        module.get_base_layer().weight.data = merged

    @staticmethod
    @torch.no_grad()
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W₀: the very parameter where another layer still holds it, and V/W' arithmetic otherwise."""
        if _lost_rows(active_adapter) not in module._caches:  # merged by plain PEFT
            return DoraLinearVariant.unmerge(module, active_adapter, orig_weight)
        lost, rows = module._cache_pop(_lost_rows(active_adapter))
        original: nn.Parameter | None = module._cache_pop(_unmerged(active_adapter)).get()
        if original is not None:
            module._cache_pop(f"{active_adapter}-weight_norm")
            _base_layer(module).weight = original
            return original.detach()
        weight: Tensor = DoraLinearVariant.unmerge(module, active_adapter, orig_weight)
        _rows(module, weight)[lost] = rows
        return weight


def dora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear, str]]:
    """Yields ``(name, layer, adapter)`` for every active adapter with the exact forward on a layer of the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            for adapter in module.active_adapters:
                if isinstance(module.lora_variant.get(adapter), ExactDoraVariant):
                    yield name, module, adapter


def layer_row_norm(layer: LoraLinear, adapter: str) -> Tensor:
    """Returns ‖V‖ by rows of a layer, (out,), exactly as its forward pass computes it."""
    weight, (lora_A, lora_B, _), scaling = dora_tensors(layer, adapter)
    squared_norm = _squared_norm(layer, accumulation_dtype(weight, lora_A, lora_B))
    return row_norm(weight, lora_A, lora_B, scaling, squared_norm=squared_norm)


def dora_weight(layer: LoraLinear, adapter: str) -> Tensor:
    """Returns W' = m ⊙ V/‖V‖ of an unmerged layer as a dense (out, in) matrix, for analysis."""
    weight, (lora_A, lora_B, magnitude), scaling = dora_tensors(layer, adapter)
    scale = dora_scale(magnitude, layer_row_norm(layer, adapter))
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    V = torch.addmm(weight.to(dtype), lora_B.to(dtype), lora_A.to(dtype), alpha=scaling)
    return scale.unsqueeze(1) * V


def dora_tensors(layer: LoraLinear, adapter: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float]:
    """Returns a layer's ``W₀, (A, B, m), s``."""
    modules = (layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_magnitude_vector[adapter])
    lora_A, lora_B, magnitude = (cast(Tensor, module.weight) for module in modules)
    return _rows(layer, _base_layer(layer).weight), (lora_A, lora_B, magnitude), float(layer.scaling[adapter])


def remembered(layer: LoraLinear, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns ``compute(W₀)`` of a layer, computed once while W₀ is frozen and unchanged."""
    cache: FrozenCache = layer._caches.setdefault(FROZEN_CACHE, FrozenCache())
    weight = _base_layer(layer).weight
    return cache.get(name, weight, lambda: compute(_rows(layer, weight)))


def _base_layer(layer: LoraLinear) -> nn.Linear:
    return cast(nn.Linear, layer.get_base_layer())  # or a Conv1D, which has the same attributes


def _rows(layer: LoraLinear, weight: Tensor) -> Tensor:
    """Returns a layer's weight as (out, in)."""
    return weight.T if layer.fan_in_fan_out else weight


def _squared_norm(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    return remembered(layer, f"squared row norm, {dtype}", lambda weight: squared_row_norm(weight, dtype))


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
