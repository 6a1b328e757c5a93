"""What an adaptive optimiser knows of the curvature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.vector import Tensors

__all__ = ["curvature_of"]


def curvature_of(optimizer: Optimizer, params: Sequence[Tensor]) -> Tensors | None:
    """Returns what an adaptive optimiser divides gradients by, a positive diagonal that stands for the curvature.

    ``√(s / (1 − β₂ᵗ)) + ε`` of Adam and AdamW with the second moment s, ``√s + ε`` of RMSprop (with the variance for s
    where centred) and Adagrad. None for other optimisers, and before their first update.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)):
        return None
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for p in params:
        state, group = optimizer.state.get(p, {}), settings[id(p)]
        if isinstance(optimizer, torch.optim.Adagrad):
            square = state.get("sum")
        elif isinstance(optimizer, torch.optim.RMSprop):
            square = state.get("square_avg")
            mean = state.get("grad_avg")
            square = square - mean.square() if square is not None and mean is not None else square
        else:
            square = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
            if square is not None:
                square = square / (1 - group["betas"][1] ** float(state["step"]))
        if square is None:
            return None
        found.append(square.clamp_min(0).sqrt() + group["eps"])
    return tuple(found)
