"""Adversarial training with a learned regulariser, beside plain training and a grid of fixed regularisers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig
from bilevel.problems.games import attack
from examples import adversarial_training as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    shares: tuple[float, ...]
    decays: tuple[float, ...]
    attack_steps: int
    restarts: int


SMALL = Budget(seeds=1, steps=2, shares=(0.5,), decays=(1e-3,), attack_steps=2, restarts=1)
FULL = Budget(seeds=4, steps=40, shares=(0.5, 0.9), decays=(3e-4, 1e-3, 3e-3), attack_steps=50, restarts=3)


def trained(config: recipe.Config, budget: Budget) -> dict[str, Any]:
    run = replace(recipe.DEFAULTS, recipe=config, engine=EngineConfig(progress=False))
    engine = recipe.build(run)
    upper, model = engine.problems["validation"], engine.problems["adversarial_training"].module
    curve = {"validation": [], "share": [], "decay": []}
    for _ in range(budget.steps):
        result = engine.step()
        curve["validation"].append(result.losses["validation"])
        curve["share"].append(float(upper.share().detach()))
        curve["decay"].append(upper.decay().tolist())
    x, y = upper.test
    torch.manual_seed(config.seed)
    strength = {"steps": budget.attack_steps, "restarts": budget.restarts}
    attacked = attack(model, x, y, radius=config.radius, bounds=recipe.PIXELS, **strength)
    accuracy = [float((model(inputs).argmax(1) == y).double().mean()) for inputs in (x, attacked)]
    return {"accuracy": accuracy[0], "robust": accuracy[1], "validation": curve["validation"][-1], "curve": curve}


def run(budget: Budget) -> Study:
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "adversarial": [], "grid": [], "learned": []}
    for seed in range(budget.seeds):
        still = recipe.Config(seed=seed, rate=0.0)
        found["plain"].append(trained(replace(still, share=1e-6, decay=1e-3), budget))
        found["adversarial"].append(trained(replace(still, decay=1e-6), budget))
        fixed = [
            trained(replace(still, share=share, decay=decay), budget)
            for share in budget.shares
            for decay in budget.decays
        ]
        found["grid"].append(min(fixed, key=lambda result: result["validation"]))
        found["learned"].append(trained(recipe.Config(seed=seed), budget))
    return Study({"robustness": table(found, budget)}, {"found": found})


def table(found: dict[str, list[dict[str, Any]]], budget: Budget) -> Table:
    labels = {
        "plain": "plain training, decay 0.001",
        "adversarial": "adversarial training, no decay",
        "grid": "adversarial training, share and decay from a grid",
        "learned": "adversarial training, share and decays learned",
    }
    trainings = {"grid": len(budget.shares) * len(budget.decays)}
    rows = []
    for name, results in found.items():
        cells = [
            Estimate.of([result[key] for result in results], percent=key != "validation", digits=digits)
            for key, digits in (("validation", 3), ("accuracy", 1), ("robust", 1))
        ]
        rows.append([labels[name], trainings.get(name, 1), *cells])
    return Table(["training", "trainings", "validation loss", "test accuracy", "accuracy under attack"], rows)


def draw(study: Study, figure: Any) -> None:
    found = study.data["found"]
    left, right = figure.subplots(1, 2)
    for name, label in (("adversarial", "no decay"), ("grid", "best of the grid"), ("learned", "learned")):
        runs = torch.tensor([result["curve"]["validation"] for result in found[name]])
        left.plot(range(1, runs.shape[1] + 1), runs.mean(0), label=label)
    left.set(xlabel="outer steps", ylabel="validation loss, half of it under attack")
    left.legend()
    share = torch.tensor([result["curve"]["share"] for result in found["learned"]]).mean(0)
    decay = torch.tensor([result["curve"]["decay"] for result in found["learned"]]).log().mean(0).exp()
    steps = range(1, len(share) + 1)
    for place, label in enumerate(("weights 1", "biases 1", "weights 2", "biases 2")):
        right.plot(steps, decay[:, place], label=f"decay of {label}")
    right.plot(steps, share, "--", label="share of attacked examples")
    right.set(xlabel="outer steps", yscale="log", title="what is learned")
    right.legend(fontsize=9)
