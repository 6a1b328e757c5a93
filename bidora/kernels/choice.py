"""Where the fused layer applies, and why it does not where it doesn't."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bilevel.errors import ConfigError, unknown_name

__all__ = ["MAX_RANK", "Kernels", "check_kernels", "choose", "impossible", "obstacle"]

Kernels = Literal["auto", "torch", "fused"]

MAX_RANK = 64
"""Of the Triton kernels: one program holds the Gram matrix AAᵀ."""


_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_kernels(kernels: str) -> None:
    """Raises ``UnknownNameError`` unless this is one of :data:`Kernels`."""
    if kernels not in get_args(Kernels):
        raise unknown_name("kernels", kernels, get_args(Kernels))


def choose(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    base_result: Tensor | None,
) -> bool:
    """Returns whether a layer is computed by :func:`bidora.kernels.fused_dora_linear`.

    Raises:
        ConfigError: "fused" is asked for and impossible.
        UnknownNameError: ``kernels`` is none of :data:`Kernels`.
    """
    check_kernels(kernels)
    if kernels == "torch" or (kernels == "auto" and not weight.is_cuda):
        return False
    reason = obstacle(x, weight, lora_A, lora_B, magnitude, bias, base_result)
    if kernels == "fused" and reason is not None:
        raise impossible(reason)
    return reason is None


def impossible(reason: str) -> ConfigError:
    """Returns the error for ``kernels="fused"`` where something is in the way."""
    return ConfigError(f"kernels='fused' is impossible here: {reason}. Use kernels='auto' to fall back to torch")


def obstacle(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    base_result: Tensor | None,
) -> str | None:
    """Returns why a layer cannot be fused, or None. Looks at no values."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses the torch operations itself"
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func, or forward-mode differentiation, is at work"
    device, dtype = weight.device, weight.dtype
    for tensor in (x, weight, lora_A, lora_B, magnitude, bias, base_result):
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a tensor is of type {type(tensor).__name__}"
        if tensor.device != device:
            return f"a tensor is on {tensor.device} and the weight on {device}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base layer's parameters require gradients"
    if dtype not in _DTYPES:
        return f"the range of {dtype} is too small to keep an output whose magnitude is 0"
    kind = device.type
    if kind not in ("cpu", "cuda"):
        return f"there are no kernels for {kind}"
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
        return f"autocast computes in {torch.get_autocast_dtype(kind)} and the weight is {dtype}"
    if base_result is not None and base_result.dtype != dtype:
        return f"the base result is {base_result.dtype} and the weight {dtype}"
    return _triton_obstacle(x, weight, lora_A, lora_B, magnitude) if kind == "cuda" else None


def _triton_obstacle(x: Tensor, weight: Tensor, *adapter: Tensor) -> str | None:
    if weight.dtype != torch.bfloat16:
        return f"on a GPU the weight must be bfloat16, not {weight.dtype}"
    if adapter[0].shape[0] > MAX_RANK:
        return f"on a GPU the rank is at most {MAX_RANK}, not {adapter[0].shape[0]}"
    if x.numel() == 0:
        return "the input is empty"
    for tensor in adapter:
        if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.is_contiguous():
            kind = f"{tensor.dtype} with strides {tensor.stride()}"
            return f"on a GPU adapters must be bfloat16 or float32 and contiguous, not {kind}"
    return _missing(weight.device.index)


@functools.cache
def _missing(device: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0, which has no bfloat16 matrix units"
    return None
