"""Distilled images beside real ones: what a fresh network learns from one or ten a class."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from torch import nn

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel.problems.distillation import SyntheticSet
from examples import distillation as recipe


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int  # outer ones
    fresh: int  # networks that each set of images is tried on
    long: int  # updates from real images: enough to fit them


SMALL = Budget(seeds=1, steps=3, fresh=1, long=20)
FULL = Budget(seeds=5, steps=150, fresh=3, long=200)

RATES: dict[int, dict[str, Any]] = {1: {}, 10: {"learn_rate": True, "pixel_rate": 0.05}}
FIRST_SEED = 10  # of those before it, some served to choose these


def run(budget: Budget) -> Study:
    found: dict[str, list[float]] = {}
    shown: dict[str, Any] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + budget.seeds):
        config = replace(recipe.DEFAULTS.recipe, seed=seed)
        digits = recipe.Digits(config)

        for count, rates in RATES.items():
            here = replace(config, per_class=count, **rates)
            trial = Trial(here, digits, budget.fresh)
            generator = torch.Generator().manual_seed(seed)
            real = SyntheticSet.sample(*digits.train, count, generator=generator)
            means = centres(digits, count, seed)
            for kind, images in (("real", real), ("means", means)):
                # whichever is better for them: as few updates as for the distilled ones, or many
                found.setdefault(f"{count} {kind}", []).append(max(trial(images, n) for n in (here.steps, budget.long)))
            images, _ = distilled(here, budget.steps)
            found.setdefault(f"{count} distilled", []).append(trial(images, here.steps))
            if count == 10:
                found.setdefault("all", []).append(trial(SyntheticSet(*digits.train), budget.long))
                continue
            if seed == FIRST_SEED:
                shown = {"real": as_list(real), "distilled": as_list(images), "labels": images.labels().tolist()}
            images, start = distilled(replace(here, fixed=True), budget.steps)
            found.setdefault("1 fixed", []).append(trial(images, here.steps, start))
            found.setdefault("1 fixed, elsewhere", []).append(trial(images, here.steps))
    names = {
        "real": "real images, drawn at random",
        "means": "class means (1) or k-means centres (10)",
        "distilled": "distilled, for any initial weights",
        "fixed": "distilled for the initial weights that they are tried on",
        "fixed, elsewhere": "the same, tried on other initial weights",
    }
    rows = [
        [
            text,
            *(
                Estimate.of(found[key], digits=1, percent=True) if (key := f"{n} {kind}") in found else ""
                for n in (1, 10)
            ),
        ]
        for kind, text in names.items()
    ]
    everything = Estimate.of(found["all"], digits=1, percent=True)
    rows.append(["all 4000 images", everything, everything])
    return Study({"accuracy": Table(["trained on", "1 a class", "10 a class"], rows)}, shown)


def distilled(config: recipe.Config, steps: int) -> tuple[SyntheticSet, nn.Module]:
    """Returns distilled images, and a network at the weights from which the last training started."""
    defaults = recipe.DEFAULTS
    torch.manual_seed(config.seed)
    engine = recipe.build(
        replace(defaults, engine=replace(defaults.engine, steps=steps, progress=False, seed=config.seed), recipe=config)
    )
    engine.run()
    training = engine.problems["distilled_training"]
    training.restart()
    return engine.problems["images"].module, training.module


@dataclass(frozen=True)
class Trial:
    """Trains networks on images and returns their test accuracy, on average."""

    config: recipe.Config
    digits: recipe.Digits
    count: int

    def __call__(self, images: SyntheticSet, steps: int, start: nn.Module | None = None) -> float:
        found = []
        for place in range(self.count if start is None else 1):
            torch.manual_seed(10_000 + 100 * self.config.seed + place)  # weights that no distillation has seen
            model = recipe.network() if start is None else copy.deepcopy(start)
            found.append(self.trained(model, images, steps))
        return statistics.fmean(found)

    def trained(self, model: nn.Module, images: SyntheticSet, steps: int) -> float:
        x, y = images.examples()
        rate = self.config.learning_rate * float(torch.as_tensor(images.rate()).detach())
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            x, y = self.digits.test
            return float((model(x).argmax(1) == y).float().mean())


def centres(digits: recipe.Digits, count: int, seed: int) -> SyntheticSet:
    images, labels = digits.train
    parts = []
    for label in range(10):
        fitted = KMeans(count, n_init=1, random_state=seed).fit(images[labels == label].numpy())
        parts.append(torch.as_tensor(fitted.cluster_centers_, dtype=images.dtype))
    return SyntheticSet(torch.cat(parts), torch.arange(10).repeat_interleave(count))


def as_list(images: SyntheticSet) -> list[list[float]]:
    return [[round(value, 2) for value in image] for image in images.inputs.tolist()]


def draw(study: Study, figure: Figure) -> None:
    figure.set_size_inches(8.0, 2.2)
    axes = figure.subplots(2, 10)
    for row, kind in zip(axes, ("real", "distilled"), strict=True):
        for digit, (place, image) in enumerate(zip(row, study.data[kind], strict=True)):
            pixels = torch.tensor(image).view(28, 28)
            limit = float(pixels.abs().max())
            place.imshow(pixels, cmap="RdGy", vmin=-limit, vmax=limit)
            place.set(xticks=[], yticks=[], title=str(digit) if kind == "real" else None)
        row[0].set_ylabel(kind)
