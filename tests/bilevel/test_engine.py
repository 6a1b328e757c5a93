"""What the engine promises: the order of updates, the right gradients, and nothing silent."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    BilevelError,
    Engine,
    EngineConfig,
    Exact,
    FiniteDifference,
    Identity,
    Problem,
    Unrolled,
    hypergradient,
)
from bilevel.errors import (
    BilevelWarning,
    ConfigError,
    DataError,
    GraphError,
    LossError,
    NonFiniteError,
    ParameterError,
    SolveError,
    UnknownNameError,
)

QUIET = EngineConfig(progress=False)
METHODS = ["finite_difference", "identity", "neumann", "conjugate_gradient", "exact", "unrolled"]


def sgd(rate: float, **settings):
    return lambda params: torch.optim.SGD(params, lr=rate, **settings)


def adam(rate: float):
    return lambda params: torch.optim.Adam(params, lr=rate)


class Decay(Problem):
    """Outer: the logarithm of a weight decay."""

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)


class Classifier(Problem):
    """Inner: a classifier with that weight decay."""

    def loss(self, batch):
        x, y = batch
        penalty = self.decay.module[0].exp() * sum(p.square().sum() for p in self.module.parameters())
        return {"loss": F.cross_entropy(self(x), y) + penalty, "penalty": penalty}


def data(size: int = 48, seed: int = 0, batch: int = 16, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    y = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)


def make(method="identity", *, module=None, steps=2, config=QUIET, outer_rate=0.1, optimizer=None, **inner) -> Engine:
    torch.manual_seed(0)
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(outer_rate), data=data(seed=1))
    settings = {"optimizer": optimizer or sgd(0.3), "data": data(), **inner}
    return Engine([decay, Classifier(module or nn.Linear(4, 3), steps=steps, **settings)], config, hypergradient=method)


def state_of(engine: Engine) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]
    return tensors + [b.clone() for problem in engine.problems.values() for b in problem.module.buffers()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("method", ["identity", "exact", "neumann", "conjugate_gradient", "finite_difference"])
def test_a_step_is_the_inner_updates_then_one_outer_update_at_the_new_point(method):
    engine = make(method, steps=3)
    inner_batches = [batch for _, batch in zip(range(3), data(shuffle=False), strict=False)]
    outer_batch = next(iter(data(seed=1, shuffle=False)))
    module, decay = (
        copy.deepcopy(engine.problems["classifier"].module),
        engine.problems["decay"].module[0].detach().clone(),
    )

    def inner_loss(w, lam, batch):
        logits = F.linear(batch[0], *w)
        return F.cross_entropy(logits, batch[1]) + lam.exp() * sum(p.square().sum() for p in w)

    w = [p.detach().clone() for p in module.parameters()]
    for batch in inner_batches:
        w = [p.requires_grad_() for p in w]
        grads = torch.autograd.grad(inner_loss(w, decay, batch), w)
        w = [(p - 0.3 * g).detach() for p, g in zip(w, grads, strict=True)]
    expected = hypergradient(
        lambda w, lam: inner_loss(w, lam, inner_batches[-1]),
        lambda w, lam: F.cross_entropy(F.linear(outer_batch[0], *w), outer_batch[1]),
        w,
        decay,
        method,
    )
    result = engine.step({"classifier": iter(inner_batches), "decay": outer_batch})
    torch.testing.assert_close(list(engine.problems["classifier"].parameters), w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        engine.problems["decay"].module[0].data, decay - 0.1 * expected.grad, rtol=1e-5, atol=1e-7
    )
    assert result.step == 1
    assert set(result.losses) == {"decay", "classifier"}
    assert "classifier/penalty" in result.metrics


@pytest.mark.parametrize("optimizer", [sgd(0.3), sgd(0.3, momentum=0.9, nesterov=True, weight_decay=0.1), adam(0.05)])
def test_unrolled_differentiates_the_optimizers_own_updates(optimizer):
    """Against central differences of the whole step, in float64, past the first update: the state is not empty."""
    batches = [(x.double(), y) for x, y in data(shuffle=False)]

    def inner_end(log_decay: float) -> torch.Tensor:
        torch.manual_seed(3)
        module = nn.Linear(4, 3).double()
        trained = optimizer(list(module.parameters()))
        lams = [-2.0, -2.0, log_decay, log_decay, log_decay]  # two updates before the outer parameter is perturbed
        for lam, batch in zip(lams, (batches * 2)[:5], strict=True):
            loss = F.cross_entropy(module(batch[0]), batch[1])
            loss = loss + torch.tensor(lam, dtype=torch.float64).exp() * sum(
                p.square().sum() for p in module.parameters()
            )
            trained.zero_grad()
            loss.backward()
            trained.step()
        return F.cross_entropy(module(batches[0][0]), batches[0][1]).detach()

    expected = (inner_end(-2.0 + 1e-5) - inner_end(-2.0 - 1e-5)) / 2e-5
    torch.manual_seed(3)
    module = nn.Linear(4, 3).double()
    decay = Decay(nn.ParameterList([torch.tensor(-2.0).double()]), optimizer=sgd(0.0))
    inner = Classifier(module, optimizer=optimizer, steps=2)
    engine = Engine([decay, inner], QUIET, hypergradient="unrolled")
    engine.step({"classifier": iter(batches[:2]), "decay": batches[0]})
    inner.steps = 3
    engine.step({"classifier": iter((batches * 2)[2:5]), "decay": batches[0]})
    found = engine.hypergradient(batches={"decay": batches[0]}).grad["0"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("asks", ["class", "attribute", "identity", "requires_grad"])
def test_a_loss_that_asks_a_parameter_for_more_than_its_values_is_told(asks):
    class Inner(Problem):
        def loss(self, batch):
            p = self.module.weight
            counts = {
                "class": lambda: isinstance(p, nn.Parameter),
                "attribute": lambda: getattr(p, "decays", False),
                "identity": lambda: any(p is q for group in self.optimizer.param_groups for q in group["params"]),
                "requires_grad": lambda: p.requires_grad,
            }[asks]()
            return (p - 1.0).square().sum() + self.outer.module.weight.exp().sum() * p.square().sum() * counts

    class Outer(Problem):
        def loss(self, batch):
            return (self.inner.module.weight - 0.5 * self.module.weight).square().sum()

    def make():
        modules = [nn.Linear(1, 1, bias=False).double() for _ in range(2)]
        modules[1].weight.decays = True
        with torch.no_grad():
            modules[1].weight.fill_(0.7)
        problems = [kind(m, optimizer=sgd(0.1), data=[0]) for kind, m in zip((Outer, Inner), modules, strict=True)]
        return Engine(problems, QUIET, hypergradient="finite_difference")

    if asks == "requires_grad":  # copies have that too
        hypergradient = make().hypergradient()
        assert not torch.equal(hypergradient.grad["weight"], hypergradient.direct["weight"])
        return
    with pytest.raises(BilevelWarning, match="loss of problem 'inner' is .* at copies of the parameters and .* at the"):
        make()


def test_random_numbers_of_a_loss_are_no_difference_and_none_are_used_up():
    class Noisy(Problem):
        def loss(self, batch):
            noise = float(np.random.rand()) + random.random() + torch.rand(())
            return (self.module.weight - self.decay.module[0]).square().sum() * noise

    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    batches = [(torch.ones(2, 4), torch.zeros(2).long())]
    decay = Decay(nn.ParameterList([torch.tensor(0.0)]), optimizer=sgd(0.1), data=batches)
    noisy = Noisy(nn.Linear(4, 3), optimizer=sgd(0.1), name="classifier")
    torch.set_rng_state(before[2])
    Engine([decay, noisy], QUIET)
    assert torch.equal(torch.get_rng_state(), before[2])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[0])


def test_dependencies_are_discovered_and_reported():
    engine = make()
    assert engine.dependencies.outer == ("decay",)
    assert engine.dependencies.inner == ("classifier",)
    assert "classifier (inner): loss depends on decay" in engine.dependencies.describe()


def test_two_problems_own_disjoint_parts_of_one_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    class Body(Problem):
        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    class Head(Problem):
        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    body = Body(network, optimizer=sgd(0.1), params="0.*", data=data(seed=1))
    head = Head(network, optimizer=sgd(0.1), params=lambda name, _: name.startswith("2."), data=data())
    engine = Engine([body, head], QUIET, hypergradient="finite_difference")
    before = state_of(engine)
    engine.step()
    assert body.parameter_names == ("0.weight", "0.bias")
    assert head.parameter_names == ("2.weight", "2.bias")
    assert not any(torch.equal(a, b) for a, b in zip(before[:4], state_of(engine)[:4], strict=True))


def test_parameters_not_given_to_the_optimizer_never_change_and_groups_are_kept():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    frozen = module[0].weight
    groups = [{"params": [module[1].weight], "lr": 0.3}, {"params": [module[1].bias], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    kept, bias, weight = (p.detach().clone() for p in (frozen, module[1].bias, module[1].weight))
    engine = make("identity", module=module, optimizer=optimizer)
    engine.run(3)
    assert torch.equal(frozen, kept)
    assert torch.equal(module[1].bias, bias)
    assert not torch.equal(module[1].weight, weight)
    assert frozen.grad is None
    assert engine.problems["classifier"].optimizer is optimizer


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a small network is not convex
@pytest.mark.parametrize("method", METHODS)
def test_asking_for_the_hypergradient_changes_nothing(method):
    """Two runs, one of them asked at every step, agree bit for bit: parameters, buffers, generators, data order."""
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    runs = []
    for asked in (False, True):
        engine = make(method, module=copy.deepcopy(module))
        torch.manual_seed(7)
        for _ in range(4):
            engine.step()
            if asked:
                engine.hypergradient()
        runs.append([*state_of(engine), torch.get_rng_state()])
    assert same(*runs)


def test_passes_of_one_derivative_see_the_same_dropout_masks():
    """New masks between the passes would make the difference of order 1/ε instead of ε²."""
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    loader = [(x.double(), y) for x, y in data()]
    results = []
    for method in (Identity(), FiniteDifference(epsilon=1e-5)):
        torch.manual_seed(0)
        decay = nn.Linear(4, 4, bias=False).double()
        nn.init.eye_(decay.weight)

        class Scale(Problem):
            def loss(self, batch):
                return F.cross_entropy(self.network(self(batch[0])), batch[1])

        class Network(Problem):
            def loss(self, batch):
                return F.cross_entropy(self(self.scale(batch[0])), batch[1])

        scale = Scale(decay, optimizer=sgd(0.1), data=loader)
        engine = Engine(
            [scale, Network(copy.deepcopy(module), optimizer=sgd(0.1), data=loader)], QUIET, hypergradient=method
        )
        torch.manual_seed(5)
        engine.step()
        torch.manual_seed(9)
        results.append(engine.hypergradient())
    exact, difference = (result.grad["weight"] - result.direct["weight"] for result in results)
    assert exact.norm() > 0
    assert (exact - difference).norm() < 1e-7 * exact.norm()


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a small network is not convex
def test_products_leave_batch_norm_statistics_to_the_training_passes():
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    engine = make("conjugate_gradient", module=module, steps=3)
    engine.step()
    # three inner passes and the outer one; neither discovery, nor the solve's pass, nor its products
    assert int(module[1].num_batches_tracked) == 4


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a small network is not convex
def test_activation_checkpointing_recomputes_with_the_swapped_parameters():
    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.first, self.second, self.active = nn.Linear(4, 8), nn.Linear(8, 3), active

        def forward(self, x):
            body = lambda x: torch.tanh(self.first(x))  # noqa: E731
            return self.second(checkpoint(body, x, use_reentrant=False) if self.active else body(x))

    for method in ("finite_difference", "identity", "neumann", "unrolled"):
        grads = []
        for active in (False, True):
            torch.manual_seed(0)
            engine = make(method, module=Checkpointed(active))
            engine.step()
            grads.append(engine.hypergradient().grad["0"])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


class Quadratic(Problem):
    """½‖w − Σ of the problems named in ``pulls``‖², with a weight."""

    def __init__(self, value, pulls, name, **settings):
        self.pulls = pulls
        super().__init__(nn.ParameterList([torch.tensor(value, dtype=torch.float64)]), name=name, **settings)

    def loss(self, batch):
        target = sum(weight * getattr(self, other).module[0] for other, weight in self.pulls.items())
        return 0.5 * (self.module[0] - target).square().sum()


class Target(Quadratic):
    """½ (Σ others − 1)² + ¼ λ²."""

    def loss(self, batch):
        total = sum(weight * getattr(self, other).module[0] for other, weight in self.pulls.items())
        return 0.5 * (total - 1.0).square().sum() + 0.25 * self.module[0].square().sum()


def test_several_inner_problems_under_one_outer_one_responding_to_its_sibling():
    """a = 2λ, b = a + 3λ, F = ½(a + b − 1)² + λ²/4: dF/dλ = 7 (a + b − 1) + λ/2."""
    step = {"optimizer": sgd(1.0)}
    outer = Target(0.5, {"a": 1.0, "b": 1.0}, "outer", optimizer=sgd(0.0))
    a = Quadratic(0.0, {"outer": 2.0}, "a", **step)
    b = Quadratic(0.0, {"outer": 3.0, "a": 1.0}, "b", steps=2, **step)
    engine = Engine([outer, a, b], QUIET, hypergradient=Exact())
    engine.step()
    engine.step()
    found = engine.hypergradient().grad["0"]
    total = a.module[0].item() + b.module[0].item()
    assert found.item() == pytest.approx(7 * (total - 1) + 0.25, rel=1e-12)


def test_one_inner_problem_under_two_outer_ones():
    """w = 2p − q: both outer problems differentiate through it, each with its own response."""
    first = Target(0.5, {"inner": 1.0}, "first", optimizer=sgd(0.0))
    second = Target(0.25, {"inner": 3.0}, "second", optimizer=sgd(0.0))
    inner = Quadratic(0.0, {"first": 2.0, "second": -1.0}, "inner", optimizer=sgd(1.0))
    engine = Engine([first, second, inner], QUIET, hypergradient="cg")
    engine.step()
    w = inner.module[0].item()
    assert w == pytest.approx(0.75)
    assert engine.hypergradient("first").grad["0"].item() == pytest.approx(2 * (w - 1) + 0.25)
    assert engine.hypergradient("second").grad["0"].item() == pytest.approx(-3 * (3 * w - 1) + 0.125)
    with pytest.raises(ConfigError, match="first, second"):
        engine.hypergradient()


def test_an_inner_loss_without_the_outer_parameters_is_an_error():
    outer = Target(0.5, {"inner": 1.0}, "outer", optimizer=sgd(0.1))
    inner = Quadratic(0.0, {"inner": 0.5}, "inner", optimizer=sgd(0.1))
    with pytest.raises(GraphError, match="'inner' does not depend on the parameters of any problem above"):
        Engine([outer, inner], QUIET)


def test_an_inner_problem_that_nothing_depends_on_is_an_error():
    outer = Target(0.5, {"outer": 1.0}, "outer", optimizer=sgd(0.1))
    inner = Quadratic(0.0, {"outer": 1.0}, "inner", optimizer=sgd(0.1))
    with pytest.raises(GraphError, match="no problem above 'inner' depends on its parameters"):
        Engine([outer, inner], QUIET)


def test_one_parameter_has_one_owner_and_one_name_one_problem():
    network = nn.Linear(4, 3)
    with pytest.raises(GraphError, match=r"'decay' and 'classifier' both own one parameter"):
        Engine([Decay(network, optimizer=sgd(0.1)), Classifier(network, optimizer=sgd(0.1))], QUIET)
    with pytest.raises(GraphError, match="two problems are named 'x'"):
        Engine([Decay(nn.Linear(1, 1), name="x"), Classifier(network, name="x")], QUIET)
    with pytest.raises(GraphError, match="needs an outer and an inner problem"):
        Engine([Classifier(network)], QUIET)


def test_reading_a_parameter_past_its_module_is_refused():
    """A closure over the parameter object would not see perturbed values: finite differences would be silently zero."""

    class Sneaky(Classifier):
        def loss(self, batch):
            return F.cross_entropy(F.linear(batch[0], *self.parameters), batch[1]) * self.decay.module[0].exp()

    torch.manual_seed(0)
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data(seed=1))
    with pytest.raises(ParameterError, match="reads parameters of"):
        Engine([decay, Sneaky(nn.Linear(4, 3), optimizer=sgd(0.1), data=data(), name="classifier")], QUIET)


def test_parameter_patterns_that_match_nothing_name_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'wieght'.*did you mean 'weight'"):
        Classifier(nn.Linear(4, 3), params=["wieght"])
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    with pytest.raises(UnknownNameError, match=r"1 frozen ones match, such as 'bias'"):
        Classifier(module, params="bias")
    with pytest.raises(ParameterError, match="holds 1 parameters that its module does not have"):
        Classifier(module, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ConfigError, match="drop params="):
        Classifier(module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), params="weight")


def test_misspelt_hooks_and_bad_names_are_errors():
    with pytest.raises(UnknownNameError, match="did you mean 'on_step_end'"):

        class Wrong(Classifier):
            def on_step_ends(self, result):
                pass

    with pytest.raises(ConfigError, match="cannot name a problem"):
        Classifier(nn.Linear(1, 1), name="loss")
    with pytest.raises(ConfigError, match=r"classifier.steps must be an integer of at least 1"):
        Classifier(nn.Linear(1, 1), steps=0)
    with pytest.raises(AttributeError, match="no problem has this name"):
        _ = Classifier(nn.Linear(1, 1)).nobody


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda self, batch: self(batch[0]), LossError, r"'classifier' must be a scalar; it has shape \(16, 3\)"),
        (lambda self, batch: 1.0, LossError, "must be a scalar tensor; it is a float"),
        (lambda self, batch: {"value": self(batch[0]).sum()}, LossError, "a mapping without 'loss'"),
    ],
)
def test_losses_that_are_none(loss, error, match):
    cls = type("Classifier", (Classifier,), {"loss": loss})
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data(seed=1))
    with pytest.raises(error, match=match):
        Engine([decay, cls(nn.Linear(4, 3), optimizer=sgd(0.1), data=data())], QUIET)


def test_a_non_finite_loss_changes_nothing_and_names_problem_step_and_batch():
    for bad in ("classifier", "decay"):
        engine = make(optimizer=adam(0.1))
        engine.step()
        before = state_of(engine)
        poison = (torch.full((16, 4), float("nan")), torch.zeros(16, dtype=torch.long))
        with pytest.raises(NonFiniteError, match=rf"step 2: the loss of problem '{bad}' is nan"):
            engine.step({bad: poison})
        assert same(before, state_of(engine))
        engine.step()
        assert not same(before, state_of(engine))


def test_a_refused_step_restores_optimizer_state_and_schedule():
    settings = {"optimizer": adam(0.1), "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}
    clean, refused = make(**settings), make(**settings)
    batches = list(data(shuffle=False))
    poison = (torch.full((16, 4), float("inf")), torch.zeros(16, dtype=torch.long))
    for engine in (clean, refused):
        engine.step({"classifier": iter(batches[:2]), "decay": batches[2]})
        if engine is refused:
            with pytest.raises(NonFiniteError):
                engine.step({"classifier": iter([batches[0], batches[1]]), "decay": poison})
        engine.step({"classifier": iter(batches[1:]), "decay": batches[0]})
    assert same(state_of(clean), state_of(refused))
    assert clean.problems["classifier"].optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_non_finite_steps_can_be_skipped_and_are_counted():
    engine = make(config=EngineConfig(progress=False, on_non_finite="skip"))
    before = state_of(engine)
    poison = (torch.full((16, 4), float("nan")), torch.zeros(16, dtype=torch.long))
    result = engine.step({"classifier": poison})
    assert result.skipped == "classifier"
    assert engine.skipped_steps == 1
    assert same(before, state_of(engine))
    assert engine.step().skipped is None


def test_any_exception_in_a_loss_leaves_the_state_before_the_step():
    engine = make()
    engine.step()
    before = state_of(engine)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.step({"decay": (torch.ones(2, 5), torch.zeros(2, dtype=torch.long))})
    assert same(before, state_of(engine))


class Expanded(nn.Module):
    """Has a buffer that repeats one number, and one that is stored row by row but repeats its columns."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.zeros(1).expand(3))
        self.register_buffer("table", torch.arange(4.0)[:, None].expand(4, 3))

    def forward(self, x):
        return self.linear(x) + self.shift + x @ self.table


