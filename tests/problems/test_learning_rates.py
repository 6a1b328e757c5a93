"""Learned learning rates, against differentiation of the updates by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bilevel import Engine, EngineConfig, hypergradcheck
from bilevel.errors import ConfigError, GraphError, NonFiniteError, ParameterError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems.hyperparameters import Hyperparameters, LabelSmoothing, Noise, Tuned, WeightDecay
from bilevel.problems.learning_rates import LearningRate, Paced

QUIET = EngineConfig(progress=False)
STEPS = 4
RATE = 0.1


def sgd(rate: float, **options: Any) -> Any:
    return lambda params: torch.optim.SGD(params, lr=rate, **options)


def data(count: int, seed: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return [(x.to(dtype), torch.randint(0, 3, (count,), generator=generator))]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def problems(
    model: nn.Module,
    optimizer: Any,
    per: str = "tensor",
    *,
    outer_optimizer: Any = None,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    hypergradient: Any = "unrolled",
    batches: Any = None,
    **parts: Any,
) -> tuple[Hyperparameters, Paced]:
    rate = LearningRate(model, per=per)
    outer = Hyperparameters(
        {"rate": rate, **parts}, optimizer=outer_optimizer or sgd(1.0), data=data(20, 1, dtype), name="outer"
    )
    inner = Paced(
        model,
        optimizer=optimizer,
        data=batches or data(30, 0, dtype),
        steps=steps,
        name="inner",
        hypergradient=hypergradient,
    )
    return outer, inner


# --- differentiation by hand ------------------------------------------------------------------------------------------

Direction = Callable[[int, Tensor, dict[str, Any]], Tensor]


def momentum(mu: float, nesterov: bool = False) -> Direction:
    def direction(made: int, grad: Tensor, memory: dict[str, Any]) -> Tensor:
        memory["b"] = grad if made == 0 else mu * memory["b"] + grad
        return grad + mu * memory["b"] if nesterov else memory["b"]

    return direction


def adam(made: int, grad: Tensor, memory: dict[str, Any]) -> Tensor:
    memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * grad
    memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * grad.square()
    return (memory["m"] / (1 - 0.9 ** (made + 1))) / (memory["v"] / (1 - 0.999 ** (made + 1))).sqrt()


def adagrad(made: int, grad: Tensor, memory: dict[str, Any]) -> Tensor:
    memory["s"] = memory.get("s", 0.0) + grad.square()
    return grad / memory["s"].sqrt()


def by_hand(model: nn.Module, direction: Direction, logs: dict[str, Tensor], weights: dict[str, Tensor]) -> Any:
    """Makes a round of updates with rates ``RATE exp(log)``; returns weights, validation loss and its derivatives."""
    (x, y), (v, u) = data(30, 0)[0], data(20, 1)[0]
    logs = {name: log.detach().requires_grad_() for name, log in logs.items()}
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    memories: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for made in range(STEPS):
        loss = F.cross_entropy(functional_call(model, weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {
            name: w - RATE * logs[name].exp() * direction(made, grad, memories[name])
            for (name, w), grad in zip(weights.items(), grads, strict=True)
        }
    loss = F.cross_entropy(functional_call(model, weights, (v,)), u)
    derivatives = dict(zip(logs, torch.autograd.grad(loss, list(logs.values())), strict=True))
    return {name: w.detach() for name, w in weights.items()}, float(loss.detach()), derivatives


@pytest.mark.parametrize("per", ["tensor", "element"])
@pytest.mark.parametrize(
    ("optimizer", "direction"),
    [
        (sgd(RATE), momentum(0.0)),
        (sgd(RATE, momentum=0.9), momentum(0.9)),
        (sgd(RATE, momentum=0.8, nesterov=True), momentum(0.8, nesterov=True)),
        (lambda params: torch.optim.Adam(params, lr=RATE, eps=0.0), adam),
        (lambda params: torch.optim.AdamW(params, lr=RATE, eps=0.0, weight_decay=0.0), adam),
        (lambda params: torch.optim.Adagrad(params, lr=RATE, eps=0.0), adagrad),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw", "adagrad"],
)
def test_rounds_are_those_of_the_learned_rates_and_differentiated_exactly(
    optimizer: Any, direction: Direction, per: str
) -> None:
    model = network()
    reference = copy.deepcopy(model)
    outer, inner = problems(model, optimizer, per, outer_optimizer=sgd(0.5))
    engine = Engine([outer, inner], QUIET)
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    logs = {name: torch.zeros(w.shape if per == "element" else (), dtype=w.dtype) for name, w in weights.items()}
    rate = outer.parts["rate"]
    assert isinstance(rate, LearningRate)
    for _ in range(3):  # the base moves on, and so do the rates
        result = engine.step()
        weights, loss, derivatives = by_hand(reference, direction, logs, weights)
        logs = {name: log - 0.5 * derivatives[name] for name, log in logs.items()}
        assert result.losses["outer"] == pytest.approx(loss, rel=1e-12)
        for name, weight in weights.items():
            torch.testing.assert_close(model.get_buffer(name), weight, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(rate.of(name).detach(), logs[name].exp(), rtol=1e-11, atol=1e-12)
    assert all(not torch.equal(log, torch.zeros_like(log)) for log in logs.values())


def test_one_step_is_the_online_rule_of_hypergradient_descent() -> None:
    """dF/dα = −∇F(w₁)·∇f(w₀), Baydin et al. 2018."""
    model = network()
    (x, y), (v, u) = data(30, 0)[0], data(20, 1)[0]
    before = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    slope = torch.autograd.grad(F.cross_entropy(functional_call(model, before, (x,)), y), list(before.values()))
    after = {n: (w - RATE * g).detach().requires_grad_() for (n, w), g in zip(before.items(), slope, strict=True)}
    other = torch.autograd.grad(F.cross_entropy(functional_call(model, after, (v,)), u), list(after.values()))
    outer, inner = problems(model, sgd(RATE), "model", steps=1)
    Engine([outer, inner], QUIET).step()
    moved = -outer.parameters[0].detach()  # by the hypergradient, from 0, with rate 1
    expected = -RATE * sum((a * b).sum() for a, b in zip(slope, other, strict=True))
    torch.testing.assert_close(moved, torch.as_tensor(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "method", [{"method": "unrolled", "memory": "graph"}, {"method": "unrolled", "mode": "forward"}], ids=str
)
def test_the_ways_of_unrolling_agree(method: Any) -> None:
    found = []
    for each in ("unrolled", method):
        outer, inner = problems(network(), sgd(RATE, momentum=0.9), hypergradient=each)
        Engine([outer, inner], QUIET).run(2)
        found.append(torch.stack([p.detach() for p in outer.parameters]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rates_are_learned_from_far_too_small_ones(dtype: torch.dtype) -> None:
    model = network(dtype)
    adam_of = lambda params: torch.optim.Adam(params, lr=0.2)  # noqa: E731
    outer, inner = problems(model, sgd(1e-3), "model", outer_optimizer=adam_of, dtype=dtype)
    engine = Engine([outer, inner], QUIET)
    first = engine.step().losses["outer"]
    assert engine.run(25).losses["outer"] < first - 1e-3
    assert outer.evaluate()["rate"] > 10.0
    assert model.get_buffer("0.weight").dtype == dtype


# --- what is in the model, and what is kept ---------------------------------------------------------------------------


def test_the_model_holds_the_trained_weights_after_every_step() -> None:
    model = network()
    outer, inner = problems(model, sgd(RATE), outer_optimizer=sgd(50.0))  # the rates change by much
    engine = Engine([outer, inner], QUIET)
    x = data(30, 0)[0][0]
    for _ in range(3):
        engine.step()
        torch.testing.assert_close(model(x), inner.module(x))  # before the next round, at the rates that were used
    assert list(model.parameters()) == []
    assert set(model.state_dict()) == {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x))


def test_weights_that_are_loaded_into_the_model_are_where_it_goes_on() -> None:
    torch.manual_seed(1)
    pretrained = {name: torch.randn_like(value) for name, value in network().state_dict().items()}
    model = network()
    loaded = Engine(list(problems(model, sgd(RATE))), QUIET)
    model.load_state_dict(pretrained)
    expected = network()
    expected.load_state_dict(pretrained)
    before = Engine(list(problems(expected, sgd(RATE))), QUIET)
    assert [loaded.step().losses for _ in range(2)] == [before.step().losses for _ in range(2)]
    for each in (model, expected):  # and between steps
        each.load_state_dict(pretrained)
    assert loaded.step().losses == before.step().losses
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    x = data(30, 0)[0][0]
    noise = lambda: {"noise": Noise(0.1).double()}  # noqa: E731
    model = network()
    whole = Engine(list(problems(model, sgd(RATE, momentum=0.9), **noise())), QUIET)
    torch.manual_seed(0)
    whole.run(2)
    whole.save(tmp_path / "state")
    outputs = model(x)
    losses = [whole.step().losses for _ in range(3)]
    model = network()
    again = Engine(list(problems(model, sgd(RATE, momentum=0.9), **noise())), QUIET)
    torch.manual_seed(7)
    again.load(tmp_path / "state")
    assert torch.equal(model(x), outputs)  # the model is the trained one without a further step
    assert [again.step().losses for _ in range(3)] == losses


def test_a_refused_step_leaves_base_displacements_and_model() -> None:
    good, bad = data(30, 0)[0], (data(30, 0)[0][0] * float("nan"), data(30, 0)[0][1])
    model = network()
    outer, inner = problems(model, sgd(RATE, momentum=0.9), batches=[good])
    engine = Engine([outer, inner], QUIET)
    engine.step()
    before = {name: value.clone() for name, value in inner.module.state_dict().items()}
    with pytest.raises(NonFiniteError):
        engine.step({"inner": iter([good, bad, bad, bad])})
    after = inner.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    expected = Engine(list(problems(network(), sgd(RATE, momentum=0.9))), QUIET)
    expected.step()
    assert engine.step().losses == expected.step().losses


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x).tanh())
            return out

    model = Tied().double()
    outer, inner = problems(model, sgd(RATE))
    Engine([outer, inner], QUIET).run(2)
    assert inner.parameter_names == ("displacement.first/weight",)
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(model(data(3, 2)[0][0]), inner.module(data(3, 2)[0][0]))


def test_a_layer_that_the_model_holds_twice_is_what_it_was_after_a_call() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(5, 3)).double()
    outer, inner = problems(model, sgd(RATE))
    Engine([outer, inner], QUIET).run(2)
    held, x = [*layer._buffers.values()], data(3, 2)[0][0]
    torch.testing.assert_close(inner.module(x), model(x))
    assert all(a is b for a, b in zip(layer._buffers.values(), held, strict=True))


def test_buffers_of_the_model_are_left_to_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    outer, inner = problems(model, sgd(RATE))
    Engine([outer, inner], QUIET).step()
    assert int(model[1].num_batches_tracked) >= STEPS
    assert float(model[1].running_mean.abs().max()) > 0.0


def test_what_is_not_chosen_keeps_its_place() -> None:
    model = network()
    first = model[0].weight
    rate = LearningRate(model, per="tensor", initial=2.0, params="2.bias")
    outer = Hyperparameters({"rate": rate}, optimizer=sgd(1.0), data=data(20, 1), name="outer")
    inner = Paced(model, optimizer=sgd(RATE), data=data(30, 0), params="2.*", name="inner")
    reference = network()
    loss = F.cross_entropy(reference(data(30, 0)[0][0]), data(30, 0)[0][1])
    slopes = dict(zip(dict(reference.named_parameters()), torch.autograd.grad(loss, reference.parameters())))  # noqa: B905
    Engine([outer, inner], QUIET).step()
    assert model[0].weight is first
    assert torch.equal(first, reference[0].weight)
    torch.testing.assert_close(model[2].weight, (reference[2].weight - RATE * slopes["2.weight"]).detach())
    torch.testing.assert_close(model[2].bias, (reference[2].bias - 2 * RATE * slopes["2.bias"]).detach())


def test_rates_and_decays_are_learned_together() -> None:
    model = network()
    decay = WeightDecay(model, initial=0.05)
    outer, inner = problems(model, sgd(RATE), "model", decay=decay)
    reference = network()
    loss = F.cross_entropy(reference(data(30, 0)[0][0]), data(30, 0)[0][1])
    loss = loss + 0.025 * sum(p.square().sum() for p in reference.parameters())
    assert float(inner_loss(outer, inner)) == pytest.approx(float(loss.detach()))
    before = [p.detach().clone() for p in outer.parameters]
    Engine([outer, inner], QUIET).step()
    assert all(not torch.equal(old, new) for old, new in zip(before, outer.parameters, strict=True))


def inner_loss(outer: Hyperparameters, inner: Paced) -> Tensor:
    for problem in (outer, inner):
        problem.attach({"outer": outer, "inner": inner})
    return inner.evaluate_loss(data(30, 0)[0])[0].detach()


# --- methods, and misuse ----------------------------------------------------------------------------------------------

FOLLOWING = ("pzobo", "unrolled")


@pytest.mark.parametrize("method", available_methods())
def test_methods_that_do_not_follow_the_updates_are_refused(method: str) -> None:
    if method not in FOLLOWING:
        with pytest.raises(ConfigError, match=rf"'{method}'.*does not depend on the learning rates"):
            problems(network(), sgd(RATE), hypergradient=method)
        return
    outer, inner = problems(network(), sgd(RATE), hypergradient=method)
    torch.manual_seed(0)
    Engine([outer, inner], QUIET, "exact").run(2)  # the engine's own method is not used
    assert all(torch.isfinite(p).all() and p.any() for p in outer.parameters)


def test_the_derivative_of_the_solution_is_zero() -> None:
    """Why they are refused: it has no information on the rates."""
    model = nn.Linear(5, 3).double()
    decay = WeightDecay(model, initial=0.1).requires_grad_(False)
    outer, inner = problems(model, sgd(1.0), "model", steps=400, decay=decay)
    engine = Engine([outer, inner], QUIET)
    engine.step()
    found = engine.hypergradient()
    assert abs(float(found.grad["rate.log.all"])) < 1e-9 < abs(float(found.direct["rate.log.all"]))


@pytest.mark.parametrize("reference", ["exact", "central_difference"])
def test_updates_that_arrive_have_the_hypergradient_of_the_solution(reference: Any) -> None:
    """Of the decays it is the implicit derivative, of the rates zero: the displaced problem is checked."""
    model = nn.Linear(5, 3).double()
    decay = WeightDecay(model, per="tensor", initial=0.1)
    outer, inner = problems(model, sgd(1.0), "tensor", steps=400, outer_optimizer=sgd(0.0), decay=decay)
    engine = Engine([outer, inner], QUIET)
    engine.step()
    report = hypergradcheck(engine, reference=reference, rtol=1e-5)
    assert report.passed, report
    few = Engine(list(problems(nn.Linear(5, 3).double(), sgd(1.0), "tensor", steps=2, outer_optimizer=sgd(0.0))), QUIET)
    few.step()
    assert not hypergradcheck(few, rtol=1e-2).passed  # after few updates the rates matter, and the check says no


def test_what_makes_no_sense_is_refused() -> None:
    bad: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
        (lambda m: LearningRate(m, initial=0.0), ConfigError, r"LearningRate\.initial .* above 0"),
        (lambda m: LearningRate(m, per="layer"), UnknownNameError, r"LearningRate\.per 'layer'"),
        (lambda m: Paced(m, optimizer=sgd(0.1, weight_decay=0.1)), ConfigError, "weight_decay of SGD would shrink"),
        (lambda m: Paced(m, optimizer=torch.optim.SGD(m.parameters(), lr=0.1)), ConfigError, "lambda params"),
        (lambda m: Paced(m, optimizer=torch.optim.Adadelta), ConfigError, "SGD, Adam,.*is Adadelta"),
        (lambda m: Paced(m, optimizer=sgd(0.1), reset="initial"), ConfigError, "anew and takes no reset"),
        (lambda m: Paced(m, optimizer=sgd(0.1), weight_decay=0.1), ConfigError, "Paced takes its .*WeightDecay"),
        (lambda m: Paced(m, optimizer=sgd(0.1), stop=3), ConfigError, "takes no stop"),
        (lambda m: Paced(m, optimizer=sgd(0.1), max_grad_norm=1.0), ConfigError, "takes no max_grad_norm"),
        (lambda m: Paced(m, optimizer=sgd(0.1), params="nothing"), UnknownNameError, "'nothing'"),
        (lambda m: Paced(m, optimizer=sgd(0.1), hypergradient="cg"), ConfigError, "'conjugate_gradient'.*unrolled"),
    ]
    for make, kind, message in bad:
        model = network()
        with pytest.raises(kind, match=message):
            make(model)
        assert len(list(model.parameters())) == 4, message  # nothing was taken from the model


def test_rates_need_a_paced_problem_and_a_paced_problem_rates() -> None:
    model = network()
    outer = Hyperparameters({"rate": LearningRate(model)}, optimizer=sgd(1.0), data=data(20, 1))
    with pytest.raises(GraphError, match="part 'rate'.*needs an inner problem of class Paced, not Tuned"):
        Engine([outer, Tuned(model, optimizer=sgd(0.1), data=data(30, 0))], QUIET)
    outer = Hyperparameters({"smoothing": LabelSmoothing()}, optimizer=sgd(1.0), data=data(20, 1))
    with pytest.raises(GraphError, match="no LearningRate"):
        Engine([outer, Paced(network(), optimizer=sgd(0.1), data=data(30, 0))], QUIET)
    other = LearningRate(nn.Linear(5, 3))
    outer = Hyperparameters({"rate": other}, optimizer=sgd(1.0), data=data(20, 1))
    with pytest.raises(ParameterError, match="'weight'.*missing"):
        Engine([outer, Paced(network(), optimizer=sgd(0.1), data=data(30, 0))], QUIET)
