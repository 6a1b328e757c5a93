"""Saving and resuming: the run goes on as if it had not stopped, and a bad file changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bilevel import Engine, EngineConfig
from bilevel.checkpoint import read_state, write_state
from bilevel.errors import CheckpointError
from tests.bilevel.test_engine import METHODS, Classifier, Decay, adam, data, make, same, state_of

# a small network is not convex
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))


def engine_for(method) -> Engine:
    schedule = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)  # noqa: E731
    return make(method, module=network(), optimizer=adam(0.05), scheduler=schedule)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 3, 5])  # an epoch has three batches: within one, at its end, past it
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, stop, tmp_path):
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
    assert second.step_count == 8
    assert second.passes.forward == whole.passes.forward


def test_the_file_holds_tensors_and_json_only(tmp_path):
    engine = engine_for("neumann")
    engine.step()
    engine.save(tmp_path / "state")
    raw = (tmp_path / "state").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["state"])
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_another_structure_is_refused_with_the_differences(tmp_path):
    engine = engine_for("identity")
    engine.save(tmp_path / "state")
    other = make("identity", module=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)))
    before = state_of(other)
    with pytest.raises(CheckpointError, match=r"0.weight: shape \(6, 4\), expected \(5, 4\)"):
        other.load(tmp_path / "state")
    assert same(before, state_of(other))

    class Renamed(Classifier):
        def loss(self, batch):
            return self(batch[0]).sum() * self.other.module[0]

    class Outer(Decay):
        def loss(self, batch):
            return self.classifier(batch[0]).sum()

    decay = Outer(nn.ParameterList([torch.tensor(-2.0)]), data=data(), name="other")
    inner = Renamed(nn.Linear(4, 3), data=data(), name="classifier")
    with pytest.raises(
        CheckpointError, match="problems decay, classifier were saved; this engine has other, classifier"
    ):
        Engine([decay, inner], EngineConfig(progress=False)).load(tmp_path / "state")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    engine = engine_for("identity")
    engine.save(tmp_path / "state")
    before = state_of(engine)
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("not a checkpoint")
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    for name in ("half", "text", "pickle", "foreign", "missing"):
        with pytest.raises(CheckpointError, match=name):
            engine.load(tmp_path / name)
    assert same(before, state_of(engine))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_state(tmp_path / "state", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"state\.b is a object"):
        write_state(tmp_path / "state", {"b": object()})
    assert torch.equal(read_state(tmp_path / "state")["a"], torch.ones(2))
    with pytest.raises(CheckpointError, match="cannot write"):
        write_state("/proc/nowhere/state", {"a": 1})


def test_nested_states_round_trip(tmp_path):
    state = {
        "i": 1,
        "f": 0.1,
        "s": "x",
        "n": None,
        "b": True,
        "l": [1, (2, {"k": torch.arange(3)})],
        "m": {0: 1.5, "0": 2},
    }
    write_state(tmp_path / "state", state)
    found = read_state(tmp_path / "state")
    assert torch.equal(found["l"][1][1].pop("k"), state["l"][1][1].pop("k"))
    assert found == state