@pytest.mark.parametrize("method", ["identity", "unrolled", {"method": "unrolled", "memory": "graph"}])
def test_expanded_buffers_are_put_back_with_everything_else(method):
    poison = (torch.full((16, 4), float("nan")), torch.zeros(16, dtype=torch.long))
    for policy in ("raise", "skip"):
        config = EngineConfig(progress=False, on_non_finite=policy)
        engine = make(method, module=Expanded(), config=config, optimizer=adam(0.1))
        buffer = engine.problems["classifier"].module.table
        if method == "identity":  # what torch allows: a change of the numbers under the repeats
            engine.problems["classifier"].optimizer.register_step_post_hook(lambda *_, b=buffer: b[:, :1].add_(0.1))
        engine.step()
        before = state_of(engine)
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="the loss of problem 'decay' is nan"):
                engine.step({"decay": poison})
        else:
            assert engine.step({"decay": poison}).skipped == "decay"
        assert same(before, state_of(engine))
        assert engine.problems["classifier"].module.table is buffer
        assert buffer.stride() == (1, 0)
        assert engine.step().skipped is None


def test_a_checkpoint_loads_into_expanded_buffers(tmp_path):
    saved, loaded = (make("identity", module=Expanded()) for _ in range(2))
    saved.step()
    saved.save(tmp_path / "file")
    with torch.no_grad():
        loaded.problems["classifier"].module.table[:, :1].add_(3.0)
    loaded.load(tmp_path / "file")
    assert same(state_of(saved), state_of(loaded))


