"""Betty's hypergradient functions as methods: Betty's numbers exactly, and what is known to be wrong with them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import (
    ConjugateGradient,
    Engine,
    EngineConfig,
    Estimator,
    FiniteDifference,
    Hypergradient,
    Identity,
    Neumann,
    Problem,
    Status,
    as_estimator,
    hypergradcheck,
    hypergradient,
)
from bilevel.errors import BilevelWarning, ConfigError, NonFiniteError, UnknownNameError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import InnerProblem, available_methods
from bilevel.interop.betty.estimators import BettyCG, BettyDarts, BettyNeumann, BettySAMA
from bilevel.randomness import Replay
from tests.bilevel.strategies import DOUBLE, EPSILON, Sample, forall, make_quadratic, samples
from tests.contract.contract import STRUCTURES, EstimatorContract, flat, operator_norm, solve

ROOT = Path(__file__).parents[2]

hypergradients = pytest.importorskip("betty.hypergradient")

METHODS = [
    BettyDarts(),
    BettyDarts(0.3),
    BettyNeumann(),
    BettyNeumann(5, 0.1),
    BettyNeumann(0, 0.5),
    BettyCG(),
    BettyCG(3),
    BettyCG(4, 0.5),
    BettySAMA(),
    BettySAMA(0.1),
]


def bettys(method: Any) -> dict[str, Any]:
    """A method's fields under the names that Betty has for them."""
    kind = type(method)
    if kind in (BettyDarts, BettySAMA):
        name = "darts_alpha" if kind is BettyDarts else "sama_adam_alpha"
        return {name: method.alpha, "darts_multitask": False, "sama_multitask": False}
    prefix = "neumann" if kind is BettyNeumann else "cg"
    return {f"{prefix}_iterations": method.iterations, f"{prefix}_alpha": method.alpha}


# In an engine


