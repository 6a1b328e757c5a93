"""The first-order methods in an engine: the derivative of the step that was made, at the promised cost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bilevel import Engine, EngineConfig, Exact, Problem, Unrolled
from bilevel.errors import ConfigError
from bilevel.hypergrad.bome import BOME
from bilevel.hypergrad.f2sa import F2SA
from bilevel.hypergrad.one_step import OneStep
from bilevel.hypergrad.sama import SAMA
from tests.bilevel.test_engine import (
    QUIET,
    Classifier,
    Decay,
    Quadratic,
    Target,
    adam,
    data,
    make,
    same,
    sgd,
    state_of,
)

METHODS = {
    "one step": OneStep(),
    "one step, forward": OneStep(difference="forward"),
    "one step, central": OneStep(difference="central", center="new"),
    "one step, rate": OneStep(0.1, center="new"),
    "sama": SAMA(),
    "sama, forward": SAMA(center="old", difference="forward"),
    "sama, exact": SAMA(center="old", difference="exact"),
    "f2sa": F2SA(multiplier=2.0, iterations=3),
    "f2sa, step": F2SA(iterations=2, step_size=0.05),
    "bome": BOME(iterations=3),
}
OPTIMIZERS = {
    "sgd": sgd(0.3, weight_decay=0.1),
    "momentum": sgd(0.1, momentum=0.9, dampening=0.2),
    "nesterov": sgd(0.1, momentum=0.9, nesterov=True),
    "adam": adam(0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.02, centered=True, momentum=0.5),
}
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a small network is not convex


def double(method, *, module=None, optimizer=None, steps=3, clip=None, **settings) -> Engine:
    """The engine of the other tests in float64."""
    torch.manual_seed(0)
    module = copy.deepcopy(module) if module is not None else nn.Linear(4, 3)
    batches = [(x.double(), y) for x, y in data(shuffle=False)]
    decay = Decay(nn.ParameterList([torch.tensor(-2.0).double()]), optimizer=sgd(0.1), data=batches)
    optimizer = optimizer or sgd(0.3)
    inner = Classifier(module.double(), steps=steps, optimizer=optimizer, data=batches, max_grad_norm=clip)
    return Engine([decay, inner], settings.pop("config", QUIET), hypergradient=method, **settings)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))


def implicit_parts(engine: Engine, steps: int = 3) -> torch.Tensor:
    """Where the outer parameter is after each step: every hypergradient is in it."""
    torch.manual_seed(5)
    found = []
    for _ in range(steps):
        engine.step()
        found.append(engine.problems["decay"].module[0].detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sama_is_one_unrolled_step_of_the_inner_optimizer(optimizer):
    # Past the first update: moments, buffers and bias correction are not those of a first step.
    settings = {"module": network(), "optimizer": OPTIMIZERS[optimizer]}
    expected = implicit_parts(double(Unrolled(steps=1), **settings))
    found = implicit_parts(double(SAMA(center="old", difference="exact"), **settings))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for difference in ("central", "forward"):
        found = implicit_parts(double(SAMA(center="old", difference=difference), **settings))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert not torch.equal(found, expected)


@pytest.mark.parametrize("size", [0.1, 1e3], ids=["clipped", "not_reached"])
def test_sama_differentiates_the_clipping_too(size):
    settings = {"module": network(), "optimizer": OPTIMIZERS["adam"], "clip": size}
    expected = implicit_parts(double(Unrolled(steps=1), **settings))
    found = implicit_parts(double(SAMA(center="old", difference="exact"), **settings))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    free = implicit_parts(double(SAMA(center="old", difference="exact"), **settings | {"clip": None}))
    assert torch.equal(found, free) == (size == 1e3)


@pytest.mark.parametrize("difference", ["exact", "central", "forward"])
def test_one_step_is_one_unrolled_step_with_the_rate_of_each_group(difference):
    def grouped(params):
        weight, bias = params
        return torch.optim.SGD([{"params": [bias], "lr": 0.5}, {"params": [weight]}], lr=0.05, weight_decay=0.1)

    def engine(method, optimizer=grouped):
        return double(method, optimizer=optimizer)

    expected = implicit_parts(engine(Unrolled(steps=1)))
    found = implicit_parts(engine(OneStep(difference=difference)))
    tolerance = {"exact": 1e-12, "central": 1e-8, "forward": 1e-6}[difference]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    # A rate that is given wins over the optimiser's; the outer loss has no direct part.
    own, given = (
        implicit_parts(double(method, optimizer=sgd(0.2)), 1) + 2.0
        for method in (OneStep(difference=difference), OneStep(0.05, difference=difference))
    )
    torch.testing.assert_close(given, own / 4, rtol=1e-6, atol=0)


def test_the_optimizers_sign_and_schedule_are_those_of_the_step():
    # f = w λ: ∂²f/∂w∂λ = 1, and vᵀ dw⁺/dλ = −η v, or +η v for an optimiser that maximises.
    class Product(Quadratic):
        def loss(self, batch):
            return self.module[0] * self.outer.module[0]

    class Linear(Quadratic):
        def loss(self, batch):
            return 3.0 * self.inner.module[0]

    for maximize, sign in ((False, -1.0), (True, 1.0)):
        for method in (OneStep(), OneStep(center="new"), SAMA(difference="exact"), OneStep(difference="forward")):
            outer = Linear(0.5, {}, "outer", optimizer=sgd(1.0))
            halving = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
            rule = sgd(0.4, maximize=maximize)
            inner = Product(0.25, {}, "inner", optimizer=rule, scheduler=halving, steps=2)
            engine = Engine([outer, inner], QUIET, hypergradient=method)
            engine.step()
            # The second of the two steps had the rate 0.2.
            assert 0.5 - outer.module[0].item() == pytest.approx(sign * 0.2 * 3.0, rel=1e-6)


@pytest.mark.parametrize("config", [QUIET, EngineConfig(progress=False, precision="bfloat16")], ids=["plain", "bf16"])
def test_differences_see_the_same_dropout_masks_and_leave_batch_norm_alone(config):
    # New masks, or a gradient of half precision beside one of full precision, would be divided by ε.
    settings = {"module": network(), "optimizer": adam(0.05), "config": config}
    for center, difference in (("old", "central"), ("old", "forward"), ("new", "central")):
        exact = double(OneStep(center=center), **settings)
        other = double(OneStep(center=center, difference=difference), **settings)
        torch.testing.assert_close(implicit_parts(other), implicit_parts(exact), rtol=1e-6, atol=0)
        for left, right in zip(state_of(other), state_of(exact), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [OneStep(), OneStep(difference="forward"), SAMA(center="old", difference="exact")])
def test_the_old_point_comes_with_the_batch_of_its_step(method):
    # The hypergradient's own batch is another one here, and the outer parameter weighs the loss on it.
    class Weighted(Classifier):
        def loss(self, batch):
            return self.decay.module[0].exp() * F.cross_entropy(self(batch[0]), batch[1])

    def run(method):
        torch.manual_seed(0)
        batches = [(x.double(), y) for x, y in data(shuffle=False)]
        decay = Decay(nn.ParameterList([torch.tensor(-2.0).double()]), optimizer=sgd(0.1), data=batches)
        module = nn.Linear(4, 3).double()
        inner = Weighted(module, steps=2, optimizer=sgd(0.3), data=batches, name="classifier")
        config = EngineConfig(progress=False, hypergradient_batch="fresh")
        return implicit_parts(Engine([decay, inner], config, hypergradient=method))

    expected = run(Unrolled(steps=1))
    torch.testing.assert_close(run(method), expected, rtol=1e-8, atol=0)
    difference = (run(OneStep(center="new")) - expected).abs().max()
    assert float(difference) > 1e-4  # the other batch, at the other point


def passes_of(method, **settings) -> tuple[int, int]:
    """What the method adds to an engine's passes in a step."""
    engine = double(method, **settings)
    result = [engine.step() for _ in range(2)][-1]
    made = engine.problems["classifier"].steps + 1  # the inner updates and the outer loss
    return result.passes[0] - made, result.passes[1] - made