def test_an_optimiser_s_expanded_state_is_put_back():
    def count(optimizer, *_):
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p].setdefault("count", torch.zeros(1).expand(2))[:1].add_(1.0)

    engine = make()
    classifier = engine.problems["classifier"]
    classifier.optimizer.register_step_post_hook(count)
    engine.step()
    poison = (torch.full((16, 4), float("nan")), torch.zeros(16, dtype=torch.long))
    with pytest.raises(NonFiniteError):
        engine.step({"decay": poison})
    assert [slots["count"].tolist() for slots in classifier.optimizer.state.values()] == [[2.0, 2.0]] * 2


def test_failed_solves_warn_raise_or_fall_back():
    """The inner loss has a saddle: conjugate gradients meet negative curvature."""

    class Saddle(Quadratic):
        def loss(self, batch):
            return -0.5 * (self.module[0] - self.outer.module[0]).square()

    def engine(**settings):
        outer = Target(0.5, {"inner": 1.0}, "outer", optimizer=sgd(0.1))
        inner = Saddle(0.25, {}, "inner", optimizer=sgd(0.1))
        return Engine([outer, inner], EngineConfig(progress=False, **settings), hypergradient="cg")

    warned = engine()
    with pytest.warns(BilevelWarning, match="negative curvature"):
        warned.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warned.step()  # said once
    with pytest.raises(SolveError, match=r"'inner', step 1: conjugate_gradient: negative curvature.*damping"):
        engine(on_solve_failure="raise").step()
    for fallback in (Exact(), "exact", {"method": "exact", "damping": 0.0}):
        with pytest.warns(BilevelWarning):
            result = engine(on_solve_failure="fallback", fallback=fallback).step()
        assert result.solves["inner"].method == "exact"
    for fallback in ("unrolled", "soba", {"method": "cg", "warm_start": True}):
        with pytest.raises(ConfigError, match="a fallback is asked now and then only"):
            EngineConfig(on_solve_failure="fallback", fallback=fallback)
    with pytest.raises(ConfigError, match="go together"):
        EngineConfig(on_solve_failure="fallback")


