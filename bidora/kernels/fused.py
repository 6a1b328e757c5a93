"""The primitive operations of a DoRA layer as fused Triton kernels, each one pass over what it reads and writes."""

# ruff: noqa: D102 (the overridden methods are documented)
from __future__ import annotations

import torch
from torch import Tensor

from bidora.kernels import device
from bidora.kernels.plain import SMALLEST_SCALE, PlainKernels, RowScale
from bidora.norm import ILL_CONDITIONED, zero_norm

__all__ = ["FusedKernels"]


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
        rank = lora_A.shape[0]
        out = torch.empty(2, rows, dtype=torch.float32, device=weight.device)
        projection = torch.empty(rows, rank, dtype=torch.float32, device=weight.device) if project else None
        tile = 64 if rows > 2048 else 16
        zero = zero_norm(torch.float32) ** 2
        split = lora_A.dtype != weight.dtype
        device.row_scale_kernel[(_blocks(rows, tile),)](
            weight, lora_A, lora_B, magnitude, out, projection, rows, columns, rank, weight.stride(0), weight.stride(1),
            scaling, zero, ILL_CONDITIONED, SMALLEST_SCALE,
            ROWS=tile, COLUMNS=128, RANK=_padded(rank), SPLIT=split, PROJECT=project, RECOVERABLE=recoverable,
            num_warps=4, num_stages=5 if tile == 64 else 3,
        )  # fmt: skip
        return RowScale(out[0], out[1], projection)

    @staticmethod
    def combine(base: Tensor, hidden: Tensor, factor: Tensor, scale: Tensor, bias: Tensor | None, s: float) -> Tensor:
        (n, rank), rows = hidden.shape, base.shape[-1]
        out = torch.empty_like(base)
        device.combine_kernel[(_blocks(rows, 128), _blocks(n, 64))](
            base, hidden, factor, scale, bias, out, n, rows, rank, s,
            N=64, ROWS=128, RANK=_padded(rank), BIAS=bias is not None, num_warps=8,
        )  # fmt: skip
        return out

    @staticmethod
    def scale_cotangent(
        cotangent: Tensor,
        output: Tensor | None,
        base: Tensor | None,
        hidden: Tensor,
        factor: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        s: float,
        out: Tensor,
    ) -> Tensor | None:
        n, rows = cotangent.shape
        rank = factor.shape[1]
        kept = output if base is None else base
        parts = None
        if kept is not None:
            parts = torch.empty(_blocks(n, 64), rows, dtype=torch.float32, device=cotangent.device)
        device.scale_cotangent_kernel[(_blocks(rows, 128), _blocks(n, 64))](
            cotangent, kept, hidden, factor, scale, bias, out, parts, n, rows, rank, s,
            N=64, ROWS=128, RANK=_padded(rank), SUMS=kept is not None, BASE=base is not None, BIAS=bias is not None,
            num_warps=8,
        )  # fmt: skip
        return parts

    @staticmethod
    def norm_cotangent(
        parts: Tensor, inverse: Tensor, magnitude: Tensor, lora_B: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (num_parts, size), rank = parts.shape, lora_B.shape[1]
        gradient = torch.empty_like(magnitude)
        coefficient = torch.empty(size, dtype=torch.float32, device=parts.device)
        device.norm_cotangent_kernel[(_blocks(size, 64),)](
            parts, inverse, magnitude, lora_B, gradient, coefficient, rows, num_parts, size, rank,
            0 if rows is None else len(rows),
            ROWS=64, PARTS=16, RANK=_padded(rank), FACTORS=rows is not None, num_warps=4,
        )  # fmt: skip
        return gradient, coefficient

    @staticmethod
    def factor_gradients(
        product_A: Tensor | None,
        product_B: Tensor | None,
        through_weight: Tensor | None,
        gram: Tensor | None,
        coefficient: Tensor,
        row_scale: RowScale,
        lora_A: Tensor,
        lora_B: Tensor,
        s: float,
    ) -> tuple[Tensor | None, Tensor | None]:
        (rank, columns), rows = lora_A.shape, lora_B.shape[0]
        dA = None if product_A is None else torch.empty_like(lora_A)
        dB = None if product_B is None else torch.empty_like(lora_B)
        programs_A = 0 if product_A is None else _blocks(columns, 128)
        programs_B = 0 if product_B is None else _blocks(rows, 128)
        device.factor_gradients_kernel[(programs_A + programs_B,)](
            product_A, product_B, through_weight, gram, coefficient, row_scale.projection, lora_A, dA, dB,
            rows, columns, rank, s, programs_A,
            COLUMNS=128, ROWS=128, RANK=_padded(rank), HAS_A=dA is not None, HAS_B=dB is not None, num_warps=4,
        )  # fmt: skip
        return dA, dB


def _blocks(size: int, tile: int) -> int:
    return -(-size // tile)


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())
