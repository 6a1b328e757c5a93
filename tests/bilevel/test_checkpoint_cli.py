"""``bilevel run --checkpoints FOLDER --every N --resume``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.checkpoint import entries
from tests.bilevel.test_cli import Run, bilevel, recipe  # noqa: F401 (fixtures)

NOISY = """
import random
import numpy as np

class Noisy(Inner):
    def loss(self, batch):
        return super().loss(batch) * (1 + 0.1 * (torch.rand(()) + np.random.rand() + random.random()))

def build(config):
    outer, inner = problems()
    inner = Noisy(inner.module, optimizer=sgd, name="inner")
    return Engine([outer, inner], config.engine, config.hypergradient)
"""


@pytest.fixture
def call(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> Callable[..., Run]:  # noqa: F811
    name = recipe(NOISY)

    def run(steps: int, *options: str) -> Run:
        return bilevel("run", name, "--steps", str(steps), "--checkpoints", "saved", *options)

    return run


def steps(folder: Path) -> list[int]:
    return [entry.step for entry in entries(folder / "saved")]


def test_a_run_is_saved_and_goes_on_up_to_its_steps_in_total(call: Callable[..., Run], tmp_path: Path) -> None:
    whole = call(7, "--every", "2", "--keep", "9", "--resume")
    assert whole.code == 0
    assert "no checkpoint in saved: starting at step 0" in whole.err
    assert steps(tmp_path) == [7, 6, 4, 2]
    expected = (tmp_path / "saved" / "step-00000007.safetensors").read_bytes()
    for path in (tmp_path / "saved").glob("step-0000000[67]*"):
        path.unlink()
    again = call(7, "--every", "2", "--resume")
    assert again.code == 0
    assert "resumed after step 4 of 7 from saved" in again.err
    assert "after step 7" in again.out
    assert steps(tmp_path) == [7, 6, 4]  # three stay
    assert (tmp_path / "saved" / "step-00000007.safetensors").read_bytes() == expected


def test_nothing_is_left_to_do_where_all_steps_were_taken(call: Callable[..., Run]) -> None:
    call(3, "--every", "1")
    done = call(3, "--resume")
    assert done.code == 0
    assert "nothing left to do: 3 of 3 steps have been taken" in done.err
    assert done.out == ""
    assert call(4, "--resume", "--output", "out").code == 0
    assert call(5, "--resume", "--output", "out").code == 0  # its own files, written again


def test_a_folder_with_checkpoints_is_not_written_to_without_resume(call: Callable[..., Run], tmp_path: Path) -> None:
    call(3, "--every", "1")
    refused = call(5, "--every", "1")
    assert refused.code == 2
    assert "holds a checkpoint of step 3; this engine has taken 0" in refused.err
    assert "--resume on the command line" in refused.err
    assert steps(tmp_path) == [3, 2, 1]


@pytest.mark.filterwarnings("always::bilevel.errors.BilevelWarning")
def test_a_damaged_checkpoint_is_reported_and_all_damaged_are_an_error(
    call: Callable[..., Run], tmp_path: Path
) -> None:
    call(3, "--every", "1", "--keep", "2")
    newest = entries(tmp_path / "saved")[0].path
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = call(3, "--resume")
    assert resumed.code == 0
    assert "warning: resumed from step-00000002.safetensors, because later checkpoints are damaged" in resumed.err
    for entry in entries(tmp_path / "saved"):
        entry.path.write_bytes(b"")
    failed = call(3, "--resume")
    assert failed.code == 2
    assert "are damaged; nothing was loaded" in failed.err


def test_resume_needs_a_folder(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:  # noqa: F811
    run = bilevel("run", recipe(), "--resume")
    assert run.code == 2
    assert "--resume needs --checkpoints FOLDER" in run.err


def test_another_method_is_refused_by_name(call: Callable[..., Run]) -> None:
    call(2, "--every", "1")
    run = call(4, "--resume", "--set", "hypergradient.method=cg")
    assert run.code == 2
    assert "inner: method 'neumann' was saved; this engine has 'conjugate_gradient'" in run.err
