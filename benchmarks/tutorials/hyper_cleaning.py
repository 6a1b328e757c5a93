"""Hyper-cleaning of 5000 MNIST images: beside the baselines, by several methods, with few and many trusted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig, RunConfig, as_estimator
from examples import hyper_cleaning as recipe

METHODS: dict[str, Any] = {
    "finite_difference": "finite_difference",
    "neumann": {"method": "neumann", "terms": 5},
    "conjugate_gradient": {"method": "conjugate_gradient", "max_iterations": 3, "warm_start": True},
    "unrolled": {"method": "unrolled", "memory": "graph"},
}
MAIN = "finite_difference"
DECAYS = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    config: recipe.Config
    rates: tuple[float, ...] = (0.5, 0.8)
    trusted: tuple[int, ...] = (100, 300, 1000)  # for the table of how many it takes


SMALL = Budget(seeds=2, steps=20, config=recipe.Config(num_train=200, num_trusted=100), rates=(0.5,), trusted=(50, 100))
FULL = Budget(seeds=5, steps=120, config=recipe.Config(data="mnist", num_train=3000, num_trusted=1000))


def run(budget: Budget) -> Study:
    found = [_one(budget, replace(budget.config, wrong=rate, seed=seed)) for seed, rate in _cases(budget)]
    few = [
        _one(budget, replace(budget.config, wrong=rate, seed=seed, num_trusted=number), methods=(MAIN,))
        for number in budget.trusted
        if number != budget.config.num_trusted
        for seed, rate in _cases(budget)
        if rate == min(budget.rates)
    ]
    tables = {
        "accuracy": _accuracy(budget, found),
        "methods": _methods(budget, found),
        "trusted": _trusted(budget, [*few, *found]),
    }
    rows = {
        str(rate): {name: [case["rows"][name] for case in found if case["rate"] == rate] for name in found[0]["rows"]}
        for rate in budget.rates
    }
    shown = {str(case["rate"]): case["weights"] for case in found if case["seed"] == 0}
    return Study(tables, {"rows": rows, "weights": shown})


def _cases(budget: Budget) -> list[tuple[int, float]]:
    return [(seed, rate) for seed in range(budget.seeds) for rate in budget.rates]


def _one(budget: Budget, config: recipe.Config, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """One split of the data: every way of weighting it, and the accuracy of what is then trained."""
    digits = recipe.Digits(config)
    x, y, _ = digits.train
    right = (~digits.wrong).float()
    decay = config.weight_decay
    # Training on everything gets the decay that suits it: with the others' it would look worse than it is.
    best = max(DECAYS, key=lambda value: accuracy(fit((x, y), torch.ones(len(x)), value), digits.trusted))
    alone = accuracy(fit(digits.trusted, torch.ones(len(digits.trusted[1])), decay), digits.test)
    rows = {
        "every training example": _judged(digits, (x, y), torch.ones(len(x)), best),
        "the trusted examples alone": [alone, alone],
        "those with right labels (an oracle)": _judged(digits, (x, y), right, decay),
    }
    costs: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for method in methods:
        cleaner, cost = clean(budget, config, method)
        costs[method] = cost
        rows[f"cleaned, `{method}`"] = _judged(digits, (x, y), cleaner.weights().detach(), decay)
        if method == MAIN:
            found = cleaner.weights().detach()
            parts = {"right": found[~digits.wrong], "wrong": found[digits.wrong]}
            weights = {name: [float(f"{value:.3g}") for value in part.tolist()] for name, part in parts.items()}
    case = {"rate": config.wrong, "seed": config.seed, "trusted": config.num_trusted}
    return {**case, "rows": rows, "costs": costs, "weights": weights}


def clean(budget: Budget, config: recipe.Config, method: str) -> tuple[recipe.Cleaner, dict[str, float]]:
    """Returns the learned weights, and what they cost."""
    torch.manual_seed(config.seed)
    settings = EngineConfig(steps=budget.steps, progress=False)
    run_config = RunConfig(engine=settings, hypergradient=as_estimator(METHODS[method]), recipe=config)
    engine = recipe.build(run_config)
    engine.run()
    cost = {
        "auc": engine.evaluate()["cleaner/auc"],
        "trusted": float(engine.problems["cleaner"].loss(engine.problems["cleaner"].data[0]).detach()),
        "forward": engine.passes.forward / budget.steps,
        "backward": engine.passes.backward / budget.steps,
    }
    return engine.problems["cleaner"], cost


def fit(data: tuple[Tensor, Tensor], weights: Tensor, decay: float) -> nn.Linear:
    """Solves the inner problem from zero: Σ s ℓ / Σ s + δ/2 ‖w‖², by L-BFGS."""
    x, y = data
    model = nn.Linear(x.shape[1], 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    parameters = list(model.parameters())
    solver = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        value = (weights * losses).sum() / weights.sum()
        value = value + decay / 2 * torch.stack([part.square().sum() for part in parameters]).sum()
        value.backward()
        return value

    solver.step(closure)
    return model


@torch.no_grad()
def accuracy(model: nn.Linear, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def _judged(digits: recipe.Digits, data: tuple[Tensor, Tensor], weights: Tensor, decay: float) -> list[float]:
    """Test accuracies after training on the weighted examples, alone and with the trusted ones."""
    weights = weights * weights.sum() / weights.square().sum()  # an example that counts in full has the weight 1
    both = tuple(torch.cat(parts) for parts in zip(data, digits.trusted, strict=True))
    more = torch.cat([weights, torch.ones(len(digits.trusted[1]))])
    return [accuracy(fit(data, weights, decay), digits.test), accuracy(fit(both, more, decay), digits.test)]


def _percent(values: Sequence[float]) -> Estimate:
    return Estimate.of(values, digits=1, percent=True)


def _accuracy(budget: Budget, found: list[dict[str, Any]]) -> Table:
    rows = []
    for name in found[0]["rows"]:
        cells: list[Any] = [name]
        for rate in budget.rates:
            cases = [case["rows"] for case in found if case["rate"] == rate]
            oracle = [case["those with right labels (an oracle)"][0] for case in cases]
            own = [case[name][0] for case in cases]
            cells += [
                _percent(own),
                _percent([a - b for a, b in zip(own, oracle, strict=True)]),
                _percent([case[name][1] for case in cases]),
            ]
        rows.append(cells)
    columns = ["trained on"]
    for rate in budget.rates:
        columns += [f"{rate:.0%} wrong", "less the oracle's", "with the trusted ones too"]
    return Table(columns, rows)


def _methods(budget: Budget, found: list[dict[str, Any]]) -> Table:
    rows = []
    for method in METHODS:
        cells: list[Any] = [f"`{method}`"]
        for rate in budget.rates:
            costs = [case["costs"][method] for case in found if case["rate"] == rate]
            cells += [
                Estimate.of([cost["auc"] for cost in costs]),
                Estimate.of([cost["trusted"] for cost in costs], digits=2),
            ]
        cells.append(f"{costs[0]['forward']:.0f}, {costs[0]['backward']:.0f}")
        rows.append(cells)
    columns = ["method"]
    for rate in budget.rates:
        columns += [f"AUC, {rate:.0%} wrong", "F at the end"]
    return Table([*columns, "passes a step"], rows)


def _trusted(budget: Budget, found: list[dict[str, Any]]) -> Table:
    rows = []
    names = "the trusted examples alone", "those with right labels (an oracle)", f"cleaned, `{MAIN}`"
    for number in budget.trusted:
        cases = [case["rows"] for case in found if case["rate"] == min(budget.rates) and case["trusted"] == number]
        alone, oracle, cleaned = ([case[name] for case in cases] for name in names)
        columns = (alone, 0), (cleaned, 0), (cleaned, 1), (oracle, 1)
        rows.append([number, *(_percent([pair[column] for pair in pairs]) for pairs, column in columns)])
    return Table(["trusted", "trusted alone", "cleaned", "cleaned and trusted", "oracle and trusted"], rows)


def draw(study: Study, figure: Any) -> None:
    """Left: the weights that were found. Right: accuracies of all rows."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rate = max(study.data["weights"], key=float)
    weights = study.data["weights"][rate]
    edges = [10 ** (-2.4 + 0.2 * step) for step in range(20)]
    for name in ("wrong", "right"):
        values = [min(max(value, edges[0]), edges[-1]) for value in weights[name]]
        left.hist(values, edges, alpha=0.6, label=f"{name} ({len(values)})")
    left.set(
        xscale="log", xlabel="weight (mean 1)", ylabel="training examples", title=f"labels, {float(rate):.0%} wrong"
    )
    left.set_ylim(top=1.35 * left.get_ylim()[1])
    left.legend(loc="upper center", ncols=2, fontsize="small", columnspacing=1.0, handlelength=1.0)
    for place, (rate, rows) in enumerate(study.data["rows"].items()):
        for height, values in enumerate(rows.values()):
            estimate = _percent([pair[0] for pair in values])
            right.errorbar(
                100 * estimate.mean,
                -height - 0.2 * place,
                xerr=100 * estimate.half_width,
                fmt="o" if place == 0 else "s",
                color=f"C{place + 2}",
                label=f"{float(rate):.0%} wrong" if height == 0 else None,
            )
    names = [name.replace("`", "") for name in study.data["rows"][rate]]
    right.set_yticks([-height - 0.1 for height in range(len(names))], names)
    right.set(xlabel="test accuracy, %", title="trained on …")
    right.grid(axis="x", alpha=0.3)
    right.legend(loc="lower left")
