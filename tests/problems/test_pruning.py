"""Pruning: masks against their formulas, their hypergradient, and what is left after the cut."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from bilevel import Engine, EngineConfig, OneStep, hypergradcheck
from bilevel.errors import BilevelWarning, ConfigError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems.pruning import (
    Mask,
    MaskedTraining,
    Pruning,
    ScoreMask,
    ThresholdMask,
    magnitude,
    mask_weights,
    prune,
    sparsity,
)

DOUBLE = torch.float64
QUIET = EngineConfig(progress=False)
adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
MASKS = {
    "threshold": lambda w: ThresholdMask(w, temperature=0.5),
    "threshold_unit": lambda w: ThresholdMask(w, per="unit", start=0.3, temperature=0.5),
    "score": lambda w: ScoreMask(w, temperature=0.5),
    "score_unit": lambda w: ScoreMask(w, per="unit", start=0.3, temperature=0.5),
}


def blobs(count: int, seed: int, dtype: torch.dtype = DOUBLE) -> Any:
    """Three classes in the plane, and two features that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    angle = y * 2 * torch.pi / 3
    x = torch.randn(count, 4, generator=generator) / 2
    x[:, :2] += torch.stack([angle.cos(), angle.sin()], 1)
    return x.to(dtype), y


def network(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def pruning(
    method: Any = "exact", mask: str = "threshold", dtype: torch.dtype = DOUBLE, density: float = 0.3, **inner: Any
) -> Engine:
    masked = mask_weights(network(dtype), MASKS[mask])
    outer = Pruning(masked, density=density, optimizer=adam, data=[blobs(30, 1, dtype)])
    training = MaskedTraining(
        masked, **{"optimizer": sgd, "data": [blobs(40, 2, dtype)], "weight_decay": 0.05, **inner}
    )
    return Engine([outer, training], QUIET, method)


@functools.cache
def solution(mask: str) -> dict[str, Any]:
    inner = pruning(mask=mask).problems["masked_training"]
    solver = torch.optim.LBFGS(
        inner.parameters, max_iter=300, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = inner.loss(inner.data[0])["loss"]
        loss.backward()
        return loss

    for _ in range(4):
        solver.step(closure)
    return {name: value.clone() for name, value in inner.module.state_dict().items()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", ["exact", "conjugate_gradient", "gmres"])
def test_hypergradients_are_those_of_the_reference(method: str, mask: str) -> None:
    engine = pruning(method, mask)
    engine.problems["masked_training"].module.load_state_dict(solution(mask))
    report = hypergradcheck(engine, rtol=1e-4)
    assert report.passed, str(report)
    assert report.hidden < 1e-3
    assert report.asymmetry < 1e-8
    assert report.inner_distance < 1e-3


@pytest.mark.parametrize("mask", MASKS)
def test_solving_again_gives_the_same(mask: str) -> None:
    engine = pruning("exact", mask)
    engine.problems["masked_training"].module.load_state_dict(solution(mask))
    hypergradcheck(engine, reference="central_difference", rtol=1e-3, raise_on_failure=True)


def test_unrolled_updates_tend_to_the_reference() -> None:
    errors = []
    for steps in (5, 40, 160):
        engine = pruning("unrolled", steps=steps)
        engine.problems["masked_training"].module.load_state_dict(solution("threshold"))
        engine.problems["pruning"].optimizer.param_groups[0]["lr"] = 0.0
        engine.step()
        errors.append(hypergradcheck(engine).relative_error)
    assert errors[2] < 0.7 * errors[1] < 0.5 * errors[0]


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", available_methods())
def test_every_method_prunes(method: str, dtype: torch.dtype) -> None:
    engine = pruning(method, dtype=dtype, optimizer=lambda params: torch.optim.SGD(params, lr=0.01))
    before = [p.detach().clone() for p in engine.problems["pruning"].parameters]
    for _ in range(2):
        engine.step()
    for start, end in zip(before, engine.problems["pruning"].parameters, strict=True):
        assert end.dtype == dtype
        assert not torch.equal(start, end)


def test_masks_are_their_formulas() -> None:
    w = torch.linspace(-2, 2, 9, dtype=DOUBLE).view(3, 3)
    layer = ThresholdMask(w, start=0.7, temperature=0.3)
    torch.testing.assert_close(layer(w), w * torch.sigmoid((w**2 / 0.7**2 - 1) / 0.3))
    unit = ThresholdMask(w, per="unit", start=0.7)
    with torch.no_grad():
        unit.log_threshold.copy_(torch.tensor([[0.1], [0.2], [0.3]]))
    assert torch.equal(unit.values(w) > 0.5, w.abs() > torch.tensor([[0.1], [0.2], [0.3]], dtype=DOUBLE).exp())
    score = ScoreMask(w + 0.1, start=0.5, temperature=0.3)
    s = ((w + 0.1).abs() / 0.5).log().clamp(-1, 1)
    torch.testing.assert_close(score(w), w * torch.sigmoid(s / 0.3))
    row = ScoreMask(w + 0.1, per="unit", start=1.0).scores
    torch.testing.assert_close(row, (w + 0.1).square().mean(1, keepdim=True).sqrt().log().clamp(-1, 1))
    median = ThresholdMask(w + 0.1).threshold()
    torch.testing.assert_close(median.flatten(), (w + 0.1).abs().median()[None])


def test_a_cold_mask_is_the_choice() -> None:
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mask = ThresholdMask(w, start=0.5)
    mask.temperature = 1e-6
    torch.testing.assert_close(mask(w), w * (w.abs() > 0.5))


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_weight_has_two_derivatives_where_it_is_zero(mask: str) -> None:
    start = torch.tensor([[0.0, 0.2], [-0.5, 1.0]], dtype=DOUBLE)
    made = MASKS[mask](start + 0.3)
    assert torch.autograd.gradcheck(made, start.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(made, start.clone().requires_grad_())


@pytest.mark.parametrize("kind", [ThresholdMask, ScoreMask])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_search_starts_from_magnitude_pruning(kind: Any, share: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    expected = copy.deepcopy(plain)
    pairs = [(expected[0], "weight"), (expected[3], "weight")]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=share)
    cut = magnitude(plain, share)
    masked = mask_weights(plain, lambda w: kind(w, start=cut))
    found = prune(masked)
    for place in (0, 3):
        assert torch.equal(found[place].weight != 0, expected[place].weight_mask > 0)
    if kind is ThresholdMask:  # scores are cut to [-1, 1], and equal ones fall together
        exact = prune(masked, share)
        assert torch.equal(exact[0].weight != 0, expected[0].weight_mask > 0)


def test_the_penalty_and_the_density_are_their_formulas() -> None:
    engine = pruning(density=0.2)
    outer = engine.problems["pruning"]
    batch = blobs(30, 1)
    masks = torch.cat([part[0].values(part.original).flatten() for part in weights_of(outer.module)])
    torch.testing.assert_close(outer.density(), masks.mean())
    expected = F.cross_entropy(outer.module(batch[0]), batch[1]) + (masks.mean() / 0.2 - 1) ** 2
    torch.testing.assert_close(outer.loss(batch), expected)
    assert outer.evaluate() == {
        "density": pytest.approx(float(masks.detach().mean())),
        "kept": pytest.approx(float((masks > 0.5).double().mean())),
    }
    outer.target = 0.99  # within its budget: no penalty
    torch.testing.assert_close(outer.loss(batch), F.cross_entropy(outer.module(batch[0]), batch[1]))


def weights_of(module: nn.Module) -> list[Any]:
    return [part.parametrizations.weight for part in module.modules() if parametrize.is_parametrized(part)]


@pytest.mark.parametrize("mask", ["threshold", "threshold_unit", "score"])
def test_a_search_meets_its_budget_and_keeps_what_is_useful(mask: str) -> None:
    """Features 2 and 3 say nothing: little of what is left reads them."""
    momentum = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)  # noqa: E731
    engine = pruning("identity", mask, density=0.4, optimizer=momentum, weight_decay=0.003, steps=3)
    for part in weights_of(engine.problems["pruning"].module):
        part[0].temperature = 0.2
    engine.run(150)
    assert engine.evaluate()["pruning/density"] < 0.5
    found = prune(engine.problems["pruning"].module, 0.6)
    read = found[0].weight.detach().abs().sum(0)
    assert float(read[:2].sum()) > 3 * float(read[2:].sum())
    x, y = blobs(500, 3)
    assert float((found(x).argmax(1) == y).double().mean()) > 0.85


@pytest.mark.parametrize("mask", ["threshold", "threshold_unit", "score"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_a_cut_has_real_zeros_and_leaves_the_network_alone(mask: str, share: float) -> None:
    masked = pruning(mask=mask).problems["pruning"].module
    state = {name: value.clone() for name, value in masked.state_dict().items()}
    values = [masked[place].weight.detach().clone() for place in (0, 2)]
    found = prune(masked, share)
    zeros = sum(int((found[place].weight == 0).sum()) for place in (0, 2))
    assert zeros >= round(share * 28)
    if mask != "score":  # whose scores may be cut to one value
        assert zeros == round(share * 28)
    assert sparsity(found)["total"] == pytest.approx(zeros / 28)
    assert list(found.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for value, place in zip(values, (0, 2), strict=True):
        kept = found[place].weight != 0
        assert torch.equal(found[place].weight[kept], value[kept])
    for name, value in masked.state_dict().items():
        assert torch.equal(value, state[name])
    for value, place in zip(values, (0, 2), strict=True):  # a copy of a parametrised module shares its class
        assert torch.equal(masked[place].weight, value)


def test_zeros_stay_zeros_while_the_rest_is_trained() -> None:
    masked = pruning().problems["pruning"].module
    tuned = prune(masked, 0.5, trainable=True)
    before = tuned(blobs(5, 0)[0])
    torch.testing.assert_close(before, prune(masked, 0.5)(blobs(5, 0)[0]))
    x, y = blobs(40, 2)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(tuned(x), y).backward()
        optimizer.step()
    plain = prune(tuned)
    assert sparsity(plain)["total"] == sparsity(tuned)["total"] == 0.5
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(plain(x), tuned(x))
    assert not torch.equal(plain(blobs(5, 0)[0]), before)


def test_a_unit_goes_as_a_whole() -> None:
    masked = pruning(mask="score_unit").problems["pruning"].module
    found = prune(masked, 0.5)
    for place in (0, 2):
        kept = found[place].weight != 0
        assert torch.equal(kept.any(1), kept.all(1))
    assert sparsity(found)["total"] >= 0.5


def test_a_layer_that_is_lost_is_warned_about() -> None:
    masked = mask_weights(network(), lambda w: ThresholdMask(w, start=0.1 if len(w) == 4 else 10.0))
    with pytest.warns(BilevelWarning, match="layer '2' loses all its weights"):
        found = prune(masked)
    assert sparsity(found)["2"] == 1.0


def test_a_network_is_masked_as_a_whole_or_not_at_all() -> None:
    # a head that starts from zeros: its median is no threshold to start from
    plain = network()
    nn.init.zeros_(plain[2].weight)
    with pytest.raises(ConfigError, match="median of .* is 0: pass start="):
        mask_weights(plain)
    mask_weights(plain, lambda weight: ThresholdMask(weight, start=0.1))


def test_chosen_layers_are_masked_and_owners_are_disjoint() -> None:
    masked = mask_weights(network(), layers=lambda path, layer: path == "0")
    outer = Pruning(masked, density=0.5, optimizer=adam)
    inner = MaskedTraining(masked, optimizer=sgd)
    assert outer.parameter_names == ("0.parametrizations.weight.0.log_threshold",)
    assert set(inner.parameter_names) == {"0.parametrizations.weight.original", "0.bias", "2.weight", "2.bias"}
    assert Pruning(masked, density=0.5, optimizer=adam(list(outer.parameters))).parameters == outer.parameters


def test_a_run_goes_on_where_it_stopped(tmp_path: Any) -> None:
    whole, first, second = (pruning(OneStep(), "score") for _ in range(3))
    whole.run(4)
    first.run(2)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run(2)
    for mine, other in zip(whole.problems["pruning"].parameters, second.problems["pruning"].parameters, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:.*negative curvature:bilevel.errors.BilevelWarning")
def test_a_mask_of_one_s_own() -> None:
    """A mask that keeps the first inputs of every unit, as many as the outer problem finds worth it."""

    class First(Mask):
        def __init__(self, weight: Tensor) -> None:
            super().__init__(temperature=0.5)
            self.count = nn.Parameter(weight.new_tensor(weight.shape[1] / 2))

        def importance(self, weight: Tensor) -> Tensor:
            return self.count - torch.arange(weight.shape[1], dtype=weight.dtype) - 0.5

    masked = mask_weights(network(), First)
    outer = Pruning(masked, density=0.5, optimizer=adam, data=[blobs(30, 1)])
    inner = MaskedTraining(masked, optimizer=sgd, data=[blobs(40, 2)], weight_decay=0.3)
    engine = Engine([outer, inner], QUIET, "exact")
    engine.run(3)
    assert hypergradcheck(engine, rtol=1e-6).passed
    assert bool((prune(masked)[0].weight[:, -1] == 0).all())


SCORED = mask_weights(network(), ScoreMask)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ThresholdMask(torch.ones(2, 2), temperature=0.0),
            ConfigError,
            "ThresholdMask.temperature must be a finite number above 0",
        ),
        (lambda: ThresholdMask(torch.ones(2, 2), per="weight"), UnknownNameError, "'layer', 'unit'"),
        (
            lambda: ThresholdMask(torch.ones(2, 2), start=0.0),
            ConfigError,
            "ThresholdMask.start must be a finite number above 0",
        ),
        (lambda: ThresholdMask(torch.zeros(2, 2)), ConfigError, r"median of \|w\|, which is 0: pass start="),
        (lambda: ScoreMask(torch.ones(2, 2), per="layer"), UnknownNameError, "'unit', 'weight'"),
        (lambda: ScoreMask(torch.zeros(2, 2)), ConfigError, "pass start="),
        (lambda: mask_weights(nn.ReLU()), ConfigError, "ReLU has no linear or convolutional layer"),
        (lambda: mask_weights(network(), layers=lambda path, layer: False), ConfigError, r"none of \['0', '2'\]"),
        (lambda: mask_weights(SCORED), ConfigError, "layer '0' is parametrised already"),
        (lambda: Pruning(network(), density=0.5, optimizer=adam), ConfigError, r"no masks: call mask_weights"),
        (lambda: MaskedTraining(network(), optimizer=sgd), ConfigError, r"no masks: call mask_weights"),
        (lambda: Pruning(SCORED, density=0.0), ConfigError, "Pruning.density must be a finite number above 0"),
        (lambda: Pruning(SCORED, density=5), ConfigError, "Pruning.density is a share"),
        (lambda: Pruning(SCORED, density=0.5, strength=-1.0), ConfigError, "Pruning.strength must be"),
        (lambda: prune(network()), ConfigError, "no masks"),
        (lambda: prune(SCORED, 1.0), ConfigError, "share of weights that become 0 must be below 1"),
        (lambda: prune(SCORED, -0.1), ConfigError, "prune.share"),
        (lambda: prune(prune(SCORED, 0.5, trainable=True), 0.5), ConfigError, "cut already: leave share= out"),
        (lambda: sparsity(nn.ReLU()), ConfigError, "no linear or convolutional layer"),
        (lambda: magnitude(network(), 1.0), ConfigError, "must be below 1"),
        (
            lambda: magnitude(nn.Linear(2, 2).requires_grad_(False).apply(lambda m: m.weight.zero_()), 0.5),
            ConfigError,
            "no magnitude to cut at",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