def test_hypergradient_batches_last_or_fresh_or_averaged():
    batches = list(data(shuffle=False))
    grads = {}
    for name, settings in {
        "last": {},
        "fresh": {"hypergradient_batch": "fresh"},
        "mean": {"hypergradient_batch": "fresh", "num_hypergradient_batches": 2},
    }.items():
        engine = make("identity", steps=1, outer_rate=1.0, config=EngineConfig(progress=False, **settings))
        before = engine.problems["decay"].module[0].item()
        engine.step({"classifier": iter([batches[0], batches[1], batches[2]]), "decay": batches[0]})
        grads[name] = before - engine.problems["decay"].module[0].item()
    # the penalty, through which the outer parameter acts, does not depend on the batch: the mixed product is the same
    assert grads["last"] == pytest.approx(grads["fresh"], rel=1e-5)
    assert grads["mean"] == pytest.approx(grads["fresh"], rel=1e-5)
    with pytest.raises(DataError, match="more batches for problem 'classifier'"):
        make("identity", steps=1, config=EngineConfig(progress=False, hypergradient_batch="fresh")).step(
            {"classifier": iter(batches[:1]), "decay": batches[0]}
        )


def test_batches_from_outside_must_name_problems():
    with pytest.raises(UnknownNameError, match="did you mean 'classifier'"):
        make().step({"clasifier": None})


