"""Digits turned by quarters: a start from which a few steps on a few examples learn to read what is turned this way.

A task turns all its digits the same way and shows few of each. Its weights stay near the start, which is the outer
parameter: each inner loop begins there, and what the outer loss sees is how well the task's other examples are read.
"""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.envs import Env
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import nn, optim

SHOTS, QUERIES, TASKS_A_STEP = 5, 10, 4
INNER_STEPS, INNER_LR, PROXIMITY = 5, 0.3, 0.1


class Tasks:
    def __init__(self, part, seed):
        x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
        x = x.to(torch.get_default_dtype()).reshape(-1, 8, 8) / 16
        self.images = [x[y == digit][part] for digit in range(10)]
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self):
        turns = int(torch.randint(4, (), generator=self.generator))
        found = {"train": [], "test": []}
        for images in self.images:
            rows = torch.randperm(len(images), generator=self.generator)
            turned = torch.rot90(images[rows[: SHOTS + QUERIES]], turns, (1, 2)).flatten(1)
            found["train"].append(turned[:SHOTS])
            found["test"].append(turned[SHOTS:])
        return {
            key: (torch.cat(images), torch.arange(10).repeat_interleave(len(images[0])))
            for key, images in found.items()
        }


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def task_loss(module, start, batch):
    inputs, labels = batch
    distance = sum((p - q).square().sum() for p, q in zip(module.parameters(), start.parameters(), strict=True))
    return F.cross_entropy(module(inputs), labels) + PROXIMITY / 2 * distance


def accuracy(module, batch):
    inputs, labels = batch
    return (module(inputs).argmax(1) == labels).double().mean()


class Outer(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.inner(inputs)
        return {"loss": F.cross_entropy(outputs, labels), "accuracy": accuracy(self.inner, batch)}

    def get_batch(self):
        return self.env.task["test"]


class Inner(ImplicitProblem):
    def training_step(self, batch):
        return task_loss(self.module, self.outer, batch)

    def get_batch(self):
        return self.env.task["train"]

    def on_inner_loop_start(self):
        self.module.load_state_dict(self.outer.module.state_dict())


class TaskEnv(Env):
    def __init__(self, seed):
        super().__init__()
        self.tasks, self.task = Tasks(slice(100), seed), None

    def step(self):
        self.task = self.tasks.draw()


class MetaEngine(Engine):
    def train_step(self):
        if self.global_step % INNER_STEPS == 1:
            self.env.step()
        for leaf in self.leaves:
            leaf.step(global_step=self.global_step)

    def validation(self):
        if not hasattr(self, "history"):
            self.history = []
        tasks, before, after = Tasks(slice(100, None), seed=1), [], []
        module = network()
        optimizer = optim.SGD(module.parameters(), lr=INNER_LR)
        for _ in range(20):
            task = tasks.draw()
            module.load_state_dict(self.outer.module.state_dict())
            before.append(accuracy(module, task["test"]))
            for _ in range(INNER_STEPS):
                optimizer.zero_grad()
                task_loss(module, self.outer, task["train"]).backward(inputs=list(module.parameters()))
                optimizer.step()
            after.append(accuracy(module, task["test"]))
        self.history.append({"before": torch.stack(before).mean().item(), "after": torch.stack(after).mean().item()})
        return self.history[-1]


def main(seed=0, num_tasks=400, outer_lr=1e-2, **hypergradient):
    torch.manual_seed(seed)
    module = network()
    outer = Outer(
        name="outer",
        module=module,
        optimizer=optim.Adam(module.parameters(), lr=outer_lr),
        config=Config(log_step=100, retain_graph=True, gradient_accumulation=TASKS_A_STEP),
    )
    module = network()
    inner = Inner(
        name="inner",
        module=module,
        optimizer=optim.SGD(module.parameters(), lr=INNER_LR),
        config=Config(unroll_steps=INNER_STEPS, **hypergradient),
    )
    engine = MetaEngine(
        config=EngineConfig(train_iters=num_tasks * INNER_STEPS, valid_step=num_tasks * INNER_STEPS // 4),
        problems=[outer, inner],
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        env=TaskEnv(seed),
    )
    engine.run()
    return engine


if __name__ == "__main__":
    for entry in main().history:
        print(entry)
