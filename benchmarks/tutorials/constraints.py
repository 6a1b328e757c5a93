"""C and kernel widths of a support vector machine, by hypergradients through its dual, beside a grid search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.svm import SVC

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig, hypergradcheck
from examples import constraints as recipe

USELESS = (0, 30)


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    grid: int  # points of a decade


SMALL = Budget(seeds=1, steps=2, grid=1)
FULL = Budget(seeds=5, steps=40, grid=2)


def judged(decide: Any, part: Any) -> tuple[float, float]:
    """Returns the loss and the accuracy of decisions on a part of the data."""
    x, y = part
    with torch.no_grad():
        f = torch.as_tensor(decide(x))
    return float(F.softplus(-y * f).mean()), float((f.sign() == y).double().mean())


def powers(low: int, high: int, points: int) -> list[float]:
    return [10.0 ** (low + k / points) for k in range((high - low) * points + 1)]


def scikit_learn(splits: Any, budget: Budget) -> dict[str, dict[str, float]]:
    """Returns what its defaults reach, and the best of a grid by the validation loss."""
    train, held_out, _ = splits
    found = {}
    for C in powers(-2, 3, budget.grid):
        for gamma in powers(-4, 0, budget.grid):
            decide = SVC(C=C, gamma=gamma).fit(*train).decision_function
            found[C, gamma] = (judged(decide, held_out)[0], decide)
    best = min(found.values(), key=lambda pair: pair[0])[1]
    default = SVC().fit(*train).decision_function
    return {"defaults": measured(default, splits), "grid": measured(best, splits) | {"trained": len(found)}}


def measured(decide: Any, splits: Any) -> dict[str, float]:
    validation, (loss, accuracy) = judged(decide, splits[1])[0], judged(decide, splits[2])
    return {"validation": validation, "loss": loss, "accuracy": accuracy}


def learned(config: recipe.Config, steps: int) -> dict[str, Any]:
    run = replace(recipe.DEFAULTS, recipe=config, engine=EngineConfig(steps=steps, progress=False))
    engine, splits = recipe.build(run), recipe.load(config)
    curves: dict[str, list[float]] = {"validation": [], "test": []}
    for _ in range(steps):
        engine.step()
        decide = engine.problems["machine"].decide
        curves["validation"].append(judged(decide, splits[1])[0])
        curves["test"].append(judged(decide, splits[2])[0])
    report = hypergradcheck(engine)
    return {
        **measured(engine.problems["machine"].decide, splits),
        "curves": curves,
        "held": engine.problems["machine"].evaluate()["active"],
        "distance": report.inner_distance,
        "error": report.relative_error,
        "widths": engine.problems["kernel"].module["log_width"].tolist(),
    }


def run(budget: Budget) -> Study:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for useless in USELESS:
        by_method: dict[str, list[dict[str, Any]]] = {}
        for seed in range(budget.seeds):
            config = recipe.Config(useless=useless, seed=seed)
            both = scikit_learn(recipe.load(config), budget)
            for widths in ("one", "feature"):
                both[widths] = learned(replace(config, per_feature=widths == "feature"), budget.steps)
            for name, result in both.items():
                by_method.setdefault(name, []).append(result)
        found[str(useless)] = by_method
    return Study({"machines": table(found), "derivative": derivatives(found)}, {"found": found})


def table(found: dict[str, Any]) -> Table:
    names = {
        "defaults": "scikit-learn's defaults",
        "grid": "grid search with scikit-learn",
        "one": "C and one width, learned",
        "feature": "C and a width for each feature, learned",
    }
    rows = []
    for useless, by_method in found.items():
        for name, label in names.items():
            results = by_method[name]

            def over(key: str, results: Any = results, **format: Any) -> Estimate:
                return Estimate.of([result[key] for result in results], **format)

            count = {"defaults": 0, "grid": 2, "one": 2, "feature": 31 + int(useless)}[name]
            accuracy = over("accuracy", percent=True, digits=1)
            rows.append([label, int(useless), count, over("validation"), over("loss"), accuracy])
    columns = [
        "machine",
        "useless features",
        "hyper-parameters chosen",
        "validation loss",
        "test loss",
        "test accuracy",
    ]
    return Table(columns, rows)


def derivatives(found: dict[str, Any]) -> Table:
    rows = []
    for useless, by_method in found.items():
        for name in ("one", "feature"):
            results = by_method[name]
            held = Estimate.of([result["held"] for result in results], percent=True, digits=0)
            worst = [f"{max(result[key] for result in results):.0e}" for key in ("error", "distance")]
            rows.append([f"{name} width{'' if name == 'one' else 's'}", int(useless), held, *worst])
    return Table(["widths", "useless features", "held by the box", "largest error", "largest distance"], rows)


def draw(study: Study, figure: Any) -> None:
    by_method = study.data["found"][str(USELESS[-1])]
    left, right = figure.subplots(1, 2)
    for name, label in (("one", "one width"), ("feature", "a width each")):
        for part, style in (("validation", "--"), ("test", "-")):
            runs = torch.tensor([result["curves"][part] for result in by_method[name]])
            color = {"one": "C0", "feature": "C1"}[name]
            left.plot(range(1, runs.shape[1] + 1), runs.mean(0), style, color=color, label=f"{label}, {part}")
    grid = torch.tensor([result["loss"] for result in by_method["grid"]]).mean()
    left.axhline(float(grid), color="C2", linestyle=":", label="grid search, test")
    left.set(xlabel="outer steps", ylabel="mean loss", title="with 30 useless features")
    left.legend(fontsize=9)
    widths = torch.tensor([result["widths"] for result in by_method["feature"]]).exp()
    bins = torch.logspace(float(widths.min().log10()), float(widths.max().log10()), 15)
    for part, label in ((widths[:, :30], "useful"), (widths[:, 30:], "useless")):
        right.hist(part.reshape(-1), bins=bins, alpha=0.6, label=label)
    right.set(xscale="log", xlabel="learned width γ of a feature", ylabel="features")
    right.legend()
