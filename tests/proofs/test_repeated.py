"""Recorded updates, made again as functions, end where the updates ended: in every nest, mode and precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import ConfigError, LossError
from bilevel.functional import leaves
from bilevel.levels.response import RepeatedUpdates

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")


class Level(Problem):
    """A problem whose loss is a function of the vectors of all problems."""

    def __init__(self, name: str, function: Callable[[Any], Tensor], seed: int, rate: float = 0.1, **settings: Any):
        torch.manual_seed(seed)
        module = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        super().__init__(module, optimizer=lambda p: torch.optim.SGD(p, lr=rate), name=name, **settings)
        self.function = function

    @property
    def w(self) -> Tensor:
        return self.module.weight[0]

    def loss(self, batch):
        return self.function(self)


def engine(problems: list[Problem], **settings: Any) -> Engine:
    config = EngineConfig(progress=False, nested_solver="exact", **settings)
    return Engine(problems, config, hypergradient="exact")


def miss(run: Engine, name: str, above: str) -> float:
    """How far the repeated updates of a problem end from its parameters."""
    differentiator, _ = run._planner._plan
    records, active = run._records, run._active()
    problem = differentiator.inner_problem(name, [above], records[name], records, active)
    again = RepeatedUpdates(problem.trajectory, problem.start)(leaves(problem.outer))
    return max(float((a - b).detach().abs().max()) for a, b in zip(again, run.problems[name].parameters, strict=True))


@pytest.mark.parametrize("third", ["exact", "unrolled"])
@pytest.mark.parametrize("reads", [0.0, 0.5])
def test_four_levels_are_repeated_where_each_stood(third, reads):
    # The problems below c had other parameters at b's first update than they have now.
    def square(x: Tensor) -> Tensor:
        return x.square().sum() / 2

    problems = [
        Level("a", lambda s: square(s.b.w - 1) + square(s.c.w + s.d.w), 1, 0.0),
        Level("b", lambda s: square(s.w - s.a.w) + s.c.w.pow(3).sum(), 2, steps=2, hypergradient="unrolled"),
        Level("c", lambda s: square(s.w - s.b.w) + square(s.d.w - 1) / 2, 3, steps=3, hypergradient=third),
        Level("d", lambda s: square(s.w - s.c.w - reads * s.b.w) + s.w.pow(4).sum() / 8, 4, steps=3),
    ]
    run = engine(problems)
    run.step()
    assert miss(run, "b", "a") < 1e-15


@pytest.mark.parametrize("batch", ["last", "fresh"])
def test_dropout_masks_of_the_problem_below_are_those_of_the_update(batch):
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def dropped(s: Any) -> Tensor:
        return F.mse_loss(F.dropout(x, 0.3) @ s.w, x @ s.b.w) + s.w.square().sum()

    problems = [
        Level("a", lambda s: s.b.w.square().sum() + s.c.w.sum(), 1, 0.0),
        Level("b", lambda s: (s.w - s.a.w).square().sum() + s.c.w.square().sum(), 2, steps=2, hypergradient="unrolled"),
        Level("c", dropped, 3, steps=2),
    ]
    run = engine(problems, hypergradient_batch=batch)
    run.step()
    assert miss(run, "b", "a") < 1e-15


def test_batches_drawn_later_leave_a_recorded_update_alone():
    data = [torch.tensor([float(place)], dtype=torch.float64) for place in range(40)]

    class Below(Level):
        def loss(self, batch):
            return (self.w - self.b.w * (1 + 0.01 * batch)).square().sum()

    problems = [
        Level("a", lambda s: s.b.w.square().sum() + s.c.w.sum(), 1, 0.0),
        Level("b", lambda s: (s.w - s.a.w).square().sum() + s.c.w.square().sum(), 2, hypergradient="unrolled"),
        Below("c", lambda s: s.w.sum(), 3, data=data, hypergradient={"method": "stocbio", "step_size": 0.1}),
    ]
    run = engine(problems)
    run.step()
    kept = run._records["b"].trajectory[-1].below["c"].record
    assert kept.samples
    assert kept.samples is not run._records["c"].samples


class Starting(Problem):
    """MAML's inner problem: it starts from the outer one's parameters, and its loss does not read them."""

    def loss(self, batch):
        return (self.module.weight - 1.0).square().sum()


class Meta(Problem):
    def loss(self, batch):
        return (self.starting.module.weight - 3.0).square().sum()


def starting(scale: float) -> Engine:
    torch.manual_seed(0)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    problems = [
        Meta(nn.Linear(2, 1, bias=False), optimizer=sgd),
        Starting(nn.Linear(2, 1, bias=False), optimizer=sgd, steps=3, reset="meta", hypergradient="unrolled"),
    ]
    run = Engine(problems, EngineConfig(progress=False, precision="float16"))
    run.scales["starting"].value = scale
    return run


def test_an_overflow_first_does_not_hide_the_start():
    run = starting(2.0**16)
    before = run.problems["meta"].module.weight.detach().clone()
    factors = iter([math.inf])
    run.scales["starting"].scaled = lambda loss: loss * next(factors, run.scales["starting"].value)
    result = run.step()
    assert result.overflows == {"starting": 1}
    # Two of three updates were made, each with derivative 1 − 2 η.
    end = run.problems["starting"].module.weight.detach()
    expected = before - 0.1 * 0.8**2 * 2 * (end - 3.0)
    torch.testing.assert_close(run.problems["meta"].module.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_where_all_updates_overflow_the_outer_one_waits():
    run = starting(2.0**16)
    before = run.problems["meta"].module.weight.detach().clone()
    run.scales["starting"].scaled = lambda loss: loss * math.inf
    result = run.step()
    assert result.overflows == {"starting": 3, "meta": 1}
    assert torch.equal(run.problems["meta"].module.weight, before)


def test_asking_for_a_hypergradient_lowers_no_scale_and_meets_no_overflow():
    run = starting(1.0)
    run.step()
    expected = run.hypergradient().grad["weight"]
    run.scales["meta"].value = 2.0**30  # its first backward pass overflows
    assert torch.equal(run.hypergradient().grad["weight"], expected)
    assert run.scales["meta"].value == 2.0**30


def test_skipping_needs_something_to_go_back_to():
    with pytest.raises(ConfigError, match="restore_on_error=False does not keep"):
        EngineConfig(on_non_finite="skip", restore_on_error=False)


def test_a_middle_level_that_takes_no_part_takes_no_turns():
    problems = [
        Level("a", lambda s: s.b.w.square().sum() + s.c.w.sum(), 1),
        Level("b", lambda s: (s.w - s.a.w).square().sum() + s.c.w.square().sum(), 2, steps=10, start=1),
        Level("c", lambda s: (s.w - s.b.w - s.a.w).square().sum(), 3, steps=2),
    ]
    run = engine(problems)
    run.step()
    assert run.problems["b"].num_updates == 0
    assert run.problems["c"].num_updates == 4  # a's loss reads it: once before b's turn, once more after it


def test_problems_that_share_a_module_are_repeated_without_checkpoints():
    class Shared(Problem):
        def loss(self, batch):
            return self.function(self)

    torch.manual_seed(0)
    module = nn.ParameterDict({"c": torch.randn(2), "d": torch.randn(2)}).double()
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    c = Shared(module, params="c", optimizer=sgd, name="c", steps=2, hypergradient="unrolled")
    d = Shared(module, params="d", optimizer=sgd, name="d", steps=2)
    c.function = lambda s: (s.module["c"] - s.b.w).square().sum()
    d.function = lambda s: (s.module["d"] - s.module["c"]).square().sum() + (s.module["d"] * s.b.w).sum()
    problems = [
        Level("a", lambda s: s.b.w.square().sum() + s.d.module["d"].sum(), 1, 0.0),
        Level("b", lambda s: (s.w - s.a.w).square().sum() + s.d.module["d"].square().sum(), 2, steps=2),
        c,
        d,
    ]
    run = engine(problems)
    assert run.step().skipped is None


class Checkpointed(nn.Module):
    """A layer that is evaluated again in backward passes, where that is asked for."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(2, 2, dtype=torch.float64)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)
        return self.layer(x).tanh()


