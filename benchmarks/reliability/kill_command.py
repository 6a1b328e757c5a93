"""The same for ``bilevel run``: killed and started again with ``--resume``, as a user would do it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.reliability.kill_cases import CHECKPOINTS
from benchmarks.reliability.kill_runs import Outcome, differences, files

__all__ = ["kill_command_line"]

RECIPE = """
import time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from bilevel import Engine, Problem
from bilevel.callbacks import JSONLinesLog

class Scale(Problem):
    def loss(self, batch):
        return nn.functional.mse_loss(self.network(batch[0] * self.module.weight), batch[1])

class Network(Problem):
    def loss(self, batch):
        time.sleep(0.005)  # so that there is a step to be killed in
        return nn.functional.mse_loss(self(batch[0] * self.scale.module.weight), batch[1])

def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)

def build(config):
    adam = lambda params: torch.optim.Adam(params, lr=0.01)
    scale = nn.Module()
    scale.weight = nn.Parameter(torch.ones(3))
    network = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    problems = [Scale(scale, optimizer=adam, data=loader(0)), Network(network, optimizer=adam, data=loader(1), steps=2)]
    log = JSONLinesLog(Path(__file__).parent / "log.jsonl", overwrite=True)
    return Engine(problems, config.engine, config.hypergradient, callbacks=[log])
"""


def kill_command_line(kills: int, seed: int, folder: Path) -> Outcome:
    """Runs a recipe twice: without a kill, and with ``kills`` of them, each once a further step was saved."""
    started, outcome = time.perf_counter(), Outcome("bilevel run --resume", steps=10 * kills + 10)
    generator = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    codes = [_start(whole, outcome.steps).wait()]
    for _ in range(kills):
        process = _start(killed, outcome.steps)
        before = len(files(killed / CHECKPOINTS)) and max(files(killed / CHECKPOINTS))
        while process.poll() is None and max(files(killed / CHECKPOINTS), default="") in ("", ".owner", before):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        outcome.kills += 1
        outcome.writing += any(name.endswith(".partial") for name in files(killed / CHECKPOINTS))
    codes.append(_start(killed, outcome.steps).wait())
    if codes != [0, 0]:
        outcome.differences.append(f"the uninterrupted run and the last one ended with {codes}")
    outcome.differences += differences(whole, killed, outcome.steps)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE, encoding="utf-8")
    options = ["--steps", str(steps), "--seed", "3", "--checkpoints", str(folder / CHECKPOINTS), "--every", "1"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "bilevel.cli", "run", str(recipe), *options, "--resume"],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
