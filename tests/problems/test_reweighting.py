"""Per-example weights against their closed form, and on data whose labels are known to be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from bilevel import Engine, EngineConfig, Problem, hypergradcheck
from bilevel.data.indexed import Indexed
from bilevel.errors import ConfigError, DataError, GraphError, LossError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems.reweighting import ExampleWeights, Reweighted
from bilevel.problems.supervised import Validation
from tests.problems.labelled import blobs

DOUBLE = torch.float64
QUIET = EngineConfig(progress=False)
METHODS = [name for name in available_methods() if not name.startswith("betty:")]
SOLVERS = ("exact", "conjugate_gradient", {"method": "neumann", "terms": 200}, "gmres")
adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
sgd = lambda params: torch.optim.SGD(params, lr=0.8)  # noqa: E731


def cleaning(
    method: Any = "exact", dtype: torch.dtype = DOUBLE, steps: int = 300, lr: float = 0.1, **outer: Any
) -> Engine:
    x, y, _ = blobs(40, 0.4, seed=0, dtype=dtype)
    trusted = blobs(30, 0.0, seed=1, dtype=dtype)[:2]
    torch.manual_seed(0)
    weights = ExampleWeights(40, data=[trusted], optimizer=lambda params: torch.optim.Adam(params, lr=lr), **outer)
    weights.module.to(dtype)
    batch = (x, y, torch.arange(40))
    inner = Reweighted(nn.Linear(2, 3).to(dtype), weight_decay=0.5, data=[batch], optimizer=sgd, steps=steps)
    return Engine([weights, inner], QUIET, method)


def solved(method: Any, steps: int = 40, **outer: Any) -> Engine:
    """An engine with uneven weights, which stand still, and its inner problem solved as well as the steps can."""
    engine = cleaning(method, steps=steps, lr=0.0, **outer)
    with torch.no_grad():
        engine.problems["example_weights"].module.logits.copy_(torch.linspace(-2, 2, 40))
    engine.step()
    return engine


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_hypergradients_are_those_of_the_reference(method: Any, form: str) -> None:
    engine = solved(method, form=form)
    report = hypergradcheck(engine, rtol=1e-4)
    assert report.passed, str(report)
    assert report.hidden < 1e-3
    assert report.inner_distance < 1e-3


@pytest.mark.parametrize("reference", ["central_difference", "unrolled"])
def test_solving_again_gives_the_same(reference: str) -> None:
    engine = solved("exact")
    assert hypergradcheck(engine, reference=reference, rtol=1e-3, raise_on_failure=True).passed


def test_unrolled_updates_tend_to_the_reference() -> None:
    errors = []
    for steps in (2, 6, 18):
        engine = solved({"method": "unrolled"}, steps=steps)
        engine.problems["reweighted"].module.load_state_dict(solved("exact").problems["reweighted"].module.state_dict())
        engine.step()
        errors.append(hypergradcheck(engine).relative_error)
    assert errors[0] > 3 * errors[1] > 30 * errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_the_hypergradient_has_its_closed_form(form: str) -> None:
    """Ridge regression with n weights: w* = (Xᵀ S X/n + δ I)⁻¹ Xᵀ S y/n, differentiated as it stands."""
    generator = torch.Generator().manual_seed(0)
    X, V = (torch.randn(size, 4, generator=generator, dtype=DOUBLE) for size in (25, 15))
    y, u = (torch.randn(size, 1, generator=generator, dtype=DOUBLE) for size in (25, 15))
    delta = 0.3
    halved = lambda outputs, targets, reduction="mean": F.mse_loss(outputs, targets, reduction=reduction) / 2  # noqa: E731

    def solution(logits: torch.Tensor) -> torch.Tensor:
        s = logits.sigmoid() if form == "sigmoid" else 25 * logits.softmax(0)
        H = (X * s[:, None]).T @ X / 25 + delta * torch.eye(4, dtype=DOUBLE)
        return torch.linalg.solve(H, (X * s[:, None]).T @ y / 25)

    outer = ExampleWeights(25, form=form, data=[(V, u)], optimizer=adam)
    logits = torch.randn(25, generator=generator, dtype=DOUBLE)
    outer.module.to(DOUBLE)
    model = nn.Linear(4, 1, bias=False).double()
    inner = Reweighted(model, criterion=halved, weight_decay=delta, data=[(X, y, torch.arange(25))], optimizer=sgd)
    with torch.no_grad():
        outer.module.logits.copy_(logits)
        model.weight.copy_(solution(logits).T)
    logits.requires_grad_()
    (F.mse_loss(V @ solution(logits), u) / 2).backward()
    engine = Engine([outer, inner], QUIET, "conjugate_gradient")
    torch.testing.assert_close(engine.hypergradient().grad["logits"], logits.grad, rtol=1e-4, atol=1e-9)


def test_weights_are_what_their_form_says() -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    for form, expected in (("sigmoid", logits.sigmoid()), ("softmax", 7 * logits.softmax(0))):
        problem = ExampleWeights(7, form=form)
        with torch.no_grad():
            problem.module.logits.copy_(logits)
        torch.testing.assert_close(problem.weights(), expected)
        chosen = torch.tensor([4, 0, 4])
        torch.testing.assert_close(problem.weights(chosen), expected[chosen])
        found = problem.evaluate()
        assert found["mean_weight"] == pytest.approx(float(expected.mean()), rel=1e-6)
        assert found["effective_examples"] == pytest.approx(float(expected.sum() ** 2 / (expected**2).sum()), rel=1e-6)
    assert ExampleWeights(5, initial=0.2).evaluate() == pytest.approx({"mean_weight": 0.2, "effective_examples": 5})
    assert ExampleWeights(5, form="softmax").evaluate() == pytest.approx({"mean_weight": 1.0, "effective_examples": 5})


def test_batches_are_unbiased() -> None:
    """The mean over equal batches is the loss on all, whatever the weights."""
    engine = cleaning(form="softmax")
    with torch.no_grad():
        engine.problems["example_weights"].module.logits.normal_()
    inner = engine.problems["reweighted"]
    batch = inner.data[0]
    whole = inner.loss(batch)["loss"]
    parts = [inner.loss([part[start : start + 10] for part in batch])["loss"] for start in range(0, 40, 10)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_every_method_runs(method: str, dtype: torch.dtype) -> None:
    engine = cleaning(method, dtype, steps=3)
    before = engine.problems["example_weights"].weights().detach().clone()
    engine.step()
    engine.step()
    after = engine.problems["example_weights"].weights().detach()
    assert after.dtype == dtype
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("method", ["finite_difference", "conjugate_gradient", "neumann", "unrolled"])
def test_wrong_labels_lose_their_weight(method: str) -> None:
    engine = cleaning(method, steps=5)
    engine.run(30)
    _, given, right = blobs(40, 0.4, seed=0)
    wrong = given != right
    weights = engine.problems["example_weights"].weights().detach()
    assert float(weights[wrong].mean()) < 0.5 * float(weights[~wrong].mean())


def test_batches_of_a_loader_find_their_weights() -> None:
    """Shuffled batches of an indexed data set move the weights of their own examples only."""
    x, y, _ = blobs(40, 0.4, seed=0)
    outer = ExampleWeights(40, data=[blobs(30, 0.0, seed=1)[:2]], optimizer=lambda p: torch.optim.SGD(p, lr=10.0))
    outer.module.to(DOUBLE)
    loader = DataLoader(Indexed(TensorDataset(x, y)), batch_size=8, shuffle=True)
    inner = Reweighted(nn.Linear(2, 3).double(), data=loader, optimizer=sgd)
    engine = Engine([outer, inner], QUIET, "identity")
    engine.step()
    moved = outer.weights().detach() != 0.5
    assert int(moved.sum()) == 8


def test_saved_weights_come_back(tmp_path: Any) -> None:
    first, second = cleaning(steps=3), cleaning(steps=3)
    first.run(3)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert torch.equal(first.problems["example_weights"].weights(), second.problems["example_weights"].weights())
    assert first.step().losses == second.step().losses


def test_only_owned_parameters_decay() -> None:
    x, y, _ = blobs(40, 0.0, seed=0)
    outer = ExampleWeights(40, data=[(x, y)], optimizer=adam)
    outer.module.to(DOUBLE)
    batch = (x, y, torch.arange(40))
    losses = []
    for decay in (0.0, 2.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).double()
        inner = Reweighted(model, weight_decay=decay, params="1.*", data=[batch], optimizer=sgd)
        Engine([outer, inner], QUIET, "identity")
        losses.append(inner.loss(batch)["loss"])
    owned = sum(part.square().sum() for part in model[1].parameters())
    torch.testing.assert_close(losses[1] - losses[0], owned)


def test_losses_of_many_parts_are_averaged_by_example() -> None:
    """Token losses of shape (b, T): an example's loss is their mean, so that its weight is one number."""
    outer = ExampleWeights(6, data=[(torch.randn(2, 5), torch.zeros(2, 4, dtype=torch.long))], optimizer=adam)
    model = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4)))
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6, 4))
    inner = Reweighted(model, data=[(x, y, torch.arange(6))], optimizer=sgd)
    Engine([outer, inner], QUIET, "identity")
    value = inner.loss((x, y, torch.arange(6)))["loss"]
    torch.testing.assert_close(value, 0.5 * F.cross_entropy(model(x), y))


