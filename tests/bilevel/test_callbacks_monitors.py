"""Monitors: what they measure is what happened, against values computed apart from them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bilevel import Callback, Engine, EngineConfig, Hypergradient, Problem, SolveInfo, Status, StepResult
from bilevel.callbacks import History, HypergradientMonitor, LearningRateMonitor
from bilevel.errors import ConfigError
from tests.bilevel.test_callbacks import Inner, engine, sgd
from tests.bilevel.test_callbacks_logs import Saves


class Outer(Problem):
    """F = ‖w − 1‖² + ‖λ‖², so that ∂F/∂λ = 2 λ."""

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.inner.module.weight - 1.0).square().sum() + self.module.weight.square().sum()


def quadratic(*callbacks: Callback, **options: Any) -> Engine:
    """The inner solution is w = λ, H = I: dF/dλ = 2 (w − 1) + 2 λ, whatever the method."""
    torch.manual_seed(0)
    outer = Outer(nn.Linear(3, 2, bias=False).double(), optimizer=sgd, max_grad_norm=options.pop("clip", None))
    inner = Inner(nn.Linear(3, 2, bias=False).double(), optimizer=sgd)
    config = EngineConfig(progress=False, **options)
    return Engine([outer, inner], config, "conjugate_gradient", callbacks=callbacks)


class Expected(Callback):
    """The hypergradient in closed form, computed where the monitor sees its own."""

    def __init__(self) -> None:
        self.total: list[torch.Tensor] = []
        self.direct: list[torch.Tensor] = []

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Hypergradient) -> None:
        weight, solution = (engine.problems[name].module.weight.detach() for name in ("outer", "inner"))
        self.direct.append(2 * weight)
        self.total.append(2 * (solution - 1.0) + 2 * weight)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_hypergradients_are_measured_as_the_closed_form_says(clip: float | None) -> None:
    expected, monitor = Expected(), HypergradientMonitor()
    quadratic(expected, monitor, clip=clip).run(5)
    total, direct = expected.total, expected.direct
    history = monitor.history
    prefix = "hypergradient/outer/"
    close = {"rtol": 1e-10}
    np.testing.assert_array_equal(history.steps, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(history[prefix + "norm"], [t.norm() for t in total], **close)
    np.testing.assert_allclose(history[prefix + "direct_norm"], [d.norm() for d in direct], **close)
    implicit = [(t - d).norm() for t, d in zip(total, direct, strict=True)]
    np.testing.assert_allclose(history[prefix + "implicit_norm"], implicit, **close)
    cosines = [(a * b).sum() / a.norm() / b.norm() for a, b in itertools.pairwise(total)]
    np.testing.assert_allclose(history[prefix + "cosine"], [math.nan, *cosines], **close)


def test_solves_are_counted_by_status_and_told_by_the_monitor() -> None:
    class Solves(Callback):
        def __init__(self) -> None:
            self.seen: list[SolveInfo] = []

        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            self.seen.append(result.solves["inner"])

    solves, monitor = Solves(), HypergradientMonitor()
    quadratic(solves, monitor).run(4)
    assert monitor.status_counts == {"inner": {"converged": 4}}
    np.testing.assert_array_equal(monitor.history["solve/inner/residual"], [info.residual for info in solves.seen])
    np.testing.assert_array_equal(monitor.history["solve/inner/products"], [info.products for info in solves.seen])


def test_failures_add_up() -> None:
    monitor, watched = HypergradientMonitor(), SimpleNamespace(step_count=0)
    statuses = [Status.CONVERGED, Status.DIVERGED, Status.STOPPED_AT_CAP, Status.SINGULAR]
    for step, status in enumerate(statuses, start=1):
        result = StepResult(step, {}, {}, {}, {"inner": SolveInfo(status)}, (1, 1), 0.1)
        monitor.on_step_end(watched, result)
    np.testing.assert_array_equal(monitor.history["solve/inner/failures"], [0, 1, 1, 2])
    assert monitor.values() == {"solve/inner/failures": 2}
    assert monitor.status_counts["inner"] == {status.value: 1 for status in statuses}


def test_a_hypergradient_that_the_update_changes_in_place_is_remembered_as_it_was() -> None:
    monitor, watched = HypergradientMonitor(), SimpleNamespace(step_count=0)
    for step, gradient in enumerate([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])], start=1):
        shown = Hypergradient(
            {"w": gradient, "frozen": None}, {"w": gradient, "frozen": None}, SolveInfo(Status.CONVERGED)
        )
        monitor.on_hypergradient(watched, "outer", shown)
        gradient.copy_(torch.tensor([0.0, 1.0]))
        monitor.on_step_end(watched, StepResult(step, {}, {}, {}, {}, (1, 1), 0.1))
    assert monitor.history["hypergradient/outer/cosine"][1] == pytest.approx(0.6)


def test_a_step_that_was_undone_leaves_no_trace() -> None:
    class Fails(torch.optim.SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("no")
            return super().step(closure)

    whole, monitor = HypergradientMonitor(), HypergradientMonitor()
    quadratic(whole).run(3)
    run = quadratic(monitor)
    failing = run.problems["outer"].optimizer
    failing.__class__ = Fails
    run.step()
    failing.broken = True
    for _ in range(2):
        with pytest.raises(Exception, match="no"):
            run.step()
    np.testing.assert_array_equal(monitor.history.steps, [1])
    failing.broken = False
    run.step()
    run.step()
    for name, values in whole.history.items():
        np.testing.assert_array_equal(monitor.history[name], values, err_msg=name)


def test_a_step_that_was_skipped_leaves_no_trace() -> None:
    monitor = HypergradientMonitor()
    run = quadratic(monitor, on_non_finite="skip")
    run.step()
    with torch.no_grad():
        run.problems["outer"].module.weight[0, 0] = math.nan
    run.step()
    assert run.skipped_steps == 1
    np.testing.assert_array_equal(monitor.history.steps, [1])
    assert monitor.values() == {}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_s_monitors_are_those_of_an_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    def run() -> tuple[Engine, HypergradientMonitor, LearningRateMonitor]:
        monitor, rates = HypergradientMonitor(), LearningRateMonitor()
        return quadratic(Saves(tmp_path / "state", stop), monitor, rates), monitor, rates

    whole, monitor, rates = run()
    whole.run(5)
    run()[0].run(stop)
    resumed, again, rates_again = run()
    resumed.load(tmp_path / "state")
    resumed.run(5 - stop)
    assert again.status_counts == monitor.status_counts == {"inner": {"converged": 5}}
    for name, values in monitor.history.items():
        np.testing.assert_array_equal(again.history[name], values, err_msg=name)
    np.testing.assert_array_equal(rates_again.history.steps, [1, 2, 3, 4, 5])
    assert rates_again.history.keys() == rates.history.keys()


def test_learning_rates_are_those_of_every_group_after_the_step() -> None:
    rates = LearningRateMonitor()
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    groups = torch.optim.SGD([{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 2.0}])
    halved = torch.optim.lr_scheduler.StepLR(groups, step_size=1, gamma=0.5)
    inner = Inner(layer, optimizer=groups, scheduler=halved)
    outer = type("Outer", (Problem,), {"loss": lambda self, batch: self.inner.module.weight.square().sum()})
    run = Engine(
        [outer(nn.Linear(2, 2, bias=False), optimizer=sgd), inner],
        EngineConfig(progress=False),
        "identity",
        callbacks=[rates],
    )
    run.run(3)
    np.testing.assert_array_equal(rates.history["inner/0"], [0.5, 0.25, 0.125])
    np.testing.assert_array_equal(rates.history["inner/1"], [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(rates.history["outer"], [0.1] * 3)


def test_history_fills_what_was_not_measured() -> None:
    history = History()
    history.append(1, {"a": 1.0})
    history.append(3, {"b": 2.0})
    history.append(4, {"a": 3.0, "b": 4.0})
    np.testing.assert_array_equal(history.steps, [1, 3, 4])
    np.testing.assert_array_equal(history["a"], [1, math.nan, 3])
    np.testing.assert_array_equal(history["b"], [math.nan, 2, 4])
    assert (list(history), len(history)) == (["a", "b"], 2)


@pytest.mark.parametrize("total", [1, 9, 10, 11, 20, 21, 1000, 12345])
def test_a_limited_history_is_spread_evenly_over_the_run(total: int) -> None:
    history = History(limit=10)
    for step in range(1, total + 1):
        due = history.due
        history.append(step, {"a": step} if due else {})
        assert (history.steps[-1] == step) == due
    steps = history.steps
    assert min(total, 5) <= len(steps) <= 10
    assert steps[0] == 1
    stride = 1 if len(steps) == 1 else steps[1] - steps[0]
    assert set(np.diff(steps)) <= {stride}
    assert total - steps[-1] < stride
    np.testing.assert_array_equal(history["a"], steps)


@pytest.mark.parametrize("split", [3, 10, 17])
def test_a_history_goes_on_where_its_state_was(split: int) -> None:
    whole, first, second = History(limit=8), History(limit=8), History(limit=8)
    for step in range(40):
        whole.append(step, {"a": step, **({"b": -step} if step > 12 else {})})
        if step == split:
            second.load_state_dict(first.state_dict())
        (first if step < split else second).append(step, {"a": step, **({"b": -step} if step > 12 else {})})
    np.testing.assert_array_equal(second.steps, whole.steps)
    for name in ("a", "b"):
        np.testing.assert_array_equal(second[name], whole[name])


@pytest.mark.parametrize("limit", [0, 1, 7])
def test_a_limit_is_even(limit: int) -> None:
    with pytest.raises(ConfigError, match="even number"):
        History(limit=limit)


def test_monitors_change_nothing() -> None:
    plain, watched = engine(), engine(HypergradientMonitor(), LearningRateMonitor())
    assert [plain.step().losses for _ in range(4)] == [watched.step().losses for _ in range(4)]
