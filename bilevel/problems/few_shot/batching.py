"""What layers do with the parameters of many tasks at once, where ``torch.func.vmap`` has a slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from bilevel.problems.few_shot.layers import Geometry, Window, convolution, normalisation, pooling

try:  # not public: see _applied
    from torch._C._functorch import _add_batch_dim, _unwrap_batched
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
except ImportError:
    HAS_STACKS = False
else:
    HAS_STACKS = True

__all__ = ["BatchedLayers", "has_batched_layers"]


def has_batched_layers(network: nn.Module, device: torch.device) -> bool:
    """Whether a network has layers that :class:`BatchedLayers` evaluates in a way of its own."""
    return any(
        (isinstance(part, _NormBase) and part.running_mean is None)
        or (isinstance(part, nn.Conv2d) and device.type in ("cpu", "cuda"))
        for part in network.modules()
    )


class BatchedLayers(TorchFunctionMode):
    """Within ``torch.func.vmap`` over tasks: layers of M tasks by operations that are made for it.

    - Batch normalisation of M tasks by C channels is one of M·C channels. ``vmap`` normalises all tasks at once and
      then applies each task's own scale and shift in two more passes over the activations, whose second derivatives
      take many more.
    - A convolution on CUDA, with kernels of each task's own, is a product of matrices in each image. ``vmap`` makes it
      a convolution in M groups.
    - On the CPU, convolutions, batch normalisation and max-pooling of images in float32 or float64 keep channels last
      in memory, see :mod:`~bilevel.problems.few_shot.layers`. ``vmap`` copies all images before each convolution and
      each pooling. Other layers between them see tensors of the shapes that they expect. ``view`` of such images as
      vectors is a copy, as ``reshape`` would be.

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
    """No argument differs between tasks, or another transform is at work than ``vmap`` over them."""


class _Rule(Function):
    """An operation of which only the rule for ``vmap`` is ever used: autograd knows the operations in it."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        raise _NotBatchedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""


class _Info(NamedTuple):
    batch_size: int


def _applied(rule: type[_Rule], *arguments: Any) -> Tensor:
    """Returns what a rule makes of arguments that ``vmap`` has stacked.

    ``rule.apply`` does the same and takes 0.1 ms more each time (torch 2.13): as long as a small layer. So that way is
    taken only where ``torch.compile`` captures the loss, which knows no other, and where torch's stacks are not to be
    had: what they are read by is not public, and this is nothing that should fail without.
    """
    if not HAS_STACKS or torch.compiler.is_compiling():
        traced: Tensor = rule.apply(*arguments)  # type: ignore[no-untyped-call]
        return traced
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    if level != 1 or not isinstance(interpreter, VmapInterpreter):
        raise _NotBatchedError
    pairs = [_unwrap_batched(part, level) if isinstance(part, Tensor) else (part, None) for part in arguments]
    if all(place is None for _, place in pairs):
        raise _NotBatchedError
    with interpreter.lower():
        values, places = zip(*pairs, strict=True)
        found, place = rule.vmap(_Info(interpreter.batch_size()), places, *values)  # type: ignore[no-untyped-call]
    stacked: Tensor = _add_batch_dim(found, place, level)
    return stacked


def _stacked(values: Tensor, place: int | None, count: int) -> Tensor:
    """Returns ``(M, …)``."""
    return values.expand(count, *values.shape) if place is None else values.movedim(place, 0)


def _images(values: Tensor, place: int | None, count: int) -> Tensor:
    """Returns ``(n, M, C, H, W)``."""
    return _stacked(values, place, count).transpose(0, 1)


def _channels_last(images: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a layer is one of :mod:`~bilevel.problems.few_shot.layers`."""
    return (
        images.device.type == "cpu"
        and images.dim() == 4
        and images.dtype in (torch.float32, torch.float64)
        and all(part is None or part.dtype == images.dtype for part in parameters)
        and not torch.is_autocast_enabled("cpu")
    )


