"""Runs to be killed: every method that remembers something, in a setting where everything else does too."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bilevel import Callback, Engine, EngineConfig, Problem
from bilevel.callbacks import Checkpoints, EarlyStopping, JSONLinesLog
from bilevel.errors import BilevelWarning, ConfigError
from bilevel.hypergrad import available_methods

__all__ = ["CHECKPOINTS", "LOG", "Case", "candidates", "remembers"]

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
BATCH, EXAMPLES = 8, 30  # a short batch at the end of each epoch


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        method: Name and fields of the method.
        workers: Processes of the inner data loader.
        every: Steps from one checkpoint to the next.
    """

    method: Mapping[str, Any]
    workers: int = 0
    every: int = 2

    def __str__(self) -> str:
        fields = [f"{key}={value}" for key, value in self.method.items() if key != "method"]
        return " ".join([self.method["method"], *fields, *([f"workers={self.workers}"] if self.workers else [])])

    def engine(self, folder: Path, watch: Callback) -> Engine:
        """Makes the engine anew, as a program does that is started again."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        adam = lambda params: torch.optim.Adam(params, lr=0.01)  # noqa: E731
        cycle = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=10_000)  # noqa: E731
        # Convex in what is trained: a solve that fails leaves nothing to remember.
        features = nn.Linear(4, 8).requires_grad_(False)
        norm = nn.BatchNorm1d(8, affine=False)
        network = nn.Sequential(features, norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        outer = Scale(
            nn.Linear(4, 4), optimizer=adam, data=DataLoader(Points(1), batch_size=BATCH, shuffle=True), scheduler=cycle
        )
        loader = DataLoader(Points(0), batch_size=BATCH, shuffle=True, num_workers=self.workers)
        inner = Network(network, optimizer=adam, data=loader, scheduler=cycle, steps=2)
        checkpoints = Checkpoints(folder / CHECKPOINTS, every=self.every, keep=2, best="network/accuracy", mode="max")
        stopping = EarlyStopping("scale", patience=10_000)
        return Engine(
            [outer, inner],
            EngineConfig(progress=False, evaluate_every=3, on_non_finite="skip"),
            hypergradient=self.method,
            callbacks=[watch, stopping, JSONLinesLog(folder / LOG, overwrite=True), checkpoints],
        )


class Points(Dataset[Any]):
    """Examples with noise that is drawn anew each time, by torch, NumPy and Python."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(EXAMPLES, 4, generator=generator)
        self.y = (self.x @ torch.randn(4, 3, generator=generator)).argmax(1)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(4) + float(np.random.randn()) + random.gauss(0.0, 1.0)
        return self.x[place] + 0.05 * noise, self.y[place]


class Scale(Problem):
    """Outer: a linear map in front of the network, whose loss draws from NumPy's and Python's generators too."""

    def loss(self, batch: Any) -> torch.Tensor:
        weight = 1.0 + 0.01 * (np.random.rand() + random.random())
        return weight * F.cross_entropy(self.network(self(batch[0])), batch[1])


class Network(Problem):
    """Inner: the last layer of a network with batch normalisation and dropout."""

    def loss(self, batch: Any) -> dict[str, torch.Tensor]:
        logits = self(self.scale(batch[0]))
        decay = sum(p.square().sum() for p in self.module[-1].parameters())
        return {"loss": F.cross_entropy(logits, batch[1]) + 0.05 * decay, "outputs": logits}

    def evaluate(self) -> dict[str, float]:
        points = Points(2)
        self.module.eval()
        found = self(self.scale(points.x)).argmax(1)
        self.module.train()
        return {"accuracy": float((found == points.y).float().mean())}


def candidates() -> Iterator[dict[str, Any]]:
    """Yields every method as it is by default, and with each of its switches and preconditioners."""
    for name, cls in available_methods().items():
        yield {"method": name}
        for field, default in cls.defaults().items():
            values: tuple[Any, ...] = ()
            if isinstance(default, bool) and field != "compile":  # the same state, computed in another way
                values = (not default,)
            if field == "preconditioner":
                values = ("optimizer", "nystrom")
            for value in values:
                yield {"method": name, field: value}


def remembers(method: Mapping[str, Any]) -> bool:
    """Whether a method keeps a state from one step to the next: found by taking steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        try:
            engine = Case(method).engine(Path(), Callback())
            engine.callbacks = ()
            for _ in range(2):
                engine.step()
        except ConfigError:  # a switch that does not go with the other fields' defaults
            return False
    return any(state for states in engine.estimator_states.values() for state in states.values())
