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
    """What the norm gives a layer.

    Attributes:
        stats: g = m/‖V‖ and 1/‖V‖ (0 in zero rows), (2, out).
        projection: VAᵀ, (out, r), where it is wanted.
    """

    stats: Tensor
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
        return RowScale(torch.stack([scale, inverse]), projection if project else None)

    @staticmethod
    def combine(base: Tensor, hidden: Tensor, factor: Tensor, stats: Tensor, bias: Tensor | None, s: float) -> Tensor:
        """Returns ``y = g ⊙ (base + s·hidden factorᵀ) + (1 − g) ⊙ bias``, (…, out) as base is, and no view."""
        scale = stats[0]
        with autocast_off(base.device):
            low_rank = hidden.view(*base.shape[:-1], hidden.shape[1]) @ factor.T
            wide = torch.add(base, low_rank, alpha=s).to(scale.dtype) * scale
            if bias is not None:
                wide += (1 - scale) * bias
        return wide.to(base.dtype)

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
        """Writes ``dz = g ⊙ dy`` to the first n rows of ``out``.

        Args:
            cotangent: dy, (n, out).
            kept: The output y, of a layer without bias, or the base's output; None if the sums are not wanted.
            hidden: x Aᵀ, (n, k), for the base's output.
            factor: B, (out, k).
            stats: g and 1/‖V‖.
            bias: (out,), or None.
            s: The adapter's scaling.
            out: (≥ n, out).
            from_base: Whether the base's output was kept. With z, the output before g and bias, z = y/g, or
                ``z = base − bias + s·hidden factorᵀ``.
            through: Whether ``dz factor`` is wanted.

        Returns:
            (parts, out), which sum to ``dg = Σₙ dy ⊙ z``; and (parts, n, k), which sum to ``dz factor``: one of them if
            there are none of the former.
        """
        scale, parts, n = stats[0], None, cotangent.shape[0]
        wide = cotangent.to(scale.dtype)
        out[:n] = wide * scale
        if kept is not None:
            z = kept.to(scale.dtype)
            if from_base:
                assert hidden is not None
                z = z + s * (hidden @ factor.T) if bias is None else z - bias + s * (hidden @ factor.T)
            else:
                z = z * torch.where(scale == 0, 0.0, 1 / scale)
            parts = (wide * z).sum(0, keepdim=True)
        return parts, (out[:n] @ factor).unsqueeze(0) if through else None

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
        """Returns ``dm = dg/‖V‖``, ``k = dL/d‖V‖² = −½·dg·m/‖V‖³``, parts of ``(k ⊙ B)ᵀB``, and ``dz factor``.

        Args:
            parts: (parts, out), summing to dg.
            through: (parts, n, k), summing to ``dz factor``, or None.
            stats: g and 1/‖V‖.
            magnitude: m.
            lora_B: B.
            cotangents: Gets ``(k ⊙ B)ᵀ`` below its first n rows, and zeros below that, (≥ n + r, out).
            n: Rows of the layer's input.
            factors: Whether A needs a gradient; if not the cotangents are left alone and the parts None.
        """
        inverse, dh = stats[1], None if through is None else through.sum(0)
        gradient = parts.sum(0) * inverse
        coefficient = -0.5 * gradient * magnitude * inverse.square()
        if not factors:
            return gradient.to(magnitude.dtype), coefficient, None, dh
        B = lora_B.to(coefficient.dtype)
        weighted = (coefficient.unsqueeze(1) * B).T
        cotangents[n:] = 0
        cotangents[n : n + len(weighted)] = weighted
        return gradient.to(magnitude.dtype), coefficient, (weighted @ B).unsqueeze(0), dh

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
        """Returns the gradients of A and B, in their dtypes, from the products over n; None for those without product.

            dA = s·product_A + 2s·(through_weight + s·(k ⊙ B)ᵀB A)        dB = s·product_B + 2s·k ⊙ VAᵀ

        Args:
            product_A: ``(dz B)ᵀ x``, (k, in).
            product_B: ``dzᵀ (x Aᵀ)``, (out, k).
            through_weight: ``(k ⊙ B)ᵀ W₀`` below its first ``offset`` rows, (≥ offset + r, in).
            offset: Rows to pass over.
            gram: (parts, r, r), summing to ``(k ⊙ B)ᵀB``.
            coefficient: k.
            projection: VAᵀ.
            lora_A: A.
            lora_B: B.
            s: The adapter's scaling.
            split: Whether the products are those of split factors.
        """
        dtype, rank = coefficient.dtype, lora_A.shape[0]
        dA = dB = None
        if product_A is not None:
            assert through_weight is not None
            assert gram is not None
            through_norm = through_weight[offset : offset + rank].to(dtype) + s * (gram.sum(0) @ lora_A.to(dtype))
            direct = product_A[:rank].to(dtype) + product_A[2 * rank :] if split else product_A.to(dtype)
            dA = (s * direct + (2 * s) * through_norm).to(lora_A.dtype)
        if product_B is not None:
            assert projection is not None
            direct = product_B[:, :rank].to(dtype) + product_B[:, rank : 2 * rank] if split else product_B.to(dtype)
            dB = (s * direct + (2 * s) * coefficient.unsqueeze(1) * projection).to(lora_B.dtype)
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
