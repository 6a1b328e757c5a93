"""Engines whose steps must leave no memory behind: every method, its variants, optimisers and modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, Problem
from bilevel.callbacks import Callback
from bilevel.hypergrad import available_methods

__all__ = [
    "Case",
    "Classifier",
    "Decay",
    "Step",
    "batches",
    "control",
    "loader",
    "make_engine",
    "method_cases",
    "network",
]

Step = Callable[[], object]
INPUTS, HIDDEN, CLASSES, BATCH = 4, 2, 3, 16
# Iterations are capped, so that 2,000 steps take seconds; what an iteration leaves behind is left by the first ones.
CAPPED: Mapping[str, dict[str, Any]] = {
    "neumann": {"terms": 3, "damping": 1.0},
    "conjugate_gradient": {"max_iterations": 3, "damping": 1.0},
    "minres": {"max_iterations": 3, "damping": 1.0},
    "gmres": {"max_iterations": 3, "damping": 1.0},
    "nystrom": {"rank": 3},
    "exact": {"damping": 1.0},
    "pzobo": {"num_directions": 2},
    "f2sa": {"iterations": 1},
    "bome": {"iterations": 1},
    "amigo": {"steps": 2},
    "stocbio": {"terms": 2},
    "ttsa": {"terms": 2},
}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "unrolled, graphs kept": {"method": "unrolled", "memory": "graph"},
    "unrolled, forward mode": {"method": "unrolled", "mode": "forward"},
    "unrolled, truncated": {"method": "unrolled", "steps": 1},
    "one_step, finite differences": {"method": "one_step", "difference": "central"},
    "neumann, warm start": {"method": "neumann", "warm_start": True},
    "conjugate_gradient, warm start": {"method": "conjugate_gradient", "warm_start": True},
    "minres, warm start": {"method": "minres", "warm_start": True},
    "gmres, warm start": {"method": "gmres", "warm_start": True, "restart": 2},
    "conjugate_gradient, preconditioner nystrom": {"method": "conjugate_gradient", "preconditioner": "nystrom"},
    "conjugate_gradient, preconditioner optimizer": {"method": "conjugate_gradient", "preconditioner": "optimizer"},
    "neumann, preconditioner nystrom": {"method": "neumann", "preconditioner": "nystrom"},
    "conjugate_gradient, Gauss–Newton": {"method": "conjugate_gradient", "curvature": "gauss_newton"},
    "conjugate_gradient, finite differences": {"method": "conjugate_gradient", "products": "finite_difference"},
    "nystrom, finite differences": {"method": "nystrom", "products": "finite_difference"},
    "exact, certificate": {"method": "exact", "certificate": {"products": 3}},
}


OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, Nesterov": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True),
    "Adam, AMSGrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "RMSprop, centred": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=1e-3),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
}
SCHEDULERS: Mapping[str, Callable[[Any], Any]] = {
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.999)],
        milestones=[5],
    ),
}


@dataclass(frozen=True)
class Case:
    """Something that a long run does at each step.

    Attributes:
        name: What the table calls it.
        make: Returns what takes a step; given a folder for files.
        period: Steps after which its state repeats.
    """

    name: str
    make: Callable[[Path], Step]
    period: int = 1


class Decay(Problem):
    """Outer: a weight decay for each tensor below, learnt on other data."""

    @property
    def decays(self) -> Tensor:
        """Their logarithms."""
        return cast(Tensor, cast(nn.ParameterList, self.module)[0])

    def loss(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self.classifier(x)
        # Metrics come with their graphs, as users return them.
        return {"loss": F.cross_entropy(logits, y), "spread": logits.std(), "decay": self.decays.exp().mean()}

    def evaluate(self) -> dict[str, float]:
        batch = next(iter(self.data or ()))
        return {"loss": float(self.loss(batch)["loss"])}


class Classifier(Problem):
    """Inner: a classifier with that decay."""

    def loss(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        squares = torch.stack([p.square().sum() for p in self.module.parameters()])
        penalty = (self.decay.decays.exp() * squares).sum()
        return {"loss": F.cross_entropy(logits, y) + penalty, "outputs": logits, "penalty": penalty}


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, BATCH, INPUTS, generator=generator)
    y = torch.randint(CLASSES, (count, BATCH), generator=generator)
    return list(zip(x, y, strict=True))


def loader(seed: int, **settings: Any) -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*batches(3, seed), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, **settings)


def network(*, norms: bool = False) -> nn.Module:
    between = (nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Dropout(0.2)) if norms else (nn.Tanh(),)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), *between, nn.Linear(HIDDEN, CLASSES))


def sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02)


def make_engine(
    method: Any = "identity",
    *,
    config: EngineConfig | None = None,
    module: nn.Module | None = None,
    kind: type[Classifier] = Classifier,
    callbacks: tuple[Callback, ...] = (),
    data: Callable[[int], Any] = lambda seed: batches(1, seed),
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    **inner: Any,
) -> Engine:
    """Returns an engine of a small classifier below the logarithms of its weight decays."""
    torch.manual_seed(0)
    module = network() if module is None else module
    outer = Decay(
        nn.ParameterList([torch.full((len(list(module.parameters())),), -4.0)]),
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        data=data(1),
    )
    problems = [outer, kind(module, optimizer=optimizer, name="classifier", data=data(0), **{"steps": 2, **inner})]
    return Engine(problems, config or EngineConfig(progress=False), hypergradient=method, callbacks=callbacks)


def control() -> Step:
    """Returns a step of a plain torch loop, which shows what a reading is worth."""
    torch.manual_seed(0)
    model = network()
    optimizer = sgd(model.parameters())
    ((x, y),) = batches(1, 0)

    def step() -> None:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()

    return step


def configured(name: str) -> dict[str, Any]:
    """Returns a method with its iterations capped."""
    return {"method": name, **CAPPED.get(name, {})}


def method_cases() -> list[Case]:
    """Returns a case for every method with its defaults, for variants, for optimisers, schedulers and modules."""

    def case(name: str, **settings: Any) -> Case:
        return Case(name, lambda folder: make_engine(**settings).step)

    found = [case(name, method=configured(name)) for name in available_methods()]
    for name, fields in VARIANTS.items():
        settings: dict[str, Any] = {"method": configured(fields["method"]) | fields}
        if fields.get("preconditioner") == "optimizer":
            settings["optimizer"] = OPTIMIZERS["Adam, AMSGrad"]
        found.append(case(name, **settings))
    for name, optimizer in OPTIMIZERS.items():
        found.append(case(f"identity, {name}", optimizer=optimizer))
    for name in ("SGD, Nesterov", "Adam, AMSGrad", "RMSprop, centred"):
        found.append(case(f"unrolled, {name}", method="unrolled", optimizer=OPTIMIZERS[name]))
    for name, scheduler in SCHEDULERS.items():
        found.append(case(f"identity, {name}", scheduler=scheduler))
    normed = {"module": network(norms=True)}
    for method in ("identity", "finite_difference", "neumann"):
        found.append(case(f"{method}, batch norm and dropout", method=configured(method), **normed))
    graphs = {"method": "unrolled", "memory": "graph"}
    found.append(case("unrolled, graphs kept, batch norm and dropout", method=graphs, **normed))
    for precision in ("bfloat16",):
        config = EngineConfig(progress=False, precision=precision)
        found.append(case(f"identity, {precision}", config=config))
    found.append(case("identity, clipped", max_grad_norm=0.1))
    return found
