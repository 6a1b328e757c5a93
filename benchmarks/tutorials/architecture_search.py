"""Architecture search on digits: what a search finds, in a space small enough to train every network of it."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import EngineConfig, OneStep
from bilevel.problems import search_space
from examples import architecture_search as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int  # outer steps of a search
    updates: int  # of a network that is trained on its own
    networks: int  # of the space, in random order; all of them where it is large enough
    draws: int = 2000  # of random searches


SMALL = Budget(seeds=1, steps=10, updates=10, networks=6)
FULL = Budget(seeds=5, steps=200, updates=120, networks=10**6)
METHODS = {
    "DARTS' first order: `one_step`, rate 0": OneStep(learning_rate=0.0, difference="central"),
    "DARTS' second order: `one_step`": OneStep(difference="central"),
    "`finite_difference`": "finite_difference",
}
RANDOM = (1, 4, 8)


def run(budget: Budget) -> Study:
    names = recipe.Config().operations
    space = list(itertools.product(range(len(names)), repeat=3))
    random.Random(0).shuffle(space)
    scores, searches = [], {method: [] for method in METHODS}
    for seed in range(budget.seeds):
        config = replace(recipe.Config(), seed=seed)
        data = recipe.digits(config)
        found = {method: searched(config, method, budget) for method in METHODS}
        wanted = {network for _, network in found.values()} | set(space[: budget.networks])
        started = time.process_time()
        scores.append({network: trained(config, data, network, budget) for network in sorted(wanted)})
        alone = (time.process_time() - started) / len(wanted)
        for method, (record, network) in found.items():
            searches[method].append({**record, "network": network, "trainings": record["seconds"] / alone})
    tables = {"search": outcome(scores, searches, budget), "space": extremes(scores, names)}
    means = {"/".join(names[place] for place in network): mean_test(scores, network) for network in ranking(scores)}
    return Study(tables, {"names": names, "searches": searches, "test": means})


def searched(config, method, budget):
    """Returns what a search does over its steps, and which network it ends at: an operation for each edge."""
    engine_config = EngineConfig(steps=budget.steps, progress=False)
    engine = recipe.build(replace(recipe.DEFAULTS, engine=engine_config, recipe=config, hypergradient=METHODS[method]))
    architecture, history = engine.problems["architecture"], []
    started, measuring = time.process_time(), 0.0
    for step in range(budget.steps + 1):
        if step % max(1, budget.steps // 40) == 0:
            before = time.process_time()
            history.append([step, [w.tolist() for w in weights(architecture)], architecture.evaluate()])
            measuring += time.process_time() - before
        if step < budget.steps:
            engine.step()
    seconds = time.process_time() - started - measuring
    cell = next(iter(architecture.genotype().values()))
    chosen = [cell["1"]["0"], cell["2"]["0"], cell["2"]["1"]]
    return {"seconds": seconds, "history": history}, tuple(config.operations.index(name) for name in chosen)


def weights(architecture):
    return [torch.stack(list(mixture.values())).detach() for mixture in architecture.weights().values()]


def trained(config, data, network, budget):
    """Returns validation and test accuracy of one network of the space, trained from scratch on the training data."""
    (x, y), validation, test = data
    names = [config.operations[place] for place in network]
    genotype = {"1": {"0": names[0]}, "2": {"0": names[1], "1": names[2]}}
    torch.manual_seed(config.seed)
    operations = search_space.image_operations(config.channels, config.operations)
    model = recipe.network(config, search_space.DiscreteCell(genotype, operations, num_inputs=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9, weight_decay=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.updates)
    for _ in range(budget.updates):
        chosen = torch.randint(len(x), (config.batch_size,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, validation), accuracy(model, test)


def accuracy(model: nn.Module, data) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def outcome(scores, searches, budget):
    """Searches beside random networks, all retrained alike; differences are paired by seed."""
    order, generator = ranking(scores), random.Random(1)
    average = [statistics.fmean(test for _, test in seed.values()) for seed in scores]
    rows = []
    for count in RANDOM:
        drawn = [expected(seed, count, budget.draws, generator) for seed in scores]
        label = "a random network" if count == 1 else f"the best of {count} random ones on validation data"
        rows.append([label, percent(drawn), difference(drawn, average), "", count])
    for method, found in searches.items():
        tests = [seed[one["network"]][1] for seed, one in zip(scores, found, strict=True)]
        ranks = [order.index(one["network"]) + 1 if one["network"] in order else "–" for one in found]
        cost = statistics.fmean(one["trainings"] for one in found)
        rows.append([method, percent(tests), difference(tests, average), ", ".join(map(str, ranks)), round(cost)])
    best = [max(seed.values())[1] for seed in scores]
    rows.append(["the best of all on validation data", percent(best), difference(best, average), "", len(order)])
    columns = [
        "network",
        "test accuracy",
        "above a random network",
        f"ranks among {len(order)}, a seed each",
        "cost, in trainings of one",
    ]
    return Table(columns, rows)


def expected(seed, count, draws, generator):
    """Returns the mean test accuracy of the best of some random networks, by validation accuracy."""
    networks = list(seed.values())
    if count == 1:
        return statistics.fmean(test for _, test in networks)
    count = min(count, len(networks))
    return statistics.fmean(max(generator.sample(networks, count))[1] for _ in range(draws))


def extremes(scores, names):
    order = ranking(scores)
    rows = []
    for rank in sorted({1, 2, 3, len(order) // 2, len(order) - 1, len(order)}):
        network = order[rank - 1]
        rows.append([rank, *(f"`{names[place]}`" for place in network), percent([seed[network][1] for seed in scores])])
    return Table(["rank", "input → 1", "input → 2", "1 → 2", "test accuracy"], rows)


def ranking(scores):
    """Returns the networks that every seed has trained, best mean test accuracy first."""
    common = set.intersection(*(set(seed) for seed in scores))
    return sorted(common, key=lambda network: (-mean_test(scores, network), network))


def mean_test(scores, network):
    return statistics.fmean(seed[network][1] for seed in scores)


def percent(values):
    return Estimate.of(values, digits=1, percent=True)


def difference(values, reference):
    return Estimate.of([a - b for a, b in zip(values, reference, strict=True)], digits=1, percent=True)


def draw(study: Study, figure) -> None:
    """The mixtures' weights over a search, edge by edge; and where searches end among all networks."""
    method = list(METHODS)[1]
    history = study.data["searches"][method][0]["history"]
    steps = [step for step, _, _ in history]
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    for edge, (panel, title) in enumerate(zip(axes, ("input → 1", "input → 2", "1 → 2"), strict=False)):
        for place, name in enumerate(study.data["names"]):
            panel.plot(steps, [weights[edge][place] for _, weights, _ in history], label=name)
        panel.set(title=title, xlabel="outer step", ylim=(0, 1))
    axes[0].set_ylabel("weight π in the mixture")
    for panel in axes[1:3]:
        panel.set_yticklabels([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    ranks = axes[3]
    tests = [100 * value for value in study.data["test"].values()]
    ranks.plot(range(1, len(tests) + 1), tests, ".", color="0.5")
    names, order = study.data["names"], list(study.data["test"])
    for place, (label, found) in enumerate(study.data["searches"].items()):
        reached = ["/".join(names[index] for index in one["network"]) for one in found]
        points = [(order.index(one) + 1, tests[order.index(one)]) for one in reached if one in order]
        if points and place in (0, 1):
            shift = 0.15 * (1 - 2 * place)
            ranks.plot(
                [x for x, _ in points],
                [y + shift for _, y in points],
                "^v"[place],
                color=f"C{4 + place}",
                label=label.split(":")[0].removeprefix("DARTS' "),
            )
    ranks.set(title="all networks", xlabel="rank", ylabel="test accuracy, %")
    ranks.legend(frameon=False, fontsize=9, loc="lower left")
