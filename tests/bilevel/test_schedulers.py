"""Schedulers step as in a hand-written loop, survive a file bit for bit, and go back when a step is refused."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from bilevel import Engine, EngineConfig
from bilevel.checkpoint import read_state, write_state
from bilevel.errors import BilevelError, ConfigError, NonFiniteError, UnknownNameError
from bilevel.optimizer_state import Kept, load_scheduler_state, scheduler_state
from bilevel.stepper import Stepper
from tests.bilevel.test_optimizers import QUIET, Decay, Network, batches, grouped, inner_loss, network


class Ramp:
    """A factor that counts its calls: what a scheduler calls may have a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / (1 + 0.1 * self.calls)


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.StepLR(optimizer, 2, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def nested(optimizer):
    """A chain in a sequence, with a cycle of momenta at its end."""
    first = lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.LambdaLR(optimizer, Ramp())])


TORCH = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, Ramp()]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, Ramp()),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-3),
    "ChainedScheduler": nested,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.2, cooldown=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, step_size_down=3, mode="exp_range"),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "SWALR": lambda o: SWALR(o, 0.001, anneal_epochs=4),
}
SPECIFIC = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 0.2},
    "greedy": {"patience": 0, "factor": 0.5, "min_lr": 1e-4, "smooth": True, "window_size": 2},
}
TRANSFORMERS = [
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *SPECIFIC,
]
NAMES = [*TORCH, *(f"transformers.{name}" for name in TRANSFORMERS)]


def scheduler_of(name: str, optimizer):
    if name in TORCH:
        return TORCH[name](optimizer)
    from transformers.optimization import get_scheduler

    kind = name.removeprefix("transformers.")
    specific = dict(SPECIFIC.get(kind, {}))
    return get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=12, scheduler_specific_kwargs=specific)


def asks_for_metric(scheduler) -> bool:
    return "metrics" in inspect.signature(scheduler.step).parameters


def test_the_table_holds_every_scheduler_of_torch():
    exported = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert exported <= set(TORCH)


def test_the_table_holds_every_scheduler_of_transformers():
    transformers = pytest.importorskip("transformers")
    assert {kind.value for kind in transformers.SchedulerType} <= set(TRANSFORMERS)


def settings_of(optimizer) -> list[dict]:
    """Everything that a scheduler may cycle: rates, momenta, betas."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def by_hand(name: str, count: int) -> tuple[nn.Module, list[list[dict]]]:
    """The parameters and the settings after each update of the loop that everybody writes."""
    module = network()
    optimizer = grouped(torch.optim.Adam, module)
    scheduler, decay, history = scheduler_of(name, optimizer), torch.tensor(-3.0), []
    for batch in batches(count):
        optimizer.zero_grad()
        loss = inner_loss(module, decay, batch)
        loss.backward()
        optimizer.step()
        if asks_for_metric(scheduler):
            scheduler.step(loss.item())
        else:
            scheduler.step()
        history.append(copy.deepcopy(settings_of(optimizer)))
    return module, history


def engine_of(name: str, config: EngineConfig = QUIET, **more) -> Engine:
    decay = Decay(
        nn.ParameterList([torch.tensor(-3.0)]),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        data=[batches(1)[0]],
    )
    module = network()
    settings = {"optimizer": grouped(torch.optim.Adam, module), "scheduler": lambda o: scheduler_of(name, o), **more}
    return Engine([decay, Network(module, steps=2, **settings)], config, "identity")


def run(engine: Engine, part: list) -> list[list[dict]]:
    history = []
    for start in range(0, len(part), 2):
        engine.step({"network": iter(part[start : start + 2])})
        history.append(copy.deepcopy(settings_of(engine.problems["network"].optimizer)))
    return history


def equal_modules(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_as_in_a_hand_written_loop(name):
    module, history = by_hand(name, 10)
    engine = engine_of(name)
    assert run(engine, batches(10)) == history[1::2]
    assert equal_modules(engine.problems["network"].module, module)
    constant = name == "transformers.constant"
    assert constant or any(now != history[0] for now in history[1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_one_goes_on_bit_for_bit(name, tmp_path):
    module, history = by_hand(name, 10)
    first = engine_of(name)
    run(first, batches(10)[:4])
    first.save(tmp_path / "state")
    second = engine_of(name)
    second.load(tmp_path / "state")
    assert settings_of(second.problems["network"].optimizer) == history[3]
    assert run(second, batches(10)[4:]) == history[5::2]
    assert equal_modules(second.problems["network"].module, module)
    run(first, batches(10)[4:])
    ends = [scheduler_state(made.problems["network"].scheduler) for made in (first, second)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_step_puts_it_back(name):
    module, history = by_hand(name, 10)
    engine = engine_of(name)
    assert run(engine, batches(10)[:4]) == history[1:4:2]
    problem = engine.problems["network"]
    before = copy.deepcopy(scheduler_state(problem.scheduler))
    x, y = batches(1)[0]
    with pytest.raises(NonFiniteError, match="network"):
        engine.step({"network": iter([batches(1)[0], (x * math.nan, y)])})  # the first update moves it on
    assert settings_of(problem.optimizer) == history[3]
    assert scheduler_state(problem.scheduler) == before
    assert run(engine, batches(10)[4:]) == history[5::2]
    assert equal_modules(problem.module, module)


def test_rates_that_are_tensors_are_put_back_and_saved(tmp_path):
    """Schedulers change them in place."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.1), foreach=False)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    kept = Kept(optimizer, scheduler)
    stepper = Stepper("one", optimizer, {"p": parameter}, scheduler=scheduler)
    stepper.update([torch.ones(2)], {})
    assert rate.item() == pytest.approx(0.05)
    kept.restore()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)
    assert optimizer.state == {}
    stepper.update([torch.ones(2)], {})
    write_state(tmp_path / "state", {"optimizer": optimizer.state_dict(), "scheduler": scheduler_state(scheduler)})
    other = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1), foreach=False)
    again = lr_scheduler.ExponentialLR(other, 0.5)
    saved = read_state(tmp_path / "state")
    other.load_state_dict(saved["optimizer"])
    load_scheduler_state(again, saved["scheduler"])
    assert other.param_groups[0]["lr"] == rate
    assert again.get_last_lr() == scheduler.get_last_lr()