def test_an_engine_without_data_waits_for_the_first_batches():
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1))
    engine = Engine([decay, Classifier(nn.Linear(4, 3), optimizer=sgd(0.1))], QUIET)
    batch = next(iter(data()))
    engine.step({"decay": batch, "classifier": batch})
    assert engine.dependencies.inner == ("classifier",)


@pytest.mark.parametrize(
    ("source", "match"), [([], "yields no batch"), (iter([]), "was an iterator and has ended"), (3, "not int")]
)
def test_data_that_yields_nothing(source, match):
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data())
    with pytest.raises(DataError, match=match):
        Engine([decay, Classifier(nn.Linear(4, 3), optimizer=sgd(0.1), data=source)], QUIET)


def test_an_iterator_that_ends_is_an_error_and_not_a_stop():
    engine = make(steps=1, data=iter(list(data(shuffle=False))))
    engine.run(3)
    with pytest.raises(DataError, match="was an iterator and has ended"):
        engine.step()


def test_clipping_and_schedules_are_the_problems_own():
    engine = make("identity", max_grad_norm=1e-3, optimizer=sgd(1.0), steps=1)
    weight = torch.cat([p.detach().clone().reshape(-1) for p in engine.problems["classifier"].parameters])
    engine.step()
    moved = torch.cat([p.detach().reshape(-1) for p in engine.problems["classifier"].parameters])
    assert (moved - weight).norm().item() == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ConfigError, match="'one_step' cannot differentiate through max_grad_norm"):
        make("one_step", max_grad_norm=1.0)
    with pytest.raises(ConfigError, match="knows those of SGD, Adam, .*; the inner problem uses ASGD"):
        make("unrolled", optimizer=lambda p: torch.optim.ASGD(p))
    with pytest.raises(ConfigError, match="LBFGS"):
        make(optimizer=lambda p: torch.optim.LBFGS(p))
    with pytest.warns(BilevelWarning, match="learning_rate is not used"):
        make(Unrolled(steps=2, learning_rate=0.1))