class Sharper(ExampleWeights):
    """Weights of a user's own: squared."""

    def weights(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        return super().weights(indices).square()


def test_weights_can_be_overridden() -> None:
    x, y, _ = blobs(40, 0.4, seed=0)
    outer = Sharper(40, data=[(x, y)], optimizer=adam)
    outer.module.to(DOUBLE)
    batch = (x, y, torch.arange(40))
    inner = Reweighted(nn.Linear(2, 3).double(), weight_decay=0.5, data=[batch], optimizer=sgd, steps=40)
    engine = Engine([outer, inner], QUIET, "exact")
    torch.testing.assert_close(inner.loss(batch)["loss"], 0.25 * F.cross_entropy(inner(x), y) + 0.25 * norm(inner))
    engine.step()
    assert hypergradcheck(engine, rtol=1e-4).passed


def norm(problem: Problem) -> torch.Tensor:
    return torch.stack([part.square().sum() for part in problem.parameters]).sum()


def engine_of(outer: Any, data: Any, **inner: Any) -> Engine:
    return Engine([outer, Reweighted(nn.Linear(2, 3), data=data, optimizer=sgd, **inner)], QUIET, "identity")


def test_weights_for_examples_that_are_not_there() -> None:
    x, y, _ = blobs(10, 0.0, seed=0, dtype=torch.float32)
    outer = lambda count: ExampleWeights(count, data=[(x, y)], optimizer=adam)  # noqa: E731
    with pytest.raises(DataError, match=r"has 8 examples, and a batch has the indices 0 to 9: .* not in the data set"):
        engine_of(outer(8), [(x, y, torch.arange(10))])
    with pytest.raises(DataError, match=r"indices -1 to 8"):
        engine_of(outer(10), [(x, y, torch.arange(10) - 1)])
    indexed = Indexed(TensorDataset(x, y))
    with pytest.raises(DataError, match=r"weights for 12 examples, .* has 10: examples that are not in the data set"):
        engine_of(outer(12), DataLoader(indexed))
    with pytest.raises(DataError, match=r"weights for 8 examples, .* has 10: some examples have none"):
        engine_of(outer(8), DataLoader(Subset(indexed, [1, 2])))
    engine_of(outer(10), DataLoader(Subset(indexed, [1, 9])))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: (x, y), r"needs batches \(inputs, targets, indices\), and got 2 parts: .*Indexed"),
        (lambda x, y: {"x": x}, r"got a dict"),
        (lambda x, y: (x, y, torch.arange(10.0)), r"must be a tensor of integers, not torch.float32"),
        (lambda x, y: (x, y, list(range(10))), r"must be a tensor of integers, not list"),
    ],
)
def test_batches_without_indices_are_refused(batch: Any, message: str) -> None:
    x, y, _ = blobs(10, 0.0, seed=0, dtype=torch.float32)
    with pytest.raises(DataError, match=message):
        engine_of(ExampleWeights(10, data=[(x, y)], optimizer=adam), [batch(x, y)])


