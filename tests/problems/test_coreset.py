"""Coresets: the projection onto the budget, the weighted loss, and whether the right examples are kept."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.data import Indexed
from bilevel.errors import ConfigError, DataError, LossError
from bilevel.hypergrad import available_methods
from bilevel.problems.coreset import Coreset, CoresetTraining, project_capped_simplex

QUIET = EngineConfig(progress=False)
DOUBLE = torch.float64
vectors = st.lists(st.floats(-3, 3), min_size=1, max_size=12).map(lambda v: torch.tensor(v, dtype=DOUBLE))


@given(vectors, st.floats(0.01, 1.0))
def test_the_projection_meets_its_constraints_and_the_conditions_of_the_nearest_point(v, share):
    total = share * len(v)
    s = project_capped_simplex(v, total)
    assert s.min() >= 0
    assert s.max() <= 1
    assert float(s.sum()) == pytest.approx(total, abs=1e-9)
    # (v − s)·(t − s) ≤ 0 for every feasible t: enough to ask the one that is furthest along v − s.
    order = (v - s).argsort(descending=True)
    t = torch.zeros(len(v), dtype=DOUBLE)
    t[order] = (total - torch.arange(len(v), dtype=DOUBLE)).clamp(0, 1)
    assert float((v - s) @ (t - s)) <= 1e-8


@given(vectors, st.floats(0.01, 1.0))
def test_a_point_that_meets_the_constraints_stays(v, share):
    s = project_capped_simplex(v, share * len(v))
    torch.testing.assert_close(project_capped_simplex(s, share * len(v)), s, atol=1e-9, rtol=0)


def test_the_projection_s_derivative_is_that_of_differences():
    v = torch.tensor([0.9, 0.2, -1.0, 0.4, 2.0, 0.35], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: project_capped_simplex(v, 2.0), (v,), eps=1e-6, atol=1e-6)


def regression(method="conjugate_gradient", *, steps=50, dtype=DOUBLE, budget=6.0, batch=None):
    """Twelve examples, of which the odd ones follow another rule than the validation examples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=generator, dtype=DOUBLE).to(dtype)
    slope = torch.tensor([1.0, -1.0], dtype=dtype)
    y = (x @ slope) * torch.tensor([1.0, -1.0], dtype=dtype).repeat(6)
    v = torch.randn(20, 2, generator=generator, dtype=DOUBLE).to(dtype)
    sgd = lambda params: torch.optim.SGD(params, lr=0.2)  # noqa: E731
    outer = Coreset(12, budget=budget, data=[(v, v @ slope)], optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    outer.module.to(dtype)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(0)).to(dtype)
    losses = lambda outputs, targets, reduction="mean": F.mse_loss(outputs, targets, reduction=reduction)  # noqa: E731
    data = [(x, y, torch.arange(12))] if batch is None else Batches(x, y, batch)
    inner = CoresetTraining(model, criterion=losses, weight_decay=0.1, data=data, optimizer=sgd, steps=steps)
    return Engine([outer, inner], QUIET, method)


class Batches(DataLoader):
    def __init__(self, x, y, size):
        super().__init__(Indexed(TensorDataset(x, y)), batch_size=size, shuffle=True)


def test_the_examples_that_follow_the_target_s_rule_are_kept():
    engine = regression()
    engine.run(40)
    coreset = engine.problems["coreset"]
    assert coreset.selected().tolist() == [0, 2, 4, 6, 8, 10]
    found = engine.evaluate()
    assert found["coreset/kept"] - found["coreset/fractional"] >= 5  # the projection makes ones and zeros
    assert float(coreset.weights().detach().sum()) == pytest.approx(6.0, abs=1e-6)


