"""Logistic regression with a weight decay of its own for each feature, learned from a validation part.

Half of the features are measurements of tumours. The other half are the same columns with their rows shuffled: real
numbers that know nothing of the row they stand in, and that a decay should shut out.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_breast_cancer

NUM_TRAIN, NUM_VALID, NUM_FEATURES = 80, 160, 60
START = 0.05


def measurements(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(part).to(torch.get_default_dtype()) for part in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x), generator=generator)
    x, y = (x[order] - x.mean(0)) / x.std(0), y[order]
    x = torch.cat([x, x[torch.randperm(len(x), generator=generator)]], 1)
    a, b = NUM_TRAIN, NUM_TRAIN + NUM_VALID
    return (x[:a], y[:a]), (x[a:b], y[a:b]), (x[b:], y[b:])


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(NUM_FEATURES))

    def forward(self, inputs):
        return inputs @ self.w


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = torch.nn.Parameter(torch.full((NUM_FEATURES,), START))

    def forward(self):
        return self.decay


class Outer(ImplicitProblem):
    def forward(self):
        return self.module()

    def training_step(self, batch):
        inputs, targets = batch
        return F.binary_cross_entropy_with_logits(self.inner(inputs), targets)

    def configure_train_data_loader(self):
        return [self.cfg["data"]]

    def configure_module(self):
        return Decay()

    def configure_optimizer(self):
        return torch.optim.SGD(self.module.parameters(), lr=self.cfg["lr"], momentum=0.9)

    def param_callback(self):
        for p in self.trainable_parameters():
            p.data.clamp_(min=1e-8)


class Inner(ImplicitProblem):
    def training_step(self, batch):
        inputs, targets = batch
        fit = F.binary_cross_entropy_with_logits(self.module(inputs), targets)
        return fit + 0.5 * (self.outer() * self.module.w.square()).sum()

    def configure_train_data_loader(self):
        return [self.cfg["data"]]

    def configure_module(self):
        return Weights()

    def configure_optimizer(self):
        return torch.optim.SGD(self.module.parameters(), lr=0.1)

    def on_inner_loop_start(self):
        self.module.w.data.zero_()


class DecayEngine(Engine):
    def __init__(self, test, **kwargs):
        self.test, self.history = test, []
        super().__init__(**kwargs)

    @torch.no_grad()
    def validation(self):
        inputs, targets = self.test
        loss = F.binary_cross_entropy_with_logits(self.inner(inputs), targets)
        self.history.append({"loss": loss.item()})
        return {"loss": loss}


def main(seed=0, outer_lr=0.3, outer_steps=60, unroll_steps=50, **hypergradient):
    train, valid, test = measurements(seed)
    outer = Outer(name="outer", config=Config(log_step=20), extra_config={"data": valid, "lr": outer_lr})
    inner = Inner(name="inner", config=Config(unroll_steps=unroll_steps, **hypergradient), extra_config={"data": train})
    engine = DecayEngine(
        test,
        config=EngineConfig(train_iters=outer_steps * unroll_steps, valid_step=10 * unroll_steps),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    return engine


if __name__ == "__main__":
    for entry in main().history:
        print(entry)
