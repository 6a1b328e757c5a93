"""Mixtures of sources: proportions from the target's loss, means that no batch's composition biases."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.data import BatchStream, shared_indices
from bilevel.errors import BilevelWarning, ConfigError, DataError, GraphError, LossError
from bilevel.hypergrad import available_methods
from bilevel.problems.mixture import BalancedBatches, DomainWeights, Mixture, Sources
from bilevel.problems.supervised import Training

QUIET = EngineConfig(progress=False)
DOUBLE = torch.float64


def numbers(shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def mean_square(outputs, targets, reduction="mean"):
    return F.mse_loss(outputs, targets, reduction=reduction)


def regression(method="conjugate_gradient", *, steps=200, dtype=DOUBLE, uniformity=0.0, temperature=1.0, decay=0.1):
    """Three linear sources and a target between them; ridge regression, so that the inner solution is known."""
    x, slopes = numbers((30, 2), dtype=dtype), numbers((3, 2), 1, dtype)
    sources = torch.arange(3).repeat(10)
    y = (x * slopes[sources]).sum(1, keepdim=True) + 0.1 * numbers((30, 1), 2, dtype)
    v = numbers((12, 2), 3, dtype)
    target = v @ (0.7 * slopes[0] + 0.3 * slopes[1])[:, None]
    adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    sgd = lambda params: torch.optim.SGD(params, lr=0.3)  # noqa: E731
    weights = DomainWeights(
        ["a", "b", "c"], data=[(v, target)], optimizer=adam, uniformity=uniformity, temperature=temperature
    )
    weights.module.to(dtype)
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).to(dtype)
    mixture = Mixture(
        model, criterion=mean_square, weight_decay=decay, data=[(x, y, sources)], optimizer=sgd, steps=steps
    )
    return Engine([weights, mixture], QUIET, method), (x, y, sources, v, target)


def solution(logits, data, decay=0.1, temperature=1.0):
    """The ridge regression's solution, as a function of the logits that autograd can differentiate."""
    x, y, sources, _, _ = data
    each = (logits / temperature).softmax(0)[sources] / 10
    H = 2 * x.T @ (each[:, None] * x) + decay * torch.eye(2, dtype=DOUBLE)
    return torch.linalg.solve(H, 2 * x.T @ (each[:, None] * y))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("uniformity", [0.0, 0.3])