class Network(Problem):
    def loss(self, batch):
        x = torch.tensor([[1.0, -0.5], [0.3, 0.8]], dtype=torch.float64)
        decay = sum(p.square().sum() for p in self.module.parameters())
        return (self(x) - self.b.w).square().sum() + decay


def over_a_network(method: str, again: bool) -> Engine:
    def read(s: Any) -> Tensor:
        return s.network(torch.ones(1, 2, dtype=torch.float64)).sum()

    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    return engine(
        [
            Level("a", lambda s: (s.b.w - 1).square().sum(), 1, 1.0),
            Level("b", lambda s: (s.w - s.a.w).square().sum() + read(s).square(), 2, steps=2),
            Network(Checkpointed(again), optimizer=sgd, steps=2, hypergradient=method),
        ]
    )


def test_a_checkpoint_in_updates_that_are_repeated_is_refused():
    with pytest.raises(LossError, match="'network' uses activation checkpointing.*by an implicit method"):
        over_a_network("unrolled", again=True).step()


@pytest.mark.parametrize("method", ["conjugate_gradient", "exact"])
def test_a_checkpoint_below_a_middle_level_changes_nothing_where_systems_are_solved(method):
    plain, again = over_a_network(method, again=False), over_a_network(method, again=True)
    for run in (plain, again):
        run.run(3)
    for one, other in zip(plain.problems.values(), again.problems.values(), strict=True):
        torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-12, atol=1e-14)
