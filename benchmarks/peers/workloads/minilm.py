"""(f) on the CPU: training passes of LoRA and DoRA and BiDoRA's step on MiniLM, 16 texts of 96 tokens.

A pass is the loss's gradient for all adapter parameters. BiDoRA's step is an update of A and B on one batch, then the
hypergradient of m on another, and its update; gradient descent, no penalty, no dropout, eager attention (the exact
product needs a second derivative).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.peers.reference import flat
from benchmarks.peers.side import Arrays, Method, Passes, Reference

TITLE = "LoRA, DoRA and BiDoRA on MiniLM"
ABOUT = (
    "passes and steps on MiniLM-L6 with rank 4 on all linear layers of the encoder; by hand is plain torch that forms "
    "the adapted weight"
)
SIZES = {"small": {"batch": 2, "length": 8}, "full": {"batch": 16, "length": 96}}
TARGETS, RANK, ALPHA, RATE, OUTER_RATE = ("query", "key", "value", "dense"), 4, 8, 1e-2, 1e-2
METHODS = {
    "lora": Method("a pass of LoRA", tolerance=1e-3),
    "dora": Method("a pass of DoRA", tolerance=1e-3),
    "bidora_difference": Method("a step of BiDoRA, central differences", tolerance=1e-3),
    "bidora_exact": Method("a step of BiDoRA, exact product", tolerance=1e-3),
}


@dataclass
class Texts:
    """Two batches, adapters' values, and the base model.

    Attributes:
        arrays: Adapters by ``"A.LAYER"``, ``"B.LAYER"``, ``"m.LAYER"``.
        inner: The batch of a pass and of the inner problem: keyword arguments of the model.
        outer: That of the outer problem.
        dtype: Of the model.
        passes: Evaluations of the loss.
    """

    arrays: Arrays
    inner: dict[str, Tensor]
    outer: dict[str, Tensor]
    dtype: torch.dtype
    passes: Passes = field(default_factory=Passes)

    def base(self) -> nn.Module:
        """Returns the model, without dropout."""
        return base_model().to(self.inner["input_ids"].device, self.dtype).eval()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.passes.forward += 1
        found: Tensor = model(**batch).loss
        return found

    def values(self, part: str) -> list[Tensor]:
        """Returns the values of ``"A"``, ``"B"`` or ``"m"``, in the order of the model's layers."""
        kept = [array for name, array in self.arrays.items() if name.startswith(f"{part}.")]
        device = self.inner["input_ids"].device
        return [torch.tensor(array, dtype=self.dtype, device=device) for array in kept]

    @torch.no_grad()
    def fill(self, adapters: dict[str, list[nn.Parameter]]) -> None:
        """Puts the values into adapters."""
        for part, parameters in adapters.items():
            for parameter, value in zip(parameters, self.values(part), strict=True):
                parameter.copy_(value.reshape(parameter.shape))


class Adapted(nn.Module):
    """A weight W₀ with LoRA, or with DoRA where it has a magnitude: forms the adapted weight."""

    def __init__(self, weight: Tensor, *, magnitude: bool) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_zeros(RANK, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, RANK))
        self.m = nn.Parameter(weight.new_zeros(rows)) if magnitude else None

    def forward(self, base: Tensor) -> Tensor:
        weight = base + ALPHA / RANK * (self.B @ self.A)
        if self.m is None:
            return weight
        return (self.m / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1) * weight


