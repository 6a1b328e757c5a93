"""What a Betty program's engine does around the updates: validation, early stopping, logs, roll-back, precision."""

from __future__ import annotations

import copy
import importlib.machinery
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import bilevel
from bilevel.errors import ConfigError, UnknownNameError
from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem
from bilevel.interop.betty.log import Log, line
from bilevel.interop.betty.patience import Patience

Batch = tuple[Tensor, Tensor]


class Outer(ImplicitProblem):
    """Fits a weight decay to other data."""

    def training_step(self, batch: Batch) -> Any:
        return F.mse_loss(self.inner(batch[0]), batch[1])


class Inner(ImplicitProblem):
    def training_step(self, batch: Batch) -> Any:
        decay = self.outer.module.weight.exp().sum()
        return F.mse_loss(self.module(batch[0]), batch[1]) + decay * self.module[0].weight.square().sum()


def batches(count: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, generator=generator).to(dtype), torch.randn(6, 1, generator=generator).to(dtype))
        for _ in range(count)
    ]


def regression(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))


def make(
    engine: type[Engine] = Engine,
    *,
    outer: type[ImplicitProblem] = Outer,
    inner: type[ImplicitProblem] = Inner,
    upper: Mapping[str, Any] | None = None,
    lower: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    norm: bool = False,
    scheduler: bool = False,
    adam: bool = False,
    **config: Any,
) -> Engine:
    """Builds a program of two problems.

    Args:
        engine: The class of the engine.
        outer: The class of the upper problem.
        inner: That of the lower one.
        upper: Fields of the upper problem's ``Config``.
        lower: Those of the lower one's.
        settings: Fields of our ``EngineConfig``.
        dtype: Of everything.
        norm: Whether the lower network has buffers.
        scheduler: Whether the lower problem has a scheduler.
        adam: Whether its optimiser has a state.
        config: Fields of Betty's ``EngineConfig``.
    """
    decay = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(decay.weight, -2.0)
    network = regression(norm).to(dtype)
    above = torch.optim.Adam(decay.parameters(), lr=0.1)
    below = (torch.optim.Adam if adam else torch.optim.SGD)(network.parameters(), lr=0.05)
    schedule = lr_scheduler.ExponentialLR(below, 0.9) if scheduler else None
    high = outer("outer", Config(**(upper or {})), decay, above, train_data_loader=batches(4, 1, dtype))
    low = inner("inner", Config(**(lower or {})), network, below, schedule, batches(5, 2, dtype))
    return engine(
        [high, low],
        EngineConfig(**{"train_iters": 12, "strategy": "cpu", **config}),
        {"u2l": {high: [low]}, "l2u": {low: [high]}},
        settings=bilevel.EngineConfig(progress=False, **(settings or {})),
    )


def parameters(engine: Engine) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for problem in engine.problems for p in problem.module.parameters()])


# --- validation -------------------------------------------------------------------------------------------------------


class Validated(Engine):
    """Notes when it validates, and in which modes."""

    values: Sequence[Any] = ()
    calls: tuple[int, ...] = ()

    def validation(self) -> Any:
        assert not any(problem.training or problem.module.training for problem in self.problems)
        self.calls = (*self.calls, self.global_step)
        return self.values[len(self.calls) - 1] if self.values else None


@pytest.mark.parametrize(("every", "expected"), [(1, tuple(range(1, 13))), (5, (5, 10)), (12, (12,)), (13, ())])
def test_validations_come_every_so_many_iterations_in_evaluation_mode(every: int, expected: tuple[int, ...]) -> None:
    engine = make(Validated, valid_step=every)
    engine.run()
    assert engine.calls == expected
    assert all(problem.training and problem.module.training for problem in engine.problems)


def test_validation_changes_nothing_of_the_training() -> None:
    plain, validated = make(norm=True), make(Validated, norm=True, valid_step=1)
    plain.run()
    validated.run()
    assert torch.equal(parameters(plain), parameters(validated))


def test_an_exception_in_validation_leaves_training_mode() -> None:
    class Fails(Engine):
        def validation(self) -> Any:
            raise OSError("no data")

    engine = make(Fails, valid_step=3)
    with pytest.raises(OSError, match="no data"):
        engine.run()
    assert engine.global_step == 3
    assert all(problem.training and problem.module.training for problem in engine.problems)


