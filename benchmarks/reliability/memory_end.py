"""Lets memory really end in a step, in this process: run it in one of its own.

    python -m benchmarks.reliability.memory_end [--device cuda:0]

On the host the address space is limited (RLIMIT_AS); on a GPU its memory is filled. A batch of the second step is too
large. Prints what happened as JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import OutOfMemoryError

__all__ = ["main", "run"]

ROOM = 400 * 2**20
WIDTH = 256


class Outer(Problem):
    """A scalar weight decay."""

    def loss(self, batch: Any) -> Tensor:
        return self.inner(batch).square().mean()


class Inner(Problem):
    """A network whose activations are as large as its batch."""

    def loss(self, batch: Any) -> Tensor:
        penalty = sum((p.square().sum() for p in self.module.parameters()), torch.zeros((), device=batch.device))
        return (self(batch) - 1.0).square().mean() + self.outer.module[0].exp() * penalty


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes the steps and prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    device = torch.device(parser.parse_args(arguments).device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    adam = lambda params: torch.optim.Adam(params, lr=0.01)  # noqa: E731
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6))).to(device)
    outer = Outer(nn.ParameterList([torch.tensor(-3.0, device=device)]), optimizer=adam)
    engine = Engine([outer, Inner(network, optimizer=adam)], EngineConfig(progress=False), "neumann")
    small = torch.randn(8, WIDTH, device=device)
    engine.step({"outer": small, "inner": small})
    before = [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]
    room = _limit(device)
    large = small.repeat(room // (8 * WIDTH * 4) // 4, 1)
    allocated = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    found: dict[str, Any] = {"raised": None}
    try:
        engine.step({"outer": small, "inner": large})
    except OutOfMemoryError as error:
        found = {"raised": type(error).__name__, "cause": type(error.__cause__).__name__, "text": str(error)}
        held = torch.cuda.memory_allocated() - allocated if device.type == "cuda" else 0
        found["held_bytes"] = held  # while the exception is alive
    after = [p for problem in engine.problems.values() for p in problem.parameters]
    found["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    found["next_step"] = engine.step({"outer": small, "inner": small}).step
    print(json.dumps(found))
    return 0


def run(device: str = "cpu") -> dict[str, Any]:
    """Returns what a process of its own reports."""
    command = [sys.executable, "-m", "benchmarks.reliability.memory_end", "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _limit(device: torch.device) -> int:
    """Leaves little memory, and returns how many bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((total - free + 2 * ROOM) / total, device)
        return ROOM
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    return ROOM


if __name__ == "__main__":
    raise SystemExit(main())
