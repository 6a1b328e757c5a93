"""A small nest that uses every kind of state, wired so that a fault can be set off at any place of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bilevel import ConjugateGradient, Engine, EngineConfig, Problem
from bilevel.callbacks import Callback
from bilevel.hypergrad.implicit import System
from bilevel.linear import Solution

LEVELS = ("test", "decay", "classifier")
"""Top level first: two scalars that regularise each other and a network."""


@dataclass
class Fuse:
    """Does something once, when a place of the code is passed for the n-th time.

    Attributes:
        place: Where.
        after: How many passes to let go by first.
        action: What; it is given the value at the place, and returns the one to go on with.
        trap: For data-loader workers, which are other processes: 1 to raise at the next example, 2 to be killed there.
    """

    place: str = ""
    after: int = 0
    action: Callable[[Any], Any] = field(default=lambda value: value)
    blown: bool = False
    trap: Any = field(default_factory=lambda: multiprocessing.Value("i", 0))

    def arm(self, place: str, action: Callable[[Any], Any], after: int = 0) -> None:
        self.place, self.action, self.after, self.blown = place, action, after, False

    def __call__(self, place: str, value: Any = None) -> Any:
        if place != self.place or self.blown:
            return value
        if self.after:
            self.after -= 1
            return value
        self.blown = True
        return self.action(value)


class Wired(nn.Module):
    """The identity, with a fuse in its forward and one in its backward pass."""

    def __init__(self, fuse: Fuse, name: str) -> None:
        super().__init__()
        self._fuse, self._name = fuse, name

    def forward(self, x: Tensor) -> Tensor:
        return _Through.apply(self._fuse(f"forward of {self._name}", x), self._fuse, self._name)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fuse: Fuse, name: str) -> Tensor:
        ctx.fuse, ctx.place = fuse, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.fuse(f"backward of {ctx.place}", grad), None, None


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Examples of three classes."""

    def __init__(self, fuse: Fuse, name: str, seed: int, size: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = (self.x @ torch.randn(4, 3, generator=generator)).argmax(1)
        self._fuse, self._name = fuse, name

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if self._name == "classifier" and get_worker_info() is not None:
            with self._fuse.trap.get_lock():
                what, self._fuse.trap.value = self._fuse.trap.value, 0
            if what == 1:
                raise ValueError("oh")
            if what == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._fuse(f"data of {self._name}", (self.x[place], self.y[place]))


class Level(Problem):
    """A problem with fuses in its loss and its hooks."""

    fuse: Fuse

    def on_run_start(self, steps: int) -> None:
        self.fuse(f"on_run_start of {self.name}")

    def on_step_start(self) -> None:
        self.fuse(f"on_step_start of {self.name}")

    def on_step_end(self, result: Any) -> None:
        self.fuse(f"on_step_end of {self.name}")

    def evaluate(self) -> Mapping[str, float]:
        self.fuse(f"evaluate of {self.name}")
        return {"size": float(sum(p.square().sum() for p in self.parameters))}

    def loss(self, batch: Any) -> Tensor:
        return self.fuse(f"loss of {self.name}", self.inner_loss(self.fuse(f"batch of {self.name}", batch)))

    def inner_loss(self, batch: Any) -> Tensor:
        raise NotImplementedError


class Test(Level):
    """Outer: how strongly the decay is pulled to zero."""

    def inner_loss(self, batch: Any) -> Tensor:
        pull, decay = self.module(), self.decay.module()
        loss = F.cross_entropy(self.classifier(batch[0]), batch[1])
        return loss + pull.square().sum() + 0.1 * decay.square().sum()


class Decay(Level):
    """Middle (outer, where there are two levels): the logarithm of the network's weight decay."""

    def inner_loss(self, batch: Any) -> Tensor:
        pull = self.test.module().exp().sum() if "test" in self.names else 1.0
        return F.cross_entropy(self.classifier(batch[0]), batch[1]) + pull * self.module().square().sum()


class Classifier(Level):
    """Inner: a network with batch norm and dropout."""

    def inner_loss(self, batch: Any) -> Tensor:
        penalty = sum((p.square().sum() for p in self.module.parameters()), torch.zeros(()))
        return F.cross_entropy(self(batch[0]), batch[1]) + self.decay.module().exp().sum() * penalty


class Scalar(nn.Module):
    """One parameter."""

    def __init__(self, value: float, fuse: Fuse, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.wire = Wired(fuse, name)

    def forward(self) -> Tensor:
        return self.wire(self.weight)


class Counter(Callback):
    """A callback with state and a fuse in every hook."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse, self.seen = fuse, 0

    def on_run_start(self, engine: Engine, steps: int) -> None:
        self.fuse("callback's on_run_start")

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Any) -> None:
        self.fuse("callback's on_hypergradient")

    def on_step_end(self, engine: Engine, result: Any) -> None:
        self.seen += 1
        self.fuse("callback's on_step_end")

    def on_evaluate(self, engine: Engine, metrics: Mapping[str, float]) -> None:
        self.fuse("callback's on_evaluate")

    def on_step_complete(self, engine: Engine, result: Any) -> None:
        self.fuse("callback's on_step_complete")

    def on_run_end(self, engine: Engine) -> None:
        self.fuse("callback's on_run_end")

    def state_dict(self) -> dict[str, Any]:
        self.fuse("callback's state_dict")
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def conjugate_gradient(fuse: Fuse) -> ConjugateGradient:
    """Returns the method, with a fuse at the end of its solves."""

    class Flawed(ConjugateGradient):
        def solve(self, system: System) -> tuple[Solution, Any]:
            solution, state = super().solve(system)
            return fuse("solve", solution), state

    return Flawed(max_iterations=3, damping=0.1, warm_start=True)


def build(fuse: Fuse, *, levels: int = 3, workers: int = 0, callbacks: Any = (), **settings: Any) -> Engine:
    """Returns the engine; every call with the same settings returns the same one."""
    torch.manual_seed(0)
    names = LEVELS[-levels:]
    # Convex in its parameters, so that no solve fails by itself.
    network = nn.Sequential(
        nn.BatchNorm1d(4, affine=False), nn.Dropout(0.3), nn.Linear(4, 3), Wired(fuse, "classifier")
    )
    modules = {
        "test": Scalar(-1.0, fuse, "test"),
        "decay": Scalar(-3.0, fuse, "decay"),
        "classifier": network,
    }
    kinds: dict[str, type[Level]] = {"test": Test, "decay": Decay, "classifier": Classifier}
    problems: list[Problem] = []
    for name in names:
        rows = Rows(fuse, name, seed=LEVELS.index(name))
        loader = DataLoader(rows, batch_size=8, shuffle=True, num_workers=workers if name == "classifier" else 0)
        problem = kinds[name](
            modules[name],
            optimizer=_optimizer(fuse, name),
            scheduler=_scheduler(fuse, name),
            data=loader,
            steps=3 if name == "classifier" else 1,
        )
        problem.fuse, problem.names = fuse, names
        problems.append(problem)
    watchers = (Counter(fuse), *callbacks)
    config = EngineConfig(progress=False, evaluate_every=1, **settings)
    return Engine(problems, config, hypergradient=conjugate_gradient(fuse), callbacks=watchers)


def _optimizer(fuse: Fuse, name: str) -> Callable[[Any], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        optimizer = Adam(parameters, lr=0.03)
        optimizer.register_step_pre_hook(lambda *_: fuse(f"optimiser of {name}, before"))
        optimizer.register_step_post_hook(lambda *_: fuse(f"optimiser of {name}, after"))
        return optimizer

    return make


def _scheduler(fuse: Fuse, name: str) -> Callable[[Optimizer], StepLR]:
    class WiredStepLR(StepLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            fuse(f"scheduler of {name}")

    return lambda optimizer: WiredStepLR(optimizer, 2, gamma=0.9)
