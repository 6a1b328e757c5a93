"""Hyper-cleaning: learn how far to trust each training label from a few examples whose labels are known to be right.

bilevel run examples/hyper_cleaning.py --set hypergradient.method=cg       # one method
python examples/hyper_cleaning.py                                          # all of them, beside three baselines
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from bilevel import Engine, EngineConfig, Problem, load_config
from bilevel.config import RunConfig


@dataclass(frozen=True)
class Config:
    num_train: int = 1000
    num_trusted: int = 100
    wrong: float = 0.6  # share of the training labels that are wrong
    weight_decay: float = 0.003
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=20), recipe=Config())
METHODS = ("finite_difference", "identity", "neumann", "conjugate_gradient", "exact", "unrolled")


class Digits:
    """scikit-learn's handwritten digits: training examples, many with wrong labels; trusted ones; test ones."""

    def __init__(self, config):
        generator = torch.Generator().manual_seed(config.seed)
        x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(x), generator=generator)
        x, y = x[order].float() / 16, y[order]
        a, b = config.num_train, config.num_train + config.num_trusted
        self.wrong = torch.rand(a, generator=generator) < config.wrong
        shift = torch.randint(1, 10, (a,), generator=generator)
        self.train = x[:a], (y[:a] + shift * self.wrong) % 10
        self.trusted, self.test = (x[a:b], y[a:b]), (x[b:], y[b:])


class Cleaner(Problem):  # outer: weights of the training examples, such that the trusted ones are classified well
    def __init__(self, digits, **settings):
        logits = nn.ParameterDict({"logits": torch.zeros(len(digits.wrong))})
        super().__init__(logits, data=[digits.trusted], **settings)
        self.digits = digits

    def weights(self):
        return torch.sigmoid(self.module.logits)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)

    def evaluate(self):
        return {"auc": roc_auc_score(~self.digits.wrong, self.weights())}


class Classifier(Problem):  # inner: fitted to the weighted training examples
    def __init__(self, digits, weight_decay, **settings):
        super().__init__(nn.Linear(64, 10), data=[digits.train], **settings)
        self.digits, self.weight_decay = digits, weight_decay

    def loss(self, batch):
        return self.fit(batch, self.cleaner.weights())

    def fit(self, batch, weights):
        x, y = batch
        penalty = sum(p.square().sum() for p in self.module.parameters())
        return (weights * F.cross_entropy(self(x), y, reduction="none")).mean() + self.weight_decay / 2 * penalty

    def evaluate(self):
        x, y = self.digits.test
        return {"accuracy": (self(x).argmax(1) == y).float().mean()}


def build(config):
    digits = Digits(config.recipe)
    cleaner = Cleaner(digits, optimizer=lambda params: torch.optim.Adam(params, lr=0.5))
    sgd = lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9)  # noqa: E731
    classifier = Classifier(digits, config.recipe.weight_decay, optimizer=sgd, steps=20)
    return Engine([cleaner, classifier], config.engine, config.hypergradient)


def baseline(config, batch, weights):
    """Trains the same classifier as often, with weights that nothing learns."""
    classifier = build(config).problems["classifier"]
    for _ in range(config.engine.steps * classifier.steps):
        classifier.optimizer.zero_grad()
        classifier.fit(batch, weights).backward()
        classifier.optimizer.step()
    return classifier.evaluate()["accuracy"]


def main():
    torch.set_num_threads(1)  # the matrices are too small for more
    config = load_config(overrides=["engine.progress=false"], defaults=DEFAULTS)
    digits = Digits(config.recipe)
    everything, right = torch.ones(len(digits.wrong)), (~digits.wrong).float()
    table = Table("training", "test accuracy", "AUC of the weights", "seconds")
    for name, batch, weights in (
        ("no cleaning", digits.train, everything),
        ("the trusted examples alone", digits.trusted, torch.tensor(1.0)),
        ("the right labels (an oracle)", digits.train, right),
    ):
        torch.manual_seed(0)
        table.add_row(name, f"{baseline(config, batch, weights):.3f}")
    for method in METHODS:
        torch.manual_seed(0)
        config = load_config(overrides=["engine.progress=false", f"hypergradient={method}"], defaults=DEFAULTS)
        engine, started = build(config), time.perf_counter()
        engine.run()
        found, seconds = engine.evaluate(), time.perf_counter() - started
        table.add_row(
            method, *(f"{found[key]:.3f}" for key in ("classifier/accuracy", "cleaner/auc")), f"{seconds:.1f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
