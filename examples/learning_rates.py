"""Learning rates that set themselves: one for every tensor of a network, from a start that is far too small.

bilevel run examples/learning_rates.py --set recipe.rate=0.1 --set recipe.per=model
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, Unrolled
from bilevel.config import RunConfig
from bilevel.problems import Hyperparameters, LearningRate, Paced


@dataclass(frozen=True)
class Config:
    rate: float = 0.001  # what all rates start from
    per: str = "tensor"  # one rate a "model", "tensor", "input" or "element"
    momentum: float = 0.9
    speed: float = 0.2  # the step of the rates' logarithms
    seed: int = 0


STEPS = 10  # inner updates for each of the rates
DEFAULTS = RunConfig(engine=EngineConfig(steps=50), hypergradient=Unrolled(memory="graph"), recipe=Config())


class Digits:
    """scikit-learn's digits: to train, to judge rates by, to test."""

    def __init__(self, seed):
        x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        data = TensorDataset(x[order].float() / 16, y[order])
        self.train, self.validation, self.test = (data[:1000], data[1000:1300], data[1300:])

    def batches(self, part):
        return DataLoader(TensorDataset(*part), batch_size=100, shuffle=True)


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


class Network(Paced):
    def __init__(self, digits, model, **settings):
        super().__init__(model, data=digits.batches(digits.train), **settings)
        self.digits = digits

    def evaluate(self):
        x, y = self.digits.test
        outputs = self.module(x)
        return {"error": (outputs.argmax(1) != y).float().mean(), "loss": self.criterion(outputs, y)}


def build(config):
    recipe = config.recipe
    digits, model = Digits(recipe.seed), network()
    rate = LearningRate(model, per=recipe.per)
    adam = lambda params: torch.optim.Adam(params, lr=recipe.speed)  # noqa: E731
    outer = Hyperparameters({"rate": rate}, optimizer=adam, data=digits.batches(digits.validation))
    sgd = lambda params: torch.optim.SGD(params, lr=recipe.rate, momentum=recipe.momentum)  # noqa: E731
    inner = Network(digits, model, optimizer=sgd, steps=STEPS, hypergradient=config.hypergradient)
    return Engine([outer, inner], config.engine)
