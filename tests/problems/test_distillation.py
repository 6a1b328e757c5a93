"""Distillation: synthetic examples as parameters, training that starts again, and derivatives through it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.errors import ConfigError, DataError, GraphError, ParameterError
from bilevel.hypergrad import available_methods
from bilevel.problems.distillation import Distillation, DistilledTraining, SyntheticSet, redraw

QUIET = EngineConfig(progress=False)
DOUBLE = torch.float64


def real(dtype=DOUBLE):
    """Two classes of points in three dimensions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
    y = torch.arange(40) % 2
    x[:, 0] += 2.0 * (2 * y - 1)
    return x.to(dtype), y


def engine(method="unrolled", *, dtype=DOUBLE, per_class=1, steps=5, soft=True, rate=True, bounds=None, **settings):
    x, y = real(dtype)
    generator = torch.Generator().manual_seed(1)
    synthetic = SyntheticSet.sample(
        x, y, per_class, generator=generator, learn_targets=soft, num_classes=2, learn_rate=rate
    )
    adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    sgd = lambda params: torch.optim.SGD(params, lr=0.4)  # noqa: E731
    outer = Distillation(synthetic, data=[(x, y)], optimizer=adam, bounds=bounds)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    return Engine([outer, DistilledTraining(model, optimizer=sgd, steps=steps, **settings)], QUIET, method)


def by_hand(synthetic, start, *, steps=5, learning_rate=0.4, decay=0.0, momentum=0.0):
    """Returns the real examples' loss after gradient descent on the synthetic ones, with its graph."""
    inputs, logits, log_rate = synthetic
    w, b = start
    speed = [torch.zeros_like(part) for part in (w, b)]
    for _ in range(steps):
        value = -(logits.softmax(1) * F.linear(inputs, w, b).log_softmax(1)).sum(1).mean()
        value = value + decay / 2 * (w.square().sum() + b.square().sum())
        grads = torch.autograd.grad(value, (w, b), create_graph=True)
        speed = [momentum * old + log_rate.exp() * grad for old, grad in zip(speed, grads, strict=True)]
        w, b = w - learning_rate * speed[0], b - learning_rate * speed[1]
    x, y = real()
    return F.cross_entropy(F.linear(x, w, b), y)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unrolled_is_the_derivative_of_the_written_out_descent_with_a_learned_rate(momentum):
    run = engine(weight_decay=0.05)
    training, outer = run.problems["distilled_training"], run.problems["distillation"]
    for group in training.optimizer.param_groups:
        group["momentum"] = momentum
    outer.module.log_rate.data.fill_(0.3)
    start = [p.detach().clone().requires_grad_() for p in training.module.parameters()]
    variables = [p.detach().clone().requires_grad_() for p in outer.parameters]
    order = dict(zip(outer.parameter_names, variables, strict=True))
    value = by_hand((order["inputs"], order["targets"], order["log_rate"]), start, decay=0.05, momentum=momentum)
    expected = dict(zip(order, torch.autograd.grad(value, variables), strict=True))
    seen = {}
    outer.update = lambda gradients, values: seen.update(zip(outer.parameter_names, gradients, strict=True))
    result = run.step()
    assert result.losses["distillation"] == pytest.approx(float(value.detach()), rel=1e-12)
    for name, grad in expected.items():
        assert float(grad.norm()) > 1e-4
        torch.testing.assert_close(seen[name], grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "method",
    ["conjugate_gradient", "exact", {"method": "neumann", "terms": 400, "step_size": 0.5}, "unrolled"],
    ids=str,
)
def test_methods_agree_with_the_reference(method):
    # Regularised and solved, so that all of them differentiate the same thing.
    run = engine(method, per_class=2, steps=400, rate=False, weight_decay=0.1)
    run.step()
    report = hypergradcheck(run, rtol=1e-6)
    assert report.passed, str(report)


