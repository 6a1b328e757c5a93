"""Learning rates learned online beside constant ones, from starts that are far off, after equally many updates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.tutorials.study import Estimate, Study, Table
from examples import learning_rates as recipe

PER = {"model": "one, learned", "tensor": "one a tensor, learned"}


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    starts: tuple[float, ...]
    grid: tuple[float, ...]


SMALL = Budget(seeds=2, steps=4, starts=(0.01,), grid=(0.01, 0.1))
FULL = Budget(seeds=5, steps=50, starts=(0.001, 0.01, 0.1), grid=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0))


@dataclass(frozen=True)
class Found:
    """Validation loss at the end, test error after each outer step (or as many updates), the rates likewise."""

    validation: float
    errors: list[float]
    rates: list[float]


def judged(network: Any, part: tuple[Any, Any]) -> tuple[float, float]:
    with torch.no_grad():
        outputs = network(part[0])
        return float((outputs.argmax(1) != part[1]).float().mean()), float(F.cross_entropy(outputs, part[1]))


def learned(per: str, start: float, seed: int, steps: int) -> Found:
    """Runs the recipe."""
    quiet = dataclasses.replace(recipe.DEFAULTS.engine, progress=False, seed=seed)
    settings = recipe.Config(rate=start, per=per, seed=seed)
    torch.manual_seed(seed)
    engine = recipe.build(dataclasses.replace(recipe.DEFAULTS, engine=quiet, recipe=settings))
    network, rates = engine.problems["network"], engine.problems["hyperparameters"]
    errors, found = [], []
    for _ in range(steps):
        engine.step()
        errors.append(judged(network.module, network.digits.test)[0])
        logarithms = torch.cat([p.detach().flatten() for p in rates.parameters])
        found.append(start * float(logarithms.mean().exp()))
    return Found(judged(network.module, network.digits.validation)[1], errors, found)


def constant(rate: float, seed: int, steps: int) -> Found:
    """Trains the same network as often by torch alone."""
    digits = recipe.Digits(seed)
    torch.manual_seed(seed)
    network = recipe.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=recipe.Config.momentum)
    errors: list[float] = []
    made = 0
    while len(errors) < steps:
        for x, y in digits.batches(digits.train):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            made += 1
            if made % recipe.STEPS == 0:
                errors.append(judged(network, digits.test)[0])
    return Found(judged(network, digits.validation)[1], errors, [rate] * steps)


def error(runs: list[Found]) -> Estimate:
    return Estimate.of([each.errors[-1] for each in runs], digits=1, percent=True)


def run(budget: Budget) -> Study:
    seeds = range(budget.seeds)
    grid = {rate: [constant(rate, seed, budget.steps) for seed in seeds] for rate in budget.grid}
    # The best constant rate of each seed, by its validation loss.
    best = [min((grid[rate][seed] for rate in budget.grid), key=lambda each: each.validation) for seed in seeds]
    found = {
        (start, per): [learned(per, start, seed, budget.steps) for seed in seeds]
        for start in budget.starts
        for per in PER
    }
    rows = [[f"{start:g}", error(grid[start]), *(error(found[start, per]) for per in PER)] for start in budget.starts]
    rows.append([f"the best of {len(budget.grid)}, tuned", error(best), "–", "–"])
    first = budget.starts[0]
    curves = {"constant": grid[first], **{name: found[first, per] for per, name in PER.items()}, "best constant": best}
    return Study(
        {"errors": Table(["start", "constant", *PER.values()], rows)},
        {
            "start": first,
            "errors": {name: [each.errors for each in runs] for name, runs in curves.items()},
            "rates": {f"{start:g}": [each.rates for each in found[start, "model"]] for start in budget.starts},
            "best rates": [each.rates[0] for each in best],
        },
    )


def draw(study: Study, figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name, runs in study.data["errors"].items():
        mean = 100 * torch.tensor(runs).mean(0)
        style = "--" if "constant" in name else "-"
        updates = range(recipe.STEPS, recipe.STEPS * (len(mean) + 1), recipe.STEPS)
        label = f"{name}, from {study.data['start']:g}" if name != "best constant" else name
        left.plot(updates, mean, style, label=label)
    left.set_xlabel("updates")
    left.set_ylabel("test error (%)")
    left.set_yscale("log")
    left.legend(fontsize="small")
    for start, runs in study.data["rates"].items():
        mean = torch.tensor(runs).log().mean(0).exp()
        right.plot(range(recipe.STEPS, recipe.STEPS * (len(mean) + 1), recipe.STEPS), mean, label=f"from {start}")
    right.axhspan(min(study.data["best rates"]), max(study.data["best rates"]), alpha=0.2, label="best constants")
    right.set_xlabel("updates")
    right.set_ylabel("learned rate")
    right.set_yscale("log")
    right.legend(fontsize="small")