def test_the_hypergradient_is_that_of_the_closed_form(uniformity, temperature):
    engine, data = regression("exact", uniformity=uniformity, temperature=temperature)
    engine.problems["domain_weights"].module.logits.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    engine.step()
    logits = engine.problems["domain_weights"].module.logits.detach().clone().requires_grad_()
    inner = solution(logits, data, temperature=temperature)
    engine.problems["mixture"].module.weight.data.copy_(inner.detach().T)
    _, _, _, v, target = data
    shares = (logits / temperature).softmax(0)
    value = F.mse_loss(v @ inner, target) + uniformity * (shares * (3 * shares).log()).sum()
    (expected,) = torch.autograd.grad(value, logits)
    found = engine.hypergradient().grad["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_documented_formula_compares_sources_by_one_number_each():
    engine, data = regression("exact")
    engine.step()
    x, y, sources, v, target = data
    weights, model = engine.problems["domain_weights"].weights().detach(), engine.problems["mixture"].module
    w = model.weight.detach().T.clone().requires_grad_()
    losses = torch.stack([F.mse_loss(x[sources == d] @ w, y[sources == d]) for d in range(3)])
    grads = torch.stack([torch.autograd.grad(one, w, retain_graph=True)[0].flatten() for one in losses])
    H = sum(weights[d] * 2 * x[sources == d].T @ x[sources == d] / 10 for d in range(3)) + 0.1 * torch.eye(
        2, dtype=DOUBLE
    )
    (outer,) = torch.autograd.grad(F.mse_loss(v @ w, target), w)
    c = -grads @ torch.linalg.solve(H, outer.flatten())
    expected = weights * (c - (weights * c).sum())
    torch.testing.assert_close(engine.hypergradient().grad["logits"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "method", ["conjugate_gradient", "exact", {"method": "neumann", "terms": 300}, {"method": "unrolled"}], ids=str
)
def test_methods_agree_with_the_reference(method):
    engine, _ = regression(method)
    engine.step()
    report = hypergradcheck(engine, rtol=1e-6)
    assert report.passed, str(report)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", available_methods())
def test_every_method_runs(method, dtype):
    engine, _ = regression(method, steps=3, dtype=dtype)
    for _ in range(2):
        engine.step()
    logits = engine.problems["domain_weights"].module.logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert logits.abs().max() > 0


def test_it_finds_the_sources_of_the_target_and_in_which_proportions():
    # With much data of each, the target's regression lies between those of the first two sources.
    engine, _ = regression(decay=1e-6, steps=10)
    engine.run(100)
    proportions = engine.problems["domain_weights"].proportions()
    assert proportions["c"] < 0.05
    assert 0.45 < proportions["a"] < 0.9
    assert engine.evaluate() == {f"domain_weights/{name}": share for name, share in proportions.items()}


def test_the_penalty_keeps_the_weights_near_uniform():
    found = []
    for uniformity in (0.0, 1.0, 100.0):
        engine, _ = regression(uniformity=uniformity, steps=10)
        engine.run(60)
        found.append(max(abs(share - 1 / 3) for share in engine.problems["domain_weights"].proportions().values()))
    assert found[0] > 2 * found[1] > 4 * found[2]


# Means over sources


def batches(rates=None, k=3):
    """A mixture whose model returns its inputs, so that the losses of a batch are given numbers."""
    adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    weights = DomainWeights(k, data=[(torch.zeros(1, 1), torch.zeros(1, 1))], optimizer=adam)
    weights.module.logits.data.copy_(torch.arange(float(k)) / 2)
    mixture = Mixture(nn.Linear(1, 1), criterion=lambda x, y, reduction="mean": x - y, rates=rates, optimizer=adam)
    for problem in (weights, mixture):
        problem.attach({"domain_weights": weights, "mixture": mixture})
    return weights, mixture


def test_losses_are_means_of_each_source_whatever_its_share_of_the_batch():
    weights, mixture = batches()
    losses, sources = torch.tensor([1.0, 3.0, 10.0, 5.0, 5.0, 8.0]), torch.tensor([0, 0, 1, 2, 2, 2])
    torch.testing.assert_close(mixture.source_losses(losses, sources), torch.tensor([2.0, 10.0, 6.0]))
    inputs = mixture.module(losses[:, None]).detach()
    expected = (weights.weights() * mixture.source_losses(inputs[:, 0], sources)).sum()
    result = mixture.loss((losses[:, None], torch.zeros(6, 1), sources))
    torch.testing.assert_close(result["loss"], expected)


def test_tokens_count_within_their_text():
    _, mixture = batches()
    losses, sources = torch.arange(12.0).view(3, 4), torch.tensor([2, 0, 1])
    torch.testing.assert_close(mixture.source_losses(losses, sources), losses.mean(1)[[1, 2, 0]])


def test_rates_make_any_composition_unbiased():
    # All batches of 3 examples, drawn with repetition from 5, each as likely as the other: most lack a source.
    sources, losses = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1.0, 2.0, 5.0, 7.0, 11.0], dtype=DOUBLE)
    _, mixture = batches(rates=[0.4, 0.2, 0.4])
    draws = [torch.tensor(draw) for draw in itertools.product(range(5), repeat=3)]
    mean = torch.stack([mixture.source_losses(losses[draw], sources[draw]) for draw in draws]).mean(0)
    torch.testing.assert_close(mean, torch.tensor([1.5, 5.0, 9.0], dtype=DOUBLE))


