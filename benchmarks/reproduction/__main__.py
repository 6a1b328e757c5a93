"""Solves the problems of benchopt's bilevel benchmark with every method, and draws what came of it."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reproduction.loading import MissingDataError
from benchmarks.reproduction.methods import ENTRIES
from benchmarks.reproduction.plot import draw
from benchmarks.reproduction.run import make_task
from benchmarks.reproduction.suite import SUITE
from benchmarks.reproduction.tables import detail, refresh, summary
from benchmarks.reproduction.work import read, solve, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite, or draws what was run. Returns the exit status."""
    options = _parse(arguments)
    file = options.output / "results.json"
    partly = options.draw or options.methods is not None or set(options.problems) != set(SUITE)
    results: dict[str, Any] = read(file) if partly and file.exists() else {"problems": {}}
    try:
        if not options.draw:
            _run(options, results, file)
    except MissingDataError as error:
        print(error, file=sys.stderr)
        return 2
    _report(results["problems"], options.output)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description=__doc__)

    def names(known: Mapping[str, Any], text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    parser.add_argument("--data", type=Path, help="folder with ijcnn1, adult_a9a and mnist10k, a data.npz in each")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and the pictures")
    parser.add_argument(
        "--problems", type=lambda text: names(SUITE, text), default=list(SUITE), help=f"some of {','.join(SUITE)}"
    )
    parser.add_argument(
        "--methods", type=lambda text: names(ENTRIES, text), help="some of the methods; the file keeps the others"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--quick", action="store_true", help="a tenth of the budget, two seeds")
    parser.add_argument("--draw", action="store_true", help="only draw what results.json holds")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, results: dict[str, Any], file: Path) -> None:
    for name in options.problems:
        make_task(name, options.data, 0)  # missing data shows before anything has run
    torch.set_num_threads(1)
    if options.jobs == 1:
        _solve(options, results, file, map)
        return
    with multiprocessing.get_context("spawn").Pool(options.jobs, torch.set_num_threads, (1,)) as pool:
        _solve(options, results, file, pool.imap)


def _solve(
    options: argparse.Namespace, results: dict[str, Any], file: Path, each: Callable[..., Iterable[Any]]
) -> None:
    for name in options.problems:
        case = SUITE[name].quick() if options.quick else SUITE[name]
        known = results["problems"].get(name, {}) if options.methods else {}
        methods = options.methods or list(ENTRIES)
        tuned = results["problems"].get(case.tuned_on, {}).get("cells", {})
        rates = {method: cell["settings"]["outer_rate"] for method, cell in tuned.items() if cell["runs"]}
        results["problems"][name] = solve(name, case, methods, options.data, each, known, rates)
        write(file, results)


def _report(problems: Mapping[str, Any], output: Path) -> None:
    """Draws the pictures, and fills the tables of the page ``<output>.md``."""
    ordered = {name: problems[name] for name in SUITE if name in problems}
    for name, problem in ordered.items():
        draw(problem, output / f"{name}.svg")
    tables = {"summary": summary(ordered), **{name: detail(problem) for name, problem in ordered.items()}}
    page = output.with_suffix(".md")
    if page.exists():
        for name in refresh(page, tables):
            print(f"{page} has no place for table {name}: add '<!-- table {name} -->' and '<!-- end -->'")
    else:
        (output / "tables.md").write_text("\n\n".join(tables.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
