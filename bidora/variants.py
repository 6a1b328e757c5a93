"""The exact DoRA forward pass on convolutions and embeddings, as functions of tensors and as PEFT LoRA variants.

Each is :mod:`bidora.dora`'s formula on the matrix that :mod:`bidora.layers` sees in the weight: W' = m ⊙ V/‖V‖ with
V = W₀ + s·BA, and the norm of V by rows differentiated. A zero filter of a convolution, or a dimension that is zero for
all tokens, has no direction: its output is the bias, 0 for an embedding, and all its derivatives are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer, LoraVariant
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bidora.dora import ExactDoraVariant, dora_scale
from bidora.kernels import Kernels
from bidora.layers import DoraLayer, adapter_tensors, as_matrices, layer_squared_norm, weight_rows
from bidora.merging import merge, unmerge
from bidora.norm import accumulation_dtype, row_norm

__all__ = [
    "ExactDoraConv1dVariant",
    "ExactDoraConv2dVariant",
    "ExactDoraConv3dVariant",
    "ExactDoraEmbeddingVariant",
    "dora_convolution",
    "dora_embedding",
    "dora_layers",
    "exact_variant",
    "unsupported",
]

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def dora_convolution(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    base_result: Tensor | None = None,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Returns ``x * W' + bias = (m/‖V‖) ⊙ (x * W₀ + s·(x * A) * B) + bias``, with ∗ a convolution of 1 to 3 dimensions.

    Twice differentiable in x, A, B and m. Beyond the base layer: one convolution to r channels, a 1×1 convolution back
    to the output's, one pass over the output, and ``r·out·in·k`` multiply-adds for the norm.

    Args:
        x: Input, (batch, in, size…) or (in, size…).
        weight: W₀, (out, in, k…): one group, no dilation.
        lora_A: A, (r, in, k…).
        lora_B: B, (out, r, 1…).
        magnitude: m, (1, out, 1…).
        scaling: s.
        bias: (out,), or None.
        stride: As in ``F.conv2d``.
        padding: As in ``F.conv2d``.
        base_result: ``x * W₀ + bias`` where it is known.
        squared_norm: ‖W₀‖² by filters where it is known, (out,).

    Returns:
        The base layer's output shape, in the promoted dtype of the base result and the factors.
    """
    convolution = _CONVOLUTIONS[weight.ndim]
    scale = _convolution_scale(weight, lora_A, lora_B, magnitude, scaling, squared_norm)
    if base_result is None:
        base_result = convolution(x.to(weight.dtype), weight, bias, stride, padding)
    # as in `dora_linear`: the base result comes with its bias
    shift = None if bias is None else (1 - scale) * bias
    low_rank = _low_rank_convolution(x, lora_A, lora_B, scaling * scale, shift, stride, padding)
    return torch.addcmul(low_rank, base_result, _per_channel(scale, weight))


