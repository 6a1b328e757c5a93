"""Measures how time and memory grow, draws it, and writes the tables of docs/benchmarks/growth.md.

    python -m benchmarks.growth --environments DIR --create                     # all axes, one after another
    python -m benchmarks.growth inner outer --budget small --environments DIR
    python -m benchmarks.growth inner tasks --device cuda --here --save         # with the libraries importable here
    python -m benchmarks.growth --page docs/benchmarks/growth.md                # page and pictures from what is kept

Every library measures its lines in a process of its own, one library after another (with ``--here`` all in one);
``--jobs`` runs axes side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.growth.axes import AXES, Axis, Line, Run
from benchmarks.growth.report import draw, lines_of, name_on_page, shown
from benchmarks.options import add_clock, add_environments, add_results, carry_out, new_parser, show_and_keep
from benchmarks.pages.results import PAGES, kept
from benchmarks.peers.environments import LIBRARIES, find
from benchmarks.peers.report import about, complain

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"small": 0.5, "full": 8.0, "cuda": 2.0}  # the longest step that a line goes on from, by Run.key


@dataclass(frozen=True)
class Settings:
    """How an axis is measured; ``size`` and the like as :func:`benchmarks.peers.report.about` asks for them."""

    size: str
    device: str
    threads: int
    cpu_time: bool
    together: bool = False
    rounds: int = 1

    @property
    def seconds(self) -> float:
        return SECONDS[run_of(self).key]


def main(arguments: Sequence[str] | None = None) -> None:
    libraries = list(dict.fromkeys(line.library for axis in AXES.values() for line in axis.lines))
    parser = new_parser(__doc__)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}; all without any")
    parser.add_argument("--budget", choices=("small", "full"), default="full")
    parser.add_argument("--libraries", nargs="+", choices=libraries, default=libraries)
    parser.add_argument("--jobs", type=int, default=1, help="axes at a time: they share the memory's bandwidth")
    add_clock(parser)
    add_environments(parser)
    add_results(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    unknown = [name for name in options.axes if name not in AXES]
    if unknown:
        parser.error(f"unknown axis {', '.join(unknown)}: there are {', '.join(AXES)}")
    carry_out(options, lambda: run(options, options.axes or list(AXES), given), shown)
    if options.page is not None:
        from benchmarks.tutorials.study import picture  # needs SciPy and Matplotlib

        for name, result in kept(options.page.read_text(encoding="utf-8")).items():
            picture(lambda figure, result=result: draw(result, figure), PAGES / name)


def run(options: argparse.Namespace, names: Sequence[str], given: Sequence[str]) -> None:
    """Measures the axes, prints their tables and keeps what is to be kept."""
    settings = Settings(options.budget, options.device, options.threads, options.cpu_time, options.here)
    pythons, absent = interpreters(options)

    def one(name: str) -> None:
        started = time.perf_counter()
        found = measure(name, pythons, absent, settings)
        told = about(given, time.perf_counter() - started, settings, "benchmarks.growth")
        result = {"about": told, "axis": name, "device": options.device, **found}
        show_and_keep(name_on_page(name, options.device), AXES[name].title, result, lines_of(result), options)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, names))


def interpreters(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """Returns the interpreter of each library, and why there is none for the others."""
    pythons, absent = {}, {}
    for library in options.libraries:
        if options.here:  # one process for all of them: what does not import fails there, with its reason
            if importlib.util.find_spec(LIBRARIES[library].module) is None:
                absent[library] = "not importable"
            else:
                pythons[library] = Path(sys.executable)
            continue
        python, why = find(library, options.environments, here=False, make=options.create)
        if python is None:
            absent[library] = why
            complain(f"{library}: {why}")
        else:
            pythons[library] = python
    return pythons, absent


def measure(name: str, pythons: Mapping[str, Path], absent: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """Returns ``rows``, ``versions`` and ``absent`` of an axis."""
    axis = AXES[name]
    rows = {line.key: row_of(line) for line in axis.lines if line.library in pythons}
    versions: dict[str, dict[str, str]] = {}
    # Libraries of one interpreter share a process, if it is not that of environments made for one each.
    groups: dict[tuple[Path, str], list[str]] = {}
    for line in axis.lines:
        if line.library in pythons:
            python = pythons[line.library]
            own = "" if settings.together else line.library
            groups.setdefault((python, own), []).append(line.key)
    for (python, own), keys in groups.items():
        started, todo = time.perf_counter(), keys
        while todo:
            found, status = worker(name, python, todo, settings)
            for key in found["lines"]:
                rows[key] |= found["lines"][key]
            versions |= found["versions"]
            begun = [key for key in todo if key in found["lines"]]
            if status == 0:
                break
            # The process has ended within a line: say so, and go on with the next one.
            broken = begun[-1] if begun else todo[0]
            rows[broken]["failed" if not rows[broken]["points"] else "stopped"] = f"the process ended: status {status}"
            rows[broken]["at"] = rows[broken]["at"] or next_value(axis, broken, rows[broken], settings)
            todo = todo[todo.index(broken) + 1 :]
        complain(f"{name}: {own or 'all libraries'}, {time.perf_counter() - started:.0f} s")
    used = {line.library for line in axis.lines}
    return {
        "rows": list(rows.values()),
        "versions": versions,
        "absent": {library: why for library, why in absent.items() if library in used},
    }


def run_of(settings: Settings) -> Run:
    return Run(settings.size, settings.device)


def next_value(axis: Axis, key: str, row: Mapping[str, Any], settings: Settings) -> int:
    done, values = {point[0] for point in row["points"]}, axis.values_of(axis.line(key), run_of(settings))
    return next((value for value in values if value not in done), values[-1])


def row_of(line: Line) -> dict[str, Any]:
    return {
        "key": line.key,
        "library": line.library,
        "points": [],
        "error": float("nan"),
        "wrong": "",
        "failed": "",
        "stopped": "",
        "at": 0,
        "note": "",
    }


def worker(axis: str, python: Path, lines: Sequence[str], settings: Settings) -> tuple[dict[str, Any], int]:
    """Runs lines in a process; returns what it has said, and its status."""
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        out, spec = Path(folder) / "out.jsonl", Path(folder) / "spec.json"
        out.touch()
        fields = {"axis": axis, "lines": list(lines), "size": settings.size}
        fields |= {"device": settings.device, "threads": settings.threads, "cpu_time": settings.cpu_time}
        spec.write_text(json.dumps({**fields, "seconds": settings.seconds, "out": str(out)}), encoding="utf-8")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        limits = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if settings.device == "cpu":  # else the peak of memory would be asked of a GPU, once one is in use
            limits["CUDA_VISIBLE_DEVICES"] = ""
        log = Path(folder) / "log.txt"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [str(python), "-m", "benchmarks.growth.worker", str(spec)],
                stdout=stream,
                stderr=stream,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", **limits},
            )
            try:
                status = process.wait(timeout=60 + 20 * settings.seconds * len(lines))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        found = read(out)
        if status and not found["lines"]:
            complain(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    return found, status


def read(out: Path) -> dict[str, Any]:
    """Reads what a worker has written."""
    lines: dict[str, dict[str, Any]] = {}
    versions: dict[str, dict[str, str]] = {}
    for text in out.read_text(encoding="utf-8").splitlines():
        found = json.loads(text)
        if "versions" in found:
            versions |= found["versions"]
            continue
        row = lines.setdefault(found.pop("line"), {"points": []})
        if "seconds" in found:
            row["points"].append([found["x"], found["seconds"], found["bytes"]])
        else:
            row |= found
    return {"lines": lines, "versions": versions}


if __name__ == "__main__":
    main()
