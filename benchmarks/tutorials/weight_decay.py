"""Weight decay for every pixel beside one that a grid search tunes, on digits among other digits.

Everyone has the same 500 labelled examples: 200 to fit, 200 to judge decays by, 100 to say when to stop (which the grid
search may use to judge by as well). Everyone's final classifier is fitted to all 500 with the decays that were found.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tutorials.study import Estimate, Study, Table
from bilevel import load_config
from examples import weight_decay as recipe

PER = {"model": "one for all", "input": "one a pixel", "element": "one a weight"}
NUMBER = {"model": 1, "input": 256, "element": 2560}
OTHER_METHODS = ("identity", "conjugate_gradient")


@dataclass(frozen=True)
class Budget:
    seeds: int
    steps: int
    grid: int
    others: tuple[int, ...]


SMALL = Budget(seeds=2, steps=4, grid=4, others=(0,))
FULL = Budget(seeds=10, steps=40, grid=21, others=(0, 1, 7))


@dataclass(frozen=True)
class Found:
    """Test errors and losses of the two final fits, and what led there."""

    fitted: float
    refitted: float
    loss: float
    path: list[float] = dataclasses.field(default_factory=list)
    decays: list[float] = dataclasses.field(default_factory=list)
    stopped: int = 0


def fit(examples: tuple[Tensor, Tensor], decay: Tensor) -> nn.Module:
    """Returns the solution of the inner problem, to high accuracy."""
    x, y = examples
    model = nn.Linear(x.shape[1], 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + (decay * model.weight.square()).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.requires_grad_(False)


def error(model: nn.Module, examples: tuple[Tensor, Tensor]) -> float:
    return float((model(examples[0]).argmax(1) != examples[1]).float().mean())


def loss(model: nn.Module, examples: tuple[Tensor, Tensor]) -> float:
    return float(F.cross_entropy(model(examples[0]), examples[1]))


def joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def final(digits: Any, decay: Tensor, **path: Any) -> Found:
    """Fits to the training examples, and to all, where the same prior is a smaller share of the mean loss."""
    everything = joined(digits.train, digits.validation, digits.stopping)
    share = len(digits.train[0]) / len(everything[0])
    small, large = fit(digits.train, decay), fit(everything, share * decay)
    return Found(error(small, digits.test), error(large, digits.test), loss(large, digits.test), **path)


def tuned(digits: Any, size: int) -> Found:
    """One decay by grid search."""
    judged = joined(digits.validation, digits.stopping)
    grid = torch.logspace(-5, 0, size)
    losses = [loss(fit(digits.train, decay), judged) for decay in grid]
    best = grid[losses.index(min(losses))]
    return final(digits, best, decays=[float(best)])


def learned(settings: recipe.Config, steps: int, method: str) -> Found:
    """Decays by hypergradients, stopped where the loss on the examples for that is least."""
    overrides = ["engine.progress=false", f"hypergradient={method}"]
    config = load_config(overrides=overrides, defaults=dataclasses.replace(recipe.DEFAULTS, recipe=settings))
    torch.manual_seed(settings.seed)
    engine = recipe.build(config)
    classifier, decay = engine.problems["classifier"], engine.problems["hyperparameters"].parts["decay"]
    path, least, kept, stopped = [], float("inf"), torch.empty(0), 0
    for step in range(steps):
        before = decay.of("weight").detach().clone()  # the weights are fitted under these
        engine.step()
        with torch.no_grad():
            found = classifier.evaluate()
        path.append(float(found["test_error"]))
        if float(found["stopping_loss"]) < least:
            least, kept, stopped = float(found["stopping_loss"]), before, step + 1
    return final(classifier.digits, kept, path=path, decays=kept.flatten().tolist(), stopped=stopped)


def percent(values: list[float]) -> Estimate:
    return Estimate.of(values, digits=1, percent=True)


def gain(found: list[Found], scalar: list[Found]) -> Estimate:
    """By how much the error is lower than the grid search's, seed by seed."""
    return percent([base.refitted - each.refitted for each, base in zip(found, scalar, strict=True)])


def row(name: str, number: int, found: list[Found], scalar: list[Found]) -> list[Any]:
    fitted, refitted = percent([each.fitted for each in found]), percent([each.refitted for each in found])
    difference = "–" if found is scalar else gain(found, scalar)
    return [name, number, fitted, refitted, difference, Estimate.of([each.loss for each in found])]


