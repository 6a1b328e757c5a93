"""The problems whose size grows. Needs torch only.

Softmax regression with learned weight decays: ``f(W, λ) = mean cross-entropy(X Wᵀ, y) + ½ Σ_g exp(λ_g) ‖w_g‖²`` with
the n entries of W in m groups, and F the cross-entropy on other data. n and m are free, a pass takes ``4·batch·n``
multiply-adds, and the inner Hessian is positive definite with eigenvalues from 1 down to the decay, so that conjugate
gradients have something to do at every size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.side import Method, Reference, Task
from benchmarks.peers.workloads.unrolled import Unrolling

__all__ = ["RATE", "Decayed", "One", "softmax_case", "softmax_task", "softmax_unrolled_reference"]

CLASSES = 100
LOG_DECAY = -11.0
RATE = 0.5  # of the inner steps, and α of Neumann series: below 1 / (largest eigenvalue)


@dataclass(frozen=True)
class Arrays:
    """Training and validation inputs and labels, and the weights at their start."""

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    w: Tensor


@functools.lru_cache(maxsize=8)
def arrays(inner: int, batch: int, device: str, dtype: torch.dtype) -> Arrays:
    """Returns data for ``inner`` parameters, a multiple of the number of classes; sides copy what they change."""
    generator = torch.Generator().manual_seed(0)
    features = inner // CLASSES
    # Features of falling size give a wide spectrum; the largest eigenvalue of the Hessian is about 1.
    size = (1.0 + torch.arange(features)).pow(-0.5)
    size *= (CLASSES * batch / features) ** 0.5 / size.norm() * min(1.0, (features / batch) ** 0.5)

    def inputs() -> Tensor:
        return (torch.randn(batch, features, generator=generator) * size).to(device, dtype)

    x, x_valid = inputs(), inputs()
    y, y_valid = (torch.randint(CLASSES, (batch,), generator=generator).to(device) for _ in range(2))
    w = (0.1 * torch.randn(CLASSES, features, generator=generator)).to(device, dtype)
    return Arrays(x, y, x_valid, y_valid, w)


def penalty(w: Tensor, decay: Tensor) -> Tensor:
    """Returns ``½ Σ_g exp(λ_g) ‖w_g‖²``; groups are consecutive entries, one for each λ."""
    return (decay.exp() * w.reshape(len(decay), -1).square().sum(1)).sum() / 2


def softmax_task(inner: int, outer: int, batch: int, device: str = "cpu", dtype: str = "float32") -> Task:
    """Returns the problem in the functional form."""
    kind: torch.dtype = getattr(torch, dtype)
    found = arrays(inner, batch, device, kind)
    decay = torch.full((outer,), LOG_DECAY, device=device, dtype=kind)

    def inner_loss(w: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(found.x, w[0]), found.y) + penalty(w[0], lam[0])

    def outer_loss(w: Sequence[Tensor], lam: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(found.x_valid, w[0]), found.y_valid)

    return Task([found.w], [decay], inner_loss, outer_loss, rate=RATE)


class Decayed(Unrolling):
    """The problem with a network, as the unrolled sides take it."""

    def inner_loss(self, model: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], decay: Tensor) -> Tensor:
        """Returns f."""
        self.passes.forward += 1
        return F.cross_entropy(model(self.train[0]), self.train[1]) + penalty(parameters[0], decay)


def softmax_case(inner: int, outer: int, batch: int, device: str = "cpu", dtype: str = "float32") -> Decayed:
    """Returns the problem with a network."""
    kind: torch.dtype = getattr(torch, dtype)
    found = arrays(inner, batch, device, kind)
    module = nn.Linear(found.w.shape[1], CLASSES, bias=False, device="meta")
    module.weight = nn.Parameter(found.w)
    decay = torch.full((outer,), LOG_DECAY, device=device, dtype=kind)
    return Decayed(module, decay, (found.x, found.y), (found.x_valid, found.y_valid), RATE)


def softmax_unrolled_reference(inner: int, outer: int, batch: int, steps: int) -> Reference:
    """Returns the derivative through the steps, in float64."""
    task = softmax_task(inner, outer, batch, dtype="float64")

    def through(count: int) -> np.ndarray:
        w, lam = [part.clone().requires_grad_() for part in task.inner], [task.outer[0].clone().requires_grad_()]
        for _ in range(count):
            grads = torch.autograd.grad(task.inner_loss(w, lam), w, create_graph=True)
            w = [p - task.rate * g for p, g in zip(w, grads, strict=True)]
        found: np.ndarray = torch.autograd.grad(task.outer_loss(w, lam), lam)[0].numpy()
        return found

    return Reference(through(steps), None, {"what one step fewer gives": through(steps - 1)})


@dataclass(frozen=True)
class One:
    """What a side's ``build`` asks for its case, where there is one case."""

    only: Any

    def case(self, method: Method) -> Any:
        return self.only