def test_costs_are_those_of_the_documentation():
    assert passes_of(OneStep()) == (1, 2)
    assert passes_of(OneStep(center="new")) == (1, 2)
    assert passes_of(OneStep(difference="central")) == (2, 2)
    assert passes_of(OneStep(difference="forward")) == (1, 1)
    assert passes_of(SAMA()) == (2, 2)
    assert passes_of(SAMA(difference="exact"), optimizer=adam(0.1)) == (1, 2)
    assert passes_of(SAMA(center="old", difference="forward"), optimizer=adam(0.1)) == (1, 1)
    assert passes_of(F2SA(iterations=4)) == (6, 6)
    assert passes_of(F2SA(iterations=4, step_size=0.1)) == (6, 6)
    assert passes_of(BOME(iterations=1)) == (3, 3)
    # Under autocast the step's own gradient does not count, and is made again.
    half = EngineConfig(progress=False, precision="bfloat16")
    assert passes_of(OneStep(difference="forward"), config=half) == (2, 2)
    engine = double(OneStep(difference="forward"))
    before = engine.passes.copy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.step()
    assert engine.passes.since(before) == (6, 6)


def test_the_steps_gradient_is_not_compared_with_one_at_other_outer_parameters():
    # f = λ² w: ∂f/∂λ = 2λw. After the outer update λ is another one, and the record's ∂f/∂λ of no use.
    class Bent(Quadratic):
        def loss(self, batch):
            return self.module[0] * self.outer.module[0].square() + self.module[0].square() / 2

    for rate in (0.3, 0.0):
        outer = Target(0.5, {"inner": 1.0}, "outer", optimizer=sgd(rate))
        inner = Bent(0.25, {}, "inner", optimizer=sgd(0.1))
        engine = Engine([outer, inner], QUIET, hypergradient=OneStep(difference="forward"))
        engine.step()
        w, lam = inner.module[0].item(), outer.module[0].item()
        expected = lam / 2 - 0.1 * (w - 1.0) * 2 * lam
        assert engine.hypergradient().grad["0"].item() == pytest.approx(expected, rel=1e-6)


