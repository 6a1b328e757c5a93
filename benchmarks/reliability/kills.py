"""Kills runs at random instants, resumes them, and compares the end with an uninterrupted run, bit for bit.

    python -m benchmarks.reliability.kills [--kills 50] [--only NAME …] [--command-line] [--output FILE.json]

For every method that remembers something from step to step (found by running all of them), a process trains, with
random data order, dropout, batch normalisation, Adam, a one-cycle schedule, evaluations and a log. It is killed with
SIGKILL again and again: after a random number of steps and a random time; while it starts or loads; while it writes a
checkpoint. Each time it is started again, and goes on by itself from what it finds. In the end, its last checkpoint
(parameters, buffers, optimisers, schedulers, what methods and callbacks remember, generators, position in the data) and
its log must be those of a run that nobody killed, byte for byte.

A kill counts as one during writing where it leaves an unfinished file behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.reliability.kill_cases import Case, candidates, remembers
from benchmarks.reliability.kill_command import kill_command_line
from benchmarks.reliability.kill_runs import Outcome, fork, kill_and_resume

__all__ = ["cases", "main", "stateful_methods"]


def stateful_methods(only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the methods, with their fields, that remember something; found in a process of its own.

    Args:
        only: Names of those to try; all by default.
    """
    tried = [method for method in candidates() if not only or method["method"] in only]
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            found = [method for method in tried if remembers(method)]
            with os.fdopen(writing, "w") as file:
                json.dump(found, file)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("the methods could not be tried out")
    methods: list[dict[str, Any]] = json.loads(text)
    return methods


def cases(only: Sequence[str] = ()) -> list[Case]:
    """Returns a case for every method that remembers something, two of others, and one with workers.

    Args:
        only: Names of methods; all by default.
    """
    stateless = [{"method": name} for name in ("identity", "unrolled") if not only or name in only]
    remembering = stateful_methods(only)
    found = [Case(method, every=1 + place % 3) for place, method in enumerate([*stateless, *remembering])]
    return found + [Case(method, workers=2, every=1) for method in remembering if method.get("warm_start")][:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; returns 1 where a run did not survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of each run")
    parser.add_argument("--only", nargs="*", default=(), help="names of methods")
    parser.add_argument("--command-line", action="store_true", help="also kill `bilevel run --resume`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    outcomes = [_in_folder(kill_and_resume, case, chosen) for case in cases(chosen.only)]
    if chosen.command_line:
        outcomes.append(_in_folder(kill_command_line, None, chosen))
    report = summary(outcomes)
    if chosen.output:
        chosen.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    Console(width=100).print(table(outcomes))
    print(f"kills survived / tried: {report['survived']} / {report['tried']}")
    return int(report["survived"] != report["tried"])


def _in_folder(run: Callable[..., Outcome], case: Case | None, chosen: argparse.Namespace) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        outcome = run(*([] if case is None else [case]), chosen.kills, chosen.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{outcome.case}: {outcome.kills} kills, {outcome.differences or 'equal'}", file=sys.stderr, flush=True)
    return outcome


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the counts of all runs, and each run's."""
    return {
        "tried": sum(outcome.kills for outcome in outcomes),
        "survived": sum(outcome.kills for outcome in outcomes if not outcome.differences),
        "during_writing": sum(outcome.writing for outcome in outcomes),
        "while_starting": sum(outcome.starting for outcome in outcomes),
        "runs": [asdict(outcome) for outcome in outcomes],
    }


def table(outcomes: Sequence[Outcome]) -> Table:
    """Returns the runs as a table."""
    made = Table(title="Runs killed, resumed and compared")
    for heading in ("method", "kills", "starting", "writing", "steps", "seconds", "at the end"):
        made.add_column(heading, justify="left" if heading in ("method", "at the end") else "right")
    for one in outcomes:
        numbers = (one.kills, one.starting, one.writing, one.steps, round(one.seconds, 1))
        made.add_row(one.case, *map(str, numbers), "; ".join(one.differences) or "equal, bit for bit")
    return made


if __name__ == "__main__":
    sys.exit(main())
