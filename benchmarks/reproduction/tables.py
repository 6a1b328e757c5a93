"""Tables in Markdown, and the page that they are kept up to date in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.reproduction.methods import ENTRIES
from benchmarks.reproduction.results import Spread, broke, final, reached, spread

__all__ = ["detail", "refresh", "summary"]


def summary(problems: Mapping[str, Any]) -> str:
    """Returns one table of all methods and problems: the suboptimality at the end, the best of each column bold."""
    names = [name for name in ENTRIES if any(name in problem["cells"] for problem in problems.values())]
    ends = {key: _ends(problem) for key, problem in problems.items()}
    lines = [f"| method | {' | '.join(problems)} |", f"|---|{'---|' * len(problems)}"]
    for name in names:
        row = []
        for found in ends.values():
            best = min(found.values(), key=lambda end: end.middle, default=None)
            cell = _end(found[name].middle) if name in found else "–"
            row.append(f"**{cell}**" if name in found and found[name] == best else cell)
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return "\n".join(lines)


def detail(problem: Mapping[str, Any]) -> str:
    """Returns one problem's table."""
    target, metrics = problem["target"], _metrics(problem)
    columns = ["method", "step size", "outer steps", "suboptimality at the end", f"gradients to {target:g}"]
    columns += [f"CPU s to {target:g}", *metrics, "remarks"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in (name for name in ENTRIES if name in problem["cells"]):
        cell = problem["cells"][name]
        if not cell["runs"]:
            lines.append(f"| `{name}` |{' – |' * (len(columns) - 2)} {cell['left_out']} |")
            continue
        values = [
            f"`{name}`",
            _number(cell["settings"]["outer_rate"]),
            f"{median(run['steps'] for run in cell['runs']):.0f}",
        ]
        values.append(_range(final(cell, problem["minima"])))
        values += [_number(reached(cell, problem["minima"], target, axis)) for axis in ("cost", "seconds")]
        values += [_range(spread([run["metrics"][metric][-1] for run in cell["runs"]])) for metric in metrics]
        lines.append(f"| {' | '.join(values)} | {_remarks(cell)} |")
    return "\n".join(lines)


def refresh(page: Path, tables: Mapping[str, str]) -> list[str]:
    """Writes tables between ``<!-- table NAME -->`` and ``<!-- end -->`` in a page; returns those without a place."""
    text, missing = page.read_text(encoding="utf-8"), []
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if not count:
            missing.append(name)
    page.write_text(text, encoding="utf-8")
    return missing


def _ends(problem: Mapping[str, Any]) -> dict[str, Spread]:
    return {name: final(cell, problem["minima"]) for name, cell in problem["cells"].items() if cell["runs"]}


def _metrics(problem: Mapping[str, Any]) -> list[str]:
    runs = [run for cell in problem["cells"].values() for run in cell["runs"]]
    return list(runs[0]["metrics"]) if runs else []


def _remarks(cell: Mapping[str, Any]) -> str:
    runs = cell["runs"]
    remarks = []
    broken = sum(broke(run) for run in runs)
    stopped = sum(run["ended"].startswith("stopped") for run in runs)
    failed, steps = sum(run["failed_solves"] for run in runs), sum(run["steps"] for run in runs)
    if broken:
        remarks.append(f"{broken} of {len(runs)} seeds diverged")
    if stopped:
        remarks.append(f"stopped by time at {_number(median(run['cost'][-1] for run in runs))} gradients")
    if failed:
        remarks.append(f"{100 * failed / steps:.0f} % of its solves reported a failure")
    return "; ".join(remarks)


def _range(found: Spread) -> str:
    return f"{_end(found.middle)} ({_end(found.low)} to {_end(found.high)})"


def _end(value: float) -> str:
    return "diverged" if value == math.inf else _number(value)


def _number(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return "never" if value == math.inf else "–"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