def _by_matrices(images: Tensor) -> bool:
    """Whether a convolution is one of :func:`convolved`."""
    return images.device.type == "cuda"


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
    if _channels_last(input, weight, bias) and input.shape[0] * input.shape[2] * input.shape[3] > 1:
        return _applied(_NormalisedImages, input, weight, bias, eps)
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
        return found.reshape(found.shape[0], count, found.shape[1] // count, *found.shape[2:]), 1


class _NormalisedImages(_Rule):
    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Any, bias: Any, eps: float) -> Any:
        """Keeps tasks and channels apart."""
        count = info.batch_size
        scale, shift = (
            None if values is None else _stacked(values, place, count)
            for values, place in ((weight, dims[1]), (bias, dims[2]))
        )
        return normalisation(_images(x, dims[0], count), scale, shift, eps), 1


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
    if isinstance(padding, str) or input.dim() != 4:
        return None
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    if _channels_last(input, weight, bias):
        return _applied(_ConvolvedImages, input, weight, bias, geometry)
    if _by_matrices(input) and groups == 1:
        return _applied(_Convolved, input, weight, bias, geometry)
    return None


def _pair(value: _Pair) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return both[0], both[1]


class _ConvolvedImages(_Rule):
    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Any:
        """Takes all images for those of one task where the kernels are the same."""
        count = info.batch_size
        if dims[1] is not None:
            kernels = _stacked(weight, dims[1], count)
            shift = None if bias is None else _stacked(bias, dims[2], count)
            return convolution(_images(x, dims[0], count), kernels, shift, geometry), 1
        images = _stacked(x, dims[0], count).flatten(0, 1).unsqueeze(1)
        found = convolution(images, weight.unsqueeze(0), None, geometry)
        found = found.view(count, len(found) // count, *found.shape[2:])
        return _shifted(found, bias, dims[2], count), 0


class _Convolved(_Rule):
    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Any:
        """Takes all tasks' images as one of many channels apart, and multiplies by each task's kernels."""
        count, pairs = info.batch_size, (geometry.stride, geometry.padding, geometry.dilation)
        if dims[1] is None:  # the same kernels: one convolution of all images
            given = _stacked(x, dims[0], count)
            found = F.conv2d(given.flatten(0, 1), weight, None, *pairs)
            found = found.reshape(count, -1, *found.shape[1:])
        else:
            found = convolved(_stacked(x, dims[0], count), _stacked(weight, dims[1], count), *pairs)
        return _shifted(found, bias, dims[2], count), 0


def _shifted(found: Tensor, bias: Tensor | None, place: int | None, count: int) -> Tensor:
    """Returns the convolutions ``(M, n, C, H, W)`` with the bias added."""
    return found if bias is None else found + _stacked(bias, place, count)[:, None, :, None, None]


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


# --- pooling ----------------------------------------------------------------------------------------------------------


def _max_pool2d(
    input: Tensor,
    kernel_size: _Pair,
    stride: _Pair | None = None,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,  # never True: that is another function
) -> Tensor | None:
    if not _channels_last(input):
        return None
    size, steps = _pair(kernel_size), _pair(stride or kernel_size)
    return _applied(_Pooled, input, Window(size, steps, _pair(padding), _pair(dilation), ceil_mode))


class _Pooled(_Rule):
    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, window: Window) -> Any:
        """Keeps tasks and channels apart."""
        return pooling(_images(x, dims[0], info.batch_size), window), 1


# --- what expects channels first --------------------------------------------------------------------------------------


def _view(input: Tensor, *shape: Any, **named: Any) -> Tensor | None:
    """Copies where the layers' memory allows no view: ``x.view(len(x), -1)`` is what many networks end with."""
    try:
        return input.view(*shape, **named)
    except RuntimeError as error:
        if input.device.type != "cpu" or "not compatible" not in str(error):
            raise
        return input.contiguous().view(*shape, **named)


def _group_norm(input: Tensor, *settings: Any, **named: Any) -> Tensor | None:
    """Copies: ``vmap`` has no way to ask for another memory format, as that function does."""
    return F.group_norm(input.contiguous(), *settings, **named)  # of any dtype: a cast keeps the memory's order


_WAYS: Mapping[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _batch_norm,
    F.conv2d: _conv2d,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    Tensor.view: _view,
    F.group_norm: _group_norm,
}
