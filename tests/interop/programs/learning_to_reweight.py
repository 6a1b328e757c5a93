"""Wrong labels: a network reads an example and its label, and says how far the label is to be trusted.

The trust is such that a small set, whose labels are known to be right, is classified well.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

NUM_TRAIN, NUM_TRUSTED = 1000, 200
WRONG = 0.5  # share of the training labels that are wrong


def noisy_digits(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order].to(torch.get_default_dtype()) / 16, y[order]
    wrong = torch.rand(NUM_TRAIN, generator=generator) < WRONG
    shift = torch.randint(1, 10, (NUM_TRAIN,), generator=generator)
    a, b = NUM_TRAIN, NUM_TRAIN + NUM_TRUSTED
    train = TensorDataset(x[:a], (y[:a] + shift * wrong) % 10)
    return train, TensorDataset(x[a:b], y[a:b]), TensorDataset(x[b:], y[b:]), wrong


class Trust(nn.Module):
    """Forms an opinion of its own on the digit; the label's loss under it becomes a weight between 0 and 1."""

    def __init__(self):
        super().__init__()
        self.opinion = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.weight = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())

    def forward(self, inputs, labels):
        losses = F.cross_entropy(self.opinion(inputs), labels, reduction="none")
        return self.weight(losses.unsqueeze(1)).squeeze(1)


class Outer(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.inner(inputs)
        accuracy = (outputs.argmax(1) == labels).double().mean()
        return {"loss": F.cross_entropy(outputs, labels), "accuracy": accuracy}

    def configure_train_data_loader(self):
        return DataLoader(self.cfg["data"], batch_size=50)

    def configure_module(self):
        return Trust()

    def configure_optimizer(self):
        return optim.Adam(self.module.parameters(), lr=self.cfg["lr"])

    def configure_scheduler(self):
        return optim.lr_scheduler.MultiStepLR(self.optimizer, milestones=[self.cfg["milestone"]], gamma=0.1)


class Inner(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        losses = F.cross_entropy(self.forward(inputs), labels, reduction="none")
        weights = self.outer(inputs, labels)
        return (weights * losses).sum() / weights.sum()

    def configure_train_data_loader(self):
        return DataLoader(self.cfg["data"], batch_size=100)

    def configure_module(self):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def configure_optimizer(self):
        return optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def configure_scheduler(self):
        return optim.lr_scheduler.MultiStepLR(self.optimizer, milestones=[self.cfg["milestone"]], gamma=0.1)


class ReweightingEngine(Engine):
    def __init__(self, test, wrong, **kwargs):
        super().__init__(**kwargs)
        self.test, self.wrong, self.best = test, wrong, 0.0
        self.history = []

    @torch.no_grad()
    def validation(self):
        inputs, labels = self.test.tensors
        accuracy = (self.inner(inputs).argmax(1) == labels).double().mean().item()
        trust = self.outer(*self.inner.cfg["data"].tensors)
        right_first = (trust[~self.wrong].unsqueeze(1) > trust[self.wrong]).double().mean().item()
        self.best = max(self.best, accuracy)
        self.history.append({"accuracy": accuracy, "best": self.best, "right_first": right_first})
        return self.history[-1]


def main(seed=0, train_iters=600, outer_lr=1e-2, roll_back=False, **hypergradient):
    torch.manual_seed(seed)
    train, trusted, test, wrong = noisy_digits(seed)
    milestone = 3 * train_iters // 4
    outer = Outer(
        name="outer",
        config=Config(log_step=100, retain_graph=True),
        extra_config={"data": trusted, "lr": outer_lr, "milestone": milestone},
    )
    inner = Inner(
        name="inner",
        config=Config(unroll_steps=1, **hypergradient),
        extra_config={"data": train, "milestone": milestone},
    )
    engine = ReweightingEngine(
        test,
        wrong,
        config=EngineConfig(train_iters=train_iters, valid_step=train_iters // 6, roll_back=roll_back),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    return engine


if __name__ == "__main__":
    for entry in main().history:
        print(entry)