def test_unrolling_needs_updates_to_differentiate():
    with pytest.warns(BilevelWarning, match="learning_rate is not used"):
        engine = make(Unrolled(steps=2, learning_rate=0.3))
    with pytest.raises(ConfigError, match="take a step first"):
        engine.hypergradient()
    engine.step()
    assert torch.isfinite(engine.hypergradient().grad["0"])


def test_same_seed_same_run_and_another_seed_another_order():
    runs = []
    for seed in (0, 0, 1):
        engine = make("neumann", config=EngineConfig(progress=False, seed=seed))
        engine.run(5)
        runs.append(state_of(engine))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_every_method_lowers_the_outer_loss_in_the_same_setting():
    for method in METHODS:
        engine = make(method, steps=10, outer_rate=1.0)
        losses = [engine.step().losses["decay"] for _ in range(30)]
        assert sum(losses[-5:]) < sum(losses[:5]), method


def test_bfloat16_training_passes_leave_the_products_in_float32():
    engine = make("identity", config=EngineConfig(progress=False, precision="bfloat16"))
    seen = []
    engine.problems["classifier"].module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    engine.step()
    assert seen == [
        torch.bfloat16,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]  # 2 inner, 1 outer, 1 for the product


def test_everything_raised_on_purpose_is_a_bilevel_error():
    for error in (
        ConfigError,
        DataError,
        GraphError,
        LossError,
        NonFiniteError,
        ParameterError,
        SolveError,
        UnknownNameError,
    ):
        assert issubclass(error, BilevelError)


