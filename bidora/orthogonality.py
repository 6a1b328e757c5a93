"""Orthogonality of the normalised direction: BiDoRA's penalty against overfitting."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bidora.layers import layer_matrices, remembered
from bidora.norm import (
    accumulation_dtype,
    autocast_off,
    frozen_product,
    ill_conditioned,
    values_are_visible,
    zero_norm,
)
from bidora.variants import dora_layers
from bilevel.errors import ParameterError

__all__ = ["direction_orthogonality", "orthogonality"]

# Times the share below which a factored ‖V‖² is inaccurate: pairs of such rows would lose its square.
_FAR = 100

# Rows of a layer with more rows than columns whose Gram matrix is remembered: 64 MiB in float32.
_LARGEST_TALL = 4096

# Elements of a Gram matrix that are squared at a time.
_BLOCK = 1 << 20


def orthogonality(model: nn.Module) -> Tensor:
    """Returns the mean of :func:`direction_orthogonality` over the DoRA layers of the active adapter: a scalar.

    The rows are a convolution's filters, and an embedding's dimensions. Depends on A and B, not on m. Twice
    differentiable. Evaluated in float32 or better. W₀W₀ᵀ is remembered for layers with out ≤ in, which takes no more
    memory than their weights in that precision, and for those with out ≤ 4·in and out ≤ 4096 (as in BERT-like models),
    four times as much.

    Raises:
        ParameterError: No layer has the exact DoRA forward.
    """
    penalties = []
    for _, layer, adapter in dora_layers(model):
        weight, (lora_A, lora_B, _), scaling = layer_matrices(layer, adapter)
        gram = None
        if _is_remembered(*weight.shape):
            dtype = accumulation_dtype(weight, lora_A, lora_B)
            gram = remembered(layer, f"Gram matrix, {dtype}", functools.partial(_gram, dtype=dtype))
        penalties.append(direction_orthogonality(weight, lora_A, lora_B, scaling, gram=gram))
    if not penalties:
        raise ParameterError(f"{type(model).__name__} has no active layer with the exact DoRA forward")
    return torch.stack(penalties).mean()


def _is_remembered(rows: int, columns: int) -> bool:
    return rows <= columns or (rows <= 4 * columns and rows <= _LARGEST_TALL)


def direction_orthogonality(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, gram: Tensor | None = None
) -> Tensor:
    """Returns ``‖D Dᵀ − I‖²_F``, where D is V = W₀ + s·BA with its rows normalised: a scalar.

    That is the sum of cos² over ordered pairs of different rows: 0 if and only if the rows are orthogonal, and at
    least ``out·(out − in)/in`` where there are more rows than dimensions. Zero rows count neither in D nor in I.

    BiDoRA (arXiv 2410.09758) calls it Gram regularisation and sums over layers; its weights have their outputs in
    columns, so its ``VᵀV`` is this ``D Dᵀ``.

    The Gram matrix of the smaller side is used, since ``‖D Dᵀ − I‖²_F = ‖DᵀD‖²_F − rows``. Multiply-adds of the forward
    pass: ``out²·r + out·in·r`` where W₀W₀ᵀ is known, by ``VVᵀ = W₀W₀ᵀ + U + Uᵀ`` with
    ``U = (s·W₀Aᵀ + ½s²·BAAᵀ) Bᵀ``, in two readings of W₀W₀ᵀ and nothing else of its size (for rows with
    ``‖V‖² < (‖W₀‖² + s²‖B‖²‖A‖²)/10`` VVᵀ is formed); otherwise, and where BA nearly cancels a row of W₀,
    ``out·in·(r + min(out, in))``.

    Args:
        weight: W₀, (out, in).
        lora_A: A, (r, in).
        lora_B: B, (out, r).
        scaling: s.
        gram: W₀W₀ᵀ where it is known.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    with autocast_off(weight.device):
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        if gram is not None and values_are_visible(A, B):
            half = scaling * frozen_product(weight, A.T) + (0.5 * scaling**2) * (B @ (A @ A.T))
            squares = gram.diagonal() + 2 * (half * B).sum(1)
            near = ill_conditioned(squares / _FAR, gram.diagonal(), A, B, scaling)
            if not (gram.requires_grad or near.any()):
                return _from_factors(gram, half, B, squares)
            low_rank = half @ B.T
            products = gram + low_rank + low_rank.T
            if not ill_conditioned(products.diagonal(), gram.diagonal(), A, B, scaling).any():
                return _sum_of_squared_cosines(products)
        V = torch.addmm(weight.to(dtype), B, A, alpha=scaling)
        if V.shape[0] <= V.shape[1]:
            return _sum_of_squared_cosines(V @ V.T)
        inverse = _reciprocal(V.square().sum(1))
        total = (V.T @ (inverse.unsqueeze(1) * V)).square().sum()
        return total - (inverse.detach() > 0).sum()


def _from_factors(gram: Tensor, half: Tensor, B: Tensor, squares: Tensor) -> Tensor:
    """Returns the sum over pairs of different rows, for ``VVᵀ = G + hBᵀ + Bhᵀ`` with the diagonal ``squares``.

    With ``E = diag(1/squares)`` and e its diagonal, the sum over all pairs is

        eᵀ(G ∘ G)e + 4 ⟨EB, G E h⟩ + 2 ⟨hᵀE h, BᵀE B⟩ + 2 tr((hᵀE B)²)
    """
    inverse = _reciprocal(squares)
    scaled_half, scaled_B = inverse.unsqueeze(1) * half, inverse.unsqueeze(1) * B
    if torch._C._functorch.peek_interpreter_stack() is None:
        own: Tensor = _SquaredForm.apply(gram, inverse)  # type: ignore[no-untyped-call]
    else:
        own = inverse @ _squared_product(gram, inverse)
    across = half.T @ scaled_B
    total = own + 4 * (scaled_B * (gram @ scaled_half)).sum()
    total = total + 2 * ((half.T @ scaled_half) * (B.T @ scaled_B)).sum() + 2 * (across * across.T).sum()
    return total - (inverse.detach() > 0).sum()


def _squared_product(gram: Tensor, vector: Tensor) -> Tensor:
    """Returns ``(G ∘ G) e``, some rows at a time."""
    rows = max(1, _BLOCK // max(1, gram.shape[1]))
    return torch.cat([block.square() @ vector for block in torch.split(gram, rows)])


class _SquaredForm(torch.autograd.Function):
    """``eᵀ(G ∘ G)e`` for a symmetric constant G: one reading of G for the value and the first derivative."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, vector: Tensor) -> Tensor:
        product = _squared_product(gram, vector)
        ctx.save_for_backward(gram, vector, product)
        return vector @ product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        gram, vector, product = ctx.saved_tensors
        if torch.is_grad_enabled():
            product = _squared_product(gram, vector)
        return None, 2 * gradient * product


def _sum_of_squared_cosines(products: Tensor) -> Tensor:
    """Returns the sum over pairs of different rows, given VVᵀ."""
    inverse = _reciprocal(products.diagonal())
    return inverse @ products.square() @ inverse - (inverse.detach() > 0).sum()


def _gram(weight: Tensor, dtype: torch.dtype) -> Tensor:
    with autocast_off(weight.device):
        rows = weight.to(dtype)
        return rows @ rows.T


def _reciprocal(squares: Tensor) -> Tensor:
    """Returns 1/‖V‖² by rows, and 0 with zero derivatives for zero rows."""
    # the second derivative is of the order of the cube of this
    zero = squares.detach() <= zero_norm(squares.dtype)
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, squares))