def test_what_a_step_adds_to_an_optimizer_is_taken_out_again_and_tensors_stay_themselves():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    stepper = Stepper("one", optimizer, {"p": parameter})
    stepper.update([torch.ones(2)], {})
    buffer = optimizer.state[parameter]["momentum_buffer"]
    kept = Kept(optimizer, None)
    optimizer.param_groups[0]["note"] = 1
    optimizer.state[parameter]["more"] = torch.ones(1)
    stepper.update([torch.ones(2)], {})
    assert buffer.tolist() == pytest.approx([1.9, 1.9])
    kept.restore()
    assert "note" not in optimizer.param_groups[0]
    assert set(optimizer.state[parameter]) == {"momentum_buffer"}
    assert optimizer.state[parameter]["momentum_buffer"] is buffer
    assert buffer.tolist() == [1.0, 1.0]
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_a_state_is_kept_again_in_the_same_memory_and_is_then_the_later_one():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    stepper = Stepper("one", optimizer, {"p": parameter}, scheduler=scheduler)
    kept, expected = Kept(optimizer, scheduler), None
    places: list[dict[str, int]] = []
    for step in range(3):
        stepper.update([torch.ones(2)], {})
        kept.take()
        places.append({name: part.data_ptr() for name, part in kept._state[parameter].items()})
        expected = copy.deepcopy((optimizer.state_dict(), scheduler_state(scheduler)))
        stepper.update([torch.full((2,), 7.0 + step)], {})
        kept.restore()
        assert str((optimizer.state_dict(), scheduler_state(scheduler))) == str(expected)
    assert places[0] == places[1] == places[2]
    assert {part.data_ptr() for part in optimizer.state[parameter].values()}.isdisjoint(places[0].values())
    # Of another shape, another type, or gone: as for the first time.
    state = optimizer.state[parameter]
    state["exp_avg"], state["exp_avg_sq"] = torch.arange(3.0), state["exp_avg_sq"].double()
    del state["step"]
    kept.take()
    optimizer.state[parameter] = {"step": 5}
    kept.restore()
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}
    assert optimizer.state[parameter]["exp_avg"].tolist() == [0.0, 1.0, 2.0]
    assert optimizer.state[parameter]["exp_avg_sq"].dtype == torch.float64


def test_a_callable_that_holds_the_model_keeps_this_very_model():
    """torch's schedulers count what a callable holds as their state; a copy of the model would be trained by nobody."""

    class ByNorm:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.calls = model, 0

        def __call__(self, epoch: int) -> float:
            self.calls += 1
            return 1 / (1 + self.model[0].weight.norm().item())

    module = network()
    optimizer = grouped(torch.optim.SGD, module)
    factor = ByNorm(module)
    scheduler = lr_scheduler.LambdaLR(optimizer, factor)
    kept = Kept(optimizer, scheduler, module.modules())
    calls = factor.calls
    factor.calls = 99
    kept.restore()
    assert factor.model is module
    assert factor.calls == calls