def place(others: int, scalar: list[Found], found: list[Found]) -> list[Any]:
    errors = [percent([each.refitted for each in side]) for side in (scalar, found)]
    return [others, 64 * (others + 1), *errors, gain(found, scalar)]


def run(budget: Budget) -> Study:
    settings = [recipe.Config(seed=seed) for seed in range(budget.seeds)]
    scalar = [tuned(recipe.Digits(each), budget.grid) for each in settings]
    alone = [tuned(without_others(each), budget.grid) for each in settings]
    learned_by = {
        per: [learned(dataclasses.replace(each, per=per), budget.steps, "neumann") for each in settings] for per in PER
    }
    found = learned_by["input"]
    rows = [row("one for all, grid search", 1, scalar, scalar)]
    rows += [row(f"{name}, learned", NUMBER[per], learned_by[per], scalar) for per, name in PER.items()]
    rows += [row("*an oracle: the other digits cut away*, grid search", 1, alone, scalar)]

    places = [place(settings[0].others, scalar, found)]
    for others in budget.others:
        there = [dataclasses.replace(each, others=others) for each in settings]
        base = [tuned(recipe.Digits(each), budget.grid) for each in there]
        places.append(place(others, base, [learned(each, budget.steps, "neumann") for each in there]))

    methods = {"neumann": found}
    for method in OTHER_METHODS:
        methods[method] = [learned(each, budget.steps, method) for each in settings]
    digits = recipe.Digits(settings[0])
    return Study(
        {
            "errors": Table(
                ["weight decay", "decays", "fitted to 200", "refitted to 500", "below the grid search", "loss"], rows
            ),
            "others": Table(
                ["other digits", "pixels", "one for all, grid search", "one a pixel, learned", "below"],
                sorted(places, key=lambda each: each[0]),
            ),
            "methods": Table(
                ["hypergradient", "refitted to 500", "below the grid search"],
                [[name, percent([f.refitted for f in each]), gain(each, scalar)] for name, each in methods.items()],
            ),
        },
        {
            "paths": {per: [each.path for each in found] for per, found in learned_by.items()},
            "grid search": [each.fitted for each in scalar],
            "decays": [each.decays for each in found],
            "stopped": {per: [each.stopped for each in found] for per, found in learned_by.items()},
            "best of the grid": [each.decays[0] for each in scalar],
            "example": (digits.train[0][0] + digits.mean).tolist(),
        },
    )


def without_others(settings: recipe.Config) -> Any:
    """Returns the same examples, less the pixels that do not matter."""
    digits = recipe.Digits(settings)
    count = digits.mean.numel() // 8
    place = torch.arange(8)[:, None] * count + torch.arange(8)
    for name in ("train", "validation", "stopping", "test"):
        x, y = getattr(digits, name)
        setattr(digits, name, (x[:, place.flatten()], y))
    return digits


def draw(study: Study, figure: Any) -> None:
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 3])
    example, decays = torch.tensor(study.data["example"]), torch.tensor(study.data["decays"])
    shown = figure.add_subplot(grid[0, 0])
    shown.imshow(example.reshape(8, -1), cmap="gray")
    shown.set_title("an example, labelled 'four'", fontsize="medium")
    learned = figure.add_subplot(grid[0, 1])
    image = learned.imshow(decays.log10().mean(0).reshape(8, -1), cmap="viridis")
    learned.set_title("log₁₀ of the learned decays", fontsize="medium")
    figure.colorbar(image, ax=learned, orientation="horizontal", shrink=0.6)
    for axes in (shown, learned):
        axes.set_xticks([])
        axes.set_yticks([])
    curves = figure.add_subplot(grid[1, :])
    for per, paths in study.data["paths"].items():
        mean = 100 * torch.tensor(paths).mean(0)
        curves.plot(range(1, len(mean) + 1), mean, label=f"{PER[per]}, learned")
    base = 100 * torch.tensor(study.data["grid search"]).mean()
    curves.axhline(float(base), linestyle="--", color="gray", label="one for all, grid search")
    curves.set_xlabel("outer step")
    curves.set_ylabel("test error (%)")
    curves.legend()
