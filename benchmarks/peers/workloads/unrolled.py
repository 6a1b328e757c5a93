"""(c) Unrolled inner steps: a weight decay for each tensor of a conv net and of a small transformer.

Inner: ``f(w, λ) = cross-entropy + ½ Σⱼ exp(λⱼ) ‖wⱼ‖²``, of which K steps of gradient descent are taken; outer: the
cross-entropy on other data at their end, differentiated through the steps. The inner parameters go on from where the
last outer step left them. Activations are most of what the graph of a step holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.side import Arrays, Method, Passes, Reference
from benchmarks.peers.workloads.digits import digits

TITLE = "Unrolled inner steps"
ABOUT = (
    "a weight decay for each tensor of a conv net on digits and of a two-layer transformer on sequences, through 5 and "
    "20 steps of gradient descent; “less memory” keeps the graphs of the last 5 steps and evaluates the others again, "
    "where a library can"
)
SIZES = {
    "small": {"batch": 8, "channels": 4, "width": 16, "length": 8},
    "full": {"batch": 64, "channels": 16, "width": 64, "length": 32},
}
VOCABULARY, HEADS, LAYERS, LOG_DECAY = 32, 4, 2, -6.0
Activation = Callable[[Tensor], Tensor]
RATES = {"conv": 0.1, "transformer": 0.3}
GRAPHS = 5
"""Kept of 20: at most a third of the memory of all of them, beside what one step takes on the way back."""
METHODS = {
    f"{network}_{steps}{'_memory' if least else ''}": Method(
        f"{text}, {steps} steps{', less memory' if least else ''}",
        options={"network": network, "steps": steps, "least_memory": least, **({"graphs": GRAPHS} if least else {})},
        tolerance=5e-3,
    )
    for network, text in (("conv", "conv net"), ("transformer", "transformer"))
    for steps, least in ((5, False), (20, False), (20, True))
}


class ConvNet(nn.Module):
    """Three convolutions, the last two of stride 2, the mean over places and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = [(1, 1), (channels, 2), (channels, 2)]
        self.layers = nn.ModuleList([nn.Conv2d(n, channels, 3, stride, padding=1) for n, stride in sizes])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Transformer(nn.Module):
    """Predicts the next token: layers of causal attention, written out, and of two linear ones, normalised before."""

    def __init__(self, width: int, length: int, activation: Activation = torch.relu) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList([Layer(width, length, activation) for _ in range(LAYERS)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(x).flatten(0, 1)


class Layer(nn.Module):
    mask: Tensor

    def __init__(self, width: int, length: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.read(self.norms[0](x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        scores = (query @ key.transpose(-1, -2)) * (width // HEADS) ** -0.5
        weights = scores.masked_fill(self.mask, -torch.inf).softmax(-1)
        x = x + self.write((weights @ value).transpose(1, 2).reshape(batch, length, width))
        found: Tensor = x + self.down(self.activation(self.up(self.norms[1](x))))
        return found


@dataclass
class Unrolling:
    """One network with its data; every library gets the same.

    Attributes:
        module: The network at its start; sides work on copies of it.
        decay: Where λ starts, one logarithm for each tensor of the network.
        train: Inputs and targets of the inner loss.
        valid: Those of the outer loss.
        rate: Of the inner steps.
        outer_rate: Of the outer steps.
        passes: Evaluations of the two losses.
    """

    module: nn.Module
    decay: Tensor
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    rate: float
    outer_rate: float = 1e-2
    passes: Passes = field(default_factory=Passes)

    def copy(self) -> nn.Module:
        """Returns a network of one's own."""
        return copy.deepcopy(self.module)

    def inner_loss(self, model: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], decay: Tensor) -> Tensor:
        """Returns f; the model holds the parameters, which are given for the penalty."""
        self.passes.forward += 1
        x, y = self.train
        penalty: Any = sum(rate * p.square().sum() for rate, p in zip(decay.exp().unbind(), parameters, strict=True))
        return F.cross_entropy(model(x), y) + penalty / 2

    def outer_loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns F."""
        self.passes.forward += 1
        x, y = self.valid
        return F.cross_entropy(model(x), y)

    def with_parameters(self, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """Returns the network as a function of inputs, at given parameters."""
        values = dict(zip((name for name, _ in self.module.named_parameters()), parameters, strict=True))
        return lambda x: functional_call(self.module, values, (x,))


class Tasks:
    """Both networks; ``case(method)`` is what a method is about."""

    def __init__(self, cases: dict[str, Unrolling]) -> None:
        self.cases = cases
        self.passes = Passes()
        for case in cases.values():
            case.passes = self.passes

    def case(self, method: Method) -> Unrolling:
        return self.cases[method.options["network"]]


def data(size: str, folder: Path | None) -> tuple[Arrays, str]:
    sizes = SIZES[size]
    x, y, source = digits(2 * sizes["batch"], folder)
    tokens = sequences(2 * sizes["batch"], sizes["length"])
    return {"images": x.reshape(-1, 1, 28, 28), "labels": y, "tokens": tokens}, f"{source}; a seeded Markov chain"


def sequences(count: int, length: int) -> np.ndarray:
    """Returns sequences of ``length + 1`` tokens: each is followed by one of four, mostly by the first of them."""
    generator = np.random.default_rng(0)
    following = generator.integers(VOCABULARY, size=(VOCABULARY, 4))
    tokens = generator.integers(VOCABULARY, size=(count, length + 1))
    for place in range(length):
        choice = generator.choice(4, size=count, p=[0.7, 0.1, 0.1, 0.1])
        tokens[:, place + 1] = following[tokens[:, place], choice]
    return tokens


def task(arrays: Arrays, size: str, device: str = "cpu", dtype: str = "float32") -> Tasks:
    sizes, kind = SIZES[size], getattr(torch, dtype)
    images = torch.tensor(arrays["images"], dtype=kind, device=device)
    labels, tokens = (torch.tensor(arrays[name], device=device) for name in ("labels", "tokens"))
    half = sizes["batch"]
    given = {"conv": (images, labels), "transformer": (tokens[:, :-1], tokens[:, 1:])}
    cases = {}
    for name, (x, y) in given.items():
        torch.manual_seed(0)
        made = ConvNet(sizes["channels"]) if name == "conv" else Transformer(sizes["width"], sizes["length"])
        module = made.to(device, kind)
        decay = torch.full((len(list(module.parameters())),), LOG_DECAY, dtype=kind, device=device)
        halves = [(x[part], y[part].flatten()) for part in (slice(0, half), slice(half, None))]
        cases[name] = Unrolling(module, decay, halves[0], halves[1], RATES[name])
    return Tasks(cases)


def unrolled(problem: Unrolling, steps: int) -> tuple[list[Tensor], Tensor]:
    """Returns the inner parameters after the steps, with their graph, and λ."""
    decay = problem.decay.clone().requires_grad_()
    parameters: list[Tensor] = [p.detach().clone().requires_grad_() for p in problem.module.parameters()]
    for _ in range(steps):
        value = problem.inner_loss(problem.with_parameters(parameters), parameters, decay)
        grads = torch.autograd.grad(value, parameters, create_graph=True)
        parameters = [p - problem.rate * g for p, g in zip(parameters, grads, strict=True)]
    return parameters, decay


def reference(arrays: Arrays, size: str, method: Method) -> Reference:
    """The derivative of the outer loss through the steps, and through one step more or less."""
    problem = task(arrays, size, dtype="float64").case(method)

    def through(steps: int) -> np.ndarray:
        parameters, decay = unrolled(problem, steps)
        value = problem.outer_loss(problem.with_parameters(parameters))
        found: np.ndarray = torch.autograd.grad(value, decay)[0].numpy()
        return found

    steps = method.options["steps"]
    own = through(steps)
    return Reference(own, None, {"what one step fewer gives": through(steps - 1), "zero": np.zeros_like(own)})
