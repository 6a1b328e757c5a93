"""TensorBoard and Weights & Biases: the same numbers as in the files, no step twice, nothing imported early."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bilevel import BilevelError
from bilevel.callbacks import JSONLinesLog, TensorBoard, WeightsAndBiases
from bilevel.errors import BilevelWarning, ConfigError, UnknownNameError
from tests.bilevel.test_callbacks import engine
from tests.bilevel.test_callbacks_logs import Saves, rows_of


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_number_of_every_step(tmp_path: Path) -> None:
    engine(TensorBoard(tmp_path / "board"), JSONLinesLog(tmp_path / "log"), evaluate_every=2).run(4)
    found, rows = scalars(tmp_path / "board"), rows_of(tmp_path / "log")
    assert found["loss/outer"] == [(row["step"], pytest.approx(row["loss"]["outer"], rel=1e-6)) for row in rows]
    assert found["solve/inner/products"] == [(row["step"], row["solve"]["inner"]["products"]) for row in rows]
    assert found["evaluate/outer/distance"] == [(2, 0.5), (4, 0.5)]
    assert found["learning_rate/inner"] == [(step, pytest.approx(0.1)) for step in (1, 2, 3, 4)]
    assert {"seconds", "passes/forward", "gradient_norm/inner"} < set(found)
    assert not {"step", "solve/inner/status", "skipped"} & set(found)


@pytest.mark.parametrize("saver_first", [True, False])
def test_a_resumed_run_shows_no_step_twice_in_tensorboard(saver_first: bool, tmp_path: Path) -> None:
    def run(folder: str) -> Any:
        board, saves = TensorBoard(tmp_path / folder, seconds=False), Saves(tmp_path / "state", 3)
        return engine(*([saves, board] if saver_first else [board, saves]), evaluate_every=2)

    run("whole").run(6)
    run("parts").run(5)  # steps 4 and 5 are written, and lost with the process
    resumed = run("parts")
    resumed.load(tmp_path / "state")
    resumed.run(3)
    assert len(list((tmp_path / "parts").iterdir())) == 2
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")


def test_saving_writes_out_what_tensorboard_holds_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    real, flushed = SummaryWriter.flush, []

    def flush(self: Any) -> None:
        real(self)
        flushed.append([step for step, _ in scalars(tmp_path / "board")["loss/inner"]])

    run = engine(TensorBoard(tmp_path / "board"))
    for _ in range(3):
        run.step()
    monkeypatch.setattr(SummaryWriter, "flush", flush)  # its writer is a thread that is behind by now, or not
    run.save(tmp_path / "state")
    assert flushed == [[1, 2, 3]]
    monkeypatch.undo()
    run.callbacks[0].on_run_end(run)


def test_a_new_run_refuses_the_folder_of_another_unless_told_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "notes.txt").write_text("mine")
    engine(TensorBoard(tmp_path / "board")).run(3)
    with pytest.raises(BilevelError, match="holds 1 event files.*overwrite=True"):
        engine(TensorBoard(tmp_path / "board")).run(1)
    engine(TensorBoard(tmp_path / "board", overwrite=True)).run(2)
    assert [step for step, _ in scalars(tmp_path / "board")["loss/inner"]] == [1, 2]
    assert (tmp_path / "board" / "notes.txt").read_text() == "mine"


def test_tensorboard_on_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(self: Any, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    board = TensorBoard(tmp_path / "board")
    with pytest.warns(BilevelWarning, match="No space left on device. The run goes on|lost 3 rows"):
        engine(board).run(3)
    assert board.lost_rows == 3


def wandb_history(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads the files that ``wandb sync`` would upload: (run id, values) a step."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    found, run_id = [], ""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
            if record.HasField("run"):
                run_id = record.run.run_id
            elif record.HasField("history"):
                items = record.history.item
                found.append((run_id, {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}))
        store.close()
    return found


def test_weights_and_biases_offline_and_resumed_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(key, value)
    log = WeightsAndBiases("project", folder=tmp_path, config={"method": "neumann"})
    first = engine(log, JSONLinesLog(tmp_path / "log"), Saves(tmp_path / "state", 2), evaluate_every=2)
    first.run(2)
    again = WeightsAndBiases("project", folder=tmp_path)
    assert again.run_id != log.run_id
    resumed = engine(again, JSONLinesLog(tmp_path / "log"), Saves(tmp_path / "state", 2), evaluate_every=2)
    resumed.load(tmp_path / "state")
    resumed.run(2)
    history, rows = wandb_history(tmp_path), rows_of(tmp_path / "log")
    assert [run_id for run_id, _ in history] == [log.run_id] * 4
    for (_, values), row in zip(history, rows, strict=True):
        assert values["_step"] == row["step"]
        assert values["loss/outer"] == row["loss"]["outer"]
        assert values["solve/inner/status"] == row["solve"]["inner"]["status"]
        assert values.get("evaluate/outer/distance") == row.get("evaluate", {}).get("outer/distance")
        assert "solve/inner/error_bound" not in values


@pytest.mark.parametrize(
    ("make", "package"),
    [(lambda: TensorBoard("x"), "tensorboard"), (lambda: WeightsAndBiases(), "wandb")],
)
def test_a_missing_package_names_the_extra(make: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*pip install 'bilevel\[logging\]'"):
        make()


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="WeightsAndBiases.mode 'ofline': did you mean 'offline'"):
        WeightsAndBiases(mode="ofline")  # type: ignore[arg-type]


def test_nothing_is_imported_before_a_run_starts() -> None:
    code = (
        "import sys; from bilevel.callbacks import *; TensorBoard('x'); WeightsAndBiases('x'); RunPlot('x.svg'); "
        "print(*sorted({'tensorboard', 'wandb', 'matplotlib', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("kind", [TensorBoard, JSONLinesLog])
def test_ranks_above_zero_write_nothing(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.distributed.rank", lambda: 1)
    log = kind(tmp_path / "log")
    run = engine(log, evaluate_every=1)
    run.run(2)
    run.evaluate()
    assert list(tmp_path.iterdir()) == []
    state: Mapping[str, Any] = log.state_dict()
    assert state["pending"] is None
