"""What the ready-made problems share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.errors import BilevelWarning, ConfigError, DataError, GraphError
from bilevel.problems import Problem, Training, Validation, counterpart

QUIET = EngineConfig(progress=False)


class Scale(Validation):
    """The outer parameter scales the logits that the inner problem is fitted with."""


class Scaled(Training):
    def loss(self, batch: Any) -> Any:
        inputs, targets = batch
        scale = counterpart(self, Scale).module["scale"]
        return self.criterion(self(inputs) * scale.exp(), targets) + self.decay()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(40, 3, generator=generator).double(), torch.randint(2, (40,), generator=generator))


def scale() -> nn.Module:
    return nn.ParameterDict({"scale": torch.zeros((), dtype=torch.float64)})


def engine(first: Any, second: Any, **settings: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    outer = Scale(scale(), data=second, optimizer=sgd, **settings)
    inner = Scaled(model, data=first, optimizer=sgd, steps=30, weight_decay=0.1)
    return Engine([outer, inner], QUIET, "conjugate_gradient")


def loaders(train: range, validation: range) -> tuple[Any, Any]:
    data = examples()
    return DataLoader(Subset(data, train), batch_size=50), DataLoader(Subset(data, validation), batch_size=50)


def test_the_loss_is_the_criterion_and_the_decay_of_the_owned_parameters():
    model = nn.Linear(3, 2)
    problem = Training(model, params="weight", optimizer=sgd, weight_decay=0.5)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    expected = F.cross_entropy(model(x), y) + 0.25 * model.weight.square().sum()
    found = problem.loss((x, y))
    assert torch.allclose(found["loss"], expected)
    assert torch.equal(found["outputs"], model(x))
    assert Training(model, optimizer=sgd).decay() == 0.0


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), "much"])
def test_a_decay_is_a_number_of_at_least_zero(weight_decay: Any):
    with pytest.raises(ConfigError, match=r"training\.weight_decay must be a finite number"):
        Training(nn.Linear(1, 1), optimizer=sgd, weight_decay=weight_decay)


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        (torch.randn(2, 3), "a Tensor"),
        ({"x": torch.randn(2, 3), "y": torch.zeros(2)}, "a dict"),
        ((torch.randn(2, 3),), "1 parts"),
        ([torch.randn(2, 3), torch.zeros(2), torch.arange(2)], "3 parts"),
    ],
)
def test_batches_of_another_form_are_refused(batch: Any, came: str):
    inner, outer = Training(nn.Linear(3, 2), optimizer=sgd), Validation(scale())
    outer.attach({"training": inner, "validation": outer})
    for problem in (inner, outer):
        with pytest.raises(DataError, match=rf"{problem.name}' needs batches \(inputs, targets\), and got {came}"):
            problem.loss(batch)


def test_a_pair_finds_each_other_and_its_hypergradient_is_right():
    found = engine(*loaders(range(30), range(30, 40)))
    found.run(5)
    report = hypergradcheck(found, rtol=1e-6)
    assert report.passed, report


def test_the_outer_criterion_is_the_inner_ones_unless_it_has_its_own():
    inner = Training(nn.Linear(3, 2).double(), optimizer=sgd, criterion=lambda out, y: out.sum() * 0 + 7.0)
    other = Validation(scale(), criterion=lambda out, y: out.sum() * 0 + 3.0)
    same = Validation(scale(), name="same")
    names = {"training": inner, "validation": other, "same": same}
    for problem in names.values():
        problem.attach(names)
    batch = examples().tensors
    assert same.loss(batch).item() == 7.0
    assert other.loss(batch).item() == 3.0


def test_a_counterpart_that_is_missing_or_not_the_only_one_is_named():
    one, two = (Training(nn.Linear(1, 1), optimizer=sgd, name=name) for name in ("one", "two"))
    outer = Validation(scale())
    outer.attach({"validation": outer})
    with pytest.raises(GraphError, match=r"works with a Training, of which its engine has 0.*give the engine one"):
        outer.trained()
    outer.attach({"validation": outer, "one": one, "two": two})
    with pytest.raises(GraphError, match=r"has 2 \(problems: .*'one': 'Training'.*name the one that is meant"):
        outer.trained()
    assert counterpart(outer, Training, "two") is two
    with pytest.raises(GraphError, match="the Training 'three'"):
        counterpart(outer, Training, "three")
    assert counterpart(outer, Problem, "one") is one


def test_examples_that_two_levels_share_are_warned_about():
    with pytest.warns(
        BilevelWarning, match=r"'scale' and 'scaled' draw the same examples, 5 of them \(indices 25, 26, 27"
    ):
        engine(*loaders(range(30), range(25, 40)))
