"""The primitive operations of a DoRA layer as fused Triton kernels, each one pass over what it reads and writes."""

# ruff: noqa: D102 (the overridden methods are documented)
from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from bidora.kernels import device
from bidora.kernels.plain import SMALLEST_SCALE, PlainKernels, RowScale
from bidora.norm import ILL_CONDITIONED, zero_norm

__all__ = ["FusedKernels"]

_ZERO = zero_norm(torch.float32) ** 2

# The versions whose compiled kernels are known to be started by ``run`` as below, with all arguments in their order.
_DIRECT = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


# How a pass over dy is split: into four programs for each multiprocessor of an H100, where it is large enough, of at
# most so many columns.
_PROGRAMS, _SPAN = 528, 1024


class _Launcher:
    """Starts a Triton kernel without Triton's own look at every argument, which takes longer than the start itself.

    What Triton specialises a kernel to is the dtype and the alignment of addresses, and which integers are 1 or
    divisible by 16. The caller's key has the dtypes and those integers; unaligned addresses go Triton's way.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[object, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        key: object,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...],
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        compiled = self.compiled.get(key)
        if compiled is not None:
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            if _aligned(addresses):
                run, function, metadata, device = compiled
                stream = torch._C._cuda_getCurrentRawStream(device)
                run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers)
                return
        kernel = self.kernel[grid](*tensors, *numbers, num_warps=num_warps, num_stages=num_stages)
        if _DIRECT and hasattr(kernel, "packed_metadata"):
            addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            if _aligned(addresses):
                self.compiled[key] = kernel.run, kernel.function, kernel.packed_metadata, torch.cuda.current_device()


_row_scale = _Launcher(device.row_scale_kernel)
_combine = _Launcher(device.combine_kernel)
_scale_cotangent = _Launcher(device.scale_cotangent_kernel)
_norm_cotangent = _Launcher(device.norm_cotangent_kernel)
_factor_gradients = _Launcher(device.factor_gradients_kernel)


class FusedKernels(PlainKernels):
    """bfloat16 on a GPU, rank at most 64. Sums are in float32, in an order that depends on the shapes alone."""

    @staticmethod
    def row_scale(
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        scaling: float,
        *,
        project: bool,
        recoverable: bool,
    ) -> RowScale:
        rows, columns = weight.shape
        rank, split = lora_A.shape[0], lora_A.dtype != weight.dtype
        stats = torch.empty(2, rows, dtype=torch.float32, device=weight.device)
        projection = torch.empty(rows, rank, dtype=torch.float32, device=weight.device) if project else None
        stride_row, stride_column = weight.stride()
        padded = _padded(rank)
        tile = 64 if rows > 4096 or padded > 32 else 32 if rows > 2048 else 16
        key = (
            weight.device, weight.dtype, lora_A.dtype, lora_B.dtype, magnitude.dtype,
            rows, columns, rank, stride_row, stride_column, project, recoverable,
        )  # fmt: skip
        _row_scale(
            (-(-rows // tile), 1, 1), key,
            (weight, lora_A, lora_B, magnitude, stats, projection),
            (
                rows, columns, rank, stride_row, stride_column,
                scaling, _ZERO, ILL_CONDITIONED, SMALLEST_SCALE, tile, 128, padded, split, project, recoverable,
            ),
            num_warps=4 if tile == 64 else 2, num_stages=5 if tile == 64 else 6,
        )  # fmt: skip
        return RowScale(stats, projection)

    @staticmethod
    def combine(base: Tensor, hidden: Tensor, factor: Tensor, stats: Tensor, bias: Tensor | None, s: float) -> Tensor:
        (n, rank), rows = hidden.shape, base.shape[-1]
        out = torch.empty_like(base)
        key = base.device, base.dtype, n == 1, n % 16 == 0, rows, rank, None if bias is None else bias.dtype
        _combine(
            (-(-rows // 128), -(-n // 64), 1), key,
            (base, hidden, factor, stats, bias, out),
            (n, rows, rank, s, 64, 128, _padded(rank), bias is not None),
            num_warps=8,
        )  # fmt: skip
        return out

    @staticmethod
    def scale_cotangent(
        cotangent: Tensor,
        kept: Tensor | None,
        hidden: Tensor | None,
        factor: Tensor,
        stats: Tensor,
        bias: Tensor | None,
        s: float,
        out: Tensor,
        *,
        from_base: bool,
        through: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        (n, rows), rank = cotangent.shape, factor.shape[1]
        padded = _padded(rank)
        tile, width = (64 if n >= 2048 or padded > 16 else 32), (128 if padded <= 64 else 64)
        blocks, span = -(-n // tile), rows
        if kept is not None:  # without the sums nothing follows that would add up parts of dz·factor
            span = min(_SPAN, width * max(1, rows * blocks // (width * _PROGRAMS)))
        splits = -(-rows // span)
        parts = dh = None
        if kept is not None:
            parts = torch.empty(blocks, rows, dtype=torch.float32, device=cotangent.device)
        if through:
            dtype = factor.dtype if splits == 1 else torch.float32
            dh = torch.empty(splits, n, rank, dtype=dtype, device=cotangent.device)
        from_base = from_base and kept is not None
        key = (
            cotangent.device, cotangent.dtype, n == 1, n % 16 == 0, tile, span, splits == 1, rows, rank,
            None if bias is None else bias.dtype, kept is not None, hidden is not None, from_base, through,
        )  # fmt: skip
        _scale_cotangent(
            (blocks, splits, 1), key,
            (cotangent, kept, hidden, factor, stats, bias, out, parts, dh),
            (
                n, rows, rank, span, s,
                tile, width, padded, kept is not None, from_base, bias is not None, through,
            ),
            num_warps=8 if padded > 64 else tile // 16, num_stages=3 if padded <= 64 else 2,
        )  # fmt: skip
        return parts, dh

    @staticmethod
    def norm_cotangent(
        parts: Tensor,
        through: Tensor | None,
        stats: Tensor,
        magnitude: Tensor,
        lora_B: Tensor,
        cotangents: Tensor,
        n: int,
        factors: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        num_parts, rows = parts.shape
        rank = lora_B.shape[1]
        gradient = torch.empty_like(magnitude)
        coefficient = torch.empty(rows, dtype=torch.float32, device=parts.device)
        turns = 4 if factors else 1
        programs = -(-rows // (64 * turns))
        gram = torch.empty(programs, rank, rank, dtype=torch.float32, device=parts.device) if factors else None
        padded = cotangents.shape[0] - n
        splits, width, sums, dh = 1, 1, 0, None
        if through is not None:
            splits, _, width = through.shape
            if splits == 1:
                dh = through[0]
            else:
                dh = torch.empty(n, width, dtype=cotangents.dtype, device=parts.device)
                sums = -(-n // 64)
        key = (
            parts.device, cotangents.dtype, magnitude.dtype, lora_B.dtype, rows, rank, factors, padded,
            n == 1, n % 16 == 0, num_parts == 1, num_parts % 16 == 0, splits, width, sums > 0,
        )  # fmt: skip
        _norm_cotangent(
            (programs + sums, 1, 1), key,
            (
                parts, through if sums else None, stats, magnitude, lora_B, gradient, coefficient, gram, cotangents,
                dh if sums else None,
            ),
            (
                n, num_parts, rows, rank, padded, splits, width, programs,
                64, turns, 64, _padded(rank), factors, 64, _padded(width), sums > 0,
            ),
            num_warps=4,
        )  # fmt: skip
        return gradient, coefficient, gram, dh

    @staticmethod
    def factor_gradients(
        product_A: Tensor | None,
        product_B: Tensor | None,
        through_weight: Tensor | None,
        offset: int,
        gram: Tensor | None,
        coefficient: Tensor,
        projection: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        s: float,
        split: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        (rank, columns), rows = lora_A.shape, lora_B.shape[0]
        dA = None if product_A is None else torch.empty_like(lora_A)
        dB = None if product_B is None else torch.empty_like(lora_B)
        programs_A = 0 if product_A is None else -(-columns // 128)
        programs_B = 0 if product_B is None else -(-rows // 128)
        num_parts = 0 if gram is None else gram.shape[0]
        product = product_B if product_A is None else product_A
        key = (
            coefficient.device, None if product is None else product.dtype, lora_A.dtype, lora_B.dtype, rows, columns,
            rank, split, dA is None, dB is None, gram is None, projection is None, offset <= 1, offset % 16 == 0,
        )  # fmt: skip
        _factor_gradients(
            (programs_A + programs_B, 1, 1), key,
            (product_A, product_B, through_weight, gram, coefficient, projection, lora_A, dA, dB),
            (
                offset, num_parts, rows, columns, rank, 3 * rank if split else rank, s, programs_A,
                128, 128, _padded(rank), dA is not None, dB is not None, split,
            ),
            num_warps=4,
        )  # fmt: skip
        return dA, dB


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _aligned(addresses: list[int | None]) -> bool:
    """Returns whether all are multiples of 16."""
    together = 0
    for address in addresses:
        together |= address or 0
    return together % 16 == 0
