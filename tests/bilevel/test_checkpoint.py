"""Saving and resuming: the run goes on as if it had not stopped, and a state that does not fit changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bilevel import Engine, EngineConfig
from bilevel.checkpoint.encoding import encode
from bilevel.engine_state import engine_state
from bilevel.engine_state.run import device_for
from tests.bilevel.test_engine import METHODS, Classifier, Decay, adam, data, make, same, sgd, state_of

# a small network is not convex
pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:bilevel.errors.BilevelWarning")

WARM = {"method": "conjugate_gradient", "warm_start": "quadratic"}


def network(hidden: int = 6) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.2), nn.Linear(hidden, 3))


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)


def engine_for(method: Any = "identity", hidden: int = 6, **settings: Any) -> Engine:
    return make(method, module=network(hidden), **{"optimizer": adam(0.05), "scheduler": one_cycle, **settings})


def fingerprint(engine: Engine) -> str:
    """A digest of everything that a checkpoint would hold."""
    structure, tensors = encode(engine_state(engine))
    digest = hashlib.sha256(json.dumps(structure).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the run goes on --------------------------------------------------------------------------------------------------


# An epoch has three batches: within one, at its end, past it.
@pytest.mark.parametrize(("method", "stop"), [*((method, 2) for method in METHODS), (WARM, 1), (WARM, 3), (WARM, 5)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method: Any, stop: int, tmp_path: Path) -> None:
    torch.manual_seed(11)
    whole = engine_for(method)
    torch.manual_seed(12)
    losses = [whole.step().losses for _ in range(8)]
    first = engine_for(method)
    torch.manual_seed(12)
    for _ in range(stop):
        first.step()
    first.save(tmp_path / "state")
    torch.manual_seed(99)
    second = engine_for(method)
    second.load(tmp_path / "state")
    resumed = [second.step().losses for _ in range(8 - stop)]
    assert resumed == losses[stop:]
    assert same(state_of(whole), state_of(second))
    assert fingerprint(whole) == fingerprint(second)
    assert second.step_count == 8


def test_loading_and_saving_again_gives_the_same_file(tmp_path: Path) -> None:
    engine = engine_for(WARM)
    for _ in range(3):
        engine.step()
    engine.save(tmp_path / "a")
    other = engine_for(WARM)
    other.load(tmp_path / "a")
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_numpy_s_and_python_s_generators_go_on_too(tmp_path: Path) -> None:
    """A loss may draw from them."""
    engine = engine_for()
    np.random.seed(1)
    random.seed(1)
    random.gauss(0, 1)  # which keeps a second number for the next call
    np.random.normal()
    engine.save(tmp_path / "state")
    expected = np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()
    engine.load(tmp_path / "state")
    assert (np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()) == expected


class KeepsFloat32(torch.optim.Optimizer):
    """Adds gradients up in float32, whatever the parameters are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p].setdefault("sum", torch.zeros(p.shape, dtype=torch.float32))
                held += p.grad.float()
                p.data.add_(held.to(p.dtype), alpha=-group["lr"])


def test_what_an_optimiser_keeps_in_a_better_precision_loses_nothing(tmp_path: Path) -> None:
    """torch's load_state_dict casts it to the parameter's dtype."""

    def made() -> Engine:
        torch.manual_seed(0)
        outer = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data())
        module = nn.Linear(4, 3)
        engine = Engine([outer, Classifier(module, optimizer=KeepsFloat32, data=data())], EngineConfig(progress=False))
        module.to(torch.bfloat16)
        module.forward = lambda x: nn.functional.linear(x.bfloat16(), module.weight, module.bias).float()
        return engine

    engine, other = made(), made()
    for _ in range(3):
        engine.step()
    (saved, *_) = engine.problems["classifier"].optimizer.state.values()
    assert not torch.equal(saved["sum"], saved["sum"].bfloat16().float())
    engine.save(tmp_path / "state")
    other.load(tmp_path / "state")
    (found, *_) = other.problems["classifier"].optimizer.state.values()
    assert found["sum"].dtype == torch.float32
    assert torch.equal(found["sum"], saved["sum"])


def test_settings_of_the_optimiser_are_those_of_the_file(tmp_path: Path) -> None:
    engine = make(optimizer=sgd(0.3, momentum=0.9))
    engine.step()
    engine.save(tmp_path / "state")
    other = make(optimizer=sgd(0.001, momentum=0.5))
    other.load(tmp_path / "state")
    (group,) = other.problems["classifier"].optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.3, 0.9)


SCHEDULERS = {
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 7]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_kind_of_scheduler_goes_on(kind: str, tmp_path: Path) -> None:
    whole = engine_for(scheduler=SCHEDULERS[kind])
    for _ in range(2):
        whole.step()
    whole.save(tmp_path / "state")
    other = engine_for(scheduler=SCHEDULERS[kind])
    other.load(tmp_path / "state")
    assert type(other.problems["classifier"].scheduler) is type(whole.problems["classifier"].scheduler)
    for engine in (whole, other):
        torch.manual_seed(0)
        for _ in range(3):
            engine.step()
    assert fingerprint(whole) == fingerprint(other)


@pytest.mark.parametrize(
    ("saved", "were", "are", "expected"),
    [
        ("cuda:0", ["cuda:0"], ["cuda:0"], "cuda:0"),
        ("cuda:1", ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"], "cuda:1"),
        ("cuda:0", ["cuda:0"], ["cuda:1"], "cuda:1"),
        ("cuda:0", ["cuda:0"], ["cpu"], "cpu"),
        ("cpu", ["cpu"], ["cuda:0"], "cuda:0"),
        ("cpu", ["cuda:0"], ["cuda:0"], "cpu"),  # a generator's state, a number
        ("cpu", ["cuda:0"], ["cuda:1"], "cpu"),
    ],
)
def test_what_methods_remember_goes_where_the_parameters_are(saved: str, were: Any, are: Any, expected: str) -> None:
    assert device_for(saved, were, are) == torch.device(expected)
