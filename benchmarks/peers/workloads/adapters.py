"""(e) BiDoRA's problem on a small transformer: adapters A, B inside, magnitudes m outside, by exact DoRA written out.

Every linear layer has the weight ``m ∘ (W₀ + s B A) / ‖W₀ + s B A‖`` (the norm of each row, not detached). Inner:
``f(A, B; m) = cross-entropy + δ/2 ‖(A, B) − start‖²``; outer: the cross-entropy on other sequences. The decay is to
the start: one towards zero leaves rotations ``(R A, B Rᵀ)`` free: the Hessian would be singular.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.peers.reference import implicit
from benchmarks.peers.side import Arrays, Method, Reference, Task
from benchmarks.peers.workloads import unrolled

TITLE = "Adapters inside, magnitudes outside"
ABOUT = (
    "BiDoRA's problem on a two-layer transformer that predicts sequences: DoRA with rank 4 on its eight linear layers, "
    "written out so that every library gets the same loss"
)
SIZES = {
    "small": {"batch": 8, "width": 16, "length": 8, "iterations": 150},
    "full": {"batch": 16, "width": 64, "length": 32, "iterations": 200},
}
RANK, SCALE, DELTA, RATE = 4, 2.0, 0.3, 0.02
LAYERS = tuple(f"layers.{i}.{name}.weight" for i in range(unrolled.LAYERS) for name in ("read", "write", "up", "down"))
ADAPTERS = tuple(f"{part}.{key}" for part in "AB" for key in LAYERS)
METHODS = {
    "identity": Method("identity"),
    "finite_difference": Method("finite_difference", tolerance=3e-2),
    "neumann": Method("neumann", 10, RATE),
    "cg": Method("conjugate_gradient", 10, tolerance=5e-3),
}


def data(size: str, folder: Path | None) -> tuple[Arrays, str]:
    sizes = SIZES[size]
    tokens = unrolled.sequences(2 * sizes["batch"], sizes["length"])
    torch.manual_seed(0)
    arrays = {f"base.{key}": p.numpy() for key, p in _network(sizes).state_dict().items()}
    arrays["tokens"] = tokens
    generator = np.random.default_rng(1)
    for key in LAYERS:
        rows, columns = arrays[f"base.{key}"].shape
        arrays[f"A.{key}"] = (generator.standard_normal((RANK, columns)) * columns**-0.5).astype(np.float32)
        arrays[f"B.{key}"] = (generator.standard_normal((rows, RANK)) * 0.1).astype(np.float32)
        arrays[f"m.{key}"] = np.linalg.norm(arrays[f"base.{key}"], axis=1)
    arrays |= {f"start.{name}": arrays[name] for name in ADAPTERS}
    return _nearly_solved(arrays, size), "a seeded Markov chain"


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Task:
    sizes, kind = SIZES[size], getattr(torch, dtype)

    def tensor(name: str) -> Tensor:
        return torch.tensor(arrays[name], dtype=kind, device=device)

    network = _network(sizes).to(device, kind).requires_grad_(False)
    network.load_state_dict({key: tensor(f"base.{key}") for key in network.state_dict()})
    base = [tensor(f"base.{key}") for key in LAYERS]
    tokens, half = torch.tensor(arrays["tokens"], device=device), sizes["batch"]
    x, y = tokens[:, :-1], tokens[:, 1:]

    def cross_entropy(inner: Sequence[Tensor], outer: Sequence[Tensor], part: slice) -> Tensor:
        pairs = zip(inner[: len(LAYERS)], inner[len(LAYERS) :], strict=True)
        weights = [dora(w, a, b, m) for w, (a, b), m in zip(base, pairs, outer, strict=True)]
        outputs: Tensor = functional_call(network, dict(zip(LAYERS, weights, strict=True)), (x[part],))
        return F.cross_entropy(outputs, y[part].flatten())

    def inner_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        penalty: Any = sum((part - at).square().sum() for part, at in zip(inner, start, strict=True))
        return cross_entropy(inner, outer, slice(0, half)) + DELTA / 2 * penalty

    def outer_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        return cross_entropy(inner, outer, slice(half, None))

    inner = [tensor(name) for name in ADAPTERS]
    start = [tensor(f"start.{name}") for name in ADAPTERS]
    outer = [tensor(f"m.{key}") for key in LAYERS]
    extra = {"arrays": arrays}
    return Task(inner, outer, inner_loss, outer_loss, rate=RATE, outer_rate=1e-2, direct=True, extra=extra)


def dora(base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """Returns ``m ∘ (W₀ + s B A) / ‖W₀ + s B A‖`` of shape (out, in); the norm is a row's."""
    weight = base + SCALE * (b @ a)
    return (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1) * weight


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    return implicit(task(arrays, size, dtype="float64"), method)


def _network(sizes: dict[str, int]) -> unrolled.Transformer:
    return unrolled.Transformer(sizes["width"], sizes["length"], torch.tanh)  # smooth, so that L-BFGS converges


def _nearly_solved(arrays: Arrays, size: str) -> Arrays:
    """Returns the arrays with A and B after iterations of L-BFGS, as float32 holds them."""
    problem = task(arrays, size, dtype="float64")
    inner = [part.requires_grad_() for part in problem.inner]
    optimizer = torch.optim.LBFGS(inner, max_iter=SIZES[size]["iterations"], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.inner_loss(inner, problem.outer)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {**arrays, **{n: p.detach().numpy().astype(np.float32) for n, p in zip(ADAPTERS, inner, strict=True)}}