class Mixture(Problem):
    """Outer: how much each of the inputs counts; validation loss."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Network(Problem):
    """Inner: two layers, in a parameter group each."""

    def loss(self, batch: Any) -> Tensor:
        return weighted(self.module, self.mixture.module, batch)


def weighted(network: nn.Module, mixture: nn.Module, batch: Any) -> Tensor:
    logits = network(mixture(batch[0]))
    decay = sum(p.square().sum() for p in network.parameters())
    return F.cross_entropy(logits, batch[1]) + 0.02 * decay


def points(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(24, 4, generator=generator, dtype=DOUBLE), torch.randint(0, 3, (24,), generator=generator)


def modules() -> tuple[nn.Module, nn.Sequential]:
    torch.manual_seed(0)
    mixture = nn.Linear(4, 4).to(DOUBLE)
    return mixture, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DOUBLE)


def groups(network: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": list(network[0].parameters()), "lr": 0.03},
        {"params": list(network[2].parameters()), "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4},
    ]


def sgd_groups(network: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": group["params"], "lr": group["lr"]} for group in groups(network)]


INNER_OPTIMIZERS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "Adam": lambda network: torch.optim.Adam(groups(network), lr=0.5),
    "AdamW": lambda network: torch.optim.AdamW(groups(network), lr=0.5, weight_decay=0.1),
    "Adam, decay": lambda network: torch.optim.Adam(groups(network), lr=0.5, weight_decay=0.1),
    "SGD": lambda network: torch.optim.SGD(sgd_groups(network), lr=0.5, momentum=0.5),
}


def engine_of(method: Any, optimizer: str = "Adam") -> Engine:
    mixture, network = modules()
    outer = Mixture(mixture, optimizer=torch.optim.Adam(mixture.parameters(), lr=0.02), data=[points(2)])
    inner = Network(network, optimizer=INNER_OPTIMIZERS[optimizer](network), data=[points(1)])
    return Engine([outer, inner], EngineConfig(progress=False), hypergradient=method)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("optimizer", INNER_OPTIMIZERS)
def test_an_engine_s_hypergradient_is_what_betty_s_function_returns(method: Any, optimizer: str) -> None:
    engine = engine_of(method, optimizer)
    for _ in range(4):
        engine.step()
    mixture, network = (engine.problems[name].module for name in ("mixture", "network"))
    inner, params = engine.problems["network"].optimizer, list(network.parameters())
    last_gradient = torch.autograd.grad(weighted(network, mixture, points(1)), params)  # of the update that comes
    engine.step()
    states = {p: {**inner.state[p], "last_grad": g} for p, g in zip(params, last_gradient, strict=True)}
    values = [p.detach().clone() for p in params]
    level = SimpleNamespace(
        paths=[],
        config=SimpleNamespace(**bettys(method)),
        cur_batch=points(1),
        training_step_exec=lambda batch: weighted(network, mixture, batch),
        parameters=lambda: params,
        trainable_parameters=lambda: params,
        meta_trainable_parameters=lambda: params,
        _strategy="default",
        optimizer=inner,
        get_opt_param_group_for_param=lambda p: next(
            group for group in inner.param_groups if any(q is p for q in group["params"])
        ),
        get_opt_state_for_param=lambda p: states[p],
    )
    above = SimpleNamespace(trainable_parameters=lambda: list(mixture.parameters()))
    v = torch.autograd.grad(F.cross_entropy(network(points(2)[0]), points(2)[1]), params)
    expected = getattr(hypergradients, method.function)(v, level, above, False)
    with torch.no_grad():  # Betty's displacements leave rounding behind
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    found = engine.hypergradient().grad
    assert all(torch.equal(p, value) for p, value in zip(params, values, strict=True))  # and ours none
    assert any(float(part.norm()) > 1e-6 for part in expected)
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * float(theirs.norm()) + 1e-14)


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_run_is_the_run_that_betty_s_own_engine_makes(method: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = pytest.importorskip("betty.configs")
        engines = pytest.importorskip("betty.engine")
        problems = pytest.importorskip("betty.problems")

    class Above(problems.ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.below.module(batch[0]), batch[1])

    class Below(problems.ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return weighted(self.module, self.above.module, batch)

        def param_groups(self) -> list[dict[str, Any]]:
            return groups(self.module)

    steps, (mixture, network) = 5, modules()
    above = Above(
        name="above",
        config=configs.Config(),
        module=mixture,
        optimizer=torch.optim.Adam(mixture.parameters(), lr=0.02),
        train_data_loader=[points(2)],
    )
    below = Below(
        name="below",
        config=configs.Config(type=method.function, unroll_steps=1, **bettys(method)),
        module=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=0.5),
        train_data_loader=[points(1)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines.Engine(
            config=configs.EngineConfig(train_iters=steps, strategy="cpu"),
            problems=[above, below],
            dependencies={"u2l": {above: [below]}, "l2u": {below: [above]}},
        ).run()
    engine = engine_of(method)
    start = [p.detach().clone() for p in engine.problems["mixture"].parameters]
    for _ in range(steps):
        engine.step()
    for name, module in (("mixture", mixture), ("network", network)):
        for ours, theirs in zip(engine.problems[name].parameters, module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert not torch.equal(start[0], engine.problems["mixture"].parameters[0])


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    whole, first, second = (engine_of("betty:sama") for _ in range(3))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    for _ in range(2):
        second.step()
    for ours, theirs in zip(second.problems["mixture"].parameters, whole.problems["mixture"].parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_sama_needs_an_update_and_a_rule_for_its_optimizer() -> None:
    with pytest.raises(ConfigError, match=r"'betty:sama' reads the state.*take a step first"):
        hypergradient(*QUADRATIC, torch.ones(3), torch.ones(3), "betty:sama")
    engine = engine_of("betty:sama")
    with pytest.raises(ConfigError, match="take a step first"):
        engine.hypergradient()
    mixture, network = modules()
    outer = Mixture(mixture, optimizer=torch.optim.SGD(mixture.parameters(), lr=0.02), data=[points(2)])
    inner = Network(network, optimizer=torch.optim.RMSprop(network.parameters()), data=[points(1)])
    engine = Engine([outer, inner], EngineConfig(progress=False), hypergradient="betty:sama")
    with pytest.raises(ConfigError, match=r"Betty's function has nothing for RMSprop\. Use 'sama'"):
        engine.step()


class Top(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.middle.module.weight - 1.0).square().sum()


class Middle(Problem):
    def loss(self, batch: Any) -> Tensor:
        bound = self.top.module.weight.exp().sum() * self.module.weight.square().sum()
        return (self.bottom.module.weight - 2.0).square().sum() + bound


class Bottom(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.module.weight - self.middle.module.weight).square().sum()


@pytest.mark.parametrize("method", ["betty:darts", "betty:neumann", "betty:cg", "betty:sama"])
def test_middle_levels_are_refused(method: str) -> None:
    def level(kind: type[Problem], **settings: Any) -> Problem:
        module = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
        return kind(module, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **settings)

    def engine(middle: str, bottom: str) -> Engine:
        levels = [level(Top), level(Middle, hypergradient=middle), level(Bottom, hypergradient=bottom)]
        return Engine(levels, EngineConfig(progress=False))

    engine("identity", method).step()
    with pytest.raises(ConfigError, match=rf"'{method}' is for inner problems with none below.*'middle' has some"):
        engine(method, "identity").step()


# As functions: where Betty is right, and where it is not


def inner_quadratic(w: Tensor, lam: Tensor) -> Tensor:
    return (CURVATURES.to(w.dtype) * w.square()).sum() / 2 - w @ lam


def outer_quadratic(w: Tensor, lam: Tensor) -> Tensor:
    return w.sum() + w.square().sum()


CURVATURES = torch.tensor([0.5, 1.0, 1.5], dtype=DOUBLE)
QUADRATIC = (inner_quadratic, outer_quadratic)


def at_solution(method: Any) -> Hypergradient:
    lam = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    return hypergradient(*QUADRATIC, lam / CURVATURES, lam, method)


def error(method: Any) -> float:
    exact = at_solution("exact").grad
    return float((at_solution(method).grad - exact).norm() / exact.norm())


def test_neumann_is_ours_with_a_fixed_step_size() -> None:
    for terms, step in ((0, 0.3), (3, 1.0), (80, 0.9)):
        theirs, ours = at_solution(BettyNeumann(terms, step)), at_solution(Neumann(terms, step))
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-12, atol=1e-14)
        assert theirs.info.residual == pytest.approx(ours.info.residual, rel=1e-6, abs=1e-12) or terms == 0
    assert error(BettyNeumann(80, 0.9)) < 1e-12
    assert math.isnan(at_solution(BettyNeumann(0)).info.residual)


def test_a_neumann_series_that_diverges_is_told() -> None:
    # (1 − 4 · 1.5)¹¹, and nothing is said of it in Betty.
    result = at_solution(BettyNeumann(10, 4.0))
    assert error(BettyNeumann(10, 4.0)) > 1e5
    assert result.info.status is Status.DIVERGED
    assert result.info.residual > 1e5
    assert at_solution(BettyNeumann(10, 0.5)).info.status is Status.STOPPED_AT_CAP


def test_cg_is_right_for_one_iteration_only() -> None:
    for alpha in (1.0, 0.5):  # which cancels in the first
        torch.testing.assert_close(
            at_solution(BettyCG(1, alpha)).grad,
            at_solution(ConjugateGradient(max_iterations=1, rtol=0.0)).grad,
            rtol=1e-12,
            atol=1e-14,
        )
    assert not at_solution(BettyCG()).info.message
    # Three iterations solve a system of three unknowns.
    assert error(ConjugateGradient(max_iterations=3, rtol=0.0)) < 1e-10
    assert error(BettyCG(3)) > 0.05
    assert error(BettyCG(3, 0.5)) > 0.5
    wrong = at_solution(BettyCG(3)).info
    assert wrong.residual > 0.01
    assert "wrong beyond one iteration; 'conjugate_gradient' is right" in wrong.explain()
    assert at_solution(BettyCG(3, 0.5)).info.status is Status.DIVERGED


def test_the_residual_is_that_of_the_system() -> None:
    lam = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    v = 1 + 2 * lam / CURVATURES
    for method in (BettyCG(), BettyCG(2), BettyNeumann(2, 0.7)):
        result = at_solution(method)  # q itself, as f has −wᵀλ
        expected = float((CURVATURES * result.grad - v).norm() / v.norm())
        assert result.info.residual == pytest.approx(expected, rel=1e-9)


def test_cg_divides_zero_by_zero_where_nothing_is_left() -> None:
    lam = torch.ones(3, dtype=DOUBLE)
    losses = (lambda w, lam: (w - lam).square().sum() / 2), outer_quadratic  # solved by one iteration
    assert hypergradient(*losses, lam.clone(), lam, BettyCG(1)).grad == pytest.approx(3.0)
    spoilt = hypergradient(*losses, lam.clone(), lam, BettyCG(3))
    assert spoilt.grad.isnan().all()
    assert spoilt.info.status is Status.DIVERGED
    flat = hypergradient(losses[0], lambda w, lam: lam.sum() + 0 * w.sum(), lam.clone(), lam, BettyCG(1))
    assert flat.info.status is Status.DIVERGED


def test_hypergradcheck_tells_right_from_wrong() -> None:
    lam = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE)
    right = hypergradcheck(*QUADRATIC, lam / CURVATURES, lam, BettyNeumann(80, 0.9), rtol=1e-8)
    wrong = hypergradcheck(*QUADRATIC, lam / CURVATURES, lam, "betty:cg")
    assert right.passed
    assert not wrong.passed
    assert not hypergradcheck(*QUADRATIC, lam / CURVATURES, lam, BettyCG(3)).passed
    assert hypergradcheck(*QUADRATIC, lam / CURVATURES, lam, ConjugateGradient(max_iterations=3, rtol=0.0)).passed


def test_darts_is_a_central_difference_of_that_length() -> None:
    lam = torch.tensor([0.3, -0.2, 0.1], dtype=DOUBLE)
    losses = (lambda w, lam: (lam * w.sin() + w**4).sum()), outer_quadratic
    for alpha in (0.01, 0.4):
        theirs = hypergradient(*losses, lam.clone(), lam, BettyDarts(alpha)).grad
        ours = hypergradient(*losses, lam.clone(), lam, FiniteDifference(alpha)).grad
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
    exact = hypergradient(*losses, lam.clone(), lam, Identity()).grad
    assert 1e-3 < float((theirs - exact).norm() / exact.norm()) < 0.1


def test_what_rounding_swallows_is_told() -> None:
    w = torch.full((64,), 3.0, dtype=torch.bfloat16)
    losses = (lambda w, lam: (w - lam).square().sum() / 2), lambda w, lam: w.sum()
    assert hypergradient(*losses, w, w.clone(), BettyDarts(1e-3)).info.status is Status.INACCURATE
    assert hypergradient(*losses, w.double(), w.double(), BettyDarts(1e-3)).info.status is Status.NOT_APPLICABLE


def test_rounding_is_that_along_the_direction_which_sama_takes() -> None:
    # v is large where the rate is zero and rounding would swallow everything; Dv is not.
    class Above(Problem):
        def loss(self, batch: Any) -> Tensor:
            return 1e3 * self.below.module[0].sum() + self.below.module[1].sum()

    class Below(Problem):
        def loss(self, batch: Any) -> Tensor:
            huge, small = self.module
            return (1e-8 * huge).sum() + (small - self.above.module[0]).square().sum()

    above = nn.ParameterList([torch.full((2,), 0.1)])
    below = nn.ParameterList([torch.full((2,), 1e8), torch.full((2,), 0.2)])
    adam = torch.optim.Adam([{"params": [below[0]], "lr": 0.0}, {"params": [below[1]], "lr": 0.01}])
    problems = [
        Above(above, optimizer=torch.optim.SGD(above.parameters(), lr=0.01)),
        Below(below, optimizer=adam),
    ]
    engine = Engine(problems, EngineConfig(progress=False), hypergradient=BettySAMA(0.1))
    engine.step()
    info = engine.step().solves["below"]
    assert info.status is Status.NOT_APPLICABLE
    assert "alpha 0.1" in info.message


def test_products_are_averaged_over_ranks() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    for method in (BettyDarts(), BettyNeumann(), BettyCG()):
        values = []
        for factor in (1.0, 0.5):
            objective = FunctionObjective(
                lambda w, lam: inner_quadratic(w[0], lam[0]),
                "the inner problem",
                Replay(("cpu",)),
                PassCount(),
                lambda tensors, factor=factor: tuple(factor * part for part in tensors),
            )
            response = method.respond(InnerProblem(objective, leaves((w,)), leaves((w,))))
            values.append(response.pullback((torch.ones(3, dtype=DOUBLE),), {}).value[0])
        torch.testing.assert_close(values[1], values[0] / 2, rtol=1e-14, atol=0)


def test_all_passes_see_the_same_dropout_masks() -> None:
    # Betty's own do not: with new masks in each pass the difference holds the noise of the loss, over 2h.
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam * F.dropout(w, 0.5).square()).sum()

    lam = torch.linspace(1.0, 2.0, 40, dtype=DOUBLE)
    torch.manual_seed(0)
    theirs = hypergradient(inner, outer_quadratic, lam.clone(), lam, BettyDarts()).grad
    torch.manual_seed(0)
    ours = hypergradient(inner, outer_quadratic, lam.clone(), lam, FiniteDifference(0.01)).grad
    torch.testing.assert_close(theirs, ours, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("broken", [1, 2])
def test_nothing_is_displaced_when_a_pass_fails(broken: int) -> None:
    w, passes = torch.ones(3, dtype=DOUBLE), 0

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == broken:
            raise KeyError("data")
        return inner_quadratic(w, lam)

    with pytest.raises(KeyError):
        hypergradient(inner, outer_quadratic, w, w.clone(), BettyDarts())
    assert torch.equal(w, torch.ones(3, dtype=DOUBLE))


@pytest.mark.parametrize("method", [BettyNeumann(2), BettyCG(2)], ids=str)
def test_what_crashes_in_betty_is_refused_in_words(method: Any) -> None:
    def unused(w: Any, lam: Tensor) -> Tensor:
        return (w[0] - lam).square().sum()

    def linear(w: Any, lam: Tensor) -> Tensor:
        return (w[0] + w[1]).sum() + lam.sum()

    w, lam = [torch.ones(2), torch.ones(2)], torch.ones(2)
    for inner in (unused, linear):
        with pytest.raises(ConfigError, match=rf"'{method.name}'.*does not reach the gradient.*Use '{method.right}'"):
            hypergradient(inner, lambda w, lam: (w[0] + w[1]).sum(), w, lam, method)
        hypergradient(inner, lambda w, lam: (w[0] + w[1]).sum(), w, lam, method.right)  # takes it


# The contract, where Betty keeps it


class TestDartsContract(EstimatorContract):
    default = BettyDarts()
    roundoff = 1e-6
    float32_error = 1e-3
    bfloat16_error = None

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        return st.builds(BettyDarts, alpha=st.floats(1e-3, 1.0))

    def target(self, sample: Sample) -> Tensor:
        return sample.direct - sample.mixed.T @ sample.cotangent

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, BettyDarts)
        # ∂f/∂λ is at most quadratic in w for these samples: central differences are exact but for rounding.
        mixed, size, alpha = operator_norm(sample.mixed), float(sample.cotangent.norm()), estimator.alpha
        distance = float((1 - 1 / sample.eigenvalues).abs().max())
        rounding = 100 * EPSILON * size / alpha * (1 + mixed) * (1 + float(sample.inner.norm()) + alpha) ** 2
        return mixed * size * distance + rounding * (1 + float(sample.outer.exp().max()))

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        return 2, 2

    @pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
    def test_tiny_and_huge_outer_losses_scale_the_answer(self, factor: float) -> None:
        # Betty's 10⁻¹⁵ beside ‖v‖ makes the displacement of a tiny cotangent too short.
        if factor > 1e-15:
            super().test_tiny_and_huge_outer_losses_scale_the_answer(factor)
            return
        sample = make_quadratic(4, 3, 4.0, 1.0, 5)
        inner_loss, outer_loss = sample.losses(torch.float32)
        arguments = (lambda w, lam: outer_loss(w, lam) * factor, sample.inner.float(), sample.outer.float())
        found, right = (hypergradient(inner_loss, *arguments, method) for method in (self.default, FiniteDifference()))
        theirs, ours = (((result.grad - result.direct) / factor).norm() for result in (found, right))
        assert float(theirs) < 1e-3 * float(ours)
        assert found.info.status is Status.INACCURATE

    def test_inner_loss_must_depend_on_inner_parameters(self) -> None:
        # Betty's differences of a loss that does not are zero, without a word.
        lam = torch.ones(2)
        found = hypergradient(lambda w, lam: lam.square().sum(), outer_quadratic, lam.clone(), lam, self.default)
        assert torch.equal(found.grad, torch.zeros(2))


class TestNeumannContract(EstimatorContract):
    default = BettyNeumann(iterations=60)
    bfloat16_error = None

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])
        return st.builds(
            lambda iterations, share: BettyNeumann(iterations, share / largest),
            iterations=st.integers(0, 30),
            share=st.floats(0.05, 1.95),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, BettyNeumann)
        rate = float((1 - estimator.alpha * sample.eigenvalues).abs().max())
        tail = rate ** (estimator.iterations + 1) / float(sample.eigenvalues[0])
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * tail

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, BettyNeumann)
        assert result.info.products == estimator.iterations + 1
        return 1, 1 + result.info.products

    # Betty's crashes on an empty tensor too.

    @pytest.mark.parametrize("inner_structure", [name for name in STRUCTURES if "empty" not in name])
    def test_inner_parameters_may_be_held_in_any_structure(self, inner_structure: str) -> None:
        super().test_inner_parameters_may_be_held_in_any_structure(inner_structure)

    @forall(20, sample=samples(max_condition=100.0), cut=st.integers(0, 8), data=st.data())
    def test_splitting_a_tensor_changes_rounding_only(self, sample: Sample, cut: int, data: st.DataObject) -> None:
        size = len(sample.inner)
        sizes = [size] if size == 1 else [1 + cut % (size - 1), size - 1 - cut % (size - 1)]
        estimator, (inner_loss, outer_loss) = data.draw(self.estimators(sample)), sample.losses()
        losses = (lambda w, lam: inner_loss(flat(w), lam)), (lambda w, lam: outer_loss(flat(w), lam))
        parts = hypergradient(*losses, list(sample.inner.split(sizes)), sample.outer, estimator)
        self._close_on(sample, parts.grad, solve(sample, estimator).grad)

    def _refused(self, inner: Callable[..., Tensor], w: Any, lam: Any) -> None:
        with pytest.raises(ConfigError, match="does not reach the gradient"):
            hypergradient(inner, lambda w, lam: sum(part.sum() for part in (*w, *lam)), w, lam, self.default)

    def test_unused_parameters_have_no_influence(self) -> None:
        pair = [torch.ones(2), torch.ones(2)]
        self._refused(lambda w, lam: (w[0] - lam[0]).square().sum(), pair, [torch.ones(2)])
        self._refused(lambda w, lam: (w[0] - lam[0]).square().sum(), [torch.ones(2)], pair)

    def test_inner_parameter_that_only_the_outer_loss_uses_has_no_response(self) -> None:
        self.test_unused_parameters_have_no_influence()

    def test_inner_loss_without_outer_parameters_leaves_the_direct_part(self) -> None:
        self._refused(lambda w, lam: w[0].square().sum(), [torch.ones(2)], [torch.ones(2)])

    def test_inner_loss_must_depend_on_inner_parameters(self) -> None:
        self._refused(lambda w, lam: lam[0].square().sum(), [torch.ones(2)], [torch.ones(2)])


# Names, fields, and betty-ml itself


def test_they_are_registered_as_any_package_s_methods_are() -> None:
    known = {"betty:darts": BettyDarts, "betty:neumann": BettyNeumann, "betty:cg": BettyCG, "betty:sama": BettySAMA}
    found = {name: cls for name, cls in available_methods().items() if name.startswith("betty:")}
    assert found == known
    for name, cls in known.items():
        assert cls.name == name
        assert as_estimator(name) == cls()
        assert as_estimator(cls().describe()) == cls()
        assert cls.right in available_methods()
    with pytest.raises(UnknownNameError, match="unknown method 'betty:reinforce'.*'betty:darts'"):
        as_estimator("betty:reinforce")


def test_the_defaults_are_betty_s() -> None:
    config = pytest.importorskip("betty.configs").Config()
    for cls in (BettyDarts, BettyNeumann, BettyCG, BettySAMA):
        for name, value in bettys(cls()).items():
            assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (BettyDarts, {"alpha": 0.0}, "BettyDarts.alpha must be a finite number above 0, not 0.0"),
        (BettyDarts, {"alpha": "auto"}, "BettyDarts.alpha must be a finite number above 0, not 'auto'"),
        (BettySAMA, {"alpha": math.inf}, "BettySAMA.alpha must be a finite number above 0, not inf"),
        (BettyNeumann, {"iterations": -1}, "BettyNeumann.iterations must be an integer of at least 0, not -1"),
        (BettyNeumann, {"alpha": -1.0}, "BettyNeumann.alpha must be a finite number above 0"),
        (BettyCG, {"iterations": 0}, "BettyCG.iterations must be an integer of at least 1, not 0"),
        (BettyCG, {"iterations": 2.0}, "BettyCG.iterations must be an integer of at least 1, not 2.0"),
        (BettyCG, {"alpha": True}, "BettyCG.alpha must be a finite number above 0, not True"),
    ],
)
def test_bad_fields(cls: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)
    with pytest.raises(UnknownNameError, match=f"field of method '{cls.name}': 'multitask'"):
        as_estimator({"method": cls.name, "multitask": True})


@pytest.fixture
def without_betty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "betty"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "betty", None)


@pytest.mark.usefixtures("without_betty")
def test_without_betty_ml_names_are_listed_and_constructing_says_what_to_install() -> None:
    assert "betty:cg" in available_methods()
    for name in ("betty:darts", "betty:neumann", "betty:cg", "betty:sama"):
        with pytest.raises(ConfigError, match=rf"'{name}'.*pip install --no-deps --ignore-requires-python betty-ml==0"):
            as_estimator(name)


def test_another_package_of_that_name_is_no_betty_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "betty.hypergradient", SimpleNamespace())
    with pytest.raises(ConfigError, match="has no attribute 'cg'.*betty-ml==0.2.1"):
        BettyCG()


@pytest.mark.parametrize("code", ["import bilevel, bilevel.cli", "import bilevel.interop.betty.estimators"])
def test_importing_loads_nothing_of_betty_ml(code: str) -> None:
    code += "; from bilevel.hypergrad import available_methods; available_methods()"
    code += "; import sys; print(*[name for name in sys.modules if name.partition('.')[0] == 'betty'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_non_finite_inner_loss_is_an_error() -> None:
    w = torch.ones(2)
    for method in (BettyDarts(), BettyNeumann(), BettyCG()):
        with pytest.raises(NonFiniteError, match="inner problem is nan"):
            hypergradient(lambda w, lam: (w * lam).sum() * math.nan, outer_quadratic, w, w.clone(), method)


def test_an_engine_warns_of_a_solve_that_diverged() -> None:
    engine = engine_of(BettyNeumann(30, 30.0))
    with pytest.warns(BilevelWarning, match="betty:neumann: diverged"):
        engine.step()


def test_the_documentation_s_own_method_is_registered_by_an_entry_point(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class Rayleigh" in block)
    (entry,) = re.findall(r'^\[project.entry-points."bilevel.methods"\]\n"(.*?)" = "(.*?)"$', page, re.M)
    module = entry[1].partition(":")[0]
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(block.partition("# Use it")[0], encoding="utf-8")
    metadata = tmp_path / "your_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[bilevel.methods]\n{entry[0]} = {entry[1]}\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from bilevel.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "methods", entry[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "floor = 1e-06" in done.stdout
    assert "betty:darts" not in done.stdout