def test_a_loaded_state_is_left_as_it_is():
    """CyclicLR takes apart what it is given."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1)
    state = scheduler_state(scheduler)
    before = copy.deepcopy(state)
    load_scheduler_state(scheduler, state)
    assert state == before


def test_milestones_are_counted_again_after_a_file(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = lr_scheduler.MultiStepLR(optimizer, [1, 1, 3])
    write_state(tmp_path / "state", scheduler_state(scheduler))
    load_scheduler_state(scheduler, read_state(tmp_path / "state"))
    assert list(scheduler.milestones.elements()) == [1, 1, 3]


def test_a_ready_scheduler_is_taken_as_it_is():
    module = network()
    optimizer = grouped(torch.optim.Adam, module)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    problem = Network(module, optimizer=optimizer, scheduler=scheduler)
    assert problem.scheduler is scheduler
    problem.update([torch.ones_like(p) for p in problem.parameters], {"loss": 1.0})
    assert scheduler.last_epoch == 1


def test_a_scheduler_of_another_optimizer_is_refused():
    """It would change nothing here, without a word."""
    module = network()
    other = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"scheduler of problem 'network': this StepLR belongs to another optimizer"):
        Network(module, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), scheduler=lr_scheduler.StepLR(other, 1))


@pytest.mark.parametrize("scheduler", [3, lambda optimizer: "cosine"])
def test_what_is_no_scheduler_is_refused(scheduler):
    with pytest.raises(ConfigError, match=r"scheduler of problem 'network' must be .* not (str|int)"):
        Network(network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), scheduler=scheduler)


class Measured(Network):
    """An inner problem whose loss and evaluation return more."""

    accuracy = 0.5

    def loss(self, batch):
        value = super().loss(batch)
        return {"loss": value, "negative": -value}

    def evaluate(self):
        return {"accuracy": self.accuracy}


def measured(metric: str | None, *, every: int = 0, mode: str = "min", **more) -> Engine:
    module = network()
    decay = Decay(
        nn.ParameterList([torch.tensor(-3.0)]),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        data=[batches(1)[0]],
    )
    plateau = lambda o: lr_scheduler.ReduceLROnPlateau(o, mode, factor=0.5, patience=0)  # noqa: E731
    settings = {"optimizer": torch.optim.SGD(module.parameters(), lr=0.1), "scheduler": plateau, "steps": 2, **more}
    inner = Measured(module, name="network", scheduler_metric=metric, **settings)
    return Engine([decay, inner], EngineConfig(progress=False, evaluate_every=every), "identity")


class Recorded(lr_scheduler.ReduceLROnPlateau):
    """A plateau that keeps what it was given."""

    def step(self, metrics, epoch=None):
        self.seen = [*getattr(self, "seen", []), metrics]
        super().step(metrics, epoch)


@pytest.mark.parametrize(("metric", "sign"), [(None, 1), ("loss", 1), ("negative", -1)])
def test_a_plateau_is_given_the_metric_that_was_named_after_every_update(metric, sign):
    engine = measured(metric, steps=1, scheduler=Recorded)
    losses = [engine.step({"network": batch}).losses["network"] for batch in batches(3)]
    assert engine.problems["network"].scheduler.seen == [sign * loss for loss in losses]


def test_a_metric_of_an_evaluation_moves_the_scheduler_after_evaluations_only():
    engine = measured("evaluate/accuracy", every=2, mode="max")
    problem = engine.problems["network"]
    rates, epochs = [], []
    for step, accuracy in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.9]):
        problem.accuracy = accuracy
        engine.step({"network": batches(6)[step]})
        rates.append(problem.optimizer.param_groups[0]["lr"])
        epochs.append(problem.scheduler.last_epoch)
    assert epochs == [0, 1, 1, 2, 2, 3]
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.05, 0.05]
    engine.evaluate()  # asked for by hand it changes nothing
    assert problem.scheduler.last_epoch == 3


def test_a_metric_that_does_not_exist_is_an_error_that_lists_what_does():
    with pytest.raises(UnknownNameError, match=r"'penalty'.*Choices: 'loss', 'negative'"):
        measured("penalty").step({"network": batches(1)[0]})
    engine = measured("evaluate/acuracy", every=1)
    with pytest.raises(BilevelError, match=r"did you mean .evaluate/accuracy."):  # after the step, which is complete
        engine.step({"network": batches(1)[0]})


def test_a_metric_of_evaluations_that_are_never_made_is_refused():
    with pytest.raises(ConfigError, match=r"problem 'network' waits for 'evaluate/accuracy'.*evaluate_every"):
        measured("evaluate/accuracy").step({"network": batches(1)[0]})


def test_a_metric_for_a_scheduler_that_asks_for_none_is_refused():
    with pytest.raises(ConfigError, match=r"scheduler_metric='loss', but StepLR.step\(\) asks for none"):
        measured("loss", scheduler=lambda o: lr_scheduler.StepLR(o, 1))
    with pytest.raises(ConfigError, match=r"scheduler_metric='loss', but it has no scheduler"):
        measured("loss", scheduler=None)
