"""Tries out what can happen to a run, and writes the page that says what did.

    python -m benchmarks.reliability --output docs/reliability.md [--kills 50] [--steps 2000] [--parts faults …]

A part that is left out keeps its section of the page as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.reliability import kills, memory, memory_end
from benchmarks.reliability.faults import table
from benchmarks.reliability.scenarios import SCENARIOS

__all__ = ["main"]

INTRODUCTION = """# Reliability

What happens to a run when something goes wrong, tried out. All tables are written by one command, `python -m
benchmarks.reliability --output docs/reliability.md`; `tests/bilevel/test_faults.py` holds every row of the first one
as a test.
"""

FAULTS = """## Faults in a step

An outer step is made whole or not at all. Before it, the engine copies what the step may change: parameters, buffers,
the state of optimisers, schedulers and methods, generators (torch's on every device, NumPy's, Python's), and it marks
the position in the data. Where anything leaves the step by an exception, all of it goes back. What is not copied:
parameters that no problem owns, attributes of Python objects that are no tensors, and batches that a loss changes in
place. `EngineConfig(restore_on_error=False)` saves the copy and gives all of this up.

The message, or a note on the exception (Python 3.11 or later; a user's own exception keeps its type), says in which
pass of which problem and step it happened. An `OutOfMemoryError` of this library is torch's, Python's `MemoryError`
and a `BilevelError` at once; it keeps nothing of the step in memory while it is held.

Below, one fault each is set off in the second of four steps: networks with dropout and batch norm, Adam with a
schedule, shuffled data, warm-started conjugate gradients. “State then” is compared with a run without the fault, bit
for bit, in all that a checkpoint holds; so is the state that is saved then and loaded into a new engine, and the
state after the fourth step.
"""

SIGNALS = """### Signals

Ctrl-C, a notebook's stop button, and the SIGTERM of schedulers let `Engine.run` finish its step; callbacks end as
always (a checkpoint is written), `run` returns the last result, and `Engine.stop_reason` says why. A second signal
undoes the step and raises `KeyboardInterrupt`. Which signals count is `EngineConfig.stop_signals`; a handler that the
program installed itself is left in place. While a step is completed or undone no handler runs; what arrives is
delivered after it.
"""

KILLS = """## Kills

Runs are killed with SIGKILL at random instants (while starting, stepping, writing a checkpoint), started again, and
compared in the end with a run that nobody killed: parameters, optimisers, schedulers, states of methods and
callbacks, generators, position in the data, and the log, byte for byte.
"""

MEMORY = """## Memory

Steps of every method, and of what long runs do beside them, after a warm-up. Slopes are those of a line through the
readings.

`f2sa` and `bome` begin with negative curvature here, at which they keep no auxiliary iterate; from the first step on at
which it is positive they keep one, five tensors, and no more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the page")
    parser.add_argument(
        "--parts", nargs="+", choices=("faults", "kills", "memory"), default=["faults", "kills", "memory"]
    )
    parser.add_argument("--kills", type=int, default=50, help="kills of each run")
    parser.add_argument("--steps", type=int, default=2000, help="outer steps of each run whose memory is watched")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    makers = {"faults": _faults, "kills": lambda: _kills(options.kills), "memory": lambda: _memory(options.steps)}
    page = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
    sections, failed = [INTRODUCTION], False
    for name, make in makers.items():
        old = _section(page, name)
        if name in options.parts:
            text, broken = make()
            failed |= broken
            old = f"<!-- {name} -->\n{text.rstrip()}\n\nMeasured with {_machine()}.\n<!-- /{name} -->\n"
        if old:
            sections.append(old)
    options.output.write_text("\n".join(sections), encoding="utf-8")
    return int(failed)


def _faults() -> tuple[str, bool]:
    lines = table(SCENARIOS)
    broken = sum("**" in line for line in lines)
    host = memory_end.run()
    kept = host["raised"] == "OutOfMemoryError" and host["unchanged"] and host["next_step"] == 2
    count = f"{len(SCENARIOS) - broken} of {len(SCENARIOS)} faults end as promised.\n"
    verdict = "the step is undone, and the next one is made" if kept else "**the promise is broken**"
    ended = (
        "### Memory that really ends\n\nIn a process whose address space is limited, a batch is made too large for it: "
        f"{verdict}. The error says:\n\n"
        f"> {re.sub(r'/[^ ,]*/', '', host.get('text', 'nothing'))}\n"
    )
    return "\n".join([FAULTS, count, *lines, "", SIGNALS, ended]), bool(broken) or not kept


def _kills(number: int) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "kills.json")
        status = kills.main(["--kills", str(number), "--command-line", "--output", str(file)])
        report = json.loads(file.read_text(encoding="utf-8"))
    lines = ["| run | kills | while starting | while writing | steps | at the end |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one['case']} | {one['kills']} | {one['starting']} | {one['writing']} | {one['steps']} | "
        f"{'; '.join(one['differences']) or 'equal, bit for bit'} |"
        for one in report["runs"]
    ]
    count = f"{report['survived']} of {report['tried']} kills survived.\n"
    return "\n".join([KILLS, count, *lines]), bool(status)


def _memory(steps: int) -> tuple[str, bool]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = memory.main(["--steps", str(steps)])
    return f"{MEMORY}{printed.getvalue()}", bool(status)


def _section(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n.*?<!-- /{name} -->\n", page, re.DOTALL)
    return found.group() if found else ""


def _machine() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}, one thread"


if __name__ == "__main__":
    raise SystemExit(main())
