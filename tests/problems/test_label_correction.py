"""Learned labels: where they start, how they move, and what their hypergradient is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.data.indexed import Indexed
from bilevel.errors import ConfigError, DataError, GraphError
from bilevel.hypergrad import available_methods
from bilevel.problems.label_correction import Relabelled, SoftLabels
from bilevel.problems.supervised import Validation
from tests.problems.labelled import blobs

DOUBLE = torch.float64
QUIET = EngineConfig(progress=False)
METHODS = [name for name in available_methods() if not name.startswith("betty:")]


def correcting(
    method: Any = "exact", dtype: torch.dtype = DOUBLE, steps: int = 40, lr: float = 0.1, **outer: Any
) -> Engine:
    x, y, _ = blobs(40, 0.4, seed=0, dtype=dtype)
    torch.manual_seed(0)
    trusted = blobs(30, 0.0, seed=1, dtype=dtype)[:2]
    labels = SoftLabels(y, 3, data=[trusted], optimizer=lambda params: torch.optim.Adam(params, lr=lr), **outer)
    labels.module.to(dtype)
    model = nn.Linear(2, 3).to(dtype)
    batch = (x, y, torch.arange(40))
    sgd = lambda params: torch.optim.SGD(params, lr=0.4)  # noqa: E731
    return Engine(
        [labels, Relabelled(model, weight_decay=0.5, data=[batch], optimizer=sgd, steps=steps)], QUIET, method
    )


def solved(method: Any) -> Engine:
    engine = correcting(method, lr=0.0)
    with torch.no_grad():
        engine.problems["soft_labels"].module.logits.add_(torch.linspace(-2, 2, 120).reshape(40, 3))
    engine.step()
    return engine


SOLVERS = ("exact", "conjugate_gradient", {"method": "neumann", "terms": 200})


@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_hypergradients_are_those_of_the_reference(method: Any) -> None:
    report = hypergradcheck(solved(method), rtol=1e-4)
    assert report.passed, str(report)
    assert report.hidden < 1e-3


@pytest.mark.parametrize("reference", ["central_difference", "unrolled"])
def test_solving_again_gives_the_same(reference: str) -> None:
    assert hypergradcheck(solved("exact"), reference=reference, rtol=1e-3, raise_on_failure=True).passed


def test_unrolled_updates_tend_to_the_reference() -> None:
    errors = []
    for steps in (2, 6, 18):
        engine = correcting("unrolled", steps=steps, lr=0.0)
        engine.problems["relabelled"].module.load_state_dict(solved("exact").problems["relabelled"].module.state_dict())
        engine.step()
        errors.append(hypergradcheck(engine).relative_error)
    assert errors[0] > 2 * errors[1] > 10 * errors[2]
    assert errors[2] < 0.05


def test_the_inner_loss_is_linear_in_the_labels() -> None:
    """So that ``dF/dp`` is ``−⟨∂ℓ(·, class)/∂w, q⟩/n``, and the softmax's derivative takes it to λ."""
    engine = solved("exact")
    labels, inner = engine.problems["soft_labels"], engine.problems["relabelled"]
    x, y = labels.data[0]
    parameters = inner.parameters
    outer = torch.autograd.grad(F.cross_entropy(inner(x), y), parameters)
    v = torch.cat([part.flatten() for part in outer])
    batch = inner.data[0]
    gradient = torch.autograd.grad(inner.loss(batch)["loss"], parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    H = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    q = torch.linalg.solve(H, v)
    slopes = torch.zeros(40, 3, dtype=DOUBLE)
    for example in range(40):
        for label in range(3):
            loss = F.cross_entropy(inner(batch[0][example : example + 1]), torch.tensor([label]))
            each = torch.autograd.grad(loss, parameters)
            slopes[example, label] = -torch.cat([part.flatten() for part in each]) @ q / 40
    p = labels.probabilities().detach()
    expected = p * (slopes - (p * slopes).sum(1, keepdim=True))
    torch.testing.assert_close(engine.hypergradient().grad["logits"], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("confidence", [0.4, 0.9, 0.999])
def test_labels_start_at_what_was_given(confidence: float) -> None:
    given = torch.tensor([2, 0, 1, 1])
    labels = SoftLabels(given, 3, confidence=confidence)
    probabilities = labels.probabilities().detach()
    torch.testing.assert_close(probabilities.gather(1, given[:, None]), torch.full((4, 1), confidence))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    assert torch.equal(labels.corrected(), given)
    assert labels.evaluate() == pytest.approx({"changed": 0.0, "confidence": confidence}, rel=1e-5)
    with torch.no_grad():
        labels.module.logits[1] = torch.tensor([0.0, 20.0, 0.0])
    assert labels.corrected().tolist() == [2, 1, 1, 1]
    assert labels.evaluate()["changed"] == 0.25


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_every_method_runs(method: str, dtype: torch.dtype) -> None:
    engine = correcting(method, dtype, steps=3)
    labels = engine.problems["soft_labels"]
    before = labels.probabilities().detach().clone()
    engine.step()
    engine.step()
    after = labels.probabilities().detach()
    assert after.dtype == dtype
    assert bool(after.isfinite().all())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("method", ["finite_difference", "conjugate_gradient", "unrolled"])
def test_wrong_labels_are_corrected(method: str) -> None:
    engine = correcting(method, steps=5)
    right = blobs(40, 0.4, seed=0)[2]
    labels = engine.problems["soft_labels"]
    before = float((labels.given == right).float().mean())
    engine.run(60)
    after = float((labels.corrected() == right).float().mean())
    assert before < 0.7
    assert after > before + 0.2


def test_the_batchs_own_targets_are_not_looked_at() -> None:
    engine = correcting()
    inner = engine.problems["relabelled"]
    x, y, indices = inner.data[0]
    one, other = (inner.loss((x, targets, indices))["loss"] for targets in (y, torch.zeros_like(y)))
    assert torch.equal(one, other)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inner.loss((x[shuffled], y, indices[shuffled]))["loss"], one)


def test_saved_labels_come_back(tmp_path: Any) -> None:
    first, second = correcting(steps=3), correcting(steps=3)
    first.run(3)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert torch.equal(first.problems["soft_labels"].probabilities(), second.problems["soft_labels"].probabilities())
    assert first.step().losses == second.step().losses


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SoftLabels(torch.tensor([0, 1]), 1), ConfigError, r"SoftLabels.num_classes must be an integer of at"),
        (lambda: SoftLabels(torch.tensor([0, 3]), 3), DataError, r"classes from 0 to 2, and are from 0 to 3"),
        (lambda: SoftLabels(torch.tensor([-1, 0]), 3), DataError, r"classes from 0 to 2, and are from -1 to 0"),
        (lambda: SoftLabels(torch.tensor([0.0, 1.0]), 3), DataError, r"integers of shape \(n,\), not torch.float32"),
        (lambda: SoftLabels(torch.zeros(2, 2, dtype=torch.long), 3), DataError, r"of shape \(2, 2\)"),
        (lambda: SoftLabels(torch.zeros(0, dtype=torch.long), 3), DataError, r"of shape \(0,\)"),
        (lambda: SoftLabels(torch.tensor([0]), 4, confidence=0.25), ConfigError, r"a finite number above 0.25"),
        (lambda: SoftLabels(torch.tensor([0]), 4, confidence=1.0), ConfigError, r"a probability below 1, not 1.0"),
        (lambda: Relabelled(nn.Linear(1, 2), weight_decay=-1.0), ConfigError, r"relabelled.weight_decay must be"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_labels_for_examples_that_are_not_there() -> None:
    x, y, _ = blobs(10, 0.0, seed=0, dtype=torch.float32)
    adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731

    def engine(labels: torch.Tensor, data: Any) -> Engine:
        outer = SoftLabels(labels, 3, data=[(x, y)], optimizer=adam)
        return Engine([outer, Relabelled(nn.Linear(2, 3), data=data, optimizer=adam)], QUIET, "identity")

    with pytest.raises(DataError, match=r"has 8 examples, and a batch has the indices 0 to 9"):
        engine(y[:8], [(x, y, torch.arange(10))])
    with pytest.raises(DataError, match=r"labels for 8 examples, .* has 10: some examples have none"):
        engine(y[:8], DataLoader(Indexed(TensorDataset(x, y))))
    with pytest.raises(DataError, match=r"needs batches \(inputs, targets, indices\)"):
        engine(y, [(x, y)])
    outer = Validation(nn.Linear(1, 1), data=[(x, y)], optimizer=adam)
    with pytest.raises(GraphError, match=r"'relabelled' works with a SoftLabels"):
        Engine([outer, Relabelled(nn.Linear(2, 3), data=[(x, y, y)], optimizer=adam)], QUIET, "identity")