def test_a_property_s_own_attribute_error_is_not_taken_for_a_problem_s_name():
    class Broken(Decay):
        @property
        def scaled(self):
            return self.module.no_such_thing

    broken = Broken(nn.ParameterList([torch.tensor(0.0)]), optimizer=sgd(0.1), name="broken")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = broken.scaled
    with pytest.raises(AttributeError, match="no problem has this name"):
        _ = broken.sclaed


class Unpacks(Problem):
    def loss(self, batch):
        x, y = batch
        return ((self(x) + self.fitted.module.weight) - y).square().mean()


class Fitted(Problem):
    def loss(self, batch):
        return (self.module.weight - self.unpacks.module.weight).square().sum()


def test_a_step_without_the_batch_that_a_loss_unpacks_says_so():
    unpacks, fitted = (
        kind(nn.Linear(1, 1), params="weight", optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        for kind in (Unpacks, Fitted)
    )
    engine = Engine([unpacks, fitted], EngineConfig(progress=False))
    message = r"cannot unpack.*handed no batch: unpacks, fitted\. Pass data= to the problem.*\{'unpacks': batch\}\)"
    with pytest.raises(DataError, match=message):
        engine.step()
    engine.step({"unpacks": (torch.ones(2, 1), torch.zeros(2, 1))})
