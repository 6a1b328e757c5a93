"""Hyper-parameters learned by the validation loss, against closed forms and exact hypergradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import Engine, EngineConfig, Problem, hypergradcheck
from bilevel.errors import ConfigError, GraphError, LossError, ParameterError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.problems import Training
from bilevel.problems.hyperparameters import (
    Augmentation,
    Hyperparameter,
    Hyperparameters,
    LabelSmoothing,
    Noise,
    PerParameter,
    RandomBrightness,
    RandomShift,
    Tasks,
    TaskWeights,
    Tuned,
    WeightDecay,
    uniform,
)

QUIET = EngineConfig(progress=False)


def sgd(rate: float, **options: Any) -> Any:
    return lambda params: torch.optim.SGD(params, lr=rate, **options)


def examples(
    count: int, features: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    y = (x[:, :classes] + 0.5 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).argmax(1)
    return [(x.to(dtype), y)]


def images(count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return [(x.to(dtype), torch.randint(0, 3, (count,), generator=generator))]


def linear(features: int = 4, classes: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).to(dtype)


def everything(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Hyperparameter]:
    parts: dict[str, Hyperparameter] = {
        "decay": WeightDecay(model, per="element", initial=0.1),
        "smoothing": LabelSmoothing(0.2),
        "noise": Noise(0.3),
        "brightness": RandomBrightness(0.2),
        "shift": RandomShift(0.7),
    }
    return {name: part.to(dtype) for name, part in parts.items()}


def engine(
    method: Any = "conjugate_gradient",
    dtype: torch.dtype = torch.float64,
    steps: int = 1,
    config: EngineConfig = QUIET,
) -> Engine:
    """All parts that a classifier can have, on images."""
    model = linear(16, dtype=dtype)
    outer = Hyperparameters(everything(model, dtype), optimizer=sgd(0.1), data=images(20, dtype, seed=1))
    inner = Tuned(model, optimizer=sgd(0.5), data=images(30, dtype), steps=steps)
    return Engine([outer, inner], config, method)


# --- the hypergradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", PerParameter.choices)
def test_decays_have_the_hypergradient_of_ridge_regression(per: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in (12, 9))
    y, u = (torch.randn(count, 1, generator=generator, dtype=torch.float64) for count in (12, 9))
    model = nn.Linear(4, 1, bias=False).double()
    decay = WeightDecay(model, per=per, initial=0.3)
    outer = Hyperparameters({"decay": decay}, data=[(v, u)])
    inner = Tuned(model, criterion=F.mse_loss, optimizer=sgd(0.1), data=[(x, y)])

    assert sum(p.numel() for p in decay.parameters()) == (1 if per in ("model", "tensor") else 4)

    def solution(rho: Tensor) -> Tensor:  # of (1/n)‖Xw − y‖² + ½ Σ exp(ρ) w²
        return torch.linalg.solve(x.T @ x / 6 + torch.diag(rho.exp().expand(4)), x.T @ y / 6)

    rho = next(decay.parameters()).detach().flatten().requires_grad_()
    with torch.no_grad():
        model.weight.copy_(solution(rho).T)
    (expected,) = torch.autograd.grad(F.mse_loss(v @ solution(rho), u), rho)
    found = Engine([outer, inner], QUIET, "exact").hypergradient().grad
    torch.testing.assert_close(next(iter(found.values())).flatten(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "method",
    ["conjugate_gradient", "exact", {"method": "neumann", "terms": 400}, {"method": "gmres", "curvature": "hessian"}],
    ids=str,
)
def test_all_parts_together_have_the_exact_hypergradient(method: Any, dtype: torch.dtype) -> None:
    report = hypergradcheck(engine(method, dtype), raise_on_failure=True)
    assert report.asymmetry < 1e-6  # nothing is detached in the training loss
    assert report.hidden < 1e-3
    assert set(report.per_parameter) == {
        *("decay.log.1/weight", "decay.log.1/bias", "smoothing.logit", "noise.log", "brightness.log", "shift.log"),
    }
    assert all(part.norm > 1e-6 for part in report.per_parameter.values())


def test_unrolled_updates_arrive_at_the_same_hypergradient() -> None:
    model = linear()
    parts = {"decay": WeightDecay(model, per="element", initial=0.1), "smoothing": LabelSmoothing(0.2).double()}
    outer = Hyperparameters(parts, optimizer=sgd(1e-6), data=examples(20, 4, 3, seed=1))
    inner = Tuned(model, optimizer=sgd(1.0, momentum=0.5), data=examples(30, 4, 3), steps=200)
    solved = Engine([outer, inner], QUIET, "unrolled")
    solved.step()
    hypergradcheck(solved, raise_on_failure=True)


def test_unrolled_is_the_derivative_of_a_run_with_its_random_augmentation() -> None:
    """Central differences over whole runs, which draw the same numbers."""

    def run(shift: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
        one = engine("unrolled", steps=3)
        outer = one.problems["hyperparameters"]
        found = dict(zip(outer.parameter_names, outer.parameters, strict=True))
        with torch.no_grad():
            for name, step in shift.items():
                found[name] += step
        before = {name: p.detach().clone() for name, p in found.items()}
        torch.manual_seed(3)
        loss = one.step().losses["hyperparameters"]
        return loss, {name: (before[name] - p.detach()) / 0.1 for name, p in found.items()}  # the rate is 0.1

    gradient, step = run({})[1], 1e-5
    for name in ("smoothing.logit", "noise.log", "brightness.log", "shift.log"):
        expected = (run({name: step})[0] - run({name: -step})[0]) / (2 * step)
        assert float(gradient[name]) == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    found = [
        engine({"method": "exact", "curvature": kind}).hypergradient().grad for kind in ("hessian", "gauss_newton")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", available_methods())
def test_every_method_learns_from_every_part(method: str) -> None:
    one = engine(method, steps=3)
    outer = one.problems["hyperparameters"]
    before = [p.detach().clone() for p in outer.parameters]
    for _ in range(2):
        one.step()
    for name, old, new in zip(outer.parameter_names, before, outer.parameters, strict=True):
        assert torch.isfinite(new).all(), name
        assert not torch.equal(old, new), name


# --- weight decay -----------------------------------------------------------------------------------------------------


def test_a_decay_an_element_finds_what_is_irrelevant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 10, generator=generator)
    y = x[:, :3] @ torch.tensor([[2.0], [-1.0], [1.5]]) + 0.5 * torch.randn(80, 1, generator=generator)
    model = nn.Linear(10, 1, bias=False)
    decay = WeightDecay(model, per="element", initial=0.1, maximum=5.0)
    adam = lambda params: torch.optim.Adam(params, lr=0.2)  # noqa: E731
    outer = Hyperparameters({"decay": decay}, optimizer=adam, data=[(x[40:], y[40:])])
    inner = Tuned(model, criterion=F.mse_loss, optimizer=sgd(0.1), data=[(x[:40], y[:40])], steps=20)
    Engine([outer, inner], QUIET, "exact").run(60)
    found = decay.of("weight").detach().flatten()
    assert found[:3].max() < 0.1
    assert found[3:].median() > 1.0


def test_only_what_is_chosen_is_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    weights = dict(model.named_parameters())
    decay = WeightDecay(model, per="tensor", initial=0.5, params="*weight")
    assert list(decay.value()) == ["0.weight", "1.weight"]
    expected = 0.25 * sum(weights[f"{layer}.weight"].square().sum() for layer in (0, 1))
    torch.testing.assert_close(decay.penalty(weights), expected)
    assert not decay.penalty({name: torch.zeros_like(w) for name, w in weights.items()}).any()


def test_an_input_has_one_decay_for_all_that_it_feeds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Linear(4, 5))
    decay = WeightDecay(model, per="input", initial=1.0)
    shapes = {name: tuple(p.shape) for name, p in decay.named_parameters()}
    expected = {"0/weight": (1, 3, 1, 1), "0/bias": (), "1/weight": (1, 4), "1/bias": ()}
    assert shapes == {f"log.{name}": shape for name, shape in expected.items()}
    with torch.no_grad():
        decay.log.get_parameter("1/weight")[0, 2] = -80.0  # input 2 is free
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    weights["1.weight"][:, 2] = 5.0
    assert float(decay.penalty(weights).detach()) < 1e-20
    weights["1.weight"][:, 1] = 1.0
    assert float(decay.penalty(weights).detach()) == pytest.approx(2.5)


def test_one_decay_is_the_optimisers_own() -> None:
    """torch's weight decay and a fixed one in the loss make the same updates."""
    weights = []
    for coupled in (0.2, 0.0):
        model = linear()
        decay = WeightDecay(model, initial=0.2 if coupled == 0.0 else 1e-12).requires_grad_(False)
        smoothing = LabelSmoothing(0.1).double()  # somebody has to learn
        outer = Hyperparameters({"decay": decay, "smoothing": smoothing}, data=examples(9, 4, 3, 1))
        assert outer.parameter_names == ("smoothing.logit",)
        outer = Hyperparameters(
            {"decay": decay, "smoothing": smoothing}, optimizer=sgd(1e-9), data=examples(9, 4, 3, 1)
        )
        inner = Tuned(model, optimizer=sgd(0.1, weight_decay=coupled), data=examples(9, 4, 3), steps=5)
        Engine([outer, inner], QUIET, "identity").run(2)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-9)


