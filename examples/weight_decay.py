"""Weight decay for every pixel: learn which of four digits in a row the label means.

bilevel run examples/weight_decay.py --set recipe.per=element
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn

from bilevel import Engine, EngineConfig
from bilevel.config import RunConfig
from bilevel.problems import Hyperparameters, Tuned, WeightDecay
from bilevel.validation import check_integer


@dataclass(frozen=True)
class Config:
    per: str = "input"  # one decay a "model", "tensor", "input" (pixel) or "element" (weight)
    initial: float = 0.01
    maximum: float = 3.0  # keeps gradient descent stable
    others: int = 3  # digits beside the labelled one
    num_train: int = 200
    num_validation: int = 200
    num_stopping: int = 100
    seed: int = 0

    def __post_init__(self):
        check_integer("Config", "others", self.others, minimum=0)


DEFAULTS = RunConfig(engine=EngineConfig(steps=20), recipe=Config())


class Digits:
    """scikit-learn's digits, each with others beside it: to train, to validate, to stop and to test."""

    def __init__(self, config):
        generator = torch.Generator().manual_seed(config.seed)
        x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        images = x.float().reshape(-1, 8, 8) / 16
        rows = [images, *(images[torch.randperm(len(y), generator=generator)] for _ in range(config.others))]
        x = torch.cat(rows, 2).flatten(1)
        sizes = config.num_train, config.num_validation, config.num_stopping
        parts = torch.randperm(len(y), generator=generator).split([*sizes, len(y) - sum(sizes)])
        self.mean = x[parts[0]].mean(0)
        self.train, self.validation, self.stopping, self.test = ((x[part] - self.mean, y[part]) for part in parts)


class Classifier(Tuned):
    def __init__(self, digits, **settings):
        model = nn.Linear(digits.mean.numel(), 10)
        super().__init__(model, data=[digits.train], **settings)
        self.digits = digits

    def evaluate(self):
        found = {}
        for name in ("stopping", "test"):
            x, y = getattr(self.digits, name)
            outputs = self(x)
            found[f"{name}_error"] = (outputs.argmax(1) != y).float().mean()
            found[f"{name}_loss"] = self.criterion(outputs, y)
        return found


def build(config):
    recipe = config.recipe
    digits = Digits(recipe)
    classifier = Classifier(digits, optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), steps=30)
    decay = WeightDecay(
        classifier.module, per=recipe.per, initial=recipe.initial, maximum=recipe.maximum, params="weight"
    )
    adam = lambda params: torch.optim.Adam(params, lr=0.2)  # noqa: E731
    outer = Hyperparameters({"decay": decay}, optimizer=adam, data=[digits.validation])
    return Engine([outer, classifier], config.engine, config.hypergradient)