def test_at_the_solution_the_rate_has_no_derivative_and_unrolled_has_one_before_it():
    for method, steps in (("conjugate_gradient", 400), ("unrolled", 3)):
        run = engine(method, steps=steps, weight_decay=0.1)
        run.problems["distillation"].optimizer.param_groups[0]["lr"] = 0.0  # and so stays at the solution
        run.step()
        grad = run.hypergradient().grad
        assert (abs(float(grad["log_rate"])) < 1e-8) == (method == "conjugate_gradient")
        assert float(grad["inputs"].norm()) > 1e-3


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", available_methods())
def test_every_method_runs(method, dtype):
    run = engine(method, dtype=dtype, rate=False, steps=3, weight_decay=0.1, initialize=redraw)
    before = [p.detach().clone() for p in run.problems["distillation"].parameters]
    run.run(2)
    for old, new in zip(before, run.problems["distillation"].parameters, strict=True):
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_few_distilled_examples_beat_the_real_ones_that_they_started_from():
    run = engine(initialize=redraw)
    start = run.problems["distillation"].module.examples()
    run.run(60)
    synthetic = run.problems["distillation"].module
    losses = []
    for (inputs, targets), rate in ((start, 1.0), (synthetic.examples(), float(synthetic.rate().detach()))):
        torch.manual_seed(5)
        model = nn.Linear(3, 2, dtype=DOUBLE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.4 * rate)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        x, y = real()
        losses.append(float(F.cross_entropy(model(x), y).detach()))
    assert losses[1] < 0.5 * losses[0]


# Where the training starts


def started(run):
    """Runs a step and returns where its training started."""
    training = run.problems["distilled_training"]
    seen, loss = [], training.loss
    training.loss = lambda batch: (
        seen.append([p.detach().clone() for p in training.module.parameters()]) or loss(batch)  # type: ignore[func-returns-value]
    )
    run.step()
    del training.loss
    return torch.cat([part.flatten() for part in seen[0]])


def test_the_training_starts_at_the_same_values_each_time():
    run = engine()
    first = torch.cat([p.detach().flatten().clone() for p in run.problems["distilled_training"].parameters])
    for _ in range(3):
        torch.testing.assert_close(started(run), first, rtol=0, atol=0)


def test_new_initial_values_follow_from_the_seed_and_the_updates_made_alone():
    runs = [engine(initialize=redraw, seed=seed) for seed in (3, 3, 4)]
    starts = []
    for place, run in enumerate(runs):
        torch.manual_seed(place)  # whatever else draws
        starts.append([started(run) for _ in range(3)])
    for one, other in zip(starts[0], starts[1], strict=True):
        assert torch.equal(one, other)
    drawn = [*starts[0], *starts[2]]
    assert all(not torch.equal(one, other) for place, one in enumerate(drawn) for other in drawn[:place])


def test_drawing_initial_values_leaves_the_generators_alone():
    run = engine(initialize=redraw)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run.problems["distilled_training"].restart()
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_that_the_problem_does_not_own_stay():
    run = engine()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE))
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    training = DistilledTraining(model, params="1.*", initialize=redraw, optimizer=sgd)
    Engine([run.problems["distillation"], training], QUIET, "unrolled")
    body, head = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    training.restart()
    assert torch.equal(model[0].weight, body)
    assert not torch.equal(model[1].weight, head)


def test_layers_that_cannot_be_drawn_anew_are_named():
    model = nn.Sequential(nn.Linear(2, 2), Bare())
    with pytest.raises(ParameterError, match=r"Bare '1' has parameters but no reset_parameters"):
        redraw(model)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("method", ["unrolled", "conjugate_gradient"])
def test_a_run_goes_on_from_a_file(method, tmp_path):
    whole, first, second = (engine(method, initialize=redraw, weight_decay=0.1) for _ in range(3))
    losses = [whole.step().losses for _ in range(6)]
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state")
    torch.manual_seed(99)
    second.load(tmp_path / "state")
    assert [second.step().losses for _ in range(3)] == losses[3:]


def test_a_step_that_failed_starts_at_the_same_values_again():
    run, other = engine(initialize=redraw), engine(initialize=redraw)
    expected = started(other)
    outer = run.problems["distillation"]
    outer.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.step()
    del outer.loss
    assert torch.equal(started(run), expected)


# The synthetic examples