class Curved(Quadratic):
    """½‖w − target‖² + w⁴/12 + target³ w: both mixed derivatives move with the other problems."""

    def loss(self, batch):
        target = sum(weight * getattr(self, other).module[0] for other, weight in self.pulls.items())
        w = self.module[0]
        return 0.5 * (w - target).square() + w**4 / 12 + target**3 * w


@pytest.mark.parametrize("method", [OneStep(difference="forward"), SAMA(center="old", difference="forward")])
def test_a_sibling_that_moved_after_the_step_spoils_no_difference(method):
    # b responds to a, and is stepped before it: at b's step ∂f_b/∂a was taken at another a.
    def run(method):
        outer = Target(0.5, {"a": 1.0, "b": 1.0}, "outer", optimizer=sgd(0.1))
        a = Curved(0.1, {"outer": 2.0}, "a", optimizer=sgd(0.1))
        b = Curved(0.3, {"outer": 0.7, "a": 1.0}, "b", optimizer=sgd(0.1))
        engine = Engine([outer, a, b], QUIET, hypergradient=method)
        for _ in range(3):
            engine.step()
        return outer.module[0].item()

    assert run(method) == pytest.approx(run(OneStep()), rel=1e-6)


EXACT_ON_UNIT_CURVATURE = {
    "one step": OneStep(),
    "one step, forward": OneStep(difference="forward"),
    "sama": SAMA(),
    "f2sa": F2SA(multiplier=3.0, iterations=60, step_size=0.5),
    "bome": BOME(barrier=0.0, iterations=2, step_size=0.5),
}


@pytest.mark.parametrize("method", EXACT_ON_UNIT_CURVATURE)
def test_several_inner_problems_one_responding_to_its_sibling(method):
    """a = 2λ, b = a + 3λ, F = ½(a + b − 1)² + λ²/4: dF/dλ = 7 (a + b − 1) + λ/2, as every Hessian is 1."""
    outer = Target(0.5, {"a": 1.0, "b": 1.0}, "outer", optimizer=sgd(0.0))
    a = Quadratic(0.0, {"outer": 2.0}, "a", optimizer=sgd(1.0))
    b = Quadratic(0.0, {"outer": 3.0, "a": 1.0}, "b", optimizer=sgd(1.0), steps=2)
    engine = Engine([outer, a, b], QUIET, hypergradient=EXACT_ON_UNIT_CURVATURE[method])
    for _ in range(4):
        engine.step()
    total = a.module[0].item() + b.module[0].item()
    assert engine.hypergradient().grad["0"].item() == pytest.approx(7 * (total - 1) + 0.25, rel=1e-6)
    if engine.hypergradient_method.needs_state:
        assert set(engine.estimator_states["outer"]) == {"a", "b"}


