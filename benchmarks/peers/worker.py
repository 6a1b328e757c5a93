"""The worker process of one library: takes commands as lines of JSON, answers each with one line.

    python -m benchmarks.peers.worker LIBRARY

Commands are ``{"do": NAME, …}``; answers ``{"ok": …}``, ``{"lacks": text}`` where the library does not offer what is
asked for, or ``{"error": text}``. Arrays travel through ``.npz`` files.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.peers.memory import keep_memory, peak_bytes, peak_resident
from benchmarks.peers.side import Method, NotOffered, Passes, Side, Task
from benchmarks.peers.timing import timed

__all__ = ["Worker", "main"]


class Worker:
    """What a worker process holds; every public method is a command.

    Also of use in one's own process, where the library can be imported: ``Worker("bilevel")``.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self.arrays: dict[str, Any] = {}
        self.sides: dict[str, Side] = {}
        self.tasks: dict[str, Any] = {}

    def hello(self, distributions: Sequence[str] = (), threads: int = 1, tf32: bool = False) -> dict[str, Any]:
        """Sets the number of threads, keeps freed memory; returns versions."""
        keep_memory()
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}
        for name in distributions:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "absent"
        return versions

    def load(self, data: str, file: str) -> None:
        """Reads a workload's arrays."""
        with np.load(file) as arrays:
            self.arrays[data] = {name: arrays[name] for name in arrays.files}

    def build(
        self,
        key: str,
        data: str,
        workload: str,
        method: str | dict[str, Any],
        size: str,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> dict[str, Any]:
        """Makes a side under a key, from the workload's start; ``method`` is one of the workload's, or its fields."""
        module = importlib.import_module(f"benchmarks.peers.workloads.{workload}")
        name = f"benchmarks.peers.sides.{self.library}.{workload}"
        try:
            side = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                raise NotOffered(f"{self.library} has no side for {workload}") from error
            raise
        task = module.task(self.arrays[data], size, device, dtype)
        self.tasks[key] = task
        self.sides[key] = side.build(task, module.METHODS[method] if isinstance(method, str) else Method(**method))
        return {"note": self.sides[key].note}

    def place(self, key: str, file: str) -> None:
        """Puts values into the parameters."""
        with np.load(file) as arrays:
            inner = [arrays[name] for name in arrays.files if name.startswith("inner")]
            outer = [arrays[name] for name in arrays.files if name.startswith("outer")]
        self.sides[key].place(inner, outer)

    def forget(self, key: str) -> None:
        """Drops what a side keeps from earlier steps."""
        self.sides[key].forget()

    def restart(self, key: str) -> bool:
        """Puts a side where it began; False where it cannot (see :meth:`Side.place`)."""
        task = self.tasks[key]
        self.forget(key)
        if not isinstance(task, Task):  # only the functional form has values to put back
            return False
        try:
            self.sides[key].place(*([as_array(x) for x in part] for part in (task.inner, task.outer)))
        except NotImplementedError:
            return False
        return True

    def timed_path(self, key: str, file: str, found: str, cpu_time: bool = False) -> dict[str, Any]:
        """Takes one timed step from each of a file's points; writes the hypergradients to another file.

        Returns:
            The seconds of every step, and how many backward passes they took in all.
        """
        side, counter, seconds, gradients = self.sides[key], Passes(), [], []
        with np.load(file) as arrays:
            points = {name: arrays[name] for name in arrays.files}
        inner = sorted(name for name in points if name.startswith("inner"))
        outer = sorted(name for name in points if name.startswith("outer"))
        with backward_counted(counter):
            for number in range(len(points[inner[0]])):
                side.place([points[name][number] for name in inner], [points[name][number] for name in outer])
                side.wait()
                seconds.append(timed(side.step, side.wait, 1, cpu_time=cpu_time))
                gradients.append(np.concatenate([as_array(part).ravel() for part in side.hypergradient()]))
        np.savez(found, gradients=np.stack(gradients))
        return {"seconds": seconds, "backward": counter.backward if side.countable else 0}

    def step(self, key: str) -> None:
        self.sides[key].step()

    def gradient(self, key: str, file: str) -> dict[str, Any]:
        """Takes a step, writes the hypergradient that it used to a file, counts its passes."""
        side, counter = self.sides[key], getattr(self.tasks[key], "passes", Passes())
        counter.forward = 0
        with backward_counted(counter):
            side.step()
        side.wait()
        np.savez(file, **{f"p{i:03d}": as_array(part) for i, part in enumerate(side.hypergradient())})
        return {"forward": counter.forward, "backward": counter.backward if side.countable else 0}

    def time(self, key: str, steps: int = 1, cpu_time: bool = False) -> float:
        """Returns the seconds of a step."""
        side = self.sides[key]
        return timed(side.step, side.wait, steps, cpu_time=cpu_time)

    def memory(self, key: str) -> dict[str, Any]:
        """Returns the peak memory of a step; meant for a process that does nothing else."""
        side = self.sides[key]
        for _ in range(2):
            side.step()
        side.wait()

        def whole() -> None:
            side.step()
            side.wait()

        resident, planned = peak_resident(whole), side.planned_bytes()
        peak = peak_bytes(whole) if planned is None else planned
        return {"peak": peak, "kind": "allocated" if planned is None else "planned", "resident": resident}

    def drop(self, key: str) -> None:
        """Forgets a side."""
        self.sides.pop(key, None)
        self.tasks.pop(key, None)
        gc.collect()


def as_array(part: Any) -> np.ndarray:
    if isinstance(part, torch.Tensor):
        part = part.detach().to("cpu", torch.float64)
    return np.asarray(part, dtype=np.float64)


@contextmanager
def backward_counted(counter: Passes) -> Iterator[None]:
    """Counts runs of autograd's engine: ``backward()``, ``torch.autograd.grad`` and the backward of ``torch.func``."""
    engine, counter.backward = torch.autograd._engine_run_backward, 0

    def run(*inputs: Any, **how: Any) -> Any:
        counter.backward += 1
        return engine(*inputs, **how)

    torch.autograd._engine_run_backward = run
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = engine


def answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    """Returns what a command gives, as the pipe carries it."""
    command = message.pop("do")
    if command.startswith("_") or not callable(getattr(worker, command, None)):
        return {"error": f"unknown command {command!r}"}
    try:
        return {"ok": getattr(worker, command)(**message)}
    except NotOffered as error:
        return {"lacks": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # Libraries print: what they print goes to the error stream, the pipe is ours.
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        pipe.write(json.dumps(answer(worker, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
