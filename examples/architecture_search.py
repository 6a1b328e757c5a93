"""Architecture search: learn which operation each edge of a cell should be, from validation data (DARTS).

bilevel run examples/architecture_search.py --set hypergradient=finite_difference --set recipe.seed=1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn

from bilevel import Engine, EngineConfig, OneStep, RunConfig
from bilevel.problems.architecture import Architecture, SupernetTraining
from bilevel.problems.search_space import Cell, image_operations


@dataclass(frozen=True)
class Config:
    operations: tuple[str, ...] = ("skip_connect", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3")
    channels: int = 8
    num_train: int = 400
    num_validation: int = 400
    batch_size: int = 50
    learning_rate: float = 0.1  # of the weights
    architecture_rate: float = 0.02  # of α
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=200), recipe=Config(), hypergradient=OneStep(difference="central"))


def digits(config):
    """Returns training, validation and test data: inputs (N, 1, 8, 8) and labels."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))
    x, y = x[order].float().view(-1, 1, 8, 8) / 16, y[order]
    a, b = config.num_train, config.num_train + config.num_validation
    return (x[:a], y[:a]), (x[a:b], y[a:b]), (x[b:], y[b:])


def batches(data, config):
    generator = torch.Generator().manual_seed(config.seed)
    dataset = torch.utils.data.TensorDataset(*data)
    return torch.utils.data.DataLoader(dataset, config.batch_size, shuffle=True, generator=generator)


def network(config, cell=None):
    """Returns a network of one cell; the search space by default."""
    operations = image_operations(config.channels, config.operations)
    cell = Cell(operations, num_inputs=1, num_nodes=2) if cell is None else cell
    stem = nn.Conv2d(1, config.channels, 3, padding=1, bias=False), nn.BatchNorm2d(config.channels)
    head = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * config.channels, 10)
    return nn.Sequential(*stem, cell, *head)


def build(config):
    recipe = config.recipe
    train, validation, _ = digits(recipe)
    torch.manual_seed(recipe.seed)
    supernet = network(recipe)
    sgd = lambda params: torch.optim.SGD(params, lr=recipe.learning_rate, momentum=0.9, weight_decay=3e-4)  # noqa: E731
    adam = lambda params: torch.optim.Adam(params, lr=recipe.architecture_rate, betas=(0.5, 0.999))  # noqa: E731
    outer = Architecture(supernet, optimizer=adam, data=batches(validation, recipe))
    inner = SupernetTraining(supernet, optimizer=sgd, data=batches(train, recipe))
    return Engine([outer, inner], config.engine, config.hypergradient)