def test_decays_stay_below_their_maximum() -> None:
    model = linear()
    parts: dict[str, Hyperparameter] = {
        "decay": WeightDecay(model, per="element", initial=0.1, maximum=0.5),
        "free": WeightDecay(model, per="element", initial=0.1),
    }
    outer = Hyperparameters(parts, optimizer=sgd(100.0), data=examples(20, 4, 3, 1))
    inner = Tuned(model, optimizer=sgd(0.1), data=examples(30, 4, 3), steps=5)
    Engine([outer, inner], QUIET, "identity").run(3)
    values = outer.evaluate()
    assert values["decay/max"] == pytest.approx(0.5)
    assert values["free/max"] > 0.5
    assert values["decay/min"] < 0.5  # the bound is one element's, not the tensor's


def test_unbounded_parts_project_nothing() -> None:
    model = linear()
    assert not Hyperparameters({"smoothing": LabelSmoothing()}).projects
    assert Hyperparameters({"decay": WeightDecay(model)}).projects


# --- label smoothing --------------------------------------------------------------------------------------------------


@given(smoothing=st.floats(1e-4, 0.999), shape=st.sampled_from([(5, 4), (3, 4, 2, 2), (2, 4, 3)]))
def test_smoothing_is_torchs(smoothing: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (shape[0], *shape[2:]), generator=generator)
    part = LabelSmoothing(smoothing).double()
    found = F.cross_entropy(logits, part.targets(labels, logits, ""))
    s = float(part.value().detach())
    assert s == pytest.approx(smoothing, rel=1e-5)
    expected = F.cross_entropy(logits, labels, label_smoothing=s)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(found, part.logit)  # the loss is linear in s
    rise = F.cross_entropy(logits, labels, label_smoothing=1.0) - F.cross_entropy(logits, labels)
    torch.testing.assert_close(slope, s * (1 - s) * rise, rtol=1e-9, atol=1e-12)


