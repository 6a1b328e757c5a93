"""What layers do with the parameters of many tasks at once, where ``torch.func.vmap`` has a slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

__all__ = ["BatchedLayers", "has_batched_layers"]


def has_batched_layers(network: nn.Module, device: torch.device) -> bool:
    """Whether a network has layers that :class:`BatchedLayers` evaluates in a way of its own."""
    return any(
        (isinstance(part, _NormBase) and part.running_mean is None)
        or (isinstance(part, nn.Conv2d) and device.type == "cuda")
        for part in network.modules()
    )


class BatchedLayers(TorchFunctionMode):
    """Within ``torch.func.vmap`` over tasks: layers of M tasks by operations that are made for it.

    - Batch normalisation of M tasks by C channels is one of M·C channels. ``vmap`` normalises all tasks at once and
      then applies each task's own scale and shift in two more passes over the activations, whose second derivatives
      take many more.
    - A convolution on CUDA, with kernels of each task's own, is a product of matrices in each image. ``vmap`` makes it
      a convolution in M groups. On the CPU it stays one.

    The numbers are the same to rounding.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the layer's own way, where there is one for the arguments."""
        way = _WAYS.get(func)
        if way is not None:
            try:
                found = way(*args, **(kwargs or {}))
            except _NotBatchedError:
                found = None
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


class _NotBatchedError(Exception):
    """No argument differs between tasks."""


class _Rule(Function):
    """An operation of which only the rule for ``vmap`` is ever used: autograd knows the operations in it."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        raise _NotBatchedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""


def _applied(rule: type[Function], *arguments: Any) -> Tensor:
    found: Tensor = rule.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


def _stacked(values: Tensor, place: int | None, count: int) -> Tensor:
    """Returns ``(M, …)``."""
    return values.expand(count, *values.shape) if place is None else values.movedim(place, 0)


# --- batch normalisation ----------------------------------------------------------------------------------------------


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if running_mean is not None or running_var is not None or not training:
        return None
    return _applied(_Normalised, input, weight, bias, eps)


class _Normalised(_Rule):
    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Any, bias: Any, eps: float) -> Any:
        """Makes tasks and channels one dimension."""
        count = info.batch_size
        x = _stacked(x, dims[0], count).transpose(0, 1)
        scale, shift = (
            None if values is None else _stacked(values, place, count).reshape(-1)
            for values, place in ((weight, dims[1]), (bias, dims[2]))
        )
        joined = x.reshape(x.shape[0], count * x.shape[2], *x.shape[3:])
        found = F.batch_norm(joined, None, None, scale, shift, True, 0.0, eps)
        return found.reshape(found.shape[0], count, -1, *found.shape[2:]), 1


# --- convolution ------------------------------------------------------------------------------------------------------

_Pair = int | tuple[int, ...]


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair | str = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> Tensor | None:
    if input.device.type != "cuda" or isinstance(padding, str) or groups != 1 or input.dim() != 4:
        return None
    return _applied(_Convolved, input, weight, bias, *(_pair(value) for value in (stride, padding, dilation)))


def _pair(value: _Pair) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return both[0], both[1]


class _Convolved(_Rule):
    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Any:
        """Takes all tasks' images as one of many channels apart, and multiplies by each task's kernels."""
        count = info.batch_size
        if dims[1] is None:  # the same kernels: one convolution of all images
            given = _stacked(x, dims[0], count)
            found = F.conv2d(given.flatten(0, 1), weight, None, stride, padding, dilation)
            found = found.reshape(count, -1, *found.shape[1:])
        else:
            found = convolved(_stacked(x, dims[0], count), _stacked(weight, dims[1], count), stride, padding, dilation)
        if bias is not None:
            found = found + _stacked(bias, dims[2], count)[:, None, :, None, None]
        return found, 0


def convolved(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Returns the convolutions of each task's images ``(M, n, C, H, W)`` with its kernels ``(M, O, C, h, w)``.

    Memory: the images' patches, h·w times the images, kept for the backward pass.
    """
    count, images, channels, *size = x.shape
    kernel = weight.shape[-2:]
    rows, columns = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    flat = x.reshape(1, count * images * channels, *size)  # channels and images are alike to unfold
    patches = F.unfold(flat, kernel, dilation, padding, stride)
    patches = patches.view(count, images, channels * kernel.numel(), rows * columns)
    patches = patches.transpose(1, 2).reshape(count, channels * kernel.numel(), -1)
    found = torch.bmm(weight.flatten(2), patches)
    return found.view(count, -1, images, rows, columns).transpose(1, 2)


_WAYS: Mapping[Any, Callable[..., Tensor | None]] = {F.batch_norm: _batch_norm, F.conv2d: _conv2d}
