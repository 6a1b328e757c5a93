"""A whole DoRA layer as one autograd function, which saves what its derivatives need and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidora.kernels.plain import PlainKernels, split_factors
from bidora.norm import autocast_off

__all__ = ["Reference", "fused_dora_linear"]

# The rows that hold (k ⊙ B)ᵀ below a cotangent are padded to a multiple of this, for the matrix units.
_NORM_ROWS = 16

Reference = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, "Tensor | None"], Tensor]
"""The layer in differentiable torch operations: ``(x, W₀, A, B, m, s, bias) -> y``."""


def fused_dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None,
    base_result: Tensor,
    *,
    reference: Reference,
    kernels: type[PlainKernels] | None = None,
) -> Tensor:
    """Returns ``y = g ⊙ (x W₀ᵀ + s·(x Aᵀ) Bᵀ) + bias``, in x's dtype, with ``g = m/‖V‖``.

    Derivatives in x are those of the whole layer: of ``base_result`` only the value is used.

    First derivatives are written by hand. With ``dz = g ⊙ dy``, ``dg = Σₙ dy ⊙ z`` and ``k = dL/d‖V‖² = −½ dg m/‖V‖³``

        dm = dg/‖V‖        dx = dz W₀ + s·(dz B) A
        dA = s·(dz B)ᵀ x + 2s·(k ⊙ B)ᵀ V        dB = s·dzᵀ(x Aᵀ) + 2s·k ⊙ VAᵀ

    ``(k ⊙ B)ᵀ W₀`` comes as r more rows of the product ``dz W₀``, so that W₀ is read once for each.  z comes from
    the output, as y/g, or with a bias from the base's output: so beside x, one (n, out) tensor is kept, and the output
    is one that the next operation often keeps anyway. A row with m = 0 outputs 5e-20·z instead of 0 for that.
    A frozen m does not spare it: ‖V‖ depends on A and B.

    With ``create_graph=True`` the first derivatives are those of ``reference``, evaluated again: differentiable to any
    order, for one more forward pass.

    Args:
        x: (…, in), of the weight's dtype.
        weight: W₀, frozen.
        lora_A: A.
        lora_B: B.
        magnitude: m.
        scaling: s.
        bias: (out,), frozen, or None.
        base_result: ``x W₀ᵀ + bias``, in x's dtype.
        reference: What second derivatives are taken of.
        kernels: The primitives; None chooses by device.
    """
    # Autocast is a licence to round factors as well; without it wide ones keep their precision.
    split = lora_A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    device = x.device
    rest = _Settings(
        float(scaling), kernels or _kernels(device.type), split, reference, torch.is_grad_enabled(),
        (device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)),
    )  # fmt: skip
    arguments = (x, weight, lora_A, lora_B, magnitude, bias, base_result.detach(), rest)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton starts kernels on the current one
            y: Tensor = _DoraLinear.apply(*arguments)  # type: ignore[no-untyped-call]
            return y
    y = _DoraLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class _Settings(NamedTuple):
    scaling: float
    kernels: type[PlainKernels]
    split: bool
    reference: Reference
    differentiated: bool
    autocast: tuple[str, torch.dtype, bool]


def _kernels(device: str) -> type[PlainKernels]:
    if device != "cuda":
        return PlainKernels
    from bidora.kernels.fused import FusedKernels  # Triton is there on GPUs only

    return FusedKernels


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        base_result: Tensor,
        rest: _Settings,
    ) -> Tensor:
        scaling, kernels, split, _, differentiated, _ = rest
        _, _, needs_A, needs_B, needs_m, *_ = ctx.needs_input_grad
        needs_factors = differentiated and (needs_A or needs_B)
        needs_sums = needs_factors or (differentiated and needs_m)
        base = base_result.contiguous()
        A, B = split_factors(lora_A, lora_B, x.dtype, split)
        hidden = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).mm(A.T)
        stats, projection = kernels.row_scale(
            weight, lora_A if split else A, lora_B, magnitude, scaling,
            project=differentiated and needs_B, recoverable=needs_sums and bias is None,
        )  # fmt: skip
        y = kernels.combine(base, hidden, B, stats, bias, scaling)
        if differentiated:
            kept = None
            if needs_sums:
                kept = y if bias is None else base
            keeps_hidden = needs_factors or bias is not None
            ctx.save_for_backward(
                x,
                weight,
                lora_A,
                lora_B,
                magnitude,
                bias,
                A,
                B,
                stats,
                projection,
                hidden if keeps_hidden else None,
                kept,
            )
            ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[i] for i in (0, 2, 3, 4))
        if torch.is_grad_enabled():
            x, A, B, m = _graph_gradients(ctx, gradient, wanted)
        else:
            x, A, B, m = _gradients(ctx, gradient, *wanted)
        return x, None, A, B, m, None, None, None


def _gradients(
    ctx: Any, gradient: Tensor, needs_x: bool, needs_A: bool, needs_B: bool, needs_m: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    with autocast_off(gradient.device):  # a backward pass may run under the caller's
        return _gradients_in_full(ctx, gradient, needs_x, needs_A, needs_B, needs_m)


def _gradients_in_full(
    ctx: Any, gradient: Tensor, needs_x: bool, needs_A: bool, needs_B: bool, needs_m: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    x, weight, lora_A, lora_B, magnitude, bias, A, B, stats, projection, hidden, kept = ctx.saved_tensors
    s, kernels, split, *_ = ctx.rest
    rows, rank = stats.shape[1], lora_A.shape[0]
    dy = gradient.reshape(-1, rows).contiguous()
    n = dy.shape[0]
    if kept is not None:
        kept = kept.view(n, rows)
    cotangents = dy.new_empty(n + (-(-rank // _NORM_ROWS) * _NORM_ROWS if needs_A else 0), rows)
    parts, through = kernels.scale_cotangent(
        dy, kept, hidden, B, stats, bias, s, cotangents, from_base=bias is not None, through=needs_x or needs_A
    )
    dx = dA = dB = dm = dh = k = gram = product = None
    if parts is not None:
        dm, k, gram, dh = kernels.norm_cotangent(parts, through, stats, magnitude, lora_B, cotangents, n, needs_A)
    elif through is not None:
        dh = through[0]
    if needs_x:
        assert dh is not None
        product = cotangents.mm(weight)
        dx = (product[:n] if needs_A else product).addmm_(dh, A, alpha=s).view(x.shape)
    elif needs_A:
        product = cotangents[n:].mm(weight)
    if needs_A:
        assert dh is not None
        dA = dh.T.mm(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    if needs_B:
        dB = (cotangents[:n] if needs_A else cotangents).T.mm(hidden)
    if k is not None and (needs_A or needs_B):
        dA, dB = kernels.factor_gradients(
            dA, dB, product, n if needs_x else 0, gram, k, projection, lora_A, lora_B, s, split
        )
    return dx, dA, dB, dm if needs_m else None


def _graph_gradients(ctx: Any, gradient: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    x, weight, lora_A, lora_B, magnitude, bias, *_ = ctx.saved_tensors
    # Of one another they may be functions, as x is of a lower layer's A: these views are not.
    inputs = [t.view_as(t) for t in (x, lora_A, lora_B, magnitude)]
    device, dtype, enabled = ctx.rest.autocast
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        y = ctx.rest.reference(inputs[0], weight, *inputs[1:], ctx.rest.scaling, bias)
    needed = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, needed, gradient.to(y.dtype), create_graph=True))
    return [next(found) if want else None for want in wanted]