@given(logit=st.floats(-1e4, 1e4))
def test_smoothing_stays_within_its_bounds(logit: float) -> None:
    part = LabelSmoothing()
    with torch.no_grad():
        part.logit.fill_(logit)
    assert 0.0 <= float(part.value().detach()) <= 1.0


# --- augmentation -----------------------------------------------------------------------------------------------------


@given(row=st.floats(-3, 3), column=st.floats(-3, 3))
def test_a_shift_interpolates_as_grid_sample_does(row: float, column: float) -> None:
    image = torch.rand(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = RandomShift(3.0).double()
    draws = iter([torch.full((1, 1, 1, 1), row / 3).double(), torch.full((1, 1, 1, 1), column / 3).double()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bilevel.problems.hyperparameters.augmentation.uniform", lambda inputs: next(draws))
        found = part.inputs(image).detach()
    move = torch.tensor([[[1.0, 0.0, 2 * column / 3], [0.0, 1.0, 2 * row / 4]]], dtype=torch.float64)
    grid = F.affine_grid(move, [1, 2, 5, 4], align_corners=True)
    expected = F.grid_sample(image, grid, align_corners=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Noise, RandomBrightness, RandomShift])
def test_augmentation_is_differentiable_in_its_strength(kind: type[Augmentation]) -> None:
    x = images(6)[0][0]
    part = kind(0.4).double()

    def augmented(log: Tensor) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = torch.func.functional_call(part, {"log": log}, (x,))
        return result

    part.forward = part.inputs  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(augmented, (part.log,))
    assert torch.autograd.gradgradcheck(augmented, (part.log,))
    torch.testing.assert_close(augmented(torch.tensor(-80.0).double()), x)  # no strength, no change


def test_strengths_mean_what_they_say() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4000, 1, 3, 3)
    assert float(Noise(0.3).inputs(x).std().detach()) == pytest.approx(0.3, rel=0.02)
    brightness = RandomBrightness(0.3).inputs(x).detach()
    assert float(brightness.abs().max()) == pytest.approx(0.3, rel=0.01)
    assert float(brightness.std((1, 2, 3)).max()) < 1e-6  # one draw an example
    draws = uniform(x)
    assert draws.shape == (4000, 1, 1, 1)
    assert float(draws.std()) == pytest.approx(1 / math.sqrt(3), rel=0.03)


def test_validation_sees_neither_augmentation_nor_smoothing_nor_decay() -> None:
    one = engine()
    outer, inner = one.problems["hyperparameters"], one.problems["tuned"]
    x, y = images(20, seed=1)[0]
    assert float(outer.evaluate_loss((x, y))[0].detach()) == float(F.cross_entropy(inner(x), y).detach())
    assert float(inner.evaluate_loss((x, y))[0].detach()) > float(F.cross_entropy(inner(x), y).detach())


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = engine(steps=2)
    torch.manual_seed(0)
    for _ in range(2):
        whole.step()
    whole.save(tmp_path / "state")
    losses = [whole.step().losses for _ in range(3)]
    again = engine(steps=2)
    torch.manual_seed(5)
    again.load(tmp_path / "state")
    assert [again.step().losses for _ in range(3)] == losses


# --- tasks ------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """All tasks ask for the same linear function, up to its size: the inner problem is strictly convex."""

    sizes = {"main": 1.0, "help": 2.0, "noise": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: size * self.body(x) for name, size in self.sizes.items()}


def tasks_engine(method: Any, steps: int = 5, dtype: torch.dtype = torch.float64) -> Engine:
    """A main task with few examples, one that shares its features, and noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    good = x[:, :1] - x[:, 1:2]
    targets = {
        "main": good + 1.0 * torch.randn(40, 1, generator=generator, dtype=torch.float64),
        "help": 2 * good,
        "noise": 3 * torch.randn(40, 1, generator=generator, dtype=torch.float64),
    }
    targets = {name: target.to(dtype) for name, target in targets.items()}
    x = x.to(dtype)
    criterion = Tasks(dict.fromkeys(targets, F.mse_loss), main="main")
    model = Shared().to(dtype)
    decay = WeightDecay(model, initial=0.05).requires_grad_(False)
    outer = Hyperparameters(
        {"weights": TaskWeights(criterion).to(dtype), "decay": decay},
        optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        data=[(x[12:], {"main": good[12:].to(dtype)})],
    )
    train = x[:12], {name: target[:12] for name, target in targets.items()}
    inner = Tuned(model, criterion=criterion, optimizer=sgd(0.05, momentum=0.8), data=[train], steps=steps)
    return Engine([outer, inner], QUIET, method)


def test_task_weights_have_the_exact_hypergradient() -> None:
    for method in ("exact", "conjugate_gradient", "unrolled"):
        solved = tasks_engine(method, steps=200)
        solved.step()
        hypergradcheck(solved, raise_on_failure=True)


def test_task_weights_favour_the_task_that_helps() -> None:
    one = tasks_engine("exact", steps=10)
    one.run(50)
    weights = one.problems["hyperparameters"].evaluate()
    assert weights["weights/help"] > 1.5
    assert weights["weights/noise"] < 0.5
    assert sum(weights[f"weights/{task}"] for task in ("main", "help", "noise")) == pytest.approx(3.0)


def test_the_training_loss_is_the_weighted_sum_and_validation_the_main_task() -> None:
    one = tasks_engine("identity")
    outer, inner = one.problems["hyperparameters"], one.problems["tuned"]
    assert isinstance(outer, Hyperparameters)
    assert isinstance(inner, Tuned)
    with torch.no_grad():
        outer.parts["weights"].logits.copy_(torch.tensor([0.0, math.log(2.0), math.log(3.0)]))
    batch = torch.randn(4, 6).double(), {name: torch.randn(4, 1).double() for name in ("main", "help", "noise")}
    each = {name: float(F.mse_loss(inner(batch[0])[name], batch[1][name]).detach()) for name in batch[1]}
    penalty = torch.as_tensor(outer.parts["decay"].penalty(inner.named_weights())).detach()
    expected = 0.5 * each["main"] + each["help"] + 1.5 * each["noise"] + float(penalty)
    assert float(inner.evaluate_loss(batch)[0].detach()) == pytest.approx(expected)
    assert float(outer.evaluate_loss(batch)[0].detach()) == pytest.approx(each["main"])


def test_smoothing_can_be_for_some_tasks() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 1)}).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: part(x) for name, part in self.parts.items()}

    criterion = Tasks({"a": F.cross_entropy, "b": F.mse_loss})
    x, y = examples(10, 4, 3)[0]
    batch = x, {"a": y, "b": x[:, :1]}
    for tasks, refused in ((["a"], False), ("a", False), (None, True)):
        outer = Hyperparameters({"smoothing": LabelSmoothing(tasks=tasks).double()}, data=[batch])
        inner = Tuned(Both(), criterion=criterion, optimizer=sgd(0.1), data=[batch])
        if refused:
            with pytest.raises(LossError, match="label smoothing needs class indices.*task 'b'"):
                Engine([outer, inner], QUIET, "identity")
        else:
            Engine([outer, inner], QUIET, "identity").hypergradient()


def test_smoothing_for_a_task_that_there_is_not_is_refused() -> None:
    x, y = examples(10, 4, 3)[0]
    parts = {"smoothing": LabelSmoothing(tasks=["head"]).double(), "noise": Noise().double()}
    outer = Hyperparameters(parts, data=[(x, y)])
    with pytest.raises(ConfigError, match="part 'smoothing' is for the tasks head, .*criterion=Tasks"):
        Engine([outer, Tuned(linear(), optimizer=sgd(0.1), data=[(x, y)])], QUIET, "identity")
    inner = Tuned(linear(), criterion=Tasks({"heads": F.cross_entropy}), optimizer=sgd(0.1), data=[(x, y)])
    for problem in (outer, inner):
        problem.attach({"hyperparameters": outer, "tuned": inner})
    with pytest.raises(UnknownNameError, match="task of part 'smoothing' 'head': did you mean 'heads'"):
        inner.evaluate_loss((x, y))


# --- a user's own, and misuse -----------------------------------------------------------------------------------------


class Bridge(Hyperparameter):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def penalty(self, weights: Any) -> Tensor:
        return self.log.exp() * sum(weight.abs().pow(3.0).sum() for weight in weights.values())


def test_a_part_of_ones_own_is_one_hook() -> None:
    model = linear()
    outer = Hyperparameters({"bridge": Bridge()}, data=examples(20, 4, 3, 1))
    inner = Tuned(model, optimizer=sgd(0.2), data=examples(30, 4, 3))
    hypergradcheck(Engine([outer, inner], QUIET, "exact"), raise_on_failure=True)
    assert outer.evaluate() == {"bridge/log": 0.0}


def test_what_makes_no_sense_is_refused() -> None:
    model = linear()
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: WeightDecay(model, initial=0.0), ConfigError, r"WeightDecay\.initial .* above 0"),
        (lambda: WeightDecay(model, per="layer"), UnknownNameError, r"WeightDecay\.per 'layer'.*'input', 'model'"),
        (lambda: WeightDecay(model, params="*wieght"), UnknownNameError, r"'\*wieght'.*1\.weight"),
        (lambda: WeightDecay(model, initial=1.0, maximum=0.5), ConfigError, r"WeightDecay\.maximum"),
        (lambda: LabelSmoothing(0.0), ConfigError, r"LabelSmoothing\.initial .* above 0"),
        (lambda: LabelSmoothing(1.0), ConfigError, r"LabelSmoothing\.initial must be below 1"),
        (lambda: Noise(-0.1), ConfigError, r"Noise\.initial"),
        (lambda: Tasks({}), ConfigError, "at least one"),
        (lambda: Tasks({"a": F.mse_loss}, main="b"), UnknownNameError, "main task 'b'"),
        (lambda: Tasks({"a": F.mse_loss}, main=[]), ConfigError, "names no task"),
        (lambda: TaskWeights(Tasks({"a": F.mse_loss})), ConfigError, "two tasks or more"),
        (lambda: Hyperparameters({}), ConfigError, "at least one Hyperparameter"),
        (lambda: Hyperparameters({"values": Noise()}), ConfigError, "'values' cannot be the name of a hyper-parameter"),
        (lambda: Hyperparameters({"a.b": Noise()}), ConfigError, "'a.b' cannot be the name"),
        (lambda: LabelSmoothing(tasks=[]), ConfigError, "names no task"),
        (lambda: Tuned(model, weight_decay=0.1), ConfigError, r"Tuned takes its decay .*add WeightDecay\(model"),
        (lambda: Hyperparameters({"lr": nn.Linear(1, 1)}), ConfigError, "'lr' must be a Hyperparameter, not Linear"),
        (lambda: Hyperparameters({"none": Hyperparameter()}), ConfigError, "enters the training loss nowhere.*penalty"),
    ]
    for make, kind, message in bad:
        with pytest.raises(kind, match=message):
            make()


def test_losses_say_what_does_not_fit() -> None:
    x, y = examples(6, 4, 3)[0]

    def evaluated(part: Hyperparameter, batch: Any, **settings: Any) -> None:
        outer = Hyperparameters({"part": part}, data=[(x, y)])
        inner = Tuned(linear(), optimizer=sgd(0.1), **settings)
        for problem in (outer, inner):
            problem.attach({"hyperparameters": outer, "tuned": inner})
        inner.evaluate_loss(batch)

    both = Tasks({"a": F.mse_loss, "b": F.mse_loss})
    bad: list[tuple[Hyperparameter, Any, dict[str, Any], type[Exception], str]] = [
        (LabelSmoothing(), (x, x), {}, LossError, "class indices"),
        (LabelSmoothing(), (x, y + 1), {}, LossError, "below 0 or above 2"),
        (Noise(), (y, y), {}, LossError, "floating-point inputs.*int64"),
        (RandomShift(), (x, y), {}, LossError, r"at least 3 dimensions.*\(6, 4\)"),
        (TaskWeights(both), (x, y), {}, LossError, "was given one loss.*criterion=Tasks"),
        (TaskWeights(both), (x, y), {"criterion": both}, LossError, "outputs must be a mapping.*'a'"),
        (WeightDecay(nn.Linear(4, 3)), (x, y), {}, ParameterError, "'weight'.*missing"),
        (WeightDecay(linear(5)), (x, y), {}, ParameterError, r"\(3, 5\).*\(3, 4\)"),
    ]
    for part, batch, settings, kind, message in bad:
        with pytest.raises(kind, match=message):
            evaluated(part, batch, **settings)
    with pytest.raises(LossError, match="targets must be a mapping.*'b'"):
        both({"a": x, "b": x}, {"a": x})


def test_a_tuned_problem_needs_its_hyperparameters() -> None:
    class Other(Problem):
        def loss(self, batch: Any) -> Tensor:
            return self.tuned.module[1].weight.square().sum() * self.module.weight.sum()

    inner = Tuned(linear(), optimizer=sgd(0.1), data=examples(5, 4, 3))
    with pytest.raises(GraphError, match="works with a Hyperparameters, of which its engine has 0"):
        Engine([Other(nn.Linear(1, 1).double()), inner], QUIET)
    plain = Training(linear(), optimizer=sgd(0.1), data=examples(5, 4, 3))
    outer = Hyperparameters({"smoothing": LabelSmoothing()}, data=examples(5, 4, 3))
    with pytest.raises(GraphError):  # a Training asks no hyper-parameters
        Engine([outer, plain], QUIET)
