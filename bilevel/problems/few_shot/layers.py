"""Layers of images of many tasks on the CPU, channels last in memory, with derivatives of every order.

Images are ``(n, M, C, H, W)``: n of each of M tasks with C channels. In memory the tasks' channels lie side by side,
``(n, H, W, M, C)``: kernels take up to M·C numbers at once, and between layers nothing is copied.
torch's own layers work this way too (``torch.channels_last``), but

- its batch normalisation adds up a channel's numbers one by one there, in float32: 25 normalised images of 28 × 28 were
  wrong by 2e-4 (torch 2.13). Here sums are pairwise, and of numbers less their mean: they are wrong by 2e-7, however
  far from zero the mean is;
- it takes the second derivatives of a convolution with a task's own kernels task by task. Here a convolution has three
  forms, ``y(x, w)``, ``x̄(ȳ, w)`` and ``w̄(x, ȳ)``, each linear in both arguments: the derivatives of any of them are the
  other two.

Each operation keeps what it was given, and from that its derivatives are computed again where a graph of them is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Geometry", "Window", "convolution", "normalisation", "pooling"]

_Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How a convolution goes over an image.

    Attributes:
        stride: By rows and columns, as all pairs.
        padding: Zeros at each side.
        dilation: Distance of a kernel's elements.
        groups: Of channels, in a task.
    """

    stride: _Pair
    padding: _Pair
    dilation: _Pair
    groups: int


@dataclass(frozen=True)
class Window:
    """Of what a maximum is taken.

    Attributes:
        size: Rows and columns.
        stride: By rows and columns, as all pairs.
        padding: Rows and columns beyond the image, at each side.
        dilation: Distance of a window's elements.
        ceil: Whether the last window may end beyond the image.
    """

    size: _Pair
    stride: _Pair
    padding: _Pair
    dilation: _Pair
    ceil: bool


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Returns each task's images convolved with its kernels, ``(n, M, O, h, w)``.

    Args:
        x: ``(n, M, C, H, W)``.
        weight: ``(M, O, C / groups, rows, columns)``.
        bias: ``(M, O)``.
        geometry: The same for all tasks.
    """
    found: Tensor = _applied(_Convolution, x, weight, bias, geometry)
    return found


def normalisation(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """Returns ``scale (x − μ) / σ + shift``, ``σ² = var + eps``: mean and variance are of a task's channel.

    Args:
        x: ``(n, M, C, H, W)``, with n·H·W above 1.
        scale: ``(M, C)``; 1 for None.
        shift: ``(M, C)``; 0 for None.
        eps: Is added to variances.
    """
    found: Tensor = _applied(_Normalisation, x, scale, shift, eps)
    return found


def pooling(x: Tensor, window: Window) -> Tensor:
    """Returns the largest number of each window, ``(n, M, C, h, w)``; of equal ones the first has the derivative.

    Args:
        x: ``(n, M, C, H, W)``.
        window: The same for all channels.
    """
    found: Tensor = _applied(_Pooling, x, window)
    return found


def _applied(function: type[Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


# --- memory -----------------------------------------------------------------------------------------------------------


def _laid_out(x: Tensor) -> Tensor:
    """Returns images in the memory described above; themselves where they are."""
    found = x.permute(0, 3, 4, 1, 2)
    return x if found.is_contiguous() else found.contiguous().permute(0, 3, 4, 1, 2)


def _joined(x: Tensor) -> Tensor:
    """Returns ``(n, M·C, H, W)``."""
    return x.permute(0, 3, 4, 1, 2).contiguous().flatten(3).permute(0, 3, 1, 2)


def _parted(x: Tensor, count: int) -> Tensor:
    """Returns ``(n, M, C, H, W)``, given ``(n, M·C, H, W)``: no view, which layers in place could not write to."""
    found = x.view(x.shape[0], count, x.shape[1] // count, *x.shape[2:])
    return x.new_empty(0).set_(found.untyped_storage(), found.storage_offset(), found.shape, found.stride())


# --- convolution ------------------------------------------------------------------------------------------------------


class _Convolution(Function):
    """``y(x, w) + b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        count = x.shape[1]
        flat = None if bias is None else bias.flatten()
        stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
        groups = count * geometry.groups
        return _parted(torch.conv2d(_joined(x), weight.flatten(0, 1), flat, stride, padding, dilation, groups), count)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, weight), (bar,) = ctx.saved_tensors, grads
        by_x, by_weight, by_bias, _ = ctx.needs_input_grad
        return (
            _applied(_OfImages, bar, weight, x, ctx.geometry) if by_x else None,
            _applied(_OfKernels, x, bar, weight, ctx.geometry) if by_weight else None,
            bar.sum((0, 3, 4)) if by_bias else None,
            None,
        )


