"""Long-tailed digits: a network learns how much an example of this digit, with this loss, should count.

Of some digits the classifier sees only few examples. The weights are such that a small balanced set is classified well.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

NUM_TEST, NUM_BALANCED, NUM_COMMON = 40, 10, 120  # examples a digit
IMBALANCE = 40  # how many times as many examples the commonest digit has as the rarest


def long_tailed_digits(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.to(torch.get_default_dtype()).reshape(-1, 8, 8) / 16
    train, balanced, test = [], [], []
    for rank, digit in enumerate(torch.randperm(10, generator=generator).tolist()):
        (found,) = torch.where(y == digit)
        found = found[torch.randperm(len(found), generator=generator)]
        test.append(found[:NUM_TEST])
        balanced.append(found[NUM_TEST:][:NUM_BALANCED])
        train.append(found[NUM_TEST + NUM_BALANCED :][: round(NUM_COMMON / IMBALANCE ** (rank / 9))])
    parts = []
    for indices in (train, balanced, test):
        rows = torch.cat(indices)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        parts.append(TensorDataset(x[rows], y[rows]))
    return parts


class Reweight(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        return F.cross_entropy(self.classifier(inputs), labels)


class Classifier(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        losses = F.cross_entropy(self.forward(inputs), labels, reduction="none")
        if not self.parents:
            return losses.mean()
        known = torch.cat([losses.detach().unsqueeze(1), F.one_hot(labels, 10)], 1)
        weights = self.reweight(known).squeeze(1)
        return (weights * losses).sum() / weights.sum()


class ReweightingEngine(Engine):
    @torch.no_grad()
    def validation(self):
        if not hasattr(self, "history"):
            self.history = []
        right = total = 0
        for inputs, labels in self.test_loader:
            right += (self.classifier(inputs).argmax(1) == labels).sum().item()
            total += len(labels)
        self.history.append({"accuracy": right / total})
        return self.history[-1]


def main(seed=0, baseline=False, train_iters=600, outer_lr=3e-3, **hypergradient):
    torch.manual_seed(seed)
    train, balanced, test = long_tailed_digits(seed)

    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optim.SGD(module.parameters(), lr=0.03, momentum=0.9)
    classifier = Classifier(
        name="classifier",
        module=module,
        optimizer=optimizer,
        scheduler=optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2 * train_iters // 3], gamma=0.1),
        train_data_loader=DataLoader(train, batch_size=50),
        config=Config(unroll_steps=1, **hypergradient),
    )
    if baseline:
        problems, u2l, l2u = [classifier], {}, {}
    else:
        module = nn.Sequential(nn.Linear(11, 50), nn.ReLU(), nn.Linear(50, 1), nn.Sigmoid())
        reweight = Reweight(
            name="reweight",
            module=module,
            optimizer=optim.Adam(module.parameters(), lr=outer_lr),
            train_data_loader=DataLoader(balanced, batch_size=100),
            config=Config(log_step=100),
        )
        problems, u2l, l2u = [reweight, classifier], {reweight: [classifier]}, {classifier: [reweight]}

    engine = ReweightingEngine(
        config=EngineConfig(train_iters=train_iters, valid_step=train_iters // 6),
        problems=problems,
        dependencies={"u2l": u2l, "l2u": l2u},
    )
    engine.test_loader = DataLoader(test, batch_size=100)
    engine.run()
    return engine


if __name__ == "__main__":
    print("all count the same:", main(baseline=True).history[-1])
    print("with learned weights:", main().history[-1])