class Adapter(nn.Module):
    """LoRA as it is trained: two thin products beside the layer's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(linear.weight.new_zeros(RANK, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) + ALPHA / RANK * F.linear(F.linear(x, self.A), self.B)
        return found


def by_hand(texts: Texts, *, magnitude: bool) -> tuple[nn.Module, dict[str, list[nn.Parameter]]]:
    """Returns the model with LoRA, or with exact DoRA, and its adapters by ``"A"``, ``"B"`` and ``"m"``."""
    model = texts.base().requires_grad_(False)
    adapters: dict[str, list[nn.Parameter]] = {"A": [], "B": [], **({"m": []} if magnitude else {})}
    for name in layers(model):
        linear: Any = model.get_submodule(name)
        if magnitude:
            made: Any = Adapted(linear.weight, magnitude=True)
            parametrize.register_parametrization(linear, "weight", made)
        else:
            made = Adapter(linear)
            model.set_submodule(name, made)
        for part, found in adapters.items():
            found.append(getattr(made, part))
    texts.fill(adapters)
    return model, adapters


def in_peft(model: nn.Module, texts: Texts) -> dict[str, list[nn.Parameter]]:
    """Returns the adapters of a PEFT model, filled."""
    kinds = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
    named = list(model.named_parameters())
    adapters = {part: [p for name, p in named if f".{kind}." in name] for part, kind in kinds.items()}
    adapters = {part: found for part, found in adapters.items() if found}
    texts.fill(adapters)
    return adapters


def layers(model: nn.Module) -> list[str]:
    """Returns the names of the layers that are adapted."""
    pairs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name, _ in pairs if name.rpartition(".")[2] in TARGETS]


def base_model() -> nn.Module:
    # Only in environments that have transformers and the packaged weights.
    from bidora.loading import load_model_and_tokenizer

    return load_model_and_tokenizer(num_labels=2, attention="eager").model


def data(size: str, folder: Path | None) -> tuple[Arrays, str]:
    generator, sizes, model = np.random.default_rng(0), SIZES[size], base_model()
    arrays: Arrays = {}
    for name in layers(model):
        weight: Any = model.get_submodule(name).weight
        rows, columns = weight.shape
        arrays[f"A.{name}"] = (generator.standard_normal((RANK, columns)) * columns**-0.5).astype(np.float32)
        arrays[f"B.{name}"] = (0.02 * generator.standard_normal((rows, RANK))).astype(np.float32)
        arrays[f"m.{name}"] = weight.detach().norm(dim=1).numpy()
    arrays["tokens"] = generator.integers(1000, 20000, (2, sizes["batch"], sizes["length"]))
    arrays["labels"] = generator.integers(2, size=(2, sizes["batch"]))
    return arrays, "random tokens"


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Texts:
    batches = []
    for number in range(2):
        ids, labels = (torch.tensor(arrays[name][number], device=device) for name in ("tokens", "labels"))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return Texts(arrays, batches[0], batches[1], getattr(torch, dtype))


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    """The gradient of A, B (and m), or the hypergradient of m after an inner step, by plain torch."""
    texts = task(arrays, size, dtype="float64")
    if method is METHODS["lora"]:
        return Reference(_gradient(texts, magnitude=False).numpy())
    if "step" not in method.kind:
        own = _gradient(texts, magnitude=True)
        with _norm(detached=True):
            others = {"the gradient with the norm detached": _gradient(texts, magnitude=True).numpy()}
        return Reference(own.numpy(), None, others)
    direct, mixed = _hypergradient(texts)
    # ∂f/∂m is right with a detached norm, and so are its differences in w.
    wrong = torch.sub(*_hypergradient(texts, detached=True, product_detached=method is METHODS["bidora_exact"]))
    others = {"the direct part alone": direct.numpy(), "the hypergradient with the norm detached": wrong.numpy()}
    return Reference((direct - mixed).numpy(), None, others)


def _gradient(texts: Texts, *, magnitude: bool) -> Tensor:
    model, adapters = by_hand(texts, magnitude=magnitude)
    return flat(torch.autograd.grad(texts.loss(model, texts.inner), [p for part in adapters.values() for p in part]))


def _hypergradient(texts: Texts, *, detached: bool = False, product_detached: bool = False) -> tuple[Tensor, Tensor]:
    """Returns ``∂F/∂m`` and ``∂²f/∂m∂w · ∂F/∂w`` after an inner step."""
    model, adapters = by_hand(texts, magnitude=True)
    directions, magnitudes = parts(adapters)
    with _norm(detached=detached):
        gradient = torch.autograd.grad(texts.loss(model, texts.inner), directions)
        with torch.no_grad():
            for p, g in zip(directions, gradient, strict=True):
                p -= RATE * g
        both = torch.autograd.grad(texts.loss(model, texts.outer), [*directions, *magnitudes])
    with _norm(detached=product_detached):
        graph = torch.autograd.grad(texts.loss(model, texts.inner), directions, create_graph=True)
    v, direct = both[: len(directions)], both[len(directions) :]
    return flat(direct), flat(torch.autograd.grad(graph, magnitudes, v))


@contextmanager
def _norm(*, detached: bool) -> Iterator[None]:
    """Takes the norm for a constant where it is to be detached, as PEFT does."""

    def forward(self: Adapted, base: Tensor) -> Tensor:
        assert self.m is not None
        weight = base + ALPHA / RANK * (self.B @ self.A)
        return (self.m / torch.linalg.vector_norm(weight.detach(), dim=1)).unsqueeze(1) * weight

    plain = Adapted.forward
    if detached:
        Adapted.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Adapted.forward = plain  # type: ignore[method-assign]


def parts(adapters: dict[str, list[nn.Parameter]]) -> tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]:
    """Returns directions and magnitudes."""
    return [*adapters["A"], *adapters["B"]], adapters.get("m", [])
