"""What compiling a solve saves: compiled products and iterations beside eager ones, and JAXopt's compiled step.

    python -m benchmarks.compiled [--size small] [--rounds 9] [--threads 1] [--cpu-time] [--device cuda]
                                  [--environments DIR [--create]] [--data DIR]
                                  [--save] [--page docs/benchmarks/compiled.md]

One outer step of the reweighting workload (an MLP and a weight network over its per-example losses) by the engine with
and without ``compile``, by a hand-written loop with the same number of passes, and by JAXopt, whose whole outer step is
one compiled function with its data as arguments. Interleaved; medians, and medians of the ratios to the engine without
``compile``. Compile times are those of the first outer step, with nothing on disk from an earlier run. The last column
is the relative distance of the hypergradient from the method's own value in float64.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import add_comparison, command, named, new_parser, show_and_keep
from benchmarks.peers.environments import find
from benchmarks.peers.protocol import Remote, WorkerError
from benchmarks.peers.report import about, lines_of, scientific
from benchmarks.peers.side import Method, NotOffered
from benchmarks.peers.timing import median, ratio, rotated
from benchmarks.peers.verdict import error

__all__ = ["Row", "main", "measure", "table"]

BASE = "engine"
METHODS = {
    "conjugate gradients, 5 products": Method("conjugate_gradient", 5),
    "conjugate gradients, 20 products": Method("conjugate_gradient", 20),
    "Neumann, 10 products": Method("neumann", 10, 0.1),
}


@dataclass
class Row:
    """One side with one method.

    Attributes:
        workload: The problem.
        method: The method.
        side: Who.
        seconds: Medians of the rounds are taken of these.
        first: Seconds of the first outer step, compilation included.
        error: Relative distance to the method's float64 value.
        failed: Why there is nothing.
    """

    workload: str
    method: str
    side: str
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    error: float = float("nan")
    failed: str = ""


def with_fields(method: Method, **more: Any) -> Method:
    """Returns the method with fields that only this library has."""
    fields: dict[str, Any] = {"max_iterations": method.products, "rtol": 0.0}
    if method.kind == "neumann":
        fields = {"terms": method.products, "step_size": method.step_size}
    return Method(method.kind, method.products, method.step_size, {**fields, **more})


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Returns all rows."""
    pythons = {name: find(name, None, here=True, make=False)[0] for name in ("hand", "bilevel")}
    if (arguments.environments is not None or arguments.here) and arguments.device == "cpu":
        pythons["jaxopt"], why = find("jaxopt", arguments.environments, here=arguments.here, make=arguments.create)
        if why:
            print(f"JAXopt: {why}")
    rows: list[Row] = []
    for workload in arguments.workloads:
        module = importlib.import_module(f"benchmarks.peers.workloads.{workload}")
        arrays, _ = module.data(arguments.size, arguments.data)
        for label, method in METHODS.items():
            own = module.reference(arrays, arguments.size, method).own
            sides = {
                BASE: ("bilevel", with_fields(method)),
                "engine, compiled": ("bilevel", with_fields(method, compile=True)),
                "by hand": ("hand", method),
                "JAXopt, compiled": ("jaxopt", method),
            }
            chosen = {side: pair for side, pair in sides.items() if pythons.get(pair[0])}
            rows += one(workload, label, chosen, pythons, module, arrays, own, arguments)
            print("\n".join(table(rows[-len(chosen) :])), flush=True)
    return rows


def one(
    workload: str,
    label: str,
    sides: dict[str, tuple[str, Method]],
    pythons: dict[str, Path | None],
    module: Any,
    arrays: dict[str, Any],
    own: Any,
    arguments: argparse.Namespace,
) -> list[Row]:
    """Returns the rows of one method: agreement at the first step, then interleaved times."""
    rows = {side: Row(workload, label, side) for side in sides}
    remotes: dict[str, Remote] = {}
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, **arrays)
        try:
            for side, (library, method) in sides.items():
                cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "kernels")}
                python = pythons[library]
                assert python is not None
                remote = remotes[side] = Remote(library, python, threads=arguments.threads, environment=cache)
                remote.ask("load", data=workload, file=str(file))
                try:
                    remote.ask(
                        "build",
                        key=side,
                        data=workload,
                        workload=workload,
                        method=asdict(method),
                        size=arguments.size,
                        device=arguments.device,
                    )
                    started = time.perf_counter()
                    found, _ = remote.gradient(side)
                    rows[side].first = time.perf_counter() - started
                    rows[side].error = error(found, own)
                    remote.ask("time", key=side, steps=arguments.steps)
                except (WorkerError, NotOffered) as failure:
                    rows[side].failed = str(failure)[:200]
            running = [side for side in sides if not rows[side].failed]
            for order in rotated(running, arguments.rounds):
                for side in order:
                    seconds = remotes[side].ask("time", key=side, steps=arguments.steps, cpu_time=arguments.cpu_time)
                    rows[side].seconds.append(seconds)
        finally:
            for remote in remotes.values():
                remote.close()
    return list(rows.values())


def table(rows: Sequence[Row]) -> list[str]:
    """Returns a Markdown table."""
    lines = [
        "| Method | Side | Step, ms | ÷ engine | First step, s | Error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(other for other in rows if other.side == BASE and (other.workload, other.method) == key(row))
        if row.failed or base.failed:
            lines.append(f"| {row.method} | {row.side} | | | | {row.failed or base.failed} |")
            continue
        found = {row.side: row.seconds, BASE: base.seconds}
        compared = "1" if row is base else str(ratio(found, row.side, BASE))
        cells = f"{1e3 * median(row.seconds):.2f} | {compared} | {row.first:.1f} | {scientific(row.error)}"
        lines.append(f"| {row.method} | {row.side} | {cells} |")
    return lines


def key(row: Row) -> tuple[str, str]:
    return row.workload, row.method


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("workloads", nargs="*", default=["reweighting"], help="of benchmarks.peers, functional ones")
    parser.add_argument("--size", default="full", choices=("small", "full"))
    parser.add_argument("--steps", type=int, default=3, help="outer steps a round")
    add_comparison(parser, rounds=15)
    command(parser, arguments, run, lines_of)


def run(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Measures, prints the tables and keeps what is to be kept."""
    started = time.perf_counter()
    rows = measure(options)
    told = about(given, time.perf_counter() - started, options, "benchmarks.compiled")
    tables = [table([row for row in rows if row.workload == name]) for name in dict.fromkeys(r.workload for r in rows)]
    lines = [line for lines in tables for line in ("", *lines)][1:]
    result = {"about": told, "lines": lines, "rows": [asdict(row) for row in rows]}
    show_and_keep(named("compiled", options.device), "Compiled solves", result, lines_of(result), options)


if __name__ == "__main__":
    main()
