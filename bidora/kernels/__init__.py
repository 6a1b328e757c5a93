"""Exact DoRA layers at LoRA's price: the whole layer as one autograd function over fused GPU kernels.

:func:`bidora.dora.dora_linear` and the layers of an adapted model choose by ``kernels``, a :data:`Kernels`:

- ``"auto"``: fused on a GPU where nothing is in the way, torch operations otherwise;
- ``"torch"``: always torch operations; :func:`bidora.use_exact_dora` sets it for a model;
- ``"fused"``: an error that says what is in the way. On the CPU the same function runs over torch operations, in any
  dtype.

In the way are: ``torch.compile`` (which fuses the torch operations itself), ``torch.func`` transforms and forward mode,
a trainable, quantised or sharded base weight, a base dtype other than the autocast one, and on a GPU a base that is
not bfloat16, a rank above 64, no Triton, or compute capability below 8.0. In layers also: dropout in training, hooks
on the base layer, several active adapters. :func:`obstacle` tells.

What is equal and what is not. The output is the torch path's up to rounding in the base's dtype. Under autocast A and
B are rounded to bfloat16 in products, as LoRA's are; without it float32 factors are split into two bfloat16 parts
each, which leaves a relative error of 2⁻¹⁶. The norm is summed in float32 as :func:`bidora.norm.row_norm` describes, of
``W₀ + s·BA`` with A as the products have it. The layer's output is kept for the backward pass, so an operation that
overwrites it in place (``nn.ReLU(inplace=True)``) is an error of autograd: use ``"torch"`` there.
"""

from __future__ import annotations

from bidora.kernels.choice import Kernels, check_kernels, choose, impossible, obstacle
from bidora.kernels.function import fused_dora_linear

__all__ = ["Kernels", "check_kernels", "choose", "fused_dora_linear", "impossible", "obstacle"]
