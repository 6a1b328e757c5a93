"""A state that does not fit is refused with the differences named, and changes nothing; all of it is loaded or none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bilevel import Callback, Engine, EngineConfig
from bilevel.checkpoint import StructureError, read_state
from bilevel.engine_state import engine_state, load_engine_state
from bilevel.errors import BilevelWarning, CheckpointError
from tests.bilevel.test_checkpoint import SCHEDULERS, WARM, engine_for, fingerprint, network, one_cycle
from tests.bilevel.test_engine import Classifier, Decay, adam, data, make, sgd

# a small network is not convex
pytestmark = pytest.mark.filterwarnings("ignore:hypergradient:bilevel.errors.BilevelWarning")


def two_groups(params: Any) -> torch.optim.Optimizer:
    first, *rest = params
    return torch.optim.Adam([{"params": [first]}, {"params": rest, "lr": 0.2}], lr=0.05)


class Silent(Callback):
    """Has no state."""


class Remembers(Callback):
    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


DIFFERENT = {
    "shape": (lambda: engine_for(WARM, hidden=5), r"classifier: 0.weight: shape \(6, 4\), expected \(5, 4\)"),
    "buffer": (lambda: engine_for(WARM, hidden=5), r"classifier: buffer 1.running_mean: shape \(6,\), expected \(5,\)"),
    "dtype": (lambda: _double(engine_for(WARM)), "classifier: 0.weight: torch.float32, expected torch.float64"),
    "optimizer": (lambda: engine_for(optimizer=sgd(0.1), scheduler=None), "Adam was saved; this engine has SGD"),
    "no optimizer": (lambda: without_optimizer(), "classifier: optimizer missing here"),
    "groups": (lambda: engine_for(optimizer=two_groups), "optimizer: 1 parameter groups were saved; here are 2"),
    "no scheduler": (lambda: engine_for(scheduler=None), "classifier: scheduler missing here"),
    "scheduler": (lambda: engine_for(scheduler=SCHEDULERS["plateau"]), "OneCycleLR was saved; .* ReduceLROnPlateau"),
    "method": (lambda: engine_for("neumann"), "method 'conjugate_gradient' was saved; this engine has 'neumann'"),
    "method's field": (lambda: engine_for({**WARM, "rtol": 0.5}), "rtol of method 'conjugate_gradient' was .* is 0.5"),
    "data": (lambda: engine_for(WARM, data=None), "classifier: data missing here"),
}  # fmt: skip


def _double(engine: Engine) -> Engine:
    engine.problems["classifier"].module.double()
    return engine


def without_optimizer() -> Engine:
    decay = Decay(nn.ParameterList([torch.tensor(-2.0)]), optimizer=sgd(0.1), data=data(seed=1))
    return Engine([decay, Classifier(network(), data=data())], EngineConfig(progress=False), hypergradient=WARM)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = engine_for(WARM)
    for _ in range(3):
        engine.step()
    engine.save(tmp_path_factory.mktemp("saved") / "state")
    return tmp_path_factory.getbasetemp() / "saved0" / "state"


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_structure_is_refused_with_the_difference(kind: str, saved: Path) -> None:
    make_other, message = DIFFERENT[kind]
    other = make_other()
    before = fingerprint(other)
    with pytest.raises(StructureError, match=message):
        other.load(saved)
    assert fingerprint(other) == before


def test_groups_that_hold_other_parameters_are_refused(tmp_path: Path) -> None:
    engine_for(optimizer=two_groups, scheduler=None).save(tmp_path / "state")
    swapped = engine_for(optimizer=lambda params: two_groups(list(params)[::-1]), scheduler=None)
    with pytest.raises(StructureError, match=r"group 0 held 0.weight; here it holds 3.bias"):
        swapped.load(tmp_path / "state")


def test_parts_of_a_composed_scheduler_count(tmp_path: Path) -> None:
    def composed(last: Any) -> Any:
        return lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), last(o)], milestones=[3])

    engine_for(scheduler=composed(lambda o: lr_scheduler.ExponentialLR(o, 0.9))).save(tmp_path / "state")
    other = engine_for(scheduler=composed(lambda o: lr_scheduler.StepLR(o, 3)))
    with pytest.raises(StructureError, match="SequentialLR/ConstantLR/ExponentialLR was saved; .*/StepLR"):
        other.load(tmp_path / "state")


def test_other_problems_are_refused(saved: Path) -> None:
    class Renamed(Classifier):
        def loss(self, batch: Any) -> Any:
            return self(batch[0]).sum() * self.other.module[0]

    class Outer(Decay):
        def loss(self, batch: Any) -> Any:
            return self.classifier(batch[0]).sum()

    decay = Outer(nn.ParameterList([torch.tensor(-2.0)]), data=data(), name="other")
    engine = Engine([decay, Renamed(nn.Linear(4, 3), data=data(), name="classifier")], EngineConfig(progress=False))
    with pytest.raises(
        StructureError, match="problems decay, classifier were saved; this engine has other, classifier"
    ):
        engine.load(saved)


def test_many_differences_are_not_all_listed(saved: Path) -> None:
    with pytest.raises(StructureError, match=r"… and \d+ more") as caught:
        engine_for("neumann", hidden=5, optimizer=two_groups, scheduler=None, data=None).load(saved)
    assert len(str(caught.value).splitlines()) == 12


# --- what may differ --------------------------------------------------------------------------------------------------


def test_callbacks_without_state_steps_and_other_settings_may_differ(saved: Path) -> None:
    engine = make(
        WARM, module=network(), optimizer=adam(9.0), scheduler=one_cycle, steps=5, config=EngineConfig(steps=7, seed=9)
    )
    engine.callbacks = (Silent(),)
    engine.load(saved)
    assert engine.step_count == 3


def test_callbacks_that_remember_are_matched_and_differences_are_said(tmp_path: Path) -> None:
    engine = engine_for()
    engine.callbacks = (Silent(), Remembers([1, 2]), Remembers("b"))
    engine.save(tmp_path / "state")
    both = Remembers(), Remembers()
    engine.callbacks = (both[0], Silent(), Silent(), both[1])
    engine.load(tmp_path / "state")
    assert [callback.value for callback in both] == [[1, 2], "b"]
    engine.callbacks = (Silent(),)
    with pytest.warns(BilevelWarning, match="Remembers: saved and not used"):
        engine.load(tmp_path / "state")
    engine.save(tmp_path / "none")
    engine.callbacks = (Remembers(),)
    with pytest.warns(BilevelWarning, match="Remembers: not in the checkpoint, starting afresh"):
        engine.load(tmp_path / "none")
    with pytest.raises(StructureError, match="2 callbacks Remembers were saved; this engine has 1"):
        engine.load(tmp_path / "state")


# --- all or nothing ---------------------------------------------------------------------------------------------------


class Refuses(Remembers):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.value == "bad":
            raise RuntimeError("cannot take this")


def _ready(saved: Path) -> tuple[Engine, dict[str, Any]]:
    engine = engine_for(WARM)
    engine.step()
    return engine, read_state(saved)


@pytest.mark.parametrize("part", ["data", "callbacks", "optimizers", "schedulers"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_where_somebody_else_s_code_fails_the_engine_is_as_before(
    part: str, error: type[BaseException], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, state = _ready(saved)
    first, second = Remembers(1), Remembers(2)
    engine.callbacks = (first, second)
    state["callbacks"] = [{"kind": "Remembers", "state": {"value": value}} for value in ("new", "bad")]
    broken = {
        "data": engine.streams["classifier"],
        "callbacks": second,
        "optimizers": engine.problems["classifier"].optimizer,
        "schedulers": engine.problems["classifier"].scheduler,
    }[part]
    before, load, calls = fingerprint(engine), type(broken).load_state_dict, []

    def fails_once(self: Any, taken: Any) -> None:
        load(self, taken)
        if self is broken:
            calls.append(1)
            if len(calls) == 1:
                _ = torch.rand(1), np.random.rand(), random.random()
                raise error("cannot take this")

    monkeypatch.setattr(type(broken), "load_state_dict", fails_once)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected, match="cannot take this"):
        load_engine_state(engine, state)
    assert calls
    assert fingerprint(engine) == before


def test_what_cannot_be_put_back_is_said(saved: Path) -> None:
    engine, state = _ready(saved)
    engine.callbacks = (Refuses("bad"),)
    state["callbacks"] = [{"kind": "Refuses", "state": {"value": "bad"}}]
    with pytest.raises(CheckpointError, match="callbacks could not be loaded.*What the engine had before as callbacks"):
        load_engine_state(engine, state)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list, tuple)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)}
    items = list(value)
    items[path[0]] = replaced(items[path[0]], path[1:], new)
    return type(value)(items)


@pytest.mark.parametrize("share", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_wrong_value_anywhere_changes_nothing_or_is_refused(share: int, saved: Path) -> None:
    """Every value of a state in turn is replaced by what cannot stand there."""
    engine, state = _ready(saved)
    engine.callbacks = (Remembers(1),)
    before, whole = fingerprint(engine), engine_state(engine)
    state["callbacks"] = [{"kind": "Remembers", "state": {"value": 2}}]
    wrong = [{"x": 1}, torch.ones(2, 2, 2), [[]]]
    refused = 0
    for number, path in enumerate(list(places(state))[::share]):
        try:
            load_engine_state(engine, replaced(state, path, wrong[number % 3]))
        except CheckpointError:
            refused += 1
            assert fingerprint(engine) == before, path
        else:
            assert path[0] in ("callbacks", "data"), path  # whose contents are others' to judge
            engine, _ = _ready(saved)
            engine.callbacks = (Remembers(1),)
            load_engine_state(engine, whole) if fingerprint(engine) != before else None
    assert refused > 150 / share


COUNTS = ["steps", "skipped_steps", "forward_passes", "backward_passes"]


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [-1, float("nan"), True, 2.0, None, "3"], ids=str)
def test_a_count_that_is_none_is_refused(key: str, value: Any, saved: Path) -> None:
    engine, state = _ready(saved)
    before = fingerprint(engine)
    with pytest.raises(CheckpointError, match="is no count"):
        load_engine_state(engine, replaced(state, ("counts", key), value))
    assert fingerprint(engine) == before


@pytest.mark.parametrize("key", ["step", "optimizer", "get_lr", "load_state_dict"])
def test_a_scheduler_s_state_cannot_replace_its_methods(key: str, saved: Path) -> None:
    engine, state = _ready(saved)
    state["schedulers"]["classifier"]["state"][key] = 1
    with pytest.raises(CheckpointError, match=f"speaks of '{key}'"):
        load_engine_state(engine, state)


@pytest.mark.parametrize("part", ["methods", "data", "callbacks", "optimizers", "schedulers", "parameters", "buffers"])
def test_a_missing_part_is_refused(part: str, saved: Path) -> None:
    engine, state = _ready(saved)
    del state[part]
    with pytest.raises(CheckpointError, match=f"holds no engine state .its {part}"):
        load_engine_state(engine, state)
    with pytest.raises(CheckpointError, match="unknown parts: more"):
        load_engine_state(engine, {**read_state(saved), "more": 1})
