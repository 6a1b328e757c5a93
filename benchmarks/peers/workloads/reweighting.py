"""(b) A weight network over per-example losses of an MLP on digits, 40 % of whose labels are drawn anew.

Inner: ``f(w, λ) = meanᵢ V(ℓᵢ; λ) ℓᵢ + ½ decay ‖w − w₀‖²`` with ``ℓᵢ = cross-entropy(MLP(xᵢ; w), yᵢ)``, MLP 784–100–10
with tanh and V 1–100–1 with tanh and a sigmoid; outer: the mean cross-entropy on clean images. The weight network sees
ℓᵢ itself, not a detached copy as in Meta-Weight-Net's code: f is then one function of w and λ, whose derivatives every
method and every library agrees on. The decay is towards the random start w₀: with a decay towards zero hidden units
coincide, and the Hessian is singular.
"""

from __future__ import annotations

import itertools
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

TITLE = "Reweighting"
ABOUT = "an MLP 784–100–10 on 500 digits with wrong labels, a weight network 1–100–1 over its per-example losses"
SIZES = {"small": (60, 12), "full": (500, 100)}
DECAY, WRONG, RATE = 0.2, 0.4, 0.1
ITERATIONS = 60
METHODS = {
    "identity": Method("identity"),
    "finite_difference": Method("finite_difference", tolerance=3e-2),
    "neumann": Method("neumann", 10, RATE),
    "cg": Method("conjugate_gradient", 10, tolerance=2e-2),
}


def data(size: str, folder: Path | None) -> tuple[Arrays, str]:
    count, hidden = SIZES[size]
    x, y, source = digits(2 * count, folder)
    generator = np.random.default_rng(1)
    given, noisy = y[:count].copy(), generator.random(count) < WRONG
    given[noisy] = generator.integers(CLASSES, size=int(noisy.sum()))
    arrays = {"x": x[:count], "y": given, "x_valid": x[count:], "y_valid": y[count:]}

    def layers(*widths: int) -> list[np.ndarray]:
        pairs = itertools.pairwise(widths)
        return [part for a, b in pairs for part in (generator.standard_normal((b, a)) / a**0.5, np.zeros(b))]

    start, weights = layers(FEATURES, hidden, CLASSES), layers(1, hidden, 1)
    arrays |= {f"lam{i}": part.astype(np.float32) for i, part in enumerate(weights)}
    arrays |= {f"start{i}": part.astype(np.float32) for i, part in enumerate(start)}
    solved = _nearly_solved({**arrays, **{f"w{i}": part for i, part in enumerate(start)}})
    return arrays | {f"w{i}": part for i, part in enumerate(solved)}, f"{source}, {100 * WRONG:.0f} % labels drawn anew"


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Task:
    kind: torch.dtype = getattr(torch, dtype)
    names = "x", "x_valid", *(f"{name}{i}" for name in ("w", "lam", "start") for i in range(4))
    x, x_valid, *parameters = (torch.tensor(arrays[name], dtype=kind, device=device) for name in names)
    starts = parameters[8:]
    y, y_valid = (torch.tensor(arrays[name], device=device) for name in ("y", "y_valid"))

    def inner_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        losses = F.cross_entropy(network(x, inner), y, reduction="none")
        weights = torch.sigmoid(network(losses[:, None], outer)[:, 0])
        decay = sum((part - start).square().sum() for part, start in zip(inner, starts, strict=True))
        return (weights * losses).mean() + DECAY / 2 * decay

    def outer_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(network(x_valid, inner), y_valid)

    extra = {"arrays": arrays}
    return Task(parameters[:4], parameters[4:8], inner_loss, outer_loss, rate=RATE, outer_rate=0.1, extra=extra)


def network(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns two layers with tanh between them."""
    first, bias, second, last = parameters
    return F.linear(torch.tanh(F.linear(x, first, bias)), second, last)


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    return implicit(task(arrays, size, dtype="float64"), method)


def _nearly_solved(arrays: dict[str, Any]) -> list[np.ndarray]:
    """Returns parameters after some iterations of L-BFGS, as float32 holds them."""
    problem = task(arrays, "", dtype="float64")
    w = [part.requires_grad_() for part in problem.inner]
    optimizer = torch.optim.LBFGS(w, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.inner_loss(w, problem.outer)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [part.detach().numpy().astype(np.float32) for part in w]
