"""A run's folder when things go wrong: two runs, killed runs, full disks, damaged files."""

from __future__ import annotations

import errno
import os
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import BilevelError, Callback, Engine
from bilevel.callbacks import Checkpoints
from bilevel.checkpoint import FolderLock, StructureError
from bilevel.engine_state import resume_engine
from bilevel.errors import BilevelWarning, CheckpointError
from tests.bilevel.test_checkpoint_folder import made, names, step_of
from tests.bilevel.test_checkpoint_format import fork, in_child

# --- who may write ----------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path)
    running = made(first)
    running.step()
    with pytest.raises(BilevelError, match="another engine of this process writes its checkpoints to"):
        made(Checkpoints(tmp_path)).run(1)
    running.step()
    reading, writing = os.pipe()

    def other_process() -> None:
        with pytest.raises(BilevelError, match=f"process {os.getppid()} writes its checkpoints to"):
            made(Checkpoints(tmp_path)).run(1)
        os.write(writing, b"refused")

    in_child(other_process)
    assert os.read(reading, 10) == b"refused"
    first.on_run_end(running)
    made(Checkpoints(tmp_path / "other")).run(1)


def test_a_run_that_has_ended_or_an_engine_that_is_gone_holds_no_folder(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path / "a")).run(1)
    engine = made(Checkpoints(tmp_path / "a"))
    assert resume_engine(engine, tmp_path / "a") == 1
    engine.run(1)
    engine = made(Checkpoints(tmp_path / "b"))
    engine.step()
    del engine
    made(Checkpoints(tmp_path / "b")).run(1)


def test_a_process_that_was_killed_holds_no_folder_not_even_through_its_children(tmp_path: Path) -> None:
    """Workers of a data loader outlive a killed process by seconds."""
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            lock = FolderLock(tmp_path)
            worker = fork()
            if worker == 0:
                os.read(os.pipe()[0], 1)  # sleeps
            os.write(writing, str(worker).encode())
            os.read(os.pipe()[0], 1)
            lock.release()
        finally:
            os._exit(1)
    worker = int(os.read(reading, 20))
    try:
        with pytest.raises(CheckpointError, match=f"process {pid} writes"):
            FolderLock(tmp_path)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, 9)


def test_where_there_are_no_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.warns(BilevelWarning, match="has no locks"):
        FolderLock(tmp_path).release()


def test_what_killed_writers_left_is_cleared_up_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000004.safetensors.123.0a1b2c3d.partial"
    for path in (left, tmp_path / "mine.partial", tmp_path / ".download.partial"):
        path.write_bytes(b"half")
    made(Checkpoints(tmp_path)).run(1)
    assert not left.exists()
    assert (tmp_path / "mine.partial").exists()
    assert (tmp_path / ".download.partial").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, every=2)).run(4)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with pytest.raises(BilevelError, match="holds a checkpoint of step 4; this engine has taken 0"):
        made(Checkpoints(tmp_path)).run(3)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = made(Checkpoints(tmp_path / "file" / "folder"))
    with pytest.raises(BilevelError, match="checkpoints cannot be written to"):
        engine.run(1)
    assert engine.step_count == 0


# --- writes that fail -------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = made()
    reference.run(6)
    engine = made(Checkpoints(tmp_path, every=1, keep=2))
    full: list[int] = [3, 4]
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if engine.step_count in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("bilevel.checkpoint.format.os.fsync", sync)
    seen: list[list[str]] = []

    class Looks(Callback):
        def on_step_end(self, engine: Engine, result: Any) -> None:
            seen.append(names(tmp_path))

    engine.callbacks = (Looks(), *engine.callbacks)
    with pytest.warns(BilevelWarning, match="step checkpoint of step [34] was not written: .*No space left") as caught:
        engine.run(6)
    assert len(caught) == 2
    assert [int(name[5:13]) for name in seen[4]] == [1, 2]  # at step 5, before its own is written
    assert [int(name[5:13]) for name in names(tmp_path)] == [5, 6]
    assert not list(tmp_path.glob(".*.partial"))
    ours, theirs = (e.problems["inner"].module.weight for e in (engine, reference))
    assert torch.equal(ours, theirs)


def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (0.5, 0.1, 0.3, 0.6)
    checkpoints = Checkpoints(tmp_path, every=100, best="outer/score")
    engine = made(checkpoints, table=table, evaluate_every=1)
    save = engine.save

    def failing(path: Any) -> None:
        if engine.step_count == 2:
            raise CheckpointError("full")
        save(path)

    monkeypatch.setattr(engine, "save", failing)
    with pytest.warns(BilevelWarning, match="best checkpoint of step 2 was not written"):
        engine.run(4)
    assert (checkpoints.best, checkpoints.best_step) == (0.3, 3)
    assert step_of(checkpoints.best_path) == 3


