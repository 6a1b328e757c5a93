"""A domain mixture for a language model: proportions learned from the target, beside plain ones and excess losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel.problems.mixture import BalancedBatches, Sources
from examples import domain_mixture as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int  # outer ones of a search, of 10 inner updates each
    final: int  # updates of every training after it, at most


SMALL = Budget(seeds=1, steps=3, final=20)
FULL = Budget(seeds=5, steps=60, final=800)
EVERY = 20  # updates between looks at the validation loss

METHODS: dict[str, Any] = {
    "learned, `conjugate_gradient`": {},
    "learned, `identity`": {"hypergradient": "identity"},
}
PLAIN = ("uniform", "by size", "the planted source alone", "the target's 20 reviews alone")
DOREMI = "excess loss, as DoReMi"
PLANTED, CORRUPTED = "birth control", ("shuffled", "reversed", "random")


def run(budget: Budget) -> Study:
    losses: dict[str, list[float]] = {}
    shares: dict[str, list[Mapping[str, float]]] = {}
    curves = []
    for seed in range(budget.seeds):
        config = replace(recipe.DEFAULTS.recipe, seed=seed)
        reviews = recipe.Reviews(config)
        sources = reviews.sources
        mixtures: dict[str, Mapping[str, float]] = {
            "uniform": dict.fromkeys(sources.names, 1 / len(sources.names)),
            "by size": sources.rates(),
            "the planted source alone": {name: float(name == PLANTED) for name in sources.names},
            DOREMI: excess_losses(reviews, config, 10 * budget.steps),
        }
        for name, settings in METHODS.items():
            mixtures[name], curve = searched(config, budget.steps, settings)
            if not settings:
                curves.append(curve)
        for name, mixture in mixtures.items():
            sampler = WeightedRandomSampler(sources.example_weights(mixture), 64 * budget.final)
            batches = DataLoader(sources, 64, sampler=sampler)
            losses.setdefault(name, []).append(trained(batches, reviews.validation, reviews.test, config))
            shares.setdefault(name, []).append(mixture)
        losses.setdefault(PLAIN[3], []).append(trained(*halves(reviews.validation, budget), reviews.test, config))
    rows = []
    for name in (*PLAIN, DOREMI, *METHODS):
        gain = [one - other for one, other in zip(losses[name], losses["uniform"], strict=True)]
        rows.append([name, Estimate.of(losses[name]), Estimate.of(gain), *shared(shares.get(name))])
    columns = [
        "proportions",
        "test loss, nats a word",
        "difference to uniform",
        "share of the planted source",
        "of the corrupted ones",
    ]
    names = list(curves[0])
    mean = {name: [statistics.fmean(step) for step in zip(*(c[name] for c in curves), strict=True)] for name in names}
    return Study({"loss": Table(columns, rows)}, {"proportions": mean})


def shared(mixtures: list[Mapping[str, float]] | None) -> list[Any]:
    if mixtures is None:
        return ["–", "–"]
    planted = [mixture[PLANTED] for mixture in mixtures]
    corrupted = [sum(mixture[name] for name in CORRUPTED) for mixture in mixtures]
    return [Estimate.of(part, digits=1, percent=True) for part in (planted, corrupted)]


def searched(
    config: recipe.Config, steps: int, settings: Mapping[str, Any]
) -> tuple[Mapping[str, float], dict[str, list[float]]]:
    """Learns the proportions; returns them and how they went."""
    torch.manual_seed(config.seed)
    defaults = recipe.DEFAULTS
    engine = recipe.build(
        replace(
            defaults,
            engine=replace(defaults.engine, steps=steps, progress=False, seed=config.seed),
            recipe=config,
            **settings,
        )
    )
    weights = engine.problems["domain_weights"]
    history = [weights.proportions()]
    for _ in range(steps):
        engine.step()
        history.append(weights.proportions())
    curve = {name: [one[name] for one in history] for name in history[0]}
    return history[-1], curve


def trained(batches: DataLoader[Any], validation: TensorDataset, test: TensorDataset, config: recipe.Config) -> float:
    """Trains a fresh model; returns its test loss where its validation loss is smallest. The same for all."""
    torch.manual_seed(1000 + config.seed)
    model = recipe.LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for place, (inputs, targets, *_) in enumerate(batches, 1):
        update(model, optimizer, F.cross_entropy(model(inputs), targets), config)
        if place % EVERY == 0:
            found.append((loss_on(model, validation), loss_on(model, test)))
    return min(found)[1]


def halves(data: TensorDataset, budget: Budget) -> tuple[DataLoader[Any], TensorDataset]:
    """Two thirds of the target's examples to train on, and the rest to say when to stop."""
    cut = 2 * len(data) // 3
    first, second = (TensorDataset(*(part[where] for part in data.tensors)) for where in (slice(cut), slice(cut, None)))
    return DataLoader(first, 64, sampler=WeightedRandomSampler(torch.ones(cut), 64 * budget.final)), second


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, value: Tensor, config: recipe.Config) -> None:
    penalty = config.weight_decay / 2 * sum(p.square().sum() for p in model.parameters())
    optimizer.zero_grad()
    (value + penalty).backward()
    optimizer.step()


@torch.no_grad()
def loss_on(model: torch.nn.Module, data: TensorDataset) -> float:
    inputs, targets = data.tensors
    return float(F.cross_entropy(model(inputs), targets))


def excess_losses(reviews: recipe.Reviews, config: recipe.Config, steps: int) -> Mapping[str, float]:
    """Weights after DoReMi (arXiv 2305.10429, algorithm 1), which sees no target: a reference model trained on uniform
    proportions; a proxy whose weights grow with each source's excess loss, clipped at 0; their mean over the steps.
    """
    sources: Sources = reviews.sources
    batches = iter(endless(DataLoader(sources, batch_sampler=BalancedBatches(sources.ids, per_source=8))))
    count = len(sources.names)
    weights, total = torch.full((count,), 1 / count), torch.zeros(count)
    torch.manual_seed(2000 + config.seed)
    reference, proxy = recipe.LanguageModel(), recipe.LanguageModel()
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    for _ in range(steps):
        inputs, targets, _ids = next(batches)
        update(reference, optimizer, F.cross_entropy(reference(inputs), targets), config)
    optimizer = torch.optim.Adam(proxy.parameters(), lr=0.01)
    for _ in range(steps):
        inputs, targets, ids = next(batches)
        losses = F.cross_entropy(proxy(inputs), targets, reduction="none")
        with torch.no_grad():
            excess = (losses - F.cross_entropy(reference(inputs), targets, reduction="none")).clamp(min=0)
            weights = weights * by_source(excess.mean(1), ids, count).exp()
            weights = (1 - 1e-3) * weights / weights.sum() + 1e-3 / count
            total += weights / steps
        update(proxy, optimizer, (weights * by_source(losses.mean(1), ids, count)).sum(), config)
    return dict(zip(sources.names, total.tolist(), strict=True))


def by_source(values: Tensor, ids: Tensor, count: int) -> Tensor:
    return torch.zeros(count).index_add(0, ids, values) / ids.bincount(minlength=count)


def endless(loader: DataLoader[Any]) -> Any:
    while True:
        yield from loader


def draw(study: Study, figure: Figure) -> None:
    curves = study.data["proportions"]
    axes = figure.subplots()
    for name, values in curves.items():
        kind = {"linewidth": 2.5} if name == PLANTED else {"linestyle": ":" if name in CORRUPTED else "-"}
        axes.plot(values, label=name, **kind)
    axes.set(xlabel="outer step", ylabel="proportion", ylim=(0, 1), xlim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
