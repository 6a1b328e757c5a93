"""Runs that are killed and started again end as if nobody had: the harness, and that it would see if they did not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reliability.kill_cases import CHECKPOINTS, LOG
from benchmarks.reliability.kill_runs import differences
from bilevel.checkpoint import file_name, write_state
from bilevel.hypergrad import available_methods

ROOT = Path(__file__).resolve().parent.parent.parent


def report_of(folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs the command, in a process that has made no gradient: one that has cannot always fork."""
    output = folder / "report.json"
    command = [sys.executable, "-m", "benchmarks.reliability.kills", "--output", str(output), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert output.exists(), done.stderr
    report: dict[str, Any] = json.loads(output.read_text())
    assert done.returncode == (report["survived"] != report["tried"]), done.stderr
    return report


def test_killed_runs_end_as_if_nobody_had(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--kills", "5", "--only", "minres")
    runs = {run["case"]: run for run in report["runs"]}
    assert set(runs) == {"minres warm_start=True", "minres warm_start=True workers=2"}
    assert [run["differences"] for run in runs.values()] == [[], []]
    assert [run["kills"] for run in runs.values()] == [5, 5]
    assert report["survived"] == report["tried"] == 10
    assert report["during_writing"] >= 1


@pytest.mark.long
@pytest.mark.parametrize("name", available_methods())
def test_fifty_kills_of_every_method_that_remembers_something(name: str, tmp_path: Path) -> None:
    report = report_of(tmp_path, "--kills", "50", "--only", name)
    assert report["survived"] == report["tried"]
    for run in report["runs"]:
        assert run["kills"] == 50
        assert run["writing"] >= 5
        assert run["starting"] >= 1


@pytest.mark.slow
def test_the_methods_that_remember_something_are_found_by_themselves() -> None:
    code = "from benchmarks.reliability.kills import *; import json; print(json.dumps(stateful_methods()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {method["method"] for method in json.loads(done.stdout.splitlines()[-1])}
    known = {
        "neumann",
        "conjugate_gradient",
        "minres",
        "gmres",
        "pzobo",
        "f2sa",
        "bome",
        "soba",
        "amigo",
        "ttsa",
        "fsla",
    }
    assert found >= known


@pytest.mark.slow
def test_the_command_line_survives_kills(tmp_path: Path) -> None:
    report = report_of(tmp_path, "--kills", "4", "--only", "none", "--command-line")
    assert [(run["case"], run["kills"], run["differences"]) for run in report["runs"]] == [
        ("bilevel run --resume", 4, [])
    ]


def written(folder: Path, value: float, log: str = "{}", kept: tuple[int, ...] = (8,), left: str = "") -> Path:
    for step in kept:
        write_state(folder / CHECKPOINTS / file_name("step", step), {"a": [1, {"b": torch.tensor([0.5, value])}]})
    (folder / LOG).write_text(log)
    if left:
        (folder / CHECKPOINTS / left).touch()
    return folder


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"value": 1.0 + 2**-23}, ["checkpoints/step-00000008.safetensors differs", ".a[1].b: "]),
        ({"log": "{ }"}, ["log.jsonl differs"]),
        ({"kept": (4, 8)}, ["checkpoints ['step-00000008.safetensors', 'step-00000004.safetensors'] are kept"]),
        ({"kept": (4,)}, ["checkpoints/step-00000008.safetensors is missing", "checkpoints ["]),
        ({"left": ".step-00000008.safetensors.1.ab.partial"}, [".step-00000008.safetensors.1.ab.partial was left"]),
    ],
    ids=str,
)
def test_a_difference_in_the_last_bit_is_seen(changed: dict[str, Any], found: list[str], tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 1.0)
    killed = written(tmp_path / "killed", **{"value": 1.0, **changed})
    lines = differences(whole, killed, 8)
    assert len(lines) == len(found)
    assert all(line.startswith(start) for line, start in zip(lines, found, strict=True)), lines
