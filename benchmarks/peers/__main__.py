"""Runs workloads for this library, for its peers and for loops written by hand, and compares them.

    python -m benchmarks.peers --environments DIR --create                  # everything; the first time with pip
    python -m benchmarks.peers regularisation reweighting --size small --rounds 3 --environments DIR
    python -m benchmarks.peers few_shot --here --device cuda                # with the libraries importable here

Each library works in a process of its own, all alive at once and timed in turns. See docs/benchmarks/index.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import add_comparison, carry_out, named, new_parser, show_and_keep
from benchmarks.peers.environments import LIBRARIES, interpreters
from benchmarks.peers.report import about, lines_of
from benchmarks.peers.run import Settings, measure

WORKLOADS = Path(__file__).parent / "workloads"


def workloads() -> list[str]:
    """Returns the names of all workloads."""
    return sorted(path.stem for path in WORKLOADS.glob("*.py") if "\nMETHODS" in path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    names = workloads()
    parser = new_parser(__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(names)}; all without any")
    parser.add_argument("--libraries", nargs="+", choices=tuple(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--methods", nargs="+", help="only these rows: keys of the workloads' METHODS")
    parser.add_argument("--size", default="full", help="a key of the workload's SIZES: small, full, …")
    add_comparison(parser, rounds=15)
    parser.add_argument("--suffix", default="", help="of the results' names: a second table of the same workload")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    unknown = [name for name in options.workloads if name not in names]
    if unknown:
        parser.error(f"unknown workload(s) {', '.join(unknown)}: there are {', '.join(names)}")
    modules = {
        name: importlib.import_module(f"benchmarks.peers.workloads.{name}") for name in options.workloads or names
    }
    for name, module in modules.items():
        if options.size not in module.SIZES:
            parser.error(f"{name} has no size {options.size!r}: its sizes are {', '.join(module.SIZES)}")
    keys = list(dict.fromkeys(key for module in modules.values() for key in module.METHODS))
    unknown = [key for key in options.methods or () if key not in keys]
    if unknown:
        parser.error(f"unknown method(s) {', '.join(unknown)}: there are {', '.join(keys)}")
    carry_out(options, lambda: _run(options, options.workloads or names, given), lines_of)


def _run(options: argparse.Namespace, names: Sequence[str], given: Sequence[str]) -> None:
    settings = Settings(
        options.size, options.rounds, options.threads, options.device, options.cpu_time, options.data, options.methods
    )
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    pythons, absent = interpreters(options)
    for name in names:
        started = time.perf_counter()
        found = measure(name, pythons, absent, settings)
        told = about(given, time.perf_counter() - started, settings)
        result = {"about": told, **found.as_json()}
        kept_as = named(name, options.device) + options.suffix
        show_and_keep(kept_as, found.title, result, lines_of(result), options)


if __name__ == "__main__":
    main()
