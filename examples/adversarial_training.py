"""A classifier that withstands perturbed images, with the regulariser learned on attacked held-out images.

bilevel run examples/adversarial_training.py
bilevel run examples/adversarial_training.py --set recipe.radius=0.2 --set recipe.weight=1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from bilevel import Engine, EngineConfig, Identity
from bilevel.config import RunConfig
from bilevel.problems.games import AdversarialTraining, Perturbation, RobustValidation, attack

PIXELS = (0.0, 1.0)


@dataclass(frozen=True)
class Config:
    num_train: int = 300
    num_validation: int = 300
    radius: float = 0.15  # largest change of a pixel
    share: float = 0.5  # of perturbed examples in training, at the start
    decay: float = 0.01  # of every tensor, at the start
    weight: float = 0.5  # what robustness counts beside accuracy, in validation
    rate: float = 0.1  # of the outer optimiser
    seed: int = 0


DEFAULTS = RunConfig(engine=EngineConfig(steps=20), hypergradient=Identity(), recipe=Config())


def load(config):
    """Returns (images, labels) for training, validation and test."""
    x, y = load_digits(return_X_y=True)
    x, rest_x, y, rest_y = train_test_split(
        x / 16, y, train_size=config.num_train, stratify=y, random_state=config.seed
    )
    sizes = {"train_size": config.num_validation, "stratify": rest_y, "random_state": config.seed}
    v, t, w, u = train_test_split(rest_x, rest_y, **sizes)
    return [(torch.as_tensor(a).float(), torch.as_tensor(b)) for a, b in ((x, y), (v, w), (t, u))]


class Validation(RobustValidation):
    def __init__(self, model, test, radius, **settings):
        super().__init__(model, **settings)
        self.test, self.radius = test, radius

    def evaluate(self):
        x, y = self.test
        with torch.enable_grad():
            attacked = attack(self.trained().module, x, y, radius=self.radius, bounds=PIXELS, steps=20)
        accuracy = lambda inputs: float((self.trained()(inputs).argmax(1) == y).float().mean())  # noqa: E731
        return {"accuracy": accuracy(x), "robust_accuracy": accuracy(attacked)}


def build(config):
    recipe = config.recipe
    train, held_out, test = load(recipe)
    torch.manual_seed(recipe.seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    start = {"share": recipe.share, "decay": recipe.decay, "weight": recipe.weight}
    adam = lambda p: torch.optim.Adam(p, lr=recipe.rate)  # noqa: E731
    sgd = lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)  # noqa: E731
    foes = {"radius": recipe.radius, "bounds": PIXELS}
    problems = [
        Validation(model, test, recipe.radius, data=[held_out], optimizer=adam, **start),
        Perturbation(*held_out, name="validation_adversary", steps=5, **foes),
        AdversarialTraining(model, data=[train], optimizer=sgd, steps=10),
        Perturbation(*train, name="adversary", **foes),
    ]
    return Engine(problems, config.engine, config.hypergradient)