@pytest.mark.parametrize("method", METHODS)
def test_float32_steps_with_dropout_and_batch_norm_stay_finite_and_change_no_more_than_they_should(method):
    module = network()
    engine = make(METHODS[method], module=copy.deepcopy(module), steps=2, optimizer=adam(0.05))
    torch.manual_seed(7)
    for _ in range(4):
        result = engine.step()
    assert all(torch.isfinite(part).all() for part in state_of(engine))
    assert result.solves["classifier"].method == METHODS[method].name
    # two inner passes and the outer one a step: no pass of a method moves the statistics
    assert int(engine.problems["classifier"].module[1].num_batches_tracked) == 12
    before = [*state_of(engine), torch.get_rng_state()]
    states = copy.deepcopy(engine.estimator_states)
    grad = engine.hypergradient().grad["0"]
    assert same([*state_of(engine), torch.get_rng_state()], before)
    assert str(states) == str(engine.estimator_states)
    assert torch.equal(grad, engine.hypergradient().grad["0"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, stop, tmp_path):
    def engine():
        return make(METHODS[method], module=network(), steps=2, optimizer=adam(0.05))

    torch.manual_seed(12)
    whole = engine()
    losses = [whole.step().losses for _ in range(6)]
    torch.manual_seed(12)
    first = engine()
    for _ in range(stop):
        first.step()
    first.save(tmp_path / "state")
    torch.manual_seed(99)
    second = engine()
    second.load(tmp_path / "state")
    assert [second.step().losses for _ in range(6 - stop)] == losses[stop:]
    assert same(state_of(whole), state_of(second))
    assert whole.passes == second.passes


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(F2SA(multiplier=20.0, iterations=5), 0.05), (BOME(barrier=0.05, iterations=5), 0.15), (OneStep(), 0.999)],
)
def test_single_loop_penalties_reach_the_implicit_hypergradient(method, tolerance):
    # A convex inner problem on one batch: w, y and λ move together, y from the state. One step falls short by far.
    batch = next(iter(data(size=48, batch=48, shuffle=False)))
    batch = (batch[0].double(), batch[1])
    engine = double(method, steps=10, optimizer=sgd(1.0))
    engine.problems["decay"].optimizer.param_groups[0]["lr"] = 0.001
    for _ in range(40):
        result = engine.step({"classifier": batch, "decay": batch})
    found = engine.hypergradient(batches={"decay": batch, "classifier": batch})
    engine.hypergradient_method = Exact()
    exact = engine.hypergradient(batches={"decay": batch, "classifier": batch})
    error = abs(float(found.grad["0"] - exact.grad["0"])) / abs(float(exact.grad["0"]))
    assert not result.solves["classifier"].status.failed
    assert error < tolerance
    if isinstance(method, OneStep):
        assert error > 0.2
    else:
        assert found.info.residual < 2 * tolerance


def test_an_optimizer_that_is_not_known_is_refused_at_once():
    class Mine(torch.optim.SGD):
        pass

    for method in (SAMA(), OneStep()):
        with pytest.raises(ConfigError, match=r"'sama', 'one_step'\) knows those of SGD.*inner problem uses Mine"):
            make(method, optimizer=lambda params: Mine(params, lr=0.1))
    # Nothing of the optimiser is needed here.
    engine = make(OneStep(0.1, center="new"), optimizer=lambda params: Mine(params, lr=0.1))
    assert math.isfinite(engine.step().losses["decay"])
    with pytest.raises(ConfigError, match="cannot differentiate through max_grad_norm"):
        make(OneStep(), max_grad_norm=1.0)


def test_a_step_must_have_been_made():
    for method in (SAMA(), OneStep()):
        with pytest.raises(ConfigError, match="take a step first"):
            make(method).hypergradient()
    assert torch.isfinite(make(OneStep(0.1, center="new")).hypergradient().grad["0"])
    with pytest.raises(ConfigError, match=r"SAMA\.optimizer is for gradient steps as a function.*by its own"):
        make(SAMA(optimizer="adam", learning_rate=0.1))


def test_embeddings_that_did_not_occur_do_not_drown_the_others():
    # Adam divides by ε alone where it has seen no gradient: a displacement along that would move nothing else.
    class Words(Problem):
        def loss(self, batch):
            words, y = batch
            table = self.module
            return (self.weight.module[0].exp() * (table(words).sum(1) - y).square()).mean()

    class Weight(Problem):
        def loss(self, batch):
            words, y = batch
            return (self.words.module(words).sum(1) - y).square().mean()

    def run(method):
        torch.manual_seed(0)
        table = nn.Embedding(20, 3).double()
        seen, y = torch.arange(10), torch.linspace(-1, 1, 10).double()
        everything = torch.arange(20), torch.linspace(1, -2, 20).double()
        weight = Weight(nn.ParameterList([torch.zeros(10).double()]), optimizer=sgd(1.0), name="weight")
        words = Words(table, optimizer=adam(0.01), steps=2, name="words")
        engine = Engine([weight, words], QUIET, hypergradient=method)
        result = engine.step({"words": (seen, y), "weight": everything})
        assert not result.solves["words"].status.failed
        return weight.module[0].detach().clone()

    exact = run(SAMA(center="old", difference="exact"))
    assert float(exact.norm()) > 0
    torch.testing.assert_close(run(SAMA(center="old", difference="central")), exact, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(run(SAMA(center="old", difference="forward")), exact, rtol=1e-3, atol=1e-9)
    plain = run(SAMA(center="new"))
    torch.testing.assert_close(plain, run(SAMA(center="new", difference="exact")), rtol=1e-6, atol=1e-12)
    assert F.cosine_similarity(plain, exact, dim=0) > 0.9