class _OfImages(Function):
    """``x̄(ȳ, w)``, of which x has the shape."""

    @staticmethod
    def forward(ctx: Any, bar: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(bar, weight, x)
        ctx.geometry = geometry
        return _parted(_derivative(bar, x, weight, geometry, 0), x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (bar, weight, _), (along,) = ctx.saved_tensors, grads
        by_bar, by_weight, _, _ = ctx.needs_input_grad
        return (
            _applied(_Convolution, along, weight, None, ctx.geometry) if by_bar else None,
            _applied(_OfKernels, along, bar, weight, ctx.geometry) if by_weight else None,
            None,
            None,
        )


class _OfKernels(Function):
    """``w̄(x, ȳ)``, of which w has the shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bar: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, bar)
        ctx.geometry = geometry
        return _derivative(bar, x, weight, geometry, 1).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, bar), (along,) = ctx.saved_tensors, grads
        by_x, by_bar, _, _ = ctx.needs_input_grad
        return (
            _applied(_OfImages, bar, along, x, ctx.geometry) if by_x else None,
            _applied(_Convolution, x, along, None, ctx.geometry) if by_bar else None,
            None,
            None,
        )


def _derivative(bar: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, place: int) -> Tensor:
    """Returns the derivative of ``⟨y(x, w), ȳ⟩`` by x (place 0) or w (place 1)."""
    found = torch.ops.aten.convolution_backward(
        _joined(bar),
        _joined(x),
        weight.flatten(0, 1),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        x.shape[1] * geometry.groups,
        [place == 0, place == 1, False],
    )
    part: Tensor = found[place]
    return part


# --- batch normalisation ----------------------------------------------------------------------------------------------
#
# A channel's numbers are taken less one near their mean: errors of mean(ȳ x) − mean(ȳ) μ and of k x − k μ would
# be μ / σ times as large. Whichever number it is, derivatives by it are 0. It is the mean of a quarter of the images,
# which is at most √3 σ from that of all.
# What there is one of a channel is in float64: its errors would be those of all numbers of the channel.
# Results are written to the place of what they were computed from: a large new tensor costs more than passes over one.


def _near(images: Tensor) -> Tensor:
    """Returns a number near each channel's mean."""
    return images[: -(-len(images) // 4)].mean((0, 3, 4), keepdim=True)


def _mean(x: Tensor) -> Tensor:
    """Returns each channel's mean, ``(1, M, C, 1, 1)``."""
    return x.mean((0, 3, 4), keepdim=True).double()


def _inverse(squares: Tensor, mean: Tensor, eps: float) -> Tensor:
    """Returns ``1 / σ``; the mean is near 0, so that its square takes little from the squares'."""
    return (_mean(squares) - mean.square() + eps).rsqrt()


def _product(product: Tensor, bar_mean: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Returns each channel's mean of ȳ x̂, where ``x̂ = (x − μ) / σ``, given ȳ x."""
    return (_mean(product) - bar_mean * mean) * inverse


def _combined(constant: Tensor, *terms: tuple[Tensor, Tensor], out: Tensor | None = None) -> Tensor:
    """Returns ``constant + Σ x factor`` of channels' constants and factors; ``out`` may be the first x."""
    (x, factor), *more = terms
    found = torch.addcmul(constant.to(x), x, factor.to(x), out=out)
    for other, factor in more:
        found.addcmul_(other, factor.to(x))
    return found


def _of_channels(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _factor(inverse: Tensor, scale: Tensor | None) -> Tensor:
    """Returns ``k = scale / σ``."""
    return inverse if scale is None else inverse * _of_channels(scale)


class _Normalisation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
        images = _laid_out(x)
        near = _near(images)
        away = images - near
        mean = _mean(away)
        inverse = _inverse(away.square_(), mean, eps)
        ctx.save_for_backward(x, scale, near, mean, inverse)  # what was given: the graph goes on from there
        ctx.eps = eps
        factor = _factor(inverse, scale)
        constant = -factor * mean if shift is None else _of_channels(shift) - factor * mean
        return _combined(constant, (torch.sub(images, near, out=away), factor), out=away)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = _applied(_NormalisationGradient, grads[0], *ctx.saved_tensors, ctx.eps)
        return (*(part if needed else None for part, needed in zip(found, ctx.needs_input_grad, strict=False)), None)


class _NormalisationGradient(Function):
    """``x̄ = k P ȳ``, and the sums of ``ȳ x̂`` and of ȳ, where ``P ȳ = ȳ − mean(ȳ) − x̂ mean(ȳ x̂)``.

    P is symmetric, and ``dx̂ = P dx / σ``. So along v, a and b the derivatives are, with a channel's numbers n and
    ``⟨u, v⟩ = mean(u v)``, ::

        by ȳ:      k P v + a x̂ + b
        by scale:  n ⟨v, P ȳ⟩ / σ
        by x:      (P (c v + e ȳ) − k ⟨v, P ȳ⟩ x̂) / σ,    c = −k ⟨ȳ, x̂⟩,    e = a − k ⟨v, x̂⟩
    """

    @staticmethod
    def forward(
        ctx: Any,
        bar: Tensor,
        x: Tensor,
        scale: Tensor | None,
        near: Tensor,
        mean: Tensor,
        inverse: Tensor,
        eps: float,
    ) -> Any:
        images, weights = _laid_out(x), _laid_out(bar)
        away, of_bar = images - near, _mean(weights)
        of_product = _product(away.mul_(weights), of_bar, mean, inverse)
        ctx.save_for_backward(bar, x, scale, near, mean, inverse, of_bar, of_product)
        ctx.eps, count = eps, x.numel() // mean.numel()
        factor = _factor(inverse, scale)
        slope = -factor * inverse * of_product
        terms = (torch.sub(images, near, out=away), slope), (weights, factor)
        by_x = _combined(-factor * of_bar - slope * mean, *terms, out=away)
        return by_x, *((count * part[0, :, :, 0, 0]).to(x) for part in (of_product, of_bar))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (bar, x, scale, near, mean, inverse, of_bar, of_product), (along, a, b) = ctx.saved_tensors, grads
        bar, along = _laid_out(bar), _laid_out(along)
        away = _laid_out(x) - near
        differentiated = torch.is_grad_enabled()
        if differentiated:  # then these are functions of ȳ and x again
            mean, of_bar = _mean(away), _mean(bar)
            inverse = _inverse(away.square(), mean, ctx.eps)
            of_product = _product(bar * away, of_bar, mean, inverse)
        factor = _factor(inverse, scale)
        product, of_along = along * away, _mean(along)
        of_image = _product(product, of_along, mean, inverse)
        out, other = (None, None) if differentiated else (product, away)
        both = _mean(torch.mul(along, bar, out=out)) - of_along * of_bar - of_image * of_product
        c, e = -factor * of_product, _of_channels(a) - factor * of_image
        slope = e * inverse
        by_bar = _combined(_of_channels(b) - factor * of_along - slope * mean, (along, factor), (away, slope), out=out)
        slope = -(c * of_image + e * of_product + factor * both) * inverse.square()
        constant = -(c * of_along + e * of_bar) * inverse - slope * mean
        by_x = _combined(constant, (away, slope), (along, c * inverse), (bar, e * inverse), out=other)
        by_scale = None if scale is None else (x.numel() // mean.numel() * both * inverse)[0, :, :, 0, 0].to(x)
        return by_bar, by_x, by_scale, None, None, None, None


# --- pooling ----------------------------------------------------------------------------------------------------------


class _Pooling(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        found, places = torch.ops.aten.max_pool2d_with_indices(
            _joined(x), window.size, window.stride, window.padding, window.dilation, window.ceil
        )
        ctx.save_for_backward(x, places)
        ctx.window = window
        return _parted(found, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, places = ctx.saved_tensors
        return _applied(_PutBack, grads[0], x, places, ctx.window), None


class _PutBack(Function):
    """The derivative of pooling: linear, and its own derivative takes the numbers at the places of the largest."""

    @staticmethod
    def forward(ctx: Any, bar: Tensor, x: Tensor, places: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = x.shape[1]
        found = torch.ops.aten.max_pool2d_with_indices_backward(
            _joined(bar), _joined(x), window.size, window.stride, window.padding, window.dilation, window.ceil, places
        )
        return _parted(found, ctx.count)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (places,) = ctx.saved_tensors
        images, channels, rows, columns = places.shape
        along = grads[0].permute(0, 3, 4, 1, 2).flatten(3).flatten(1, 2)
        found = along.gather(1, places.permute(0, 2, 3, 1).flatten(1, 2))
        found = found.view(images, rows, columns, ctx.count, channels // ctx.count).permute(0, 3, 4, 1, 2)
        return found, None, None, None
