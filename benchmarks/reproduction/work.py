"""All runs of a problem, spread over processes, as what the results file holds."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reproduction.methods import ENTRIES
from benchmarks.reproduction.run import Run, make_task, run, tune
from benchmarks.reproduction.suite import Case
from bilevel import Estimator

__all__ = ["read", "solve", "write"]

TRIES = 7


def solve(
    name: str,
    case: Case,
    methods: Sequence[str],
    folder: Path | None,
    each: Callable[..., Iterable[Any]],
    known: Mapping[str, Any],
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Runs methods on a problem.

    Args:
        name: The problem's.
        case: The problem and its budget.
        methods: Which to run.
        folder: Where the data is.
        each: ``map``, or what spreads it over processes.
        known: Earlier results of the problem, whose other methods are kept.
        rates: Outer step sizes of methods that need no search.

    Returns:
        The problem's results.
    """
    cells: dict[str, Any] = dict(known.get("cells", {}))
    started = time.perf_counter()
    for method, cell in zip(methods, each(partial(_cell, name, case, folder, rates), methods), strict=True):
        cells[method] = cell
        print(f"{name} {method}: {_line(cell)} ({time.perf_counter() - started:.0f} s)", flush=True)
    references = dict(known.get("references", {}))
    seeds = [case.seeds[0]] if case.shared_minimum else list(case.seeds)
    missing = [seed for seed in seeds if str(seed) not in references]
    for seed, reference in zip(missing, each(partial(_reference, name, folder), missing), strict=True):
        references[str(seed)] = reference
    return {
        **{key: getattr(case, key) for key in ("title", "budget", "seconds", "target", "quantity")},
        "seeds": list(case.seeds),
        "tuning_seeds": list(case.tuning_seeds),
        "references": references,
        "minima": _minima(case, cells, references),
        "cells": {method: cells[method] for method in ENTRIES if method in cells},
    }


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Writes results, infinite values as null."""

    def standard(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): standard(value) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return [standard(value) for value in item]
        if isinstance(item, float):
            return float(f"{item:.12g}") if math.isfinite(item) else None
        return item

    file.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(standard(results), indent=0, allow_nan=False).replace("\n", "")
    file.write_text(lines.replace('"seed":', '\n"seed":').replace('"settings":', '\n"settings":') + "\n")


def read(file: Path) -> dict[str, Any]:
    """Reads what :func:`write` wrote."""

    def infinite(values: list[float | None]) -> list[float]:
        return [math.inf if value is None else value for value in values]

    results: dict[str, Any] = json.loads(file.read_text())
    for problem in results["problems"].values():
        for cell in problem["cells"].values():
            for record in cell["runs"]:
                record["value"] = infinite(record["value"])
    return results


def _cell(name: str, case: Case, folder: Path | None, rates: Mapping[str, float], method: str) -> dict[str, Any]:
    """Tunes a method, unless its step size is known, and runs it with every seed."""
    entry = ENTRIES[method]
    if name in entry.left_out:
        return {"left_out": entry.left_out[name], "runs": []}
    make = partial(make_task, name, folder)
    rate, tried = (rates[method], {}) if method in rates else tune(make, case, entry, tries=TRIES)
    runs: list[Run] = [run(make(seed), case, entry.recipe(make(seed), rate), seed) for seed in case.seeds]
    recipe = entry.recipe(make(case.seeds[0]), rate)
    method = recipe.method
    fields = method.describe() if isinstance(method, Estimator) else {"method": method.name, **vars(method)}
    settings = {**vars(recipe), "method": fields}
    return {"settings": settings, "tried": tried, "runs": [dataclasses.asdict(record) for record in runs]}


def _reference(name: str, folder: Path | None, seed: int) -> float:
    task = make_task(name, folder, seed)
    return task.lowest([task.outer_start.double()])


def _minima(case: Case, cells: Mapping[str, Any], references: Mapping[str, float]) -> dict[str, float]:
    """Returns h* for every seed: the reference, or what a run found below it."""
    minima = {}
    for seed in case.seeds:
        runs = [run for cell in cells.values() for run in cell["runs"] if case.shared_minimum or run["seed"] == seed]
        values = [value for run in runs for value in run["value"] if math.isfinite(value)]
        minima[str(seed)] = min([references[str(case.seeds[0] if case.shared_minimum else seed)], *values])
    return minima


def _line(cell: Mapping[str, Any]) -> str:
    if not cell["runs"]:
        return f"left out, {cell['left_out']}"
    ends = ", ".join(f"{record['value'][-1]:.6g}" for record in cell["runs"])
    return f"step size {cell['settings']['outer_rate']:.3g}, h at the end {ends}"