def test_the_kernel_s_own_limit_costs_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """A file that may not grow past 20 kB, in a process of its own; the limit is lifted later."""

    def run() -> None:
        engine = made(Checkpoints(tmp_path, every=1), width=2000)
        engine.run(1)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
        with pytest.warns(BilevelWarning, match="step 2 was not written: .*File too large"):
            engine.run(1)
        assert names(tmp_path) == ["step-00000001.safetensors"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        engine.run(1)

    in_child(run)
    assert names(tmp_path) == ["step-00000001.safetensors", "step-00000003.safetensors"]
    assert step_of(tmp_path / "step-00000003.safetensors") == 3


def test_a_failed_write_can_be_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(Checkpoints(tmp_path, every=1, on_failure="raise"))

    def failing(path: Any) -> None:
        raise CheckpointError("full")

    monkeypatch.setattr(engine, "save", failing)
    with pytest.raises(BilevelError, match="step checkpoint of step 1 was not written: full"):
        engine.run(2)


def test_old_files_that_cannot_be_removed_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".safetensors":
            raise OSError(errno.EROFS, "Read-only file system")

    engine = made(Checkpoints(tmp_path, every=1, keep=1))
    monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.warns(BilevelWarning, match="an old checkpoint could not be removed .*Read-only"):
        engine.run(2)


# --- going on ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # another name of the file stays whole
    path.write_bytes(content)


def test_a_folder_without_checkpoints_changes_nothing(tmp_path: Path) -> None:
    engine = made()
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "missing"):
        assert resume_engine(engine, folder) is None
    assert engine.step_count == 0
    with pytest.raises(CheckpointError, match="cannot be read"):
        resume_engine(engine, tmp_path / "notes.txt")


def test_the_newest_is_taken_be_it_periodic_or_best(tmp_path: Path) -> None:
    engine = made(Checkpoints(tmp_path, every=4, best="outer"))
    for _ in range(7):
        engine.step()
    assert names(tmp_path) == ["best-00000007.safetensors", "step-00000004.safetensors"]
    assert resume_engine(made(Checkpoints(tmp_path, best="outer")), tmp_path) == 7


def test_a_damaged_one_is_reported_and_the_one_before_is_taken(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, every=1)).run(3)
    damage(tmp_path / "step-00000003.safetensors")
    (tmp_path / "step-00000002.safetensors").write_bytes(b"")
    engine = made(Checkpoints(tmp_path, every=1, keep=1))
    with pytest.warns(BilevelWarning) as caught:
        assert resume_engine(engine, tmp_path) == 1
    text = str(caught[0].message)
    assert "resumed from step-00000001.safetensors" in text
    assert "step-00000003.safetensors: " in text
    assert "its checksum is not that of its content" in text
    assert "step-00000002.safetensors: " in text
    assert engine.step_count == 1
    with pytest.warns(BilevelWarning, match="set aside as step-0000000[23].safetensors.damaged"):
        engine.run(1)
    assert names(tmp_path) == ["step-00000002.safetensors"] + [f"step-0000000{n}.safetensors.damaged" for n in (2, 3)]


def test_all_damaged_is_an_error_and_never_a_new_start(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, every=1)).run(2)
    for path in tmp_path.glob("*.safetensors"):
        damage(path)
    engine = made()
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged; nothing was loaded"):
        resume_engine(engine, tmp_path)
    assert engine.step_count == 0


def test_damaged_ones_that_were_set_aside_are_mentioned(tmp_path: Path) -> None:
    (tmp_path / "step-00000002.safetensors.damaged").touch()
    with pytest.warns(BilevelWarning, match="no checkpoint but damaged ones"):
        assert resume_engine(made(), tmp_path) is None


def test_another_structure_is_no_damage(tmp_path: Path) -> None:
    made(Checkpoints(tmp_path, every=1)).run(2)
    with pytest.raises(StructureError, match="shape"):
        resume_engine(made(width=3), tmp_path)


def test_a_resumed_run_takes_the_steps_it_is_asked_for(tmp_path: Path) -> None:
    whole = made(Checkpoints(tmp_path / "whole", every=3))
    whole.run(7)
    made(Checkpoints(tmp_path / "a", every=3)).run(4)
    engine = made(Checkpoints(tmp_path / "a", every=3))
    assert resume_engine(engine, tmp_path / "a") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(3)
    assert engine.step_count == 7
    a, b = ((tmp_path / name / "step-00000007.safetensors").read_bytes() for name in ("whole", "a"))
    assert a == b
