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

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bidora.frozen import FrozenCache
from bidora.kernels import Kernels, check_kernels, choose, fused_dora_linear, impossible
from bidora.merging import merge, unmerge
from bidora.norm import accumulation_dtype, row_norm, squared_row_norm

__all__ = [
    "FROZEN_CACHE",
    "ExactDoraVariant",
    "dora_linear",
    "dora_linear_with_dropout",
    "dora_scale",
    "dora_tensors",
    "dora_weight",
    "layer_row_norm",
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
    kernels: Kernels = "auto",
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
        base_result: ``x W₀ᵀ + bias`` where it is known. Its derivatives may be taken through x.
        squared_norm: ‖W₀‖² by rows where it is known; see :func:`bidora.norm.squared_row_norm`.
        kernels: "torch" for differentiable torch operations, "fused" for one autograd function with fused kernels, or
            "auto" for the latter where it is faster: see :mod:`bidora.kernels`.

    Returns:
        (…, out), in the promoted dtype of the base result and the factors; fused, in the base result's.

    Raises:
        ConfigError: "fused" is impossible here; the message says why.
    """
    if choose(kernels, x, weight, lora_A, lora_B, magnitude, bias, base_result):
        x = x.to(weight.dtype)
        if base_result is None:
            with torch.no_grad():
                base_result = F.linear(x, weight, bias)
        return fused_dora_linear(
            x, weight, lora_A, lora_B, magnitude, scaling, bias, base_result, reference=_in_torch_operations
        )
    scale = dora_scale(magnitude, row_norm(weight, lora_A, lora_B, scaling, squared_norm=squared_norm))
    if base_result is None:
        base_result = F.linear(x.to(weight.dtype), weight, bias)
    # g ⊙ (W₀x + b) + (1 − g) ⊙ b: the base result comes with its bias, and taking that off first would cost a pass.
    # With g = 1 and B = 0 this is the base result to the last bit.
    shift = None if bias is None else (1 - scale) * bias
    return torch.addcmul(_low_rank(x, lora_A, lora_B, scaling * scale, shift), base_result, scale)


_in_torch_operations = functools.partial(dora_linear, kernels="torch")


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
    # PEFT's layers leave the input as it is, and autocast converts both
    hidden = F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype), lora_A)
    # the factor goes into the (out, r) matrix, not onto the (n, out) result
    rows = factor.unsqueeze(1) * lora_B
    return F.linear(hidden, rows.to(hidden.dtype), None if shift is None else shift.to(hidden.dtype))


FROZEN_CACHE = "bidora-frozen"
"""Where a layer keeps its :class:`~bidora.frozen.FrozenCache`: in PEFT's ``_caches``, which no state dict has."""


class ExactDoraVariant(DoraLinearVariant):
    """DoRA on nn.Linear and transformers' Conv1D with the norm differentiated, zero rows, and tied weights.

    Implements PEFT's ``LoraVariant``; parameters, initialisation and file format are PEFT's.

    Args:
        kernels: How it is computed: see :mod:`bidora.kernels`.
    """

    def __init__(self, kernels: Kernels = "auto") -> None:
        check_kernels(kernels)
        self.kernels = kernels

    # PEFT declares it static, and calls it on the instance
    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Returns the layer's output, given the base layer's."""
        base = _base_layer(module)
        weight, factors, scaling = _tensors(module, base, active_adapter)
        dropout = module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        if self._is_fused(module, base, drops, x, weight, *factors, base.bias, result):
            return fused_dora_linear(
                x.to(weight.dtype), weight, *factors, scaling, base.bias, result, reference=_in_torch_operations
            )
        squared_norm = _squared_norm(module, accumulation_dtype(weight, *factors))
        if drops:
            return dora_linear_with_dropout(
                dropout(x), weight, *factors, scaling, base_result=result, squared_norm=squared_norm
            )
        return dora_linear(
            x, weight, *factors, scaling, base.bias, base_result=result, squared_norm=squared_norm, kernels="torch"
        )

    def _is_fused(self, module: Any, base: nn.Module, drops: bool, *arguments: Any) -> bool:
        if self.kernels == "torch" or (self.kernels == "auto" and not arguments[0].is_cuda):
            return False
        reason = "there is dropout in training" if drops else _base_obstacle(module, base)
        if reason is None:
            return choose(self.kernels, *arguments)
        if self.kernels == "fused":
            raise impossible(reason)
        return False

    @staticmethod
    @torch.no_grad()
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W', and unties the base weight so that PEFT does not write it into other layers."""
        return merge(DoraLinearVariant, _rows, module, active_adapter, orig_weight)

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
        return unmerge(DoraLinearVariant, _rows, module, active_adapter, orig_weight)


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
    return _tensors(layer, _base_layer(layer), adapter)


def _tensors(layer: LoraLinear, base: nn.Linear, adapter: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float]:
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    factors = cast(tuple[Tensor, Tensor, Tensor], (lora_A, lora_B, layer.lora_magnitude_vector[adapter].weight))
    return _rows(layer, base.weight), factors, float(layer.scaling[adapter])


def _base_obstacle(layer: LoraLinear, base: nn.Module) -> str | None:
    """Returns why a base layer's result may be something else than ``x W₀ᵀ + b`` of the input, or None."""
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is a {type(base).__name__}"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer has hooks"
    if "forward" in vars(base):
        return "the base layer's forward is replaced"
    if len(layer.active_adapters) > 1:
        return f"{len(layer.active_adapters)} adapters are active"
    return None


def _base_layer(layer: LoraLinear) -> nn.Linear:
    return cast(nn.Linear, layer.get_base_layer())  # or a Conv1D, which has the same attributes


def _rows(layer: LoraLinear, weight: Tensor) -> Tensor:
    """Returns a layer's weight as (out, in)."""
    return weight.T if layer.fan_in_fan_out else weight


def _squared_norm(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    """Returns ‖W₀‖² by rows, computed once while W₀ is frozen and unchanged."""
    cache: FrozenCache = layer._caches.setdefault(FROZEN_CACHE, FrozenCache())
    weight = _base_layer(layer).weight
    return cache.get(f"squared row norm, {dtype}", weight, lambda: squared_row_norm(_rows(layer, weight), dtype))
