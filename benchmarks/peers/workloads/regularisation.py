"""(a) A weight decay for each input feature of multinomial logistic regression on digits.

Inner: ``f(W, λ) = mean cross-entropy(X Wᵀ, y) + ½ Σⱼ exp(λⱼ) Σ_c W_cj²``; outer: the cross-entropy on other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.reference import implicit
from benchmarks.peers.side import Arrays, Method, Reference, Task
from benchmarks.peers.workloads.digits import CLASSES, FEATURES, digits

TITLE = "Per-feature regularisation"
ABOUT = "multinomial logistic regression, 784 × 10, on 5,000 digits with a learned weight decay for each feature"
SIZES = {"small": 300, "full": 5000}
LOG_DECAY = -4.0
RATE = 0.1
METHODS = {
    "identity": Method("identity"),
    "finite_difference": Method("finite_difference", tolerance=3e-2),
    "neumann": Method("neumann", 20, RATE),
    "cg": Method("conjugate_gradient", 20, tolerance=2e-2),
}


def data(size: str, folder: Path | None) -> tuple[Arrays, str]:
    count = SIZES[size]
    x, y, source = digits(2 * count, folder)
    arrays = {"x": x[:count], "y": y[:count], "x_valid": x[count:], "y_valid": y[count:]}
    arrays["lam"] = np.full(FEATURES, LOG_DECAY, dtype=np.float32)
    arrays["w"] = _nearly_solved(arrays)
    return arrays, source


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Task:
    kind: torch.dtype = getattr(torch, dtype)
    x, x_valid, w, lam = (torch.tensor(arrays[n], dtype=kind, device=device) for n in ("x", "x_valid", "w", "lam"))
    y, y_valid = (torch.tensor(arrays[name], device=device) for name in ("y", "y_valid"))

    def inner_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(x, inner[0]), y) + (outer[0].exp() * inner[0].square().sum(0)).sum() / 2

    def outer_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(x_valid, inner[0]), y_valid)

    return Task([w], [lam], inner_loss, outer_loss, rate=RATE, outer_rate=1.0, extra={"arrays": arrays})


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    return implicit(task(arrays, size, dtype="float64"), method)


def _nearly_solved(arrays: dict[str, Any]) -> np.ndarray:
    """Returns weights after 60 iterations of L-BFGS, as float32 holds them."""
    problem = task({**arrays, "w": np.zeros((CLASSES, FEATURES))}, "", dtype="float64")
    w = problem.inner[0].requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.inner_loss([w], problem.outer)
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach().numpy().astype(np.float32)