def test_a_criterion_that_reduces_is_refused() -> None:
    x, y, _ = blobs(10, 0.0, seed=0, dtype=torch.float32)
    mean = lambda outputs, targets, reduction="mean": F.cross_entropy(outputs, targets)  # noqa: E731
    with pytest.raises(LossError, match=r"each of the 10 examples .* reduction='none'; it returned the shape \(\)"):
        engine_of(ExampleWeights(10, data=[(x, y)], optimizer=adam), [(x, y, torch.arange(10))], criterion=mean)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExampleWeights(0), ConfigError, r"ExampleWeights.num_examples must be an integer of at least 1"),
        (lambda: ExampleWeights(3, form="sigmod"), UnknownNameError, r"did you mean 'sigmoid'"),
        (lambda: ExampleWeights(3, initial=1.0), ConfigError, r"initial must be a weight between 0 and 1, not 1.0"),
        (lambda: ExampleWeights(3, initial=0.0), ConfigError, r"initial must be a finite number above 0"),
        (lambda: ExampleWeights(3, form="softmax", initial=0.1), ConfigError, r"drop initial=0.1"),
        (lambda: Reweighted(nn.Linear(2, 2), weight_decay=-1.0), ConfigError, r"reweighted.weight_decay must be"),
    ],
)
def test_settings_without_sense_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_engine_without_weights_says_so() -> None:
    x, y, _ = blobs(10, 0.0, seed=0, dtype=torch.float32)
    with pytest.raises(GraphError, match=r"'reweighted' works with a ExampleWeights, of which its engine has 0"):
        engine_of(Validation(nn.Linear(1, 1), data=[(x, y)], optimizer=adam), [(x, y, torch.arange(10))])