def test_gradients_in_a_source_that_is_missing_are_zero_and_finite():
    weights, mixture = batches(rates=dict.fromkeys("012", 1 / 3))
    value = mixture.loss((torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 2])))["loss"]
    grads = torch.autograd.grad(value, [weights.module.logits, *mixture.module.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_a_batch_that_lacks_a_source_is_refused_without_rates():
    _, mixture = batches()
    with pytest.raises(DataError, match=r"no example of 1, whose loss.*BalancedBatches.*rates=") as caught:
        mixture.source_losses(torch.ones(2), torch.tensor([0, 2]))
    assert "no example of 1," in str(caught.value)


@pytest.mark.parametrize("sources", [[0, 3], [-1, 0], [0.0, 1.0]])
def test_sources_that_have_no_weight_are_refused(sources):
    for rates in (None, [0.5, 0.25, 0.25]):
        _, mixture = batches(rates=rates)
        with pytest.raises(DataError, match=re.escape("integer in [0, 3)")):
            mixture.source_losses(torch.ones(2), torch.tensor(sources))


def test_a_criterion_that_averages_is_refused():
    _, mixture = batches()
    with pytest.raises(LossError, match="values for each of the 3 examples"):
        mixture.source_losses(torch.tensor(1.0), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DomainWeights(1), "DomainWeights.sources must be an integer of at least 2, not 1"),
        (lambda: DomainWeights(["web"]), "two sources or more; got web"),
        (lambda: DomainWeights(["web", "web"]), "different names; got web, web"),
        (lambda: DomainWeights(2, temperature=0.0), "temperature must be a finite number above 0"),
        (lambda: DomainWeights(2, uniformity=-1.0), "uniformity must be a finite number at least 0"),
        (lambda: Mixture(nn.Linear(1, 1), rates=[0.5, 0.6]), "must sum to 1, not to 1.1"),
        (lambda: Mixture(nn.Linear(1, 1), rates=[1.0, 0.0]), r"rates[1] must be a finite number above 0"),
        (lambda: Mixture(nn.Linear(1, 1), weight_decay=-1.0), "weight_decay must be"),
        (lambda: Sources({"web": TensorDataset(torch.zeros(1))}), "two sources or more; got web"),
        (lambda: BalancedBatches([0, 0], 1), "two sources or more"),
        (lambda: BalancedBatches([0, 1], 0), "per_source must be an integer of at least 1"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_rates_of_other_sources_are_refused():
    for rates in ({"0": 0.5, "1": 0.5}, [0.5, 0.5], {"0": 0.5, "1": 0.25, "x": 0.25}):
        _, mixture = batches(rates=rates)
        with pytest.raises(ConfigError, match="must be given for each of the sources 0, 1, 2"):
            mixture.source_losses(torch.ones(2), torch.tensor([0, 2]))


def test_a_mixture_without_weights_says_what_is_missing():
    adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    mixture = Mixture(nn.Linear(1, 1), optimizer=adam)
    mixture.attach({"mixture": mixture})
    with pytest.raises(GraphError, match="works with a DomainWeights"):
        mixture.loss((torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 1])))


# Batches from several sources


def three_sources():
    sizes = {"small": 3, "large": 10, "middle": 5}
    base = iter(range(100))
    return Sources(
        {
            name: TensorDataset(torch.tensor([next(base) for _ in range(size)]), torch.zeros(size))
            for name, size in sizes.items()
        }
    )


def test_sources_say_where_examples_come_from():
    sources = three_sources()
    assert len(sources) == 18
    assert [int(sources[i][0]) for i in range(18)] == list(range(18))
    assert [sources[i][2] for i in (0, 2, 3, 12, 13, 17)] == [0, 0, 1, 1, 2, 2]
    assert (int(sources[-1][0]), sources[-1][2]) == (17, 2)
    assert sources.rates() == {"small": 3 / 18, "large": 10 / 18, "middle": 5 / 18}
    with pytest.raises(DataError, match="sources without examples: b"):
        Sources({"a": TensorDataset(torch.zeros(1)), "b": TensorDataset(torch.zeros(0))})


def test_a_target_that_a_source_holds_is_warned_about():
    first, second = (TensorDataset(torch.randn(12, 1), torch.randn(12, 1)) for _ in range(2))
    sources = Sources({"a": first, "b": second})
    assert shared_indices(Subset(first, range(8)), sources) == list(range(8))
    assert shared_indices(Subset(second, range(3)), Subset(sources, range(14))) == [0, 1]
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    target = DataLoader(Subset(first, range(8)), batch_size=4)
    for loader in (
        DataLoader(sources, batch_sampler=BalancedBatches(sources.ids, 2)),
        DataLoader(sources, batch_size=24),
    ):
        mixture = Mixture(nn.Linear(1, 1), criterion=mean_square, data=loader, optimizer=sgd)
        with pytest.warns(BilevelWarning, match="'domain_weights' and 'mixture' draw the same examples, 8 of them"):
            Engine([DomainWeights(["a", "b"], data=target, optimizer=sgd), mixture], QUIET, "identity")


def test_balanced_batches_hold_every_source_and_show_the_largest_once():
    sources = three_sources()
    batches = list(DataLoader(sources, batch_sampler=BalancedBatches(sources.ids, 2)))
    assert len(batches) == len(BalancedBatches(sources.ids, 2)) == 5
    for _, _, ids in batches:
        assert ids.bincount().tolist() == [2, 2, 2]
    seen = torch.cat([inputs for inputs, _, _ in batches])
    assert seen[(seen >= 3) & (seen < 13)].sort().values.tolist() == list(range(3, 13))
    counts = seen[seen < 3].bincount()
    assert counts.max() - counts.min() <= 1  # the small one's rounds are whole ones


def test_the_order_is_new_each_epoch_and_follows_the_generator():
    ids = three_sources().ids
    same, other = (BalancedBatches(ids, 2, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    first, second = list(same), list(same)
    assert first != second
    assert [list(other), list(other)] == [first, second]


def test_a_source_number_that_no_example_has_is_an_error():
    with pytest.raises(DataError, match=r"sources \[1\] of 3 have no examples"):
        BalancedBatches([0, 2], 1)


@pytest.mark.parametrize("own", [False, True])
def test_a_position_among_balanced_batches_is_restored(own):
    def stream():
        sources = three_sources()
        generator = torch.Generator().manual_seed(3) if own else None
        sampler = BalancedBatches(sources.ids, 2, generator=generator)
        return BatchStream(DataLoader(sources, batch_sampler=sampler), "mixture", 0)

    first, second = stream(), stream()
    for _ in range(7):  # into the second epoch
        first.next()
    second.load_state_dict(first.state_dict())
    for _ in range(8):
        assert torch.equal(first.next()[0], second.next()[0])


def test_proportions_become_sampling_rates():
    sources = three_sources()
    wanted = {"small": 0.6, "large": 0.3, "middle": 0.1}
    weights = sources.example_weights(wanted)
    totals = torch.zeros(3, dtype=DOUBLE).index_add(0, sources.ids, weights)
    torch.testing.assert_close(totals, torch.tensor([0.6, 0.3, 0.1], dtype=DOUBLE))
    torch.manual_seed(0)
    drawn = sources.ids[torch.tensor(list(WeightedRandomSampler(weights, 4000)))].bincount() / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.6, 0.3, 0.1]), atol=5 * math.sqrt(0.25 / 4000), rtol=0)
    with pytest.raises(ConfigError, match="proportions must be given for each of the sources small, large, middle"):
        sources.example_weights({"small": 1.0})
    with pytest.raises(ConfigError, match="proportions.large must be a finite number at least 0"):
        sources.example_weights(wanted | {"large": -0.1})


