"""Row norms of W₀ + s·BA, without forming it.

Shapes everywhere: W₀ (out, in), A (r, in), B (out, r). Layers that store (in, out) pass a transposed view.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = [
    "ILL_CONDITIONED",
    "accumulation_dtype",
    "autocast_off",
    "dense_row_norm",
    "frozen_product",
    "ill_conditioned",
    "row_norm",
    "squared_row_norm",
    "values_are_visible",
    "zero_norm",
]

ILL_CONDITIONED = 1e-3
"""Rows with ‖V‖² below this share of the sum of squares of its terms are ill-conditioned: see :func:`row_norm`."""

# Elements of a low-precision weight that are converted at a time.
_BLOCK = 1 << 20


def row_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    squared_norm: Tensor | None = None,
) -> Tensor:
    """Returns ‖V‖ = ‖W₀ + s·BA‖ by rows, (out,), without forming BA.

        ‖V‖² = ‖W₀‖² + s·rowsum(B ∘ (2·W₀Aᵀ + s·B(AAᵀ)))

    in float32, or float64 if an argument is; autocast does not reach in. Twice differentiable in A and B.
    ``r·(out·in + r·in + r·out)`` multiply-adds; autograd keeps (out, r) matrices.

    Accuracy. With u the unit roundoff (6e-8 in float32, TF32 off), the error of the sum on the right is at most
    ``c·u·t`` where ``t = ‖W₀‖² + s²‖B‖²‖A‖_F²`` by rows, and c grows with the length of the sums (n at worst, √n in
    practice). Relative to ‖V‖² this is ``c·u·t/‖V‖²``, large where BA nearly cancels W₀. Rows with ``‖V‖² < t/1000``
    are therefore formed and summed densely, which leaves the error of V itself. So the relative error of the returned
    norm is below ``500·c·u`` in the worst row that is not formed, and ``c·u`` in the usual one, where t ≈ ‖V‖².

    Rows with ‖V‖ up to :func:`zero_norm` count as zero; the norm and its derivatives are 0 there.

    Args:
        weight: W₀, (out, in).
        lora_A: A, (r, in).
        lora_B: B, (out, r).
        scaling: s.
        squared_norm: ‖W₀‖² by rows where it is known; see :func:`squared_row_norm`.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    with autocast_off(weight.device):
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        # With r ≥ in, BA is no larger than W₀Aᵀ. Where values cannot be looked at, all rows are formed.
        if A.shape[0] >= A.shape[1] or not values_are_visible(A, B):
            return _root(_dense_squared_norm(weight, A, B, scaling))
        if squared_norm is None:
            squared_norm = squared_row_norm(weight, dtype)
        cross = 2 * frozen_product(weight, A.T) + scaling * (B @ (A @ A.T))
        squares = squared_norm + scaling * (B * cross).sum(1)
        ill = ill_conditioned(squares, squared_norm, A, B, scaling)
        if ill.any():
            rows = ill.nonzero().squeeze(1)
            dense = _dense_squared_norm(weight[rows], A, B[rows], scaling)
            squares = squares.index_put((rows,), dense)
        return _root(squares)


def dense_row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns what :func:`row_norm` does, from V itself: two (out, in) temporaries."""
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    with autocast_off(weight.device):
        return _root(_dense_squared_norm(weight, lora_A.to(dtype), lora_B.to(dtype), scaling))


def squared_row_norm(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ‖W₀‖² by rows, (out,), accumulated in ``dtype``."""
    if weight.requires_grad:
        return weight.to(dtype).square().sum(1)  # smooth at zero rows, unlike the norm
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)  # no (out, in) temporary
    return norm.square()


@torch.no_grad()
def ill_conditioned(squares: Tensor, squared_norm: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Returns in which rows a factored ‖V‖² is too small beside its terms to be accurate: see :func:`row_norm`."""
    terms = squared_norm + scaling**2 * A.square().sum() * B.square().sum(1)
    return squares < ILL_CONDITIONED * terms


def values_are_visible(*tensors: Tensor) -> bool:
    """Returns whether Python may look at values: not under torch.compile or vmap, or on the meta device."""
    if torch.compiler.is_compiling():
        return False
    return not any(t.is_meta or _is_batched(t) for t in tensors)


def _is_batched(tensor: Tensor) -> bool:
    """Returns whether vmap wraps a tensor, at any depth: ``vmap(grad(f))`` wraps it again."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def frozen_product(weight: Tensor, matrix: Tensor) -> Tensor:
    """Returns ``weight @ matrix`` in the matrix's precision, keeping no converted copy of a frozen weight."""
    if weight.dtype == matrix.dtype or weight.requires_grad:
        return weight.to(matrix.dtype) @ matrix
    return _frozen_product(weight, matrix)


def zero_norm(dtype: torch.dtype) -> float:
    """Returns the norm up to which a row counts as zero: 2e-13 in float32.

    Its cube is the smallest normal number: below, second derivatives, which hold ‖V‖⁻³, overflow.
    """
    return float(torch.finfo(dtype).tiny ** (1 / 3))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns float64 if one of the tensors is, and float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which autocast does not lower the precision of products."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _dense_squared_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.addmm(weight.to(A.dtype), B, A, alpha=scaling).square().sum(1)


def _root(squares: Tensor) -> Tensor:
    """Returns the square root, and 0 with zero derivatives where it is (nearly) 0. NaN stays NaN."""
    zero = squares.detach() <= zero_norm(squares.dtype) ** 2
    # both branches of a `where` are differentiated: the one not taken has to be finite too
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def _frozen_product(weight: Tensor, matrix: Tensor) -> Tensor:
    product: Tensor = _FrozenProduct.apply(weight, matrix)  # type: ignore[no-untyped-call]
    return product


class _FrozenProduct(torch.autograd.Function):
    """``weight @ matrix`` for a constant weight of lower precision than the matrix.

    Converting the weight first would leave a copy of it, twice as large, in every layer's graph. This keeps the weight
    itself and converts it block by block; a bfloat16 weight on a GPU is not converted at all, but multiplied by the
    matrix's three bfloat16 parts. Its derivative is another such product, so it has all orders.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, matrix: Tensor) -> Tensor:
        if _has_wide_products(weight, matrix):
            return _product_of_parts(weight, matrix)
        rows = max(1, _BLOCK // max(1, weight.shape[1]))
        return torch.cat([block.to(matrix.dtype) @ matrix for block in torch.split(weight, rows)])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (weight,) = ctx.saved_tensors
        return None, _frozen_product(weight.T, gradient)

    @staticmethod
    def jvp(ctx: Any, weight_tangent: None, tangent: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return _frozen_product(weight, tangent)


def _has_wide_products(weight: Tensor, matrix: Tensor) -> bool:
    """Returns whether bfloat16 matrices can be multiplied to float32: on GPUs, from torch 2.8 on."""
    if not (weight.is_cuda and weight.dtype == torch.bfloat16 and matrix.dtype == torch.float32):
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(matrix):
        return False
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def _product_of_parts(weight: Tensor, matrix: Tensor) -> Tensor:
    """Returns ``weight @ matrix`` to float32's precision: three parts of 8 bits make its 24."""
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.to(weight.dtype))
        rest = rest - parts[-1]
    products = torch.mm(weight, torch.cat(parts, 1), out_dtype=torch.float32)
    return products.view(weight.shape[0], 3, -1).sum(1)
