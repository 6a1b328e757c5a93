"""Pruning on MNIST: accuracy against sparsity, learned masks beside magnitude pruning, all fine-tuned alike."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig, Identity, OneStep
from bilevel.problems.pruning import prune, sparsity
from examples import pruning as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int  # outer steps of a search
    tuning: int  # updates after the cut
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    dense: int = 300  # updates before


SMALL = Budget(seeds=1, steps=5, tuning=10, sparsities=(0.9, 0.98), dense=20)
FULL = Budget(seeds=5, steps=200, tuning=300)
LEARNED = {
    "thresholds, one a layer": ("layer", Identity()),
    "thresholds, one a unit": ("unit", Identity()),
    "scores, one a weight": ("score", Identity()),
    "the same, w* held fixed": ("score", OneStep(learning_rate=0.0, difference="central")),
}
BASELINES = ("magnitude, layer by layer", "magnitude", "magnitude, gradually")
STRONGEST = BASELINES[2]


def run(budget: Budget) -> Study:
    found = defaultdict(lambda: defaultdict(list))  # method, sparsity: one value a seed
    seconds, dense = defaultdict(list), []
    for seed in range(budget.seeds):
        config = replace(recipe.Config(), seed=seed, dense_updates=budget.dense)
        train, validation, test = recipe.mnist(config.seed)
        everything = tuple(torch.cat(parts) for parts in zip(train, validation, strict=True))
        network = recipe.dense(config, train)
        dense.append(accuracy(recipe.fit(copy.deepcopy(network), everything, budget.tuning, 0.05, seed), test))
        for share in budget.sparsities:
            for method in (*BASELINES, *LEARNED):
                model, taken = cut(method, network, everything, replace(config, sparsity=share), budget)
                seconds[method].append(taken)
                recipe.fit(model, everything, budget.tuning, 0.05, seed)
                assert abs(sparsity(model)["total"] - share) < 0.002, (method, share, sparsity(model))
                found[method][share].append(accuracy(model, test))
    labels = [f"{100 * share:.0f} % zeros" for share in budget.sparsities]
    rows = [
        [
            method,
            *(percent(found[method][share]) for share in budget.sparsities),
            Estimate.of(seconds[method], digits=1),
        ]
        for method in found
    ]
    whole = ["not pruned", percent(dense), *[""] * len(labels)]
    gains = [
        [method, *(difference(found[method][share], found[STRONGEST][share]) for share in budget.sparsities)]
        for method in found
        if method != STRONGEST
    ]
    tables = {
        "accuracy": Table(["test accuracy", *labels, "seconds before fine-tuning"], [whole, *rows]),
        "gain": Table([f"beside *{STRONGEST}*", *labels], gains),
    }
    values = {method: [found[method][share] for share in budget.sparsities] for method in found}
    return Study(tables, {"sparsities": budget.sparsities, "accuracy": values, "dense": dense})


def cut(method, network, everything, config, budget):
    """Returns a pruned copy of a network, whose zeros stay zeros, and the seconds that it took."""
    started = time.process_time()
    if method in LEARNED:
        config, estimator = replace(config, mask=LEARNED[method][0]), LEARNED[method][1]
        run_config = replace(recipe.DEFAULTS, engine=EngineConfig(steps=budget.steps, progress=False))
        engine = recipe.build(replace(run_config, recipe=config, hypergradient=estimator))
        started = time.process_time()
        engine.run()
        found = prune(engine.problems["pruning"].module, config.sparsity, trainable=True)
        return found, time.process_time() - started
    model = copy.deepcopy(network)
    layers = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
    if method == "magnitude, layer by layer":
        for layer, name in layers:
            torch_prune.l1_unstructured(layer, name, config.sparsity)
    elif method == "magnitude":
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=config.sparsity)
    else:
        gradually(model, layers, everything, config, budget)
    return model, time.process_time() - started


def gradually(model, layers, everything, config, budget):
    """Magnitude pruning on a cubic schedule while training on, for as many batches as a search sees."""
    updates = 2 * budget.steps
    every, total = max(1, updates // 20), sum(layer.weight.numel() for layer, _ in layers)
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0)

    def between(update):
        if update % every == 0:
            wanted = config.sparsity * (1 - (1 - min(1.0, (update + every) / updates)) ** 3)
            gone = sum(int((layer.weight_mask == 0).sum()) for layer, _ in layers)
            amount = max(0, round(wanted * total) - gone)
            torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=amount)

    recipe.fit(model, everything, updates, 0.05, config.seed, between)


def accuracy(model, data):
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def percent(values):
    return Estimate.of(values, digits=1, percent=True)


def difference(values, reference):
    return Estimate.of([a - b for a, b in zip(values, reference, strict=True)], digits=1, percent=True)


def draw(study: Study, figure) -> None:
    """Test accuracy against the share of weights that are left."""
    axes = figure.subplots()
    left = [100 * (1 - share) for share in study.data["sparsities"]]
    styles = {"magnitude, layer by layer": ":", "magnitude": "--", "magnitude, gradually": "-."}
    for place, (method, values) in enumerate(study.data["accuracy"].items()):
        means = [Estimate.of(value) for value in values]
        axes.errorbar(
            [x * (1 + 0.012 * (place - 3)) for x in left],
            [100 * one.mean for one in means],
            [100 * one.half_width for one in means],
            label=method,
            linestyle=styles.get(method, "-"),
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.axhline(100 * Estimate.of(study.data["dense"]).mean, color="0.5", linewidth=1, label="not pruned")
    axes.set(xscale="log", xlabel="weights left, %", ylabel="test accuracy, %", ylim=(82, 95))
    axes.set_xticks(left, [f"{x:.0f}" for x in left])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.legend(frameon=False, loc="lower left")