# --- early stopping ---------------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("mode", "tolerance", "values", "stops_at"),
    [
        ("min", 1, [3, 2, 1, 1], 4),
        ("min", 2, [3, 4, 2, 3, 2, 1], 5),
        ("max", 1, [1, 2, 2, 3], 3),
        ("max", 3, [5, 4, 4, 6, 1, 1, 1], 7),
        ("min", 2, [NAN, 1, NAN, NAN], 4),
        ("max", 2, [NAN, NAN, 1, 2], 2),
        ("min", 1, [4, 3, 2, 1], None),
        ("max", 1, [-math.inf, 0, math.inf], None),
    ],
)
def test_patience_counts_validations_without_improvement(
    mode: str, tolerance: int, values: list[float], stops_at: int | None
) -> None:
    patience = Patience("loss", mode, tolerance)
    stops = [patience({"loss": torch.tensor(float(value))}) for value in values]
    assert next((place for place, stop in enumerate(stops, 1) if stop), None) == stops_at


@pytest.mark.parametrize(("mode", "stops_after"), [("min", 6), ("max", 8)])
def test_a_run_ends_after_the_validation_that_exhausts_the_patience(
    mode: str, stops_after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make(
        Validated,
        valid_step=2,
        early_stopping=True,
        early_stopping_mode=mode,
        early_stopping_tolerance=2,
        early_stopping_metric="score",
    )
    engine.values = [{"score": value} for value in (1.0, 2.0, 1.5, 1.0, 5.0, 0.0)]
    engine.run()
    assert (engine.global_step, engine.calls[-1]) == (stops_after, stops_after)
    assert "Early stopping is executed!" in capsys.readouterr().out


def test_a_metric_that_validation_does_not_return_is_told_with_the_choices() -> None:
    engine = make(Validated, valid_step=1, early_stopping=True, early_stopping_metric="acc")
    engine.values = [{"loss": 1.0, "accuracy": 2.0}]
    with pytest.raises(UnknownNameError, match=r"early_stopping_metric.*'acc'(.|\n)*accuracy"):
        engine.run()


def test_without_early_stopping_no_metric_is_needed() -> None:
    engine = make(Validated, valid_step=6)
    engine.values = [{}, {"other": torch.ones(3)}]
    engine.run()
    assert engine.global_step == 12


# --- logs -------------------------------------------------------------------------------------------------------------


class Talks(Inner):
    def training_step(self, batch: Batch) -> Any:
        loss = super().training_step(batch)
        return {
            "loss": loss,
            "count": self.count,
            "tensor": torch.tensor(1.5),
            "several": [torch.tensor(1), 2.0],
            "named": {"a": torch.tensor([3.0]), "b": 4},
        }


def lines_of(text: str, start: str) -> list[str]:
    pattern = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \[INFO\] (.*)$"
    found = [match.group(1) for match in re.finditer(pattern, text, re.MULTILINE)]
    return [text for text in found if text.startswith(start)]


def test_lines_have_betty_s_form(capsys: pytest.CaptureFixture[str]) -> None:
    lower = {"log_step": 4, "unroll_steps": 2, "gradient_accumulation": 2}
    engine = make(Validated, inner=Talks, lower=lower, upper={"log_step": 2}, valid_step=6)
    engine.values = [{"loss": torch.tensor(0.25), "hits": [1, 2]}, None]
    engine.run()
    text = capsys.readouterr().out
    rest = r"tensor: 1\.5 \|\| several_0: 1 \|\| several_1: 2\.0 \|\| named_0: 3\.0 \|\| named_1: 4$"
    inner = lines_of(text, '[Problem "inner"] ')
    assert len(inner) == 3
    for found, count in zip(inner, (4, 8, 12), strict=True):
        head = re.escape(f'[Problem "inner"] [Global Step {count}] [Local Step {count}] loss: ')
        assert re.fullmatch(head + rf"\d+\.\d+ \|\| count: {count} \|\| {rest}", found), found
    outer = lines_of(text, '[Problem "outer"] ')
    assert [found.partition(" loss: ")[0] for found in outer] == ['[Problem "outer"] [Global Step 8] [Local Step 2]']
    assert lines_of(text, "[Validation] ") == [
        "[Validation] [Global Step 6] loss: 0.25 || hits_0: 1 || hits_1: 2",
        "[Validation] [Global Step 12] ",
    ]


@pytest.mark.parametrize("step", [0, -1])
def test_no_step_no_lines(step: int, capsys: pytest.CaptureFixture[str]) -> None:
    make(lower={"log_step": step}).run()
    assert not lines_of(capsys.readouterr().out, "[Problem ")


@pytest.mark.parametrize("method", ["iterative", "sama"])
def test_lines_count_the_batches_of_updates_that_are_followed(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    lower: dict[str, Any] = {"log_step": 2, "gradient_accumulation": 2}
    if method == "sama":
        make(lower={**lower, "type": "sama"}, adam=True).run()
    else:
        from bilevel.interop.betty import IterativeProblem

        kind = type("Followed", (IterativeProblem,), {"training_step": Inner.training_step})
        make(inner=kind, lower=lower).run()
    heads = [found.partition(" loss")[0] for found in lines_of(capsys.readouterr().out, '[Problem "inner"] ')]
    assert heads == [f'[Problem "inner"] [Global Step {n}] [Local Step {n}]' for n in (2, 4, 6, 8, 10, 12)]


def test_the_loss_in_a_line_is_that_of_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[float] = []

    class Remembers(Inner):
        def training_step(self, batch: Batch) -> Any:
            loss = super().training_step(batch)
            if torch.is_grad_enabled():
                self.latest = float(loss.detach())
            return loss

        def grad_callback(self) -> None:
            said.append(self.latest)

    make(inner=Remembers, lower={"log_step": 1}).run()
    shown = [float(found.partition(" loss: ")[2]) for found in lines_of(capsys.readouterr().out, "[Problem ")]
    assert shown == said


class FakeWandb(ModuleType):
    """Keeps what it is told, as a run does: nothing at a step before its last one."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run: FakeWandb | None = None
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.inits = 0

    def init(self, **settings: Any) -> FakeWandb:
        self.inits += 1
        self.run = self
        return self

    def log(self, numbers: Mapping[str, Any], step: int | None = None, **more: Any) -> None:
        last = max((said for said, _ in self.rows if said is not None), default=0)
        if step is None or step >= last:
            self.rows.append((step, dict(numbers)))

    def column(self, key: str) -> list[Any]:
        return [numbers[key] for _, numbers in self.rows if key in numbers]


def test_wandb_is_told_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a problem counts its own steps, which are fewer than the engine's."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    lower = {"log_step": 1, "unroll_steps": 3}
    upper = {"log_step": 1, "log_local_step": True}
    engine = make(Validated, inner=Talks, lower=lower, upper=upper, valid_step=4, logger_type="wandb")
    engine.values = [{"loss": 1.0}, {"loss": 2.0}, {"loss": torch.tensor(3.0)}]
    engine.run()
    assert fake.inits == 1
    assert fake.column("inner/count") == list(range(1, 13))
    assert fake.column("inner/several_1") == [2.0] * 12
    assert len(fake.column("outer/loss")) == 4
    assert fake.column("validation/loss") == [1.0, 2.0, 3.0]


def test_a_wandb_run_that_there_is_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    fake.run = fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    make(lower={"log_step": 4}, logger_type="wandb").run()
    assert fake.inits == 0
    assert len(fake.column("inner/loss")) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_numbers_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    lower = {"log_step": 4, "unroll_steps": 2}
    engine = make(
        Validated,
        inner=Talks,
        lower=lower,
        upper={"log_step": 3, "log_local_step": True},
        valid_step=6,
        logger_type="tensorboard",
    )
    engine.values = [{"loss": 1.0}, {"loss": 2.0}]
    engine.run()
    (folder,) = (tmp_path / "betty_tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read["inner/count"] == [(4, 4.0), (8, 8.0), (12, 12.0)]
    assert read["inner/named_1"] == [(4, 4.0), (8, 4.0), (12, 4.0)]
    assert [step for step, _ in read["outer/loss"]] == [3, 6]
    assert read["validation/loss"] == [(6, 1.0), (12, 2.0)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_number_is_in_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No iteration is refused for it."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)

    class Words(Inner):
        def training_step(self, batch: Batch) -> Any:
            return {"loss": super().training_step(batch), "word": "a", "vector": torch.ones(2), "none": None}

    engine = make(inner=Words, lower={"log_step": 6}, logger_type="tensorboard")
    engine.run()
    assert engine.global_step == 12
    lines = lines_of(capsys.readouterr().out, '[Problem "inner"] ')
    assert len(lines) == 2
    assert all("word: a || vector: tensor([1., 1.]) || none: None" in found for found in lines)


def test_a_logger_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"EngineConfig\.logger_type needs the package wandb.*bilevel\[logging\]"):
        make(logger_type="wandb")


def test_other_ranks_are_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = Log("none", quiet=True)
    for write in (log.info, log.warning, log.debug):
        write("a line")
    log.log({"loss": 1.0}, tag="inner", step=1)
    assert capsys.readouterr().out == ""
    loud = Log("none")
    loud.debug("not shown")
    loud.info("shown %s", "so")
    loud.warning("100%")
    text = capsys.readouterr().out
    assert [found.partition("] [")[2] for found in text.splitlines()] == ["INFO] shown so", "WARNING] 100%"]


def test_nothing_of_the_process_s_logging_is_configured() -> None:
    import logging

    before = list(logging.getLogger().handlers), set(logging.Logger.manager.loggerDict)
    make(lower={"log_step": 1}).run()
    assert (list(logging.getLogger().handlers), set(logging.Logger.manager.loggerDict)) == before


def test_a_line_of_numbers() -> None:
    assert line({}) == ""
    stats = {"loss": torch.tensor(0.5), "pair": (torch.tensor([1.0]), 2), "map": {"x": 3}, "text": "a"}
    assert line(stats) == "loss: 0.5 || pair_0: 1.0 || pair_1: 2 || map_0: 3 || text: a"


# --- roll-back --------------------------------------------------------------------------------------------------------


def by_hand(
    unroll: int, accumulation: int, above: int, warmup: int, *, norm: bool, scheduler: bool, adam: bool, iterations: int
) -> tuple[Tensor, list[Tensor], float]:
    """The loop with roll-back as one would write it, with the identity for the inverse Hessian."""
    decay = nn.Parameter(torch.full((1, 1), -2.0, dtype=torch.float64))
    network = regression(norm).double()
    top = torch.optim.Adam([decay], lr=0.1)
    low = (torch.optim.Adam if adam else torch.optim.SGD)(network.parameters(), lr=0.05)
    schedule = lr_scheduler.ExponentialLR(low, 0.9) if scheduler else None
    data, data_above = batches(5, 2), batches(4, 1)
    weights = list(network.parameters())

    def inner_loss(batch: Batch) -> Tensor:
        return F.mse_loss(network(batch[0]), batch[1]) + decay.exp().sum() * network[0].weight.square().sum()

    def inner_step(batch: Batch, update: bool) -> None:
        grads = torch.autograd.grad(inner_loss(batch) / accumulation, weights)
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad if p.grad is None else p.grad + grad
        if update:
            low.step()
            low.zero_grad()

    def hypergradient(batch: Batch, inner_batch: Batch) -> Tensor:
        loss = F.mse_loss(network(batch[0]), batch[1])
        v = torch.autograd.grad(loss, weights)
        buffers = copy.deepcopy(dict(network.named_buffers()))
        grads = torch.autograd.grad(inner_loss(inner_batch), weights, create_graph=True)
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
        (mixed,) = torch.autograd.grad(grads, [decay], v)
        return -mixed

    period, place, outer_count, start = unroll * accumulation, 0, 0, None
    first = next(count for count in range(period, 10**6, period) if count > warmup)
    for count in range(1, iterations + 1):
        length = first if count <= first else period
        if place == length - period:
            start = copy.deepcopy((network.state_dict(), low.state_dict()))
        batch = data[(count - 1) % 5]
        inner_step(batch, count % accumulation == 0)
        place += 1
        if count % period or count <= warmup:
            continue
        place, outer_count = 0, outer_count + 1
        grad = hypergradient(data_above[(outer_count - 1) % 4], batch) / above
        decay.grad = grad if decay.grad is None else decay.grad + grad
        if outer_count % above == 0:
            top.step()
            top.zero_grad()
        assert start is not None
        network.load_state_dict(start[0])
        low.load_state_dict(start[1])
        for part in range(accumulation):
            inner_step(data[(count - accumulation + part) % 5], part == accumulation - 1)
        if schedule is not None:
            schedule.step()
    return decay.detach(), [tensor.detach() for tensor in network.state_dict().values()], low.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("unroll", "accumulation", "above", "warmup"),
    [(1, 1, 1, 0), (3, 1, 1, 0), (2, 2, 1, 0), (2, 1, 2, 3), (2, 2, 2, 5), (3, 1, 1, 3)],
)
def test_roll_back_is_the_loop_written_by_hand(
    unroll: int, accumulation: int, above: int, warmup: int, adam: bool
) -> None:
    """Buffers, the optimiser's state and the scheduler as well."""
    lower = {
        "type": "identity",
        "unroll_steps": unroll,
        "gradient_accumulation": accumulation,
        "warmup_steps": warmup,
    }
    engine = make(
        lower=lower,
        upper={"gradient_accumulation": above},
        roll_back=True,
        norm=True,
        scheduler=True,
        adam=adam,
        train_iters=24,
    )
    engine.run()
    decay, state, rate = by_hand(
        unroll, accumulation, above, warmup, norm=True, scheduler=True, adam=adam, iterations=24
    )
    outer, inner = engine.problems
    torch.testing.assert_close(outer.module.weight.detach(), decay, rtol=1e-12, atol=0)
    assert not torch.equal(decay, torch.full_like(decay, -2.0))
    for ours, theirs in zip(inner.module.state_dict().values(), state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert inner.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-14)


def test_roll_back_changes_the_run() -> None:
    plain, rolled = make(lower={"unroll_steps": 3}), make(lower={"unroll_steps": 3}, roll_back=True)
    plain.run()
    rolled.run()
    assert not torch.allclose(parameters(plain), parameters(rolled))
    assert rolled.driver.levels["inner"].num_updates == 12 + 4


# --- precision --------------------------------------------------------------------------------------------------------


class Dtypes:
    """Notes the dtype of what the network returns, by problem."""

    def note(self, out: Tensor) -> Tensor:
        if self.count:  # type: ignore[attr-defined]
            kinds = self.__dict__.setdefault("kinds", [])
            kinds.append(out.dtype)
        return out


class NotingOuter(Dtypes, Outer):
    def training_step(self, batch: Batch) -> Any:
        return F.mse_loss(self.note(self.inner(batch[0])).float(), batch[1])


class NotingInner(Dtypes, Inner):
    def training_step(self, batch: Batch) -> Any:
        decay = self.outer.module.weight.exp().sum()
        out = self.note(self.module(batch[0])).float()
        return F.mse_loss(out, batch[1]) + decay * self.module[0].weight.square().sum()


def noting(outer: str, inner: str, method: str = "neumann") -> Engine:
    lower = {"type": method, "precision": inner, "unroll_steps": 2, "neumann_alpha": 0.1}
    return make(
        outer=NotingOuter,
        inner=NotingInner,
        upper={"precision": outer},
        lower=lower,
        dtype=torch.float32,
        train_iters=2,
    )


@pytest.mark.parametrize("outer", ["fp32", "bf16"])
@pytest.mark.parametrize("inner", ["fp32", "bf16"])
def test_each_problem_s_training_passes_have_its_own_precision(outer: str, inner: str) -> None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    engine = noting(outer, inner)
    engine.run()
    high, low = engine.problems
    assert high.kinds == [names[outer]]
    # two updates, then the products of the hypergradient
    assert low.kinds[:2] == [names[inner]] * 2
    assert low.kinds[2:]
    assert set(low.kinds[2:]) == {torch.float32}
    assert all(p.dtype == torch.float32 for problem in engine.problems for p in problem.module.parameters())


@pytest.mark.parametrize("method", ["darts", "neumann", "cg", "sama"])
def test_hypergradients_in_bfloat16_are_float32_s_to_its_rounding(method: str) -> None:
    grads = []
    for precision in ("fp32", "bf16"):
        engine = noting(precision, precision, method)
        engine.run()
        grads.append(engine.hypergradient().grad["weight"])
    assert grads[0].dtype == grads[1].dtype == torch.float32
    assert grads[0].norm() > 0
    assert not torch.equal(grads[0], grads[1])
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


class Spiking(Inner):
    """Its gradients overflow in float16 at chosen steps, at the scale of the beginning."""

    at: tuple[int, ...] = ()

    def training_step(self, batch: Batch) -> Any:
        loss = F.mse_loss(self.module(batch[0]).float(), batch[1])
        return loss * (40.0 if self.count in self.at else 1e-3) + 0.0 * self.outer.module.weight.sum()

    def grad_callback(self) -> None:
        self.__dict__.setdefault("called", []).append(self.count)


@pytest.mark.parametrize(
    ("accumulation", "at", "left_out"),
    [
        (1, (2,), {2}),
        (2, (), set()),
        (2, (1,), {1}),
        (2, (2,), {1}),
        (2, (4,), {2}),
        (2, (2, 3), {1, 2}),
        (3, (2,), {1}),
        (3, (4, 6), {2}),
    ],
)
def test_an_overflow_leaves_the_whole_accumulated_update_out(
    accumulation: int, at: tuple[int, ...], left_out: set[int]
) -> None:
    """The scale backs off, the counts go on, and the update after it is a whole one."""
    lower = {"precision": "fp16", "initial_dynamic_scale": 2.0**16, "gradient_accumulation": accumulation}
    engine = make(inner=Spiking, lower=lower, dtype=torch.float32)
    low = engine.problems[1]
    low.at = at
    changed, overflows = set(), 0
    for iteration in range(1, 13):
        before = torch.cat([p.detach().reshape(-1).clone() for p in low.module.parameters()])
        overflows += engine.train_step().overflows.get("inner", 0)
        after = torch.cat([p.detach().reshape(-1) for p in low.module.parameters()])
        if not torch.equal(before, after):
            assert iteration % accumulation == 0
            changed.add(iteration // accumulation)
        assert torch.isfinite(after).all()
    assert changed == set(range(1, 12 // accumulation + 1)) - left_out
    assert overflows == len(at)
    assert engine.driver.scales["inner"].value == 2.0**16 * 0.5 ** len(at)
    assert (low.count, engine.problems[0].count) == (12, 12 // accumulation)


def test_an_overflow_is_saved_with_the_accumulation_that_it_spoils(tmp_path: Path) -> None:
    lower = {"precision": "fp16", "initial_dynamic_scale": 2.0**16, "gradient_accumulation": 2}

    def built() -> Engine:
        engine = make(inner=Spiking, lower=lower, dtype=torch.float32, train_iters=8)
        engine.problems[1].at = (3,)
        return engine

    whole, first, second = built(), built(), built()
    whole.run()
    first.run(3)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run()
    assert torch.equal(parameters(second), parameters(whole))
    assert second.driver.scales["inner"].state_dict() == whole.driver.scales["inner"].state_dict()
    assert whole.driver.scales["inner"].overflows == 1


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@on_gpu
@pytest.mark.parametrize("strategy", ["default", "gpu"])
def test_problems_and_batches_go_to_the_gpu(strategy: str) -> None:
    engine = make(strategy=strategy, train_iters=4)
    engine.run()
    assert torch.device(engine.device).type == "cuda"
    assert all(p.is_cuda for problem in engine.problems for p in problem.module.parameters())
    assert all(part.is_cuda for problem in engine.problems for part in problem.cur_batch)
    on_cpu = make(train_iters=4)
    on_cpu.run()
    torch.testing.assert_close(parameters(engine).cpu(), parameters(on_cpu), rtol=1e-8, atol=1e-10)


@on_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_reduced_precision_trains_on_the_gpu(precision: str, tmp_path: Path) -> None:
    def built() -> Engine:
        config = {"precision": precision, "gradient_accumulation": 2}
        return make(
            outer=NotingOuter, inner=NotingInner, upper=config, lower=config, dtype=torch.float32, strategy="gpu"
        )

    whole, first, second = built(), built(), built()
    whole.run()
    first.run(5)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run()
    assert torch.equal(parameters(second), parameters(whole))
    assert torch.isfinite(parameters(whole)).all()
    assert {torch.float16, torch.bfloat16} & set(whole.problems[1].kinds)