def test_the_mean_over_batches_is_the_whole_loss():
    engine = regression(batch=3)
    coreset, training = engine.problems["coreset"], engine.problems["coreset_training"]
    coreset.module.weights.data.copy_(torch.linspace(0, 1, 12))
    data = training.data.dataset.dataset
    batches = [[*data[torch.arange(i, i + 3)], torch.arange(i, i + 3)] for i in range(0, 12, 3)]
    mean = torch.stack([training.loss(batch)["loss"] for batch in batches]).mean()
    x, y = data.tensors
    each = (training(x) - y).square()
    expected = (coreset.weights() * each).sum() / 6 + 0.05 * training.module[0].weight.square().sum()
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    "method", ["conjugate_gradient", "exact", {"method": "neumann", "terms": 300}, "unrolled"], ids=str
)
def test_methods_agree_with_the_reference(method):
    engine = regression(method, steps=300)
    engine.step()
    report = hypergradcheck(engine, rtol=1e-6)
    assert report.passed, str(report)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", available_methods())
def test_every_method_runs(method, dtype):
    engine = regression(method, steps=3, dtype=dtype, batch=4)
    start = engine.problems["coreset"].weights().detach().clone()
    engine.run(2)
    weights = engine.problems["coreset"].weights().detach()
    assert weights.dtype == dtype
    assert weights.min() >= 0
    assert float(weights.sum()) == pytest.approx(6.0, abs=1e-4)
    assert not torch.equal(weights, start)


def test_a_run_goes_on_from_a_file(tmp_path):
    whole, first, second = (regression(batch=5, steps=3) for _ in range(3))
    losses = [whole.step().losses for _ in range(6)]
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert [second.step().losses for _ in range(3)] == losses[3:]


@pytest.mark.parametrize("budget", [0, -1.0, 4.5, float("nan"), True])
def test_budgets_that_no_weights_meet_are_refused(budget):
    with pytest.raises(ConfigError, match="Coreset.budget must be"):
        Coreset(4, budget=budget)


def test_a_budget_of_all_keeps_all():
    coreset = Coreset(3, budget=3)
    assert coreset.selected().tolist() == [0, 1, 2]
    assert coreset.project((torch.tensor([5.0, -5.0, 0.0]),))[0].tolist() == [1.0, 1.0, 1.0]


def test_weights_for_examples_that_are_not_in_the_data_set_are_refused():
    engine = regression()
    training = engine.problems["coreset_training"]
    for indices, found in (
        ([0, 12], "has 12 examples, and a batch has the indices 0 to 12"),
        ([-1, 3], "has 12 examples, and a batch has the indices -1 to 3"),
        ([0.0, 1.0], "must be a tensor of integers, not torch.float32"),
    ):
        with pytest.raises(DataError, match=re.escape(found)):
            training.loss((torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), torch.tensor(indices)))


def test_a_coreset_of_more_examples_than_there_are_is_refused():
    data = Indexed(TensorDataset(torch.randn(20, 2), torch.randint(0, 2, (20,))))
    sgd = lambda params: torch.optim.SGD(params, lr=0.2)  # noqa: E731
    inner = CoresetTraining(nn.Linear(2, 2), data=DataLoader(data, batch_size=5), optimizer=sgd)
    outer = Coreset(100, budget=10, data=[(torch.randn(4, 2), torch.zeros(4).long())], optimizer=sgd)
    with pytest.raises(DataError, match="'coreset' has weights for 100 examples, and the data set .* has 20"):
        Engine([outer, inner], QUIET)


def test_batches_without_indices_are_refused():
    training = regression().problems["coreset_training"]
    with pytest.raises(DataError, match=r"needs batches \(inputs, targets, indices\), and got 2 parts.*Indexed"):
        training.loss((torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)))


def test_a_criterion_that_averages_is_refused():
    training = regression().problems["coreset_training"]
    training.criterion = lambda outputs, targets, reduction: (outputs - targets).mean()
    with pytest.raises(LossError, match="values for each of the 2 examples"):
        training.loss((torch.zeros(2, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), torch.tensor([0, 1])))


@pytest.mark.parametrize("count", [0, 13])
def test_more_examples_than_there_are_cannot_be_selected(count):
    with pytest.raises(ConfigError, match=r"selected\(\) takes 1 to 12 examples"):
        regression().problems["coreset"].selected(count)
