"""Memory does not grow: thousands of outer steps of every method, with what long runs do beside them.

    python -m benchmarks.reliability.memory [--steps 2000] [--only TEXT] [--jobs 1] [--output FILE.json]

Each case takes a tenth of the steps to warm up, and then the steps, with the cyclic garbage collector off but for
readings. At every reading the live tensors, their bytes and the nodes of autograd's graphs must be what they were at
the first; no tensor may need the cyclic collector; and neither the C heap (tensors' data and graphs, read from glibc to
the byte), nor Python's heap, nor the resident memory may grow. A plain torch loop runs first, as a control: its slopes
are those of an instrument that sees no leak. The exit status is 1 where anything grows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.reliability.memory_cases import Case, control, method_cases
from benchmarks.reliability.memory_events import event_cases
from benchmarks.reliability.memory_probe import Verdict, follow, judge
from bilevel.errors import BilevelWarning

__all__ = ["CASES", "Row", "main", "measure"]

CONTROL = Case("a plain torch loop (control)", lambda folder: control())
CASES: tuple[Case, ...] = (*method_cases(), *event_cases())
READINGS = 20
HEAD = """
| each step | steps | tensors | graph nodes | in cycles, a step | C heap, bytes a step | Python heap, blocks a step \
| resident, bytes a step | |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: The case.
        steps: Steps after the warm-up.
        verdict: What was seen.
    """

    name: str
    steps: int
    verdict: Verdict


def measure(case: Case, steps: int, readings: int = READINGS) -> Row:
    """Takes a case's steps and judges what they left behind.

    Args:
        case: The case.
        steps: About how many, after a tenth of them (20 at least) as a warm-up; rounded to whole periods of the case.
        readings: How many, after the first.
    """
    every = max(1, round(steps / readings / case.period)) * case.period
    count = max(1, round(steps / every)) * every
    warm_up = -(-max(steps // 10, 20) // case.period) * case.period
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        found = follow(lambda: case.make(Path(folder)), warm_up=warm_up, steps=count, every=every)
    return Row(case.name, count, judge(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, each in a process of its own")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if options.only in case.name]
    if not chosen:
        parser.error(f"no case's name holds {options.only!r}: they are {', '.join(case.name for case in CASES)}")
    print(HEAD, flush=True)
    rows = []
    for row in _measured([CONTROL.name, *(case.name for case in chosen)], options.steps, options.jobs):
        rows.append(row)
        print(line(row), flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n")
    return int(any(row.verdict.faults for row in rows))


def _measured(names: Sequence[str], steps: int, jobs: int) -> Iterator[Row]:
    take = partial(_measure_named, steps=steps)
    if jobs == 1:
        yield from map(take, names)
        return
    # One case a process: its resident memory is its own. (Python 3.10 knows no such limit.)
    limit = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), **limit) as pool:
        yield from pool.map(take, names)


def _measure_named(name: str, steps: int) -> Row:
    torch.set_num_threads(1)
    return measure(next(case for case in (CONTROL, *CASES) if case.name == name), steps)


def line(row: Row) -> str:
    """Returns a row of the table, in Markdown."""
    verdict = row.verdict
    slopes = verdict.heap_slope, verdict.blocks_slope, verdict.resident_slope
    cells = (
        row.name,
        str(row.steps),
        str(verdict.tensors),
        str(verdict.nodes),
        f"{verdict.cyclic_tensors:.2g}",
        *(f"{slope:+.1f}" for slope in slopes),
        "; ".join(verdict.faults) or "constant",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
