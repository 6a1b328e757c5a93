"""Logs in files: every step once, exact numbers, and the same bytes after an interruption."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import BilevelError, Callback, Engine, EngineConfig, Problem, StepResult
from bilevel.callbacks import CSVLog, HypergradientMonitor, JSONLinesLog
from bilevel.callbacks.log_file import LogFile
from bilevel.errors import BilevelWarning, CheckpointError, ConfigError
from tests.bilevel.test_callbacks import Inner, engine, sgd

LOGS = [JSONLinesLog, CSVLog]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON Lines file; anything that is not JSON, NaN included, is an error."""

    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Results(Callback):
    def __init__(self) -> None:
        self.seen: list[StepResult] = []

    def on_step_end(self, engine: Engine, result: StepResult) -> None:
        self.seen.append(result)


class Saves(Callback):
    """Saves the engine at a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_step_complete(self, engine: Engine, result: StepResult) -> None:
        if result.step == self.step:
            engine.save(self.path)


def test_a_row_holds_what_the_step_returned_exactly(tmp_path: Path) -> None:
    results = Results()
    run = engine(JSONLinesLog(tmp_path / "deep" / "log.jsonl"), results, evaluate_every=2)
    run.problems["inner"].optimizer.add_param_group({"params": [], "lr": 0.25})
    run.run(3)
    rows = rows_of(tmp_path / "deep" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, result in zip(rows, results.seen, strict=True):
        assert row["loss"] == result.losses
        assert row["gradient_norm"] == result.gradient_norms
        assert row["passes"] == {"forward": result.passes[0], "backward": result.passes[1]}
        assert row["learning_rate"] == {"outer": [0.1], "inner": [0.1, 0.25]}
        assert row["skipped"] is None
        info, solve = result.solves["inner"], row["solve"]["inner"]
        assert (solve["method"], solve["status"]) == ("neumann", info.status.value)
        numbers = ("residual", "iterations", "products", "error_bound", "inner_gradient_norm")
        assert [solve[key] for key in numbers] == [getattr(info, key) for key in numbers]
        assert "seconds" not in row
    assert [row.get("evaluate") for row in rows] == [None, {"outer/distance": 0.5}, None]


def test_a_table_holds_the_same_by_flat_names(tmp_path: Path) -> None:
    nested, flat = tmp_path / "log.jsonl", tmp_path / "log.csv"
    engine(JSONLinesLog(nested), CSVLog(flat), HypergradientMonitor(), evaluate_every=2).run(4)
    for row, cells in zip(rows_of(nested), table_of(flat), strict=True):
        assert int(cells["step"]) == row["step"]
        assert float(cells["loss/inner"]) == row["loss"]["inner"]
        assert float(cells["gradient_norm/outer"]) == row["gradient_norm"]["outer"]
        assert cells["solve/inner/status"] == row["solve"]["inner"]["status"]
        assert float(cells["learning_rate/inner"]) == row["learning_rate"]["inner"][0]
        assert (cells["skipped"], cells["solve/inner/error_bound"]) == ("", "")
        assert cells["evaluate/outer/distance"] == ("0.5" if row["step"] % 2 == 0 else "")
        assert float(cells["hypergradient/outer/norm"]) == row["values"]["hypergradient/outer/norm"]


class Strange(Problem):
    def loss(self, batch: Any) -> Mapping[str, Any]:
        values = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": torch.tensor(0.1)}
        return {"loss": (self.inner.module.weight - 1.0).square().sum() + self.module.weight.sum() * 0.0, **values}


def strange(*callbacks: Callback, **settings: Any) -> Engine:
    torch.manual_seed(0)
    problems = [Strange(nn.Linear(2, 2), optimizer=sgd, name="outer"), Inner(nn.Linear(2, 2), optimizer=sgd)]
    return Engine(problems, EngineConfig(progress=False, **settings), "identity", callbacks=callbacks)


def test_what_is_not_finite_is_valid_json_and_told_apart(tmp_path: Path) -> None:
    strange(JSONLinesLog(tmp_path / "log.jsonl"), CSVLog(tmp_path / "log.csv")).run(2)
    (row, _), (cells, _) = rows_of(tmp_path / "log.jsonl"), table_of(tmp_path / "log.csv")
    single = torch.tensor(0.1).item()
    assert row["metric"] == {"outer/a": "Infinity", "outer/b": "-Infinity", "outer/c": "NaN", "outer/d": single}
    assert [float(row["metric"][f"outer/{key}"]) for key in "ab"] == [math.inf, -math.inf]
    assert math.isnan(float(row["metric"]["outer/c"]))
    assert [cells[f"metric/outer/{key}"] for key in "abcd"] == ["inf", "-inf", "nan", repr(single)]
    assert row["solve"]["inner"]["residual"] is None  # nothing is solved: not known, rather than not finite


def test_a_skipped_step_has_a_row(tmp_path: Path) -> None:
    run = engine(JSONLinesLog(tmp_path / "log.jsonl"), CSVLog(tmp_path / "log.csv"), on_non_finite="skip")
    run.step()
    with torch.no_grad():
        run.problems["inner"].module.weight.fill_(math.nan)
    run.step()
    rows, cells = rows_of(tmp_path / "log.jsonl"), table_of(tmp_path / "log.csv")
    assert [row["skipped"] for row in rows] == [None, "inner"]
    assert rows[1]["loss"] == {}
    assert (cells[1]["step"], cells[1]["skipped"], cells[1]["loss/outer"]) == ("2", "inner", "")


def test_a_row_is_in_the_file_when_its_step_is_over(tmp_path: Path) -> None:
    run = engine(JSONLinesLog(tmp_path / "log.jsonl"))
    for step in range(1, 4):
        run.step()
        assert [row["step"] for row in rows_of(tmp_path / "log.jsonl")] == list(range(1, step + 1))


def test_an_evaluation_between_steps_has_a_row_of_its_own(tmp_path: Path) -> None:
    run = engine(JSONLinesLog(tmp_path / "log.jsonl"), CSVLog(tmp_path / "log.csv"))
    run.step()
    run.evaluate()
    run.step()
    assert rows_of(tmp_path / "log.jsonl")[1] == {"step": 1, "evaluate": {"outer/distance": 0.5}}
    cells = table_of(tmp_path / "log.csv")
    assert [(row["step"], row["evaluate/outer/distance"]) for row in cells] == [("1", ""), ("1", "0.5"), ("2", "")]
    assert cells[1]["loss/outer"] == ""


@pytest.mark.parametrize("make", LOGS)
@pytest.mark.parametrize("saver_first", [True, False])
@pytest.mark.parametrize("stop", [1, 3, 4])  # metrics come at steps 3 and 6: before, at and after the first
def test_an_interrupted_and_resumed_run_leaves_the_same_bytes(
    make: Callable[[Path], LogFile], saver_first: bool, stop: int, tmp_path: Path
) -> None:
    def run(path: Path, *, load: bool = False) -> Engine:
        saves, log = Saves(tmp_path / "state", stop), make(path)
        first = [saves, log] if saver_first else [log, saves]
        made = engine(*first, HypergradientMonitor(), evaluate_every=3)
        if load:
            made.load(tmp_path / "state")
        return made

    run(tmp_path / "whole").run(7)
    run(tmp_path / "parts").run(6)  # what comes after the saved step is lost with the process
    with (tmp_path / "parts").open("ab") as file:
        file.write(b'{"half a ')
    run(tmp_path / "parts", load=True).run(7 - stop)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("make", LOGS)
def test_two_runs_of_one_engine_are_one_log(make: Callable[[Path], LogFile], tmp_path: Path) -> None:
    engine(make(tmp_path / "whole")).run(4)
    run = engine(make(tmp_path / "parts"))
    run.run(2)
    run.run(2)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("make", LOGS)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "the file is missing, and the run continues from a state in which it had"),
        (lambda path: os.truncate(path, 100), "the file has 100 bytes, and the run continues from a state in which"),
        (lambda path: path.write_bytes(b"x" * 5000), "is not what the run had written .* nothing was changed"),
        (lambda path: path.write_bytes(b"\xff\0," * 5000), "is not what the run had written .* nothing was changed"),
    ],
)
def test_a_log_that_is_not_the_one_of_the_state_is_refused_before_a_step(
    make: Callable[[Path], LogFile], harm: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    run = engine(make(path))
    run.run(3)
    run.save(tmp_path / "state")
    harm(path)
    harmed = path.read_bytes() if path.exists() else None
    resumed = engine(make(path))
    resumed.load(tmp_path / "state")
    with pytest.raises(CheckpointError, match=message):
        resumed.run(2)
    assert resumed.step_count == 3
    assert (path.read_bytes() if path.exists() else None) == harmed


@pytest.mark.parametrize("make", LOGS)
def test_a_new_run_refuses_the_log_of_another_unless_told_to_overwrite(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    engine(make(path)).run(3)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"holds \d+ bytes.*overwrite=True"):
        engine(make(path)).run(1)
    assert path.read_bytes() == before
    engine(make(path, overwrite=True)).run(3)
    assert path.read_bytes() == before
    path.write_bytes(b"")
    engine(make(path)).run(3)  # an empty file is nobody's
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", LOGS)
def test_a_folder_in_the_way_is_an_error_before_the_first_step(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = engine(make(tmp_path / "file" / "log"))
    with pytest.raises(BilevelError, match="cannot open its file"):
        run.run(1)
    assert run.step_count == 0


@pytest.mark.parametrize("make", LOGS)
def test_a_full_disk_ends_no_run_and_rows_are_counted(make: Any) -> None:
    log = make("/dev/full")
    run = engine(log)
    with pytest.warns(BilevelWarning) as said:
        run.run(5)
    assert [str(warning.message).partition(")")[2] for warning in said] == [
        f" cannot write: [Errno {errno.ENOSPC}] No space left on device. The run goes on, and rows are lost.",
        " lost 5 rows",
    ]
    assert (run.step_count, log.lost_rows) == (5, 5)
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("make", LOGS)
@pytest.mark.parametrize("full", [{1}, {2, 3}])
def test_a_disk_that_was_full_for_a_while_leaves_no_half_rows(
    make: Any, full: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    run = engine(make(tmp_path / "log"))
    half_done = False

    def write(file: int, data: Any) -> int:
        nonlocal half_done
        if run.step_count in full:
            if half_done:
                half_done = False
                raise OSError(errno.ENOSPC, "No space left on device")
            half_done = True
            return real(file, bytes(data)[:10])
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.warns(BilevelWarning, match="rows are lost|lost . rows"):
        run.run(5)
    monkeypatch.undo()
    read = rows_of if make is JSONLinesLog else table_of
    assert [int(row["step"]) for row in read(tmp_path / "log")] == [step for step in range(1, 6) if step not in full]


def test_a_column_that_cannot_be_added_costs_rows_not_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(BilevelWarning, match="rows are lost|lost 1 rows"):
        engine(CSVLog(tmp_path / "log"), evaluate_every=2).run(3)
    assert [row["step"] for row in table_of(tmp_path / "log")] == ["1", "3"]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_table_with_a_lost_row_and_a_later_column_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine(CSVLog(tmp_path / "log"), Saves(tmp_path / "state", 2), evaluate_every=3)
    real = os.write

    def write(file: int, data: Any) -> int:
        if run.step_count == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.warns(BilevelWarning, match="rows are lost|lost 1 rows"):
        run.run(4)
    before = (tmp_path / "log").read_bytes()
    resumed = engine(CSVLog(tmp_path / "log"), Saves(tmp_path / "state", 2), evaluate_every=3)
    resumed.load(tmp_path / "state")
    with pytest.warns(BilevelWarning, match="lost 1 rows"):
        resumed.run(2)
    assert (tmp_path / "log").read_bytes() == before
    assert [row["step"] for row in table_of(tmp_path / "log")] == ["2", "3", "4"]


@pytest.mark.parametrize("make", LOGS)
def test_seconds_are_there_if_asked_for(make: Any, tmp_path: Path) -> None:
    results = Results()
    engine(make(tmp_path / "log", seconds=True), results).run(1)
    (row,) = (rows_of if make is JSONLinesLog else table_of)(tmp_path / "log")
    assert float(row["seconds"]) == results.seen[0].seconds


@pytest.mark.parametrize("make", LOGS)
def test_a_step_that_another_callback_did_not_let_complete_has_its_row(make: Any, tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_step_end(self, engine: Engine, result: StepResult) -> None:
            if result.step == 2:
                raise OSError("no")

    run = engine(make(tmp_path / "log"), Breaks())
    with pytest.raises(BilevelError, match="Breaks"):
        run.run(3)
    run.run(2)
    read = rows_of if make is JSONLinesLog else table_of
    assert [int(row["step"]) for row in read(tmp_path / "log")] == [1, 2, 3, 4]


def test_values_of_two_callbacks_must_differ_in_name(tmp_path: Path) -> None:
    run = engine(JSONLinesLog(tmp_path / "log"), HypergradientMonitor(), HypergradientMonitor())
    with pytest.raises(BilevelError, match="two callbacks publish a value named 'hypergradient/outer/norm'"):
        run.step()


def test_a_value_cannot_take_the_name_of_a_column(tmp_path: Path) -> None:
    class Takes(Callback):
        def values(self) -> Mapping[str, float]:
            return {"loss/outer": 1.5}

    run = engine(CSVLog(tmp_path / "log"), Takes())
    with pytest.raises(BilevelError, match="a callback publishes a value named 'loss/outer'"):
        run.step()


def test_names_with_commas_quotes_and_newlines_survive_in_a_table(tmp_path: Path) -> None:
    class Awkward(Callback):
        def values(self) -> Mapping[str, float]:
            return {'a,"b"\nc': 1.5}

    engine(CSVLog(tmp_path / "log"), Awkward(), evaluate_every=2).run(2)
    assert [row['a,"b"\nc'] for row in table_of(tmp_path / "log")] == ["1.5", "1.5"]