def dora_embedding(
    tokens: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    embed_scale: Tensor | float = 1.0,
    padding_idx: int | None = None,
    base_result: Tensor | None = None,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Returns rows of ``W' = (m/‖V‖) ⊙ V`` with ``V = W₀ + s·(BA)ᵀ``, norm over the tokens, times the scale.

    Twice differentiable in A, B and m, and dense: the norm depends on every column of A. Multiply-adds for n tokens:
    ``r·dim·(tokens + n)``.

    Args:
        tokens: Indices, (…).
        weight: W₀, (tokens, dim).
        lora_A: A, (r, tokens).
        lora_B: B, (dim, r).
        magnitude: m, (dim,).
        scaling: s.
        embed_scale: A constant factor of the layer's output, as some models have.
        padding_idx: The column of A that is held constant, as torch does with a padding token's row.
        base_result: The base layer's output where it is known.
        squared_norm: ‖W₀‖² by dimensions where it is known, (dim,).

    Returns:
        (…, dim), in the promoted dtype of the base result and the factors.
    """
    if padding_idx is not None:
        # In the norm as in the look-up. F.embedding's own padding_idx leaves the former, and half a gradient.
        before, column, after = lora_A.tensor_split([padding_idx % len(weight), padding_idx % len(weight) + 1], dim=1)
        lora_A = torch.cat([before, column.detach(), after], dim=1)
    scale = dora_scale(magnitude, row_norm(weight.T, lora_A, lora_B, scaling, squared_norm=squared_norm))
    if base_result is None:
        base_result = F.embedding(tokens, weight) * embed_scale
    hidden = F.embedding(tokens, lora_A.T)
    factors = (scaling * scale * embed_scale).unsqueeze(1) * lora_B
    return torch.addcmul(F.linear(hidden, factors.to(hidden.dtype)), base_result, scale)


def _convolution_scale(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, squared_norm: Tensor | None
) -> Tensor:
    """Returns m/‖V‖, (out,)."""
    norm = row_norm(*as_matrices(weight, lora_A, lora_B), scaling, squared_norm=squared_norm)
    return dora_scale(magnitude.flatten(), norm)


def _low_rank_convolution(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, factor: Tensor, shift: Tensor | None, stride: Any, padding: Any
) -> Tensor:
    convolution = _CONVOLUTIONS[lora_A.ndim]
    hidden = convolution(x, lora_A, None, stride, padding)
    # the factor goes into the (out, r) matrix, not onto the output
    rows = factor.view(-1, *(1,) * (lora_B.ndim - 1)) * lora_B
    return convolution(hidden, rows.to(hidden.dtype), None if shift is None else shift.to(hidden.dtype))


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Returns (out,) as (out, 1…), which fits outputs with and without a batch."""
    return values.view(-1, *(1,) * (weight.ndim - 2))


class _ExactDoraConvolution:
    """The methods of PEFT's ``LoraVariant`` that convolutions of all dimensions share."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output, given the base layer's."""
        base = module.get_base_layer()
        factors, scaling = adapter_tensors(module, active_adapter)
        squared_norm = layer_squared_norm(module, accumulation_dtype(base.weight, *factors))
        settings = {"stride": base.stride, "padding": base.padding}
        dropout = module.lora_dropout[active_adapter]
        if not module.training or isinstance(dropout, nn.Identity):
            return dora_convolution(
                x, base.weight, *factors, scaling, base.bias, **settings, base_result=result, squared_norm=squared_norm
            )
        # PEFT's meaning of dropout: base_result + drop(x) * (W' − W₀)
        dropped = dropout(x)
        scale = _convolution_scale(base.weight, *factors, scaling, squared_norm)
        low_rank = _low_rank_convolution(dropped, *factors[:2], scaling * scale, None, **settings)
        again = _CONVOLUTIONS[base.weight.ndim](dropped.to(base.weight.dtype), base.weight, None, **settings)
        return result + torch.addcmul(low_rank, again, _per_channel(scale - 1, base.weight))

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W', and unties the base weight."""
        return merge(DoraConv2dVariant, weight_rows, module, active_adapter, orig_weight)  # any dimension's is the same

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Replaces the base weight by W'."""
        merged = _ExactDoraConvolution.merge_safe(module, active_adapter, orig_weight)
        module.get_base_layer().weight.data = merged

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W₀."""
        return unmerge(DoraConv2dVariant, weight_rows, module, active_adapter, orig_weight)


class ExactDoraConv1dVariant(_ExactDoraConvolution, DoraConv1dVariant):
    """DoRA on nn.Conv1d with the norm differentiated, zero filters, and tied weights."""


class ExactDoraConv2dVariant(_ExactDoraConvolution, DoraConv2dVariant):
    """DoRA on nn.Conv2d with the norm differentiated, zero filters, and tied weights."""


class ExactDoraConv3dVariant(_ExactDoraConvolution, DoraConv3dVariant):
    """DoRA on nn.Conv3d with the norm differentiated, zero filters, and tied weights."""


class ExactDoraEmbeddingVariant(DoraEmbeddingVariant):
    """DoRA on nn.Embedding with the norm differentiated, zero dimensions, and tied weights. As PEFT's, no dropout."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output, given the base layer's."""
        base = module.get_base_layer()
        factors, scaling = adapter_tensors(module, active_adapter)
        embed_scale = module._get_embed_scale()
        return dora_embedding(
            x,
            base.weight,
            *factors,
            scaling,
            # rounded as in the base layer's own forward pass
            embed_scale=1.0 if embed_scale is None else embed_scale.to(base.weight.dtype),
            padding_idx=base.padding_idx,
            base_result=result,
            squared_norm=layer_squared_norm(module, accumulation_dtype(base.weight, *factors)),
        )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W', and unties the base weight, which an output layer often shares."""
        return merge(DoraEmbeddingVariant, weight_rows, module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Replaces the base weight by W'."""
        merged = ExactDoraEmbeddingVariant.merge_safe(module, active_adapter, orig_weight)
        module.get_base_layer().weight.data = merged

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns W₀."""
        return unmerge(DoraEmbeddingVariant, weight_rows, module, active_adapter, orig_weight)


_EXACT: dict[type[LoraLayer], tuple[type[LoraVariant], type[LoraVariant]]] = {
    Linear: (DoraLinearVariant, ExactDoraVariant),
    Conv1d: (DoraConv1dVariant, ExactDoraConv1dVariant),
    Conv2d: (DoraConv2dVariant, ExactDoraConv2dVariant),
    Conv3d: (DoraConv3dVariant, ExactDoraConv3dVariant),
    Embedding: (DoraEmbeddingVariant, ExactDoraEmbeddingVariant),
}
_INSTALLED = tuple(exact for _, exact in _EXACT.values())

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unsupported(module: nn.Module) -> str | None:
    """Returns why a base layer cannot have the exact DoRA forward, or None."""
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    if not isinstance(module, kinds):
        return (
            f"it is a {type(module).__name__}; this version adapts nn.Linear, transformers' Conv1D, nn.Conv1d, "
            "nn.Conv2d, nn.Conv3d and nn.Embedding"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so that an adapter would do nothing"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in _WEIGHT_DTYPES:
        return (
            f"its weight is a {type(weight).__name__} of {weight.dtype}, and quantised or sharded ones are unsupported"
        )
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _unsupported_convolution(module)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "its max_norm rescales weights in the forward pass; use max_norm=None"
        if module.scale_grad_by_freq:
            return "with scale_grad_by_freq=True its gradients are derivatives of no loss; use False"
    return None


def _unsupported_convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
    if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:
        return f"{type(module).__name__} has a forward pass of its own, not nn.{kind.__name__}'s"
    if module.groups != 1:
        return f"it has groups={module.groups}, for which PEFT's DoRA takes the norm of another matrix than its weight"
    if module.padding_mode != "zeros":
        return f"it has padding_mode={module.padding_mode!r}, and PEFT's adapters pad with zeros"
    if any(step != 1 for step in module.dilation):
        return f"it has dilation={module.dilation}, which PEFT's adapters leave out"
    return None


def exact_variant(layer: LoraLayer, adapter: str, kernels: Kernels = "auto") -> LoraVariant | str:
    """Returns the exact forward for a DoRA adapter on a layer of PEFT's, or why there is none."""
    reason = unsupported(layer.get_base_layer())
    if reason is not None:
        return reason
    if type(layer) not in _EXACT:
        return f"PEFT adapts it by {type(layer).__name__}"
    plain, exact = _EXACT[type(layer)]
    variant = layer.lora_variant.get(adapter)
    if type(variant) not in (plain, exact):
        return f"its variant is {type(variant).__name__}"
    return ExactDoraVariant(kernels) if exact is ExactDoraVariant else exact()


def dora_layers(model: nn.Module) -> Iterator[tuple[str, DoraLayer, str]]:
    """Yields ``(name, layer, adapter)`` for every active adapter with the exact forward on a layer of the model."""
    for name, module in model.named_modules():
        if isinstance(module, DoraLayer):
            for adapter in module.active_adapters:
                if isinstance(module.lora_variant.get(adapter), _INSTALLED):
                    yield name, module, adapter
