"""A run in a process of its own that is killed, started again and compared with one that was not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.kill_cases import CHECKPOINTS, LOG, Case
from bilevel import Callback, Engine
from bilevel.checkpoint import entries, file_name, read_state
from bilevel.checkpoint.format import PARTIAL
from bilevel.engine_state import resume_engine

__all__ = ["Outcome", "differences", "files", "fork", "kill_and_resume"]

STEPS_A_KILL = 3  # so that the run is not over before the kills are
NEAR_THE_END = 12
PATIENCE = 120.0  # seconds that anything may take


@dataclass
class Outcome:
    """What became of a run that was killed.

    Attributes:
        case: The run.
        kills: How often it was killed.
        starting: Kills before its first step since the last start.
        writing: Kills that left an unfinished checkpoint.
        steps: How many steps it took in the end.
        differences: What is not as in the uninterrupted run; empty where all is.
        seconds: How long that took.
    """

    case: str
    kills: int = 0
    starting: int = 0
    writing: int = 0
    steps: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Announce(Callback):
    """Writes a byte to a pipe when a step is complete."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def on_step_complete(self, engine: Engine, result: Any) -> None:
        """See :meth:`Callback.on_step_complete`."""
        os.write(self._descriptor, b".")


class Process:
    """A forked process that trains until a number of steps is taken, going on from what is in its folder."""

    def __init__(self, case: Case, folder: Path, steps: int) -> None:
        self._reading, writing = os.pipe()
        self.steps = 0
        self.code: int | None = None
        self.pid = fork()
        if self.pid == 0:
            _child(case, folder, steps, writing)
        os.close(writing)
        os.set_blocking(self._reading, False)

    def running(self) -> bool:
        """Looks whether it still runs and how many steps it has taken."""
        with contextlib.suppress(BlockingIOError):
            self.steps += len(os.read(self._reading, 4096))
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait_for(self, ready: Callable[[], object]) -> bool:
        """Waits until ``ready()``; False where the process has ended before."""
        deadline = time.monotonic() + PATIENCE
        while self.running():
            if ready():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} does not get on")
            time.sleep(1e-4)
        return False

    def kill(self) -> bool:
        """Kills it; False where it has ended by itself."""
        os.kill(self.pid, signal.SIGKILL)
        while self.running():
            time.sleep(1e-4)
        return self.code == -signal.SIGKILL

    def clear_up(self) -> None:
        """Ends what it may have left: workers of its data loader, which notice only after seconds."""
        os.close(self._reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def fork() -> int:
    """Forks; Python 3.12 and later warn where there are threads, such as those of a linear-algebra library."""
    torch.optim.SGD([torch.zeros(1)])  # imports, the first time, what would take every child seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _child(case: Case, folder: Path, steps: int, announcements: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="resumed from|.*set aside|.*was not written")
        engine = case.engine(folder, Announce(announcements))
        resume_engine(engine, folder / CHECKPOINTS)
        if engine.step_count < steps:
            engine.run(steps - engine.step_count)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_and_resume(case: Case, kills: int, seed: int, folder: Path) -> Outcome:
    """Runs a case twice in a folder: without a kill, and with ``kills`` of them."""
    started, outcome = time.perf_counter(), Outcome(str(case), steps=STEPS_A_KILL * kills + 6)
    whole, killed = folder / "whole", folder / "killed"
    generator = random.Random(seed)
    process = Process(case, whole, outcome.steps)
    begun = time.perf_counter()
    process.wait_for(lambda: process.steps)
    start_up = time.perf_counter() - begun
    process.wait_for(lambda: False)
    step = (time.perf_counter() - begun - start_up) / outcome.steps
    left = [process]
    while process.code == 0 and outcome.kills < kills:
        process = Process(case, killed, outcome.steps)
        left.append(process)
        newest = max((entry.step for entry in entries(killed / CHECKPOINTS)), default=0)
        over = newest > outcome.steps - NEAR_THE_END
        if not _strike(process, generator, killed / CHECKPOINTS, start_up, step, over=over):
            break
        outcome.kills += 1
        outcome.starting += process.steps == 0
        outcome.writing += any(path.endswith(PARTIAL) for path in files(killed / CHECKPOINTS))
        process.code = 0
    if process.code == 0:
        process = Process(case, killed, outcome.steps)
        left.append(process)
        process.wait_for(lambda: False)
    if process.code != 0:
        outcome.differences.append(f"a process ended with {process.code} after {outcome.kills} kills")
    for ended in left:
        ended.clear_up()
    outcome.differences += differences(whole, killed, outcome.steps)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _strike(
    process: Process, generator: random.Random, folder: Path, start_up: float, step: float, *, over: bool
) -> bool:
    """Waits for a random instant and kills; False where the process ended before it.

    Where the run is nearly ``over``, it is killed while it starts: it would be over before the kills are.
    """
    if over:
        time.sleep(generator.uniform(0.0, 0.5 * start_up))
        return process.kill()
    kind = generator.choice(["start", "steps", "steps", "writing", "writing"])
    if kind == "start":
        time.sleep(generator.uniform(0.0, 1.2 * start_up))
        return process.kill()
    steps = generator.randrange(4)
    alive = process.wait_for(lambda: process.steps >= steps)
    if alive and kind == "writing":
        # At any place of the write: opening, data, checksum, synchronising, renaming.
        alive = process.wait_for(lambda: any(path.endswith(PARTIAL) for path in files(folder)))
        time.sleep(generator.choice([0.0, generator.uniform(0.0, 0.002)]))
    elif alive:
        time.sleep(generator.uniform(0.0, 2.0 * step))
    return process.kill() if alive else False


def files(folder: Path) -> list[str]:
    """Returns what is in a folder; nothing where there is none."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def differences(whole: Path, killed: Path, steps: int) -> list[str]:
    """Compares the ends of two runs: the bytes of the last checkpoint and of the log, and what else is left."""
    last = Path(CHECKPOINTS) / file_name("step", steps)
    found = []
    for name in (last, Path(LOG)):
        if not (whole / name).exists() or not (killed / name).exists():
            found.append(f"{name} is missing")
        elif (whole / name).read_bytes() != (killed / name).read_bytes():
            found.append(f"{name} differs")
    if f"{last} differs" in found:
        found += _places(read_state(whole / last), read_state(killed / last))
    kept = [[entry.path.name for entry in entries(folder / CHECKPOINTS)] for folder in (whole, killed)]
    if kept[0] != kept[1]:
        found.append(f"checkpoints {kept[1]} are kept, not {kept[0]}")
    partial = [name for name in files(killed / CHECKPOINTS) if name.endswith(PARTIAL)]
    return found + [f"{name} was left" for name in partial]


def _places(left: Any, right: Any, where: str = "") -> list[str]:
    """Returns where two states differ."""
    if isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        return [line for key in left for line in _places(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [line for place, pair in pairs for line in _places(*pair, f"{where}[{place}]")]
    same = left.equal(right) if hasattr(left, "equal") and hasattr(right, "equal") else left == right
    return [] if same else [f"{where}: {left!r:.60} and {right!r:.60}"]
