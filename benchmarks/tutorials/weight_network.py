"""A weight network on noisy and on imbalanced MNIST: accuracy while it trains, and the function that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import Engine, EngineConfig, OneStep, RunConfig
from examples import weight_network as recipe

TASKS = {"noisy": "wrong labels", "imbalanced": "rare classes"}
ROWS = {
    "plain": "every training example alike",
    "trusted": "the trusted examples alone",
    "weighted": "weighted by V",
}


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    every: int = 20
    config: recipe.Config = field(default_factory=recipe.Config)


SMALL = Budget(seeds=2, steps=40)
FULL = Budget(seeds=5, steps=300)


def run(budget: Budget) -> Study:
    curves: dict[str, dict[str, list[Any]]] = {}
    functions: dict[str, list[list[float]]] = {}
    losses = torch.linspace(0, 6, 61)
    for task in TASKS:
        curves[task], functions[task] = {row: [] for row in ROWS}, []
        for seed in range(1, budget.seeds + 1):  # settings were chosen with seed 0
            config = replace(budget.config, task=task, seed=seed)
            curves[task]["plain"].append(_plain(budget, config, "train"))
            curves[task]["trusted"].append(_plain(budget, config, "trusted"))
            curve, engine = _weighted(budget, config)
            curves[task]["weighted"].append(curve)
            functions[task].append(engine.problems["weight_network"].weights(losses).tolist())
    rows: list[list[Any]] = []
    for row, text in ROWS.items():
        cells: list[Any] = [text]
        for task in TASKS:
            found = curves[task][row]
            cells += [_percent([curve[-1][1] for curve in found]), _percent([_stopped(curve) for curve in found])]
        rows.append(cells)
    columns = ["trained on"]
    for task in TASKS.values():
        columns += [f"{task}: at the end", "stopped by the trusted"]
    data = {"curves": curves, "functions": functions, "losses": losses.tolist(), "every": budget.every}
    return Study({"accuracy": Table(columns, rows)}, {**data, "warmup": budget.config.warmup})


def _engine(budget: Budget, config: recipe.Config) -> Engine:
    torch.manual_seed(config.seed)
    settings = EngineConfig(steps=budget.steps, seed=config.seed, progress=False)
    return recipe.build(RunConfig(engine=settings, hypergradient=OneStep(), recipe=config))


def _weighted(budget: Budget, config: recipe.Config) -> tuple[list[list[float]], Engine]:
    engine = _engine(budget, config)
    classifier: Any = engine.problems["classifier"]
    return _curve(budget, classifier, lambda: engine.run(budget.every)), engine


def _plain(budget: Budget, config: recipe.Config, part: str) -> list[list[float]]:
    """The same model, updates and batches, all weights equal."""
    classifier: Any = _engine(budget, config).problems["classifier"]
    x, y = getattr(classifier.images, part)
    generator = torch.Generator().manual_seed(config.seed)

    def train(updates: int) -> None:
        for _ in range(updates):
            chosen = torch.randperm(len(x), generator=generator)[:100]
            classifier.optimizer.zero_grad()
            F.cross_entropy(classifier(x[chosen]), y[chosen]).backward()
            classifier.optimizer.step()

    train(config.warmup)
    return _curve(budget, classifier, lambda: train(budget.every))


def _curve(budget: Budget, classifier: Any, train: Callable[[], object]) -> list[list[float]]:
    """Accuracies on the trusted and the test examples, after every few updates."""
    found = []
    for _ in range(0, budget.steps, budget.every):
        train()
        parts = classifier.images.trusted, classifier.images.test
        found.append([_accuracy(classifier, *part) for part in parts])
    return found


@torch.no_grad()
def _accuracy(classifier: Any, x: Tensor, y: Tensor) -> float:
    return float((classifier(x).argmax(1) == y).float().mean())


def _stopped(curve: list[list[float]]) -> float:
    """The test accuracy where that on the trusted examples was best."""
    return max(curve, key=lambda point: point[0])[1]


def _percent(values: list[float]) -> Estimate:
    return Estimate.of(values, digits=1, percent=True)


def draw(study: Study, figure: Any) -> None:
    """Left: V of each seed. Right: test accuracy along the training with wrong labels."""
    left, right = figure.subplots(1, 2)
    for number, (task, text) in enumerate(TASKS.items()):
        for place, values in enumerate(study.data["functions"][task]):
            label = f"with {text}" if place == 0 else None
            left.plot(study.data["losses"], values, color=f"C{number}", linewidth=1.2, label=label)
    left.set(xlabel="loss of an example", ylabel="weight V(loss)", ylim=(-0.03, 1.03))
    left.legend()
    for number, (row, text) in enumerate(ROWS.items()):
        for place, curve in enumerate(study.data["curves"]["noisy"][row]):
            steps = [study.data["warmup"] + study.data["every"] * (step + 1) for step in range(len(curve))]
            label = text if place == 0 else None
            right.plot(steps, [100 * point[1] for point in curve], color=f"C{number + 2}", linewidth=1.2, label=label)
    right.set(xlabel="updates of the model", ylabel="test accuracy, %", title=f"{TASKS['noisy']}")
    right.legend()