def test_a_run_goes_on_from_a_file(tmp_path):
    def engine():
        sources = three_sources()
        loader = DataLoader(sources, batch_sampler=BalancedBatches(sources.ids, 2))
        adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
        weights = DomainWeights(sources.names, data=[(torch.tensor([4.0]), torch.tensor([1.0]))], optimizer=adam)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1), nn.Flatten(0))
        reads = Reads(model, criterion=mean_square, data=loader, optimizer=adam, steps=2)
        return Engine([weights, reads], QUIET, "identity")

    whole, first, second = engine(), engine(), engine()
    losses = [whole.step().losses for _ in range(6)]
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert [second.step().losses for _ in range(3)] == losses[3:]


class Reads(Mixture):
    """Subclassing: inputs are made numbers of another kind before the model sees them."""

    def loss(self, batch):
        inputs, targets, sources = batch
        return super().loss((inputs.float() / 10, targets, sources))


def test_a_language_model_s_outputs_need_nothing_special():
    """Classes in the second dimension and tokens in the third, as the cross-entropy wants them."""
    adam = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (12, 7))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), Transposed())
    weights = DomainWeights(2, data=[(inputs[:4], targets[:4])], optimizer=adam)
    mixture = Mixture(model, data=[(inputs, targets, torch.arange(12) % 2)], optimizer=adam, steps=2)
    assert isinstance(mixture, Training)
    engine = Engine([weights, mixture], QUIET, "identity")
    engine.run(2)
    losses = F.cross_entropy(model(inputs), targets, reduction="none").mean(1)
    expected = (weights.weights() * torch.stack([losses[0::2].mean(), losses[1::2].mean()])).sum()
    torch.testing.assert_close(mixture.loss((inputs, targets, torch.arange(12) % 2))["loss"], expected)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)