def test_they_start_at_distinct_real_examples_of_each_class():
    x, y = real()
    synthetic = SyntheticSet.sample(x, y, 5, generator=torch.Generator().manual_seed(0))
    inputs, labels = synthetic.examples()
    assert labels.tolist() == [0] * 5 + [1] * 5
    places = [(x == one).all(1).nonzero().item() for one in inputs]
    assert len(set(places)) == 10
    assert y[places].tolist() == labels.tolist()
    assert [name for name, _ in synthetic.named_parameters()] == ["inputs"]
    assert synthetic.rate() == 1.0


def test_soft_labels_start_near_their_classes_and_sum_to_one():
    synthetic = SyntheticSet(torch.zeros(3, 2), torch.tensor([0, 3, 1]), learn_targets=True)
    labels = synthetic.labels()
    assert labels.shape == (3, 4)
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    torch.testing.assert_close(labels.gather(1, torch.tensor([[0], [3], [1]])), torch.full((3, 1), 0.9))


def test_real_targets_are_learned_as_they_are():
    synthetic = SyntheticSet(torch.zeros(3, 2), torch.tensor([[0.5], [1.0], [-2.0]]), learn_targets=True)
    assert torch.equal(synthetic.labels(), torch.tensor([[0.5], [1.0], [-2.0]]))
    assert {name for name, _ in synthetic.named_parameters()} == {"inputs", "targets"}


def test_inputs_stay_within_their_bounds_and_nothing_else_is_clamped():
    run = engine(bounds=(-0.5, 0.5))
    run.run(5)
    synthetic = run.problems["distillation"].module
    assert synthetic.inputs.detach().abs().max() == 0.5
    assert synthetic.targets.detach().abs().max() > 1
    assert not engine().problems["distillation"].projects


def test_batches_are_of_indices():
    run = engine(per_class=2)
    training, synthetic = run.problems["distilled_training"], run.problems["distillation"].module
    inputs, labels = synthetic.examples()
    found = training.loss(torch.tensor([3, 0]))["loss"]
    torch.testing.assert_close(found, F.cross_entropy(training(inputs[[3, 0]]), labels[[3, 0]]))
    for batch in ([4], [-1], [0.0], []):
        with pytest.raises(DataError, match=re.escape("4 synthetic examples, in [0, 4)")):
            training.loss(torch.tensor(batch))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SyntheticSet.sample(*real(), 21), DataError, "class 0 has 20: lower per_class"),
        (lambda: SyntheticSet.sample(*real(), 0), ConfigError, "per_class must be an integer of at least 1"),
        (lambda: SyntheticSet(torch.zeros(2, 1), torch.zeros(3)), DataError, "2 inputs and 3 targets"),
        (
            lambda: SyntheticSet(torch.zeros(2, 1).byte(), torch.zeros(2)),
            DataError,
            "floating-point numbers, not torch.u",
        ),
        (lambda: SyntheticSet(torch.zeros(0, 1), torch.zeros(0)), DataError, "0 inputs and 0 targets"),
        (
            lambda: SyntheticSet(torch.zeros(2, 1), torch.tensor([0, 5]), learn_targets=True, num_classes=5),
            DataError,
            "in [0, 5)",
        ),
        (
            lambda: SyntheticSet(torch.zeros(2, 1), torch.tensor([0, 0]), learn_targets=True),
            ConfigError,
            "num_classes must be an integer of at least 2",
        ),
        (lambda: Distillation(nn.Linear(1, 1)), ParameterError, "learns a SyntheticSet, not a Linear"),
        (
            lambda: Distillation(SyntheticSet(torch.zeros(1, 1), torch.zeros(1)), bounds=(1.0, 0.0)),
            ConfigError,
            "bounds[1] must be a finite number above 1",
        ),
        (
            lambda: DistilledTraining(nn.Linear(1, 1), initialize=redraw, reset=None),
            ConfigError,
            "leave reset out, or initialize",
        ),
        (lambda: DistilledTraining(nn.Linear(1, 1), seed=-1), ConfigError, "seed must be an integer of at least 0"),
    ],
)
def test_settings_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_a_training_without_synthetic_examples_says_what_is_missing():
    training = DistilledTraining(nn.Linear(1, 1))
    training.attach({"distilled_training": training})
    with pytest.raises(GraphError, match="works with a Distillation"):
        training.loss(None)
