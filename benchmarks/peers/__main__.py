"""Runs workloads for this library, for its peers and for loops written by hand, and compares them.

    python -m benchmarks.peers --environments DIR --create                  # everything; the first time with pip
    python -m benchmarks.peers regularisation reweighting --size small --rounds 3 --environments DIR
    python -m benchmarks.peers few_shot --here --device cuda                # with the libraries importable here

Each library works in a process of its own, all alive at once and timed in turns. See docs/benchmarks/index.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import LIBRARIES, find
from benchmarks.peers.report import RESULTS, about, complain, lines_of, load, save, with_results, without_paths
from benchmarks.peers.run import Settings, measure

WORKLOADS = Path(__file__).parent / "workloads"


def workloads() -> list[str]:
    """Returns the names of all workloads."""
    return sorted(path.stem for path in WORKLOADS.glob("*.py") if "\nMETHODS" in path.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    names = workloads()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(names)}; all without any")
    parser.add_argument("--libraries", nargs="+", choices=tuple(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--methods", nargs="+", help="only these rows: keys of the workloads' METHODS")
    parser.add_argument("--size", default="full", help="a key of the workload's SIZES: small, full, …")
    parser.add_argument("--rounds", type=int, default=15, help="turns that every library has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="steadier where others use the machine too")
    parser.add_argument("--environments", type=Path, help="folder of the libraries' environments")
    parser.add_argument("--create", action="store_true", help="make with pip what is missing there")
    parser.add_argument("--here", action="store_true", help="take the libraries that this interpreter can import")
    parser.add_argument(
        "--data", type=Path, help="folder with mnist10k/ and omniglot/; packaged or seeded data without"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results of this run here")
    parser.add_argument(
        "--save", action="store_true", help=f"keep the results in {RESULTS.name}/, from which pages are made"
    )
    parser.add_argument("--suffix", default="", help="of the kept results' names: a second table of the same workload")
    parser.add_argument("--page", type=Path, help="write the kept results into this page; without workloads, only that")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    unknown = [name for name in options.workloads if name not in names]
    if unknown:
        parser.error(f"unknown workload(s) {', '.join(unknown)}: there are {', '.join(names)}")
    if options.page is None or options.workloads or options.save:
        _run(options, options.workloads or names, given)
    if options.page is not None:
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(with_results(text, load()), encoding="utf-8")


def _run(options: argparse.Namespace, names: Sequence[str], given: Sequence[str]) -> None:
    settings = Settings(
        options.size, options.rounds, options.threads, options.device, options.cpu_time, options.data, options.methods
    )
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    pythons, absent = {}, {}
    for library in options.libraries:
        python, why = find(library, options.environments, here=options.here, make=options.create)
        if python is None:
            absent[library] = why
            complain(f"{LIBRARIES[library].name}: {why}")
        else:
            pythons[library] = python
    results = {}
    for name in names:
        started = time.perf_counter()
        found = measure(name, pythons, absent, settings)
        told = about(without_paths(given), time.perf_counter() - started, settings)
        result = {"about": told, **found.as_json()}
        key = name + ("" if options.device == "cpu" else f"-{options.device}") + options.suffix
        results[key] = result
        print(f"## {found.title}\n", *lines_of(result), "", sep="\n", flush=True)
        if options.save:
            save(key, result)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
