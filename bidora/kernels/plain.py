"""The primitive operations of a DoRA layer in plain torch: what the fused kernels compute, on any device and dtype.

Shapes: W₀ (out, in), A (r, in), B (out, r), m (out,), x and its rows (n, in). With *split* factors (see
:func:`split_factors`) the products have k = 3r columns instead of r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bidora.norm import accumulation_dtype, autocast_off, ill_conditioned, zero_norm

__all__ = ["SMALLEST_SCALE", "PlainKernels", "RowScale", "nonzero_scale", "split_factors"]

SMALLEST_SCALE = 2.0**-64
"""Stands for g = 0 in rows that have a direction: 5e-20·z is 0 to the rest of a model, and z can be told from it."""

# Elements of a low-precision weight that are converted at a time.
_BLOCK = 1 << 20


class RowScale(NamedTuple):
    """What the norm gives a layer: g = m/‖V‖ and 1/‖V‖ (0 in zero rows), (out,); and VAᵀ (out, r), where wanted."""

    scale: Tensor
    inverse: Tensor
    projection: Tensor | None


def split_factors(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype, split: bool) -> tuple[Tensor, Tensor]:
    """Returns A and B in the dtype of the products; split, as ``[A₁; A₂; A₁]`` and ``[B₁, B₁, B₂]``.

    There ``A₁`` is A rounded and ``A₂`` the rest, rounded. One product of bfloat16 factors then has the relative error
    2⁻¹⁶ of a product of float32 ones, instead of 2⁻⁹.
    """
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    if not split:
        return A, B
    A_rest, B_rest = (lora_A - A).to(dtype), (lora_B - B).to(dtype)
    return torch.cat([A, A_rest, A]), torch.cat([B, B, B_rest], 1)


def nonzero_scale(scale: Tensor) -> Tensor:
    """Returns g, away from 0 by enough to divide by."""
    small = scale.abs() < SMALLEST_SCALE
    return torch.where(small, torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE), scale)


class PlainKernels:
    """The five primitives; :class:`bidora.kernels.fused.FusedKernels` has the same ones."""

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
        """Returns g, 1/‖V‖ and VAᵀ, all in float32 or float64: see :func:`bidora.norm.row_norm`.

        Args:
            weight: W₀.
            lora_A: A, in the precision that the norm is to have: rounded where the products round it.
            lora_B: B.
            magnitude: m.
            scaling: s.
            project: Whether VAᵀ is wanted: where A or B needs a gradient.
            recoverable: Whether g must not be 0 outside zero rows.
        """
        dtype = accumulation_dtype(weight, lora_A, lora_B)
        with autocast_off(weight.device):
            A, B = lora_A.to(dtype), lora_B.to(dtype)
            rows = max(1, _BLOCK // max(1, weight.shape[1]))
            blocks = zip(torch.split(weight, rows), torch.split(B, rows), strict=True)
            parts = [_norm_of_rows(w.to(dtype), A, b, scaling) for w, b in blocks]
            squares, projection = (torch.cat(part) for part in zip(*parts, strict=True))
            zero = squares <= zero_norm(dtype) ** 2
            inverse = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())
            scale = magnitude.to(dtype) * inverse
            if recoverable:
                scale = torch.where(zero, 0.0, nonzero_scale(scale))
        return RowScale(scale, inverse, projection if project else None)

    @staticmethod
    def combine(base: Tensor, hidden: Tensor, factor: Tensor, scale: Tensor, bias: Tensor | None, s: float) -> Tensor:
        """Returns ``y = g ⊙ (base + s·hidden factorᵀ) + (1 − g) ⊙ bias``, (…, out) as base is, and no view."""
        with autocast_off(base.device):
            low_rank = hidden.view(*base.shape[:-1], -1) @ factor.T
            wide = torch.add(base, low_rank, alpha=s).to(scale.dtype) * scale
            if bias is not None:
                wide += (1 - scale) * bias
        return wide.to(base.dtype)

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
        """Writes ``g ⊙ dy`` to the first n rows of ``out``, and returns parts that sum to ``dg = Σₙ dy ⊙ z``.

        z, the output before g and bias, comes from the output (no bias): ``y/g``; or from the base's, where given:
        ``base − bias + s·hidden factorᵀ``. With neither there are no sums.

        Returns:
            (parts, out), or None.
        """
        with autocast_off(cotangent.device):
            wide = cotangent.to(scale.dtype)
            out[: len(cotangent)] = wide * scale
            if base is not None:
                z = torch.addmm(base, hidden, factor.T, alpha=s).to(scale.dtype)
                return (wide * (z if bias is None else z - bias)).sum(0, keepdim=True)
            if output is not None:
                return (wide * (output * torch.where(scale == 0, 0.0, 1 / scale))).sum(0, keepdim=True)
        return None

    @staticmethod
    def norm_cotangent(
        parts: Tensor, inverse: Tensor, magnitude: Tensor, lora_B: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``dm = dg/‖V‖`` and ``k = dL/d‖V‖² = −½·dg·m/‖V‖³``.

        Args:
            parts: (parts, out), summing to dg.
            inverse: 1/‖V‖, or 0.
            magnitude: m.
            lora_B: B.
            rows: Where ``(k ⊙ B)ᵀ`` goes, with zeros below: (≥ r, out); None if A needs no gradient.
        """
        gradient = parts.sum(0) * inverse
        coefficient = -0.5 * gradient * magnitude * inverse.square()
        if rows is not None:
            rank = lora_B.shape[1]
            rows[:rank] = (coefficient.unsqueeze(1) * lora_B).T
            rows[rank:] = 0
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
        """Returns the gradients of A and B, in their dtypes, from the products over n; None for those without product.

            dA = s·product_A + 2s·(through_weight + s·(k ⊙ B)ᵀB A)        dB = s·product_B + 2s·k ⊙ VAᵀ

        Args:
            product_A: ``(dz B)ᵀ x``, (r, in).
            product_B: ``dzᵀ (x Aᵀ)``, (out, r).
            through_weight: ``(k ⊙ B)ᵀ W₀``, (≥ r, in).
            gram: ``(k ⊙ B)ᵀB``, (r, r).
            coefficient: k.
            row_scale: What :meth:`row_scale` returned, with the projection.
            lora_A: A.
            lora_B: B.
            s: The adapter's scaling.
        """
        dtype = coefficient.dtype
        dA = dB = None
        if product_A is not None:
            assert through_weight is not None
            assert gram is not None
            through_norm = through_weight[: len(lora_A)].to(dtype) + s * (gram.to(dtype) @ lora_A.to(dtype))
            dA = (s * product_A.to(dtype) + (2 * s) * through_norm).to(lora_A.dtype)
        if product_B is not None:
            assert row_scale.projection is not None
            through_norm = coefficient.unsqueeze(1) * row_scale.projection
            dB = (s * product_B.to(dtype) + (2 * s) * through_norm).to(lora_B.dtype)
        return dA, dB


def _norm_of_rows(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns ‖V‖² and VAᵀ of some rows; ill-conditioned ones are formed."""
    known = weight.square().sum(1)
    half = weight @ A.T
    projection = half + scaling * (B @ (A @ A.T))
    squares = known + scaling * (B * (half + projection)).sum(1)
    ill = ill_conditioned(squares, known, A, B, scaling)
    if ill.any():
        dense = torch.addmm(weight[ill], B[ill], A, alpha=scaling)
        squares[ill], projection[ill] = dense.square().sum(1), dense @ A.T
    return squares, projection
