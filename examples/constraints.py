"""A support vector machine whose C and kernel widths are learned, through the box-constrained dual that trains it.

bilevel run examples/constraints.py --set recipe.per_feature=true --set recipe.useless=30
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

from bilevel import ConjugateGradient, Engine, EngineConfig, Problem
from bilevel.config import RunConfig
from bilevel.problems.constraints import Box, Constrained


@dataclass(frozen=True)
class Config:
    per_feature: bool = False  # a width for each feature, or one for all
    useless: int = 0  # further features: columns with their entries shuffled
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=40), hypergradient=ConjugateGradient(100), recipe=Config())
RIDGE = 0.001  # added to the kernel's diagonal


def load(config):
    """Returns (x, y) for training, validation and test: half of the patients, a quarter and a quarter; y is −1 or 1."""
    x, y = (torch.as_tensor(part).double() for part in load_breast_cancer(return_X_y=True))
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = [x[torch.randperm(len(x), generator=generator), i % x.shape[1]] for i in range(config.useless)]
    x = torch.stack([*x.T, *shuffled], 1)
    train, rest = train_test_split(torch.arange(len(y)), test_size=0.5, stratify=y, random_state=config.seed)
    held_out, test = train_test_split(rest, test_size=0.5, stratify=y[rest], random_state=config.seed)
    x = (x - x[train].mean(0)) / x[train].std(0)
    return [(x[part], 2 * y[part] - 1) for part in (train, held_out, test)]


class Kernel(Problem):  # outer: log C and log γ, by the loss on the validation examples
    def __init__(self, splits, config, **settings):
        (x, _), self.validation, self.test = splits
        start = torch.full((x.shape[1] if config.per_feature else 1,), 1 / x.shape[1]).log().to(x)  # gamma="scale"
        super().__init__(nn.ParameterDict({"log_c": torch.zeros(()).to(x), "log_width": start}), **settings)

    def __call__(self, a, b):  # exp(−Σ γᵢ (aᵢ − bᵢ)²), and 1 in the place of an intercept
        a, b = (part * (self.module["log_width"] / 2).exp() for part in (a, b))
        return 1 + (2 * a @ b.T - a.square().sum(1)[:, None] - b.square().sum(1)).exp()

    def loss(self, batch):
        return F.softplus(-self.validation[1] * self.machine.decide(self.validation[0])).mean()

    def evaluate(self):
        return {"accuracy": (self.machine.decide(self.test[0]).sign() == self.test[1]).double().mean()}


class Machine(Constrained):  # inner: min ½ αᵀQα − Σ α over 0 ≤ α ≤ C; α = Cβ, so that C does not move the box
    def __init__(self, examples, **settings):
        self.x, self.y = examples
        super().__init__(nn.ParameterDict({"beta": torch.zeros_like(self.y)}), constraints=Box(0.0, 1.0), **settings)

    def decide(self, x):
        return self.kernel(x, self.x) @ (self.kernel.module["log_c"].exp() * self.module["beta"] * self.y)

    def loss(self, batch):  # scaled such that its largest eigenvalue is about 1; a ridge bounds the smallest one
        c, beta = self.kernel.module["log_c"].exp(), self.module["beta"]
        return ((self.y * self.decide(self.x) + RIDGE * c * beta) / 2 - 1) @ beta / (2 * len(beta) * c)


def build(config):
    splits = load(config.recipe)
    outer = Kernel(splits, config.recipe, optimizer=lambda p: torch.optim.Adam(p, lr=0.2))
    nesterov = lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.98, nesterov=True)  # noqa: E731
    inner = Machine(splits[0], optimizer=nesterov, steps=200, normal_curvature=0.1)
    return Engine([outer, inner], config.engine, config.hypergradient)
