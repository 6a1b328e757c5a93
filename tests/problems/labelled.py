"""Labelled examples, some with wrong labels."""

from __future__ import annotations

import torch
from torch import Tensor


def blobs(count: int, wrong: float, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Three classes in the plane, each a normal distribution: points, given labels, right labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    angle = y * 2 * torch.pi / 3
    x = 2 * torch.stack([angle.cos(), angle.sin()], 1) + torch.randn(count, 2, generator=generator)
    bad = torch.rand(count, generator=generator) < wrong
    shift = torch.randint(1, 3, (count,), generator=generator)
    return x.to(dtype), (y + shift * bad) % 3, y
