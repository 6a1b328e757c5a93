"""(d) Few-shot learning: parameters from which tasks are learned in a few steps; the tasks of a batch are independent.

MAML: ``min over λ of 1/M Σ_i F_i(w_i)``, where ``w_i`` is K steps of gradient descent on ``f_i`` from λ, differentiated
through the steps. Implicit MAML: the steps are on ``f_i(w) + β/2 ‖w − λ‖²``, and ``dF/dλ = 1/M Σ_i (I + H_i/β)⁻¹ v_i``
at their end, by conjugate gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.reference import conjugate_gradient, flat, unflat
from benchmarks.peers.side import Arrays, Method, Passes, Reference
from benchmarks.peers.workloads.digits import digits

TITLE = "Few-shot learning"
ABOUT = (
    "MAML on Omniglot's characters, 5-way 1-shot, with four blocks of convolution, batch normalisation, ReLU and "
    "max-pooling; implicit MAML without the normalisation, under which β would have to be above 20 for a solution to "
    "be unique; and MAML on sinusoids with a 40–40 network; TF32 is off"
)
WAYS, SHOTS = 5, 1
SIZES: dict[str, dict[str, int]] = {
    "small": {"channels": 4, "queries": 2, "hidden": 8},
    "full": {"channels": 32, "queries": 5, "hidden": 40},
    "gpu": {"channels": 32, "queries": 15, "hidden": 40},
}
TASKS, POINTS = 64, 10
NETWORKS = {"conv": "conv net", "plain": "conv net without norms", "sinusoid": "sinusoids"}
RATES = {"conv": 0.1, "plain": 0.1, "sinusoid": 0.01}
PROXIMAL, PRODUCTS = 2.0, 5

OLD_RESIDUAL = "conjugate gradients whose direction takes the residual before its update"


def _method(network: str, tasks: int, steps: int, *, implicit: bool = False) -> Method:
    options = {"network": network, "tasks": tasks, "steps": steps, "implicit": implicit}
    plural = "" if steps == 1 else "s"
    name = f"implicit MAML (β = {PROXIMAL:g}, {PRODUCTS} products)" if implicit else "MAML"
    text = f"{name}, {NETWORKS[network]}, {tasks} tasks, {steps} step{plural}"
    return Method(text, PRODUCTS if implicit else 0, options=options, tolerance=1e-2 if implicit else 5e-3)


METHODS = {
    "conv_1_16": _method("conv", 16, 1),
    "conv_5_16": _method("conv", 16, 5),
    "conv_1_64": _method("conv", 64, 1),
    "conv_5_64": _method("conv", 64, 5),
    "implicit_5_16": _method("plain", 16, 5, implicit=True),
    "implicit_5_64": _method("plain", 64, 5, implicit=True),
    "sinusoid_1_64": _method("sinusoid", 64, 1),
    "sinusoid_5_64": _method("sinusoid", 64, 5),
}
# 64 conv nets take minutes on a processor and have nothing to show that 16 do not.
ROWS = {
    "full": [key for key in METHODS if not key.endswith("64") or key.startswith("sinusoid")],
    "gpu": [key for key in METHODS if key.endswith("64")],
}


class ConvNet(nn.Module):
    """Four blocks on 28 × 28 images, and a linear layer."""

    def __init__(self, channels: int, *, normalised: bool = True) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(n, channels, 3, padding=1) for n in (1, *[channels] * 3)])
        self.norms = nn.ModuleList([self.norm(channels) if normalised else nn.Identity() for _ in range(4)])
        self.head = nn.Linear(channels, WAYS)

    @staticmethod
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(torch.relu(norm(convolution(x))), 2)
        found: Tensor = self.head(x.flatten(1))
        return found


@dataclass
class FewShot:
    """Tasks and a network; every library gets the same.

    Attributes:
        network: At λ's start; sides work on copies of it.
        batch: Support inputs and targets, query inputs and targets, each ``(M, n, …)``.
        criterion: Of outputs and targets of one task.
        rate: Of the inner steps.
        steps: Inner steps.
        proximal: β; 0 for MAML.
        products: Iterations of conjugate gradients.
        outer_rate: Of the outer steps.
        passes: Evaluations of losses.
    """

    network: nn.Module
    batch: tuple[Tensor, Tensor, Tensor, Tensor]
    criterion: Callable[[Tensor, Tensor], Tensor]
    rate: float
    steps: int
    proximal: float = 0.0
    products: int = 0
    outer_rate: float = 1e-3
    passes: Passes = field(default_factory=Passes)

    @property
    def count(self) -> int:
        return len(self.batch[0])

    def copy(self) -> nn.Module:
        """Returns a network of one's own."""
        return copy.deepcopy(self.network)

    def support_loss(self, model: Callable[[Tensor], Tensor], task: int) -> Tensor:
        """Returns ``f_i`` without the proximal term."""
        self.passes.forward += 1
        return self.criterion(model(self.batch[0][task]), self.batch[1][task])

    def query_loss(self, model: Callable[[Tensor], Tensor], task: int) -> Tensor:
        """Returns ``F_i``."""
        self.passes.forward += 1
        return self.criterion(model(self.batch[2][task]), self.batch[3][task])

    def with_parameters(self, values: Mapping[str, Tensor] | Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """Returns the network as a function of inputs, at given parameters."""
        names = [name for name, _ in self.network.named_parameters()]
        given = dict(values) if isinstance(values, Mapping) else dict(zip(names, values, strict=True))
        return lambda x: functional_call(self.network, given, (x,))


class Tasks:
    """``case(method)`` is what a method is about."""

    def __init__(self, cases: dict[str, FewShot]) -> None:
        self.cases = cases
        self.passes = Passes()

    def case(self, method: Method) -> FewShot:
        found, options = copy.copy(self.cases[method.options["network"]]), method.options
        found.batch = tuple(part[: options["tasks"]] for part in found.batch)  # type: ignore[assignment]
        found.steps, found.passes = options["steps"], self.passes
        found.proximal = PROXIMAL if options["implicit"] else 0.0
        found.products = method.products
        return found


def data(size: str, folder: Path | None, tasks: int = TASKS) -> tuple[Arrays, str]:
    queries = SIZES[size]["queries"]
    images, classes, source = _characters(folder)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(tasks):
        ways = generator.choice(np.unique(classes), WAYS, replace=False)
        drawn.append([generator.permutation(np.flatnonzero(classes == way))[: SHOTS + queries] for way in ways])
    x = images[np.array(drawn)][:, :, :, None].astype(np.float32)  # (tasks, ways, shots + queries, 1, 28, 28)
    y = np.broadcast_to(np.arange(WAYS)[None, :, None], x.shape[:3])
    arrays = {}
    for name, part in (("support", slice(0, SHOTS)), ("query", slice(SHOTS, None))):
        arrays[f"{name}_x"] = x[:, :, part].reshape(tasks, -1, 1, 28, 28)
        arrays[f"{name}_y"] = y[:, :, part].reshape(tasks, -1)
        points = generator.uniform(-5, 5, (tasks, POINTS, 1))
        arrays[f"{name}_points"] = points.astype(np.float32)
    amplitude, phase = generator.uniform(0.1, 5, (tasks, 1, 1)), generator.uniform(0, np.pi, (tasks, 1, 1))
    for name in ("support", "query"):
        arrays[f"{name}_values"] = (amplitude * np.sin(arrays[f"{name}_points"] - phase)).astype(np.float32)
    return arrays, f"{source}; sinusoids of amplitude 0.1 to 5 and phase 0 to π"


def _characters(folder: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns images of 28 × 28 in [0, 1], their classes, and which they are."""
    if folder is None:
        x, y, name = digits(5000, None)
        return x.reshape(-1, 28, 28), y, f"{name} (no --data with Omniglot)"
    with np.load(folder / "omniglot" / "background_small1.npz") as arrays:
        ink = np.unpackbits(arrays["x"], axis=1, count=105 * 105).reshape(-1, 105, 105)
        padded = np.pad(ink, ((0, 0), (3, 4), (3, 4))).reshape(-1, 28, 4, 28, 4)
        return padded.mean((2, 4), dtype=np.float32), arrays["y"].astype(np.int64), "Omniglot, background_small1"


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Tasks:
    sizes, kind = SIZES[size], getattr(torch, dtype)

    def tensors(*names: str) -> Any:
        found = [torch.tensor(arrays[name], device=device) for name in names]
        return tuple(part.to(kind) if part.is_floating_point() else part for part in found)

    torch.manual_seed(0)
    hidden = sizes["hidden"]
    layers = nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    networks = {
        "conv": ConvNet(sizes["channels"]),
        "plain": ConvNet(sizes["channels"], normalised=False),
        "sinusoid": nn.Sequential(*layers),
    }
    images = tensors("support_x", "support_y", "query_x", "query_y")
    points = tensors("support_points", "support_values", "query_points", "query_values")
    cases = {}
    for name, network in networks.items():
        batch, criterion = (points, F.mse_loss) if name == "sinusoid" else (images, F.cross_entropy)
        cases[name] = FewShot(network.to(device, kind), batch, criterion, RATES[name], 1)
    return Tasks(cases)


def adapted(problem: FewShot, start: Sequence[Tensor], number: int, *, graph: bool) -> list[Tensor]:
    """Returns a task's parameters after the inner steps from ``start``."""
    w = [p if graph else p.detach().requires_grad_() for p in start]
    for _ in range(problem.steps):
        value = problem.support_loss(problem.with_parameters(w), number)
        grads = torch.autograd.grad(value, w, create_graph=graph)
        if problem.proximal:
            grads = [g + problem.proximal * (p - s) for g, p, s in zip(grads, w, start, strict=True)]  # type: ignore
        w = [p - problem.rate * g for p, g in zip(w, grads, strict=True)]
        w = w if graph else [p.detach().requires_grad_() for p in w]
    return w


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = task(arrays, size, device, "float64").case(method)
    start = [p.detach().clone().requires_grad_() for p in problem.network.parameters()]
    single = _implicit if problem.proximal else _unrolled
    found = [single(problem, start, number) for number in range(problem.count)]
    first, *more = (torch.stack(parts).mean(0).cpu().numpy() for parts in zip(*found, strict=True))
    if problem.proximal:
        return Reference(first, more[0], {OLD_RESIDUAL: more[1]})
    return Reference(first, None, {"the first-order gradient": more[0]})


def _unrolled(problem: FewShot, start: Sequence[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Returns MAML's gradient of a task, and the first-order one."""
    w = adapted(problem, start, number, graph=True)
    value = problem.query_loss(problem.with_parameters(w), number)
    whole, first_order = (torch.autograd.grad(value, list(parts), retain_graph=True) for parts in (start, w))
    return flat(whole), flat(first_order)


def _implicit(problem: FewShot, start: Sequence[Tensor], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns implicit MAML's gradient of a task by the method's number of products, exactly, and by a wrong one."""
    w = adapted(problem, start, number, graph=False)
    v = flat(torch.autograd.grad(problem.query_loss(problem.with_parameters(w), number), w))
    grads = torch.autograd.grad(problem.support_loss(problem.with_parameters(w), number), w, create_graph=True)

    def operator(q: Tensor) -> Tensor:
        return q + flat(torch.autograd.grad(grads, w, unflat(q, w), retain_graph=True)) / problem.proximal

    own, exact = conjugate_gradient(operator, v, problem.products, 0.0), conjugate_gradient(operator, v, 500, 1e-10)
    # Betty's conjugate gradients as released, on H + βI: the new direction starts from the residual before the update.
    q, r, p = torch.zeros_like(v), v, v
    for _ in range(problem.products):
        image = problem.proximal * operator(p)
        alpha, old = (r @ r) / (p @ image), r
        q, r = q + alpha * p, r - alpha * image
        p = old + (r @ r) / (old @ old) * p
    return own, exact, problem.proximal * q
