"""Tables, JSON and the page."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.environments import LIBRARIES

__all__ = ["about", "as_told", "conditions", "ending", "lines_of"]

COLUMNS = ("method", "library", "passes", "ms a step", "to the loop by hand", "peak MiB", "error", "to the exact", "")


def about(given: Sequence[str], seconds: float, settings: Any, module: str = "benchmarks.peers") -> dict[str, Any]:
    """Returns what a reader needs to judge the numbers that a command with these arguments has measured."""
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    size = getattr(settings, "size", None)
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "threads": settings.threads,
        **({} if size is None else {"size": size}),
        "rounds": settings.rounds,
        "clock": "processor time" if settings.cpu_time else "wall clock",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m {module} " + shlex.join(as_told(given)),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
    }


def as_told(given: Sequence[str]) -> list[str]:
    """Returns a command's arguments as a page tells them.

    Where the results went is left out; other folders and files have their last name: those of this machine tell a
    reader nothing.
    """
    told, rest = [], iter(given)
    for text in rest:
        if text in ("--json", "--page"):
            next(rest, None)
        elif text != "--save" and not text.startswith(("--json=", "--page=")):
            told.append(Path(text).name if "/" in text else text)
    return told


def conditions(told: Mapping[str, Any]) -> str:
    """Returns how it was measured, as a page tells it of what :func:`about` returned, or of what is kept of that."""
    threads = "{} thread" if told.get("threads") == 1 else "{} threads"
    shown = {"command": "`{}`", "date": "{}", "machine": "{}", "threads": threads, "clock": "{}"}
    parts = [text.format(told[key]) for key, text in shown.items() if key in told]
    return "; ".join(filter(None, [", ".join(parts), f"torch {told['torch']}"]))


def ending(result: Mapping[str, Any], source: str = "") -> str:
    """Returns the line below a table: what was measured, how, and versions of peers and of what they are written in."""
    versions = "".join(
        f", {name} {version}"
        for library, found in result.get("versions", {}).items()
        for name, version in found.items()
        if name not in ("python", "torch") and library not in ("hand", "vmap", "bilevel", "bilevel_compiled")
    )
    return f"{source}{'. ' if source else ''}{conditions(result['about'])}{versions}."


def processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Returns a workload's table and the lines below it, in Markdown."""
    if "lines" in result:  # a table of another form, see benchmarks.peers.precision
        return [*result["lines"], "", ending(result, result.get("source", ""))]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for key, label in result["methods"].items():
        rows = [row for row in result["rows"] if row["method"] == key]
        theirs = [row for row in rows if ranked(row) and row["library"] not in ("hand", "jaxopt")]
        best = min((row["seconds"] for row in theirs), default=None)
        for row in sorted(rows, key=lambda row: (not ranked(row), row["library"] != "hand", _order(row["seconds"]))):
            lines.append("| " + " | ".join(cells(row, label, best)) + " |")
            label = ""
    notes = [f"{LIBRARIES[name].name}: {why}." for name, why in result["absent"].items()]
    notes += remarks(result)
    lines += ["", ending(result, result["source"])]
    return lines + ([""] + [f"- {note}" for note in notes] if notes else [])


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Returns what is to be known of rows; where a library has several notes, with the methods that each is about."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["note"]:
            found.setdefault((row["library"], row["note"].rstrip(".")), []).append(result["methods"][row["method"]])
    lines = []
    for (library, note), labels in found.items():
        several = sum(other == library for other, _ in found) > 1
        where = f" ({'; '.join(labels)})" if several else ""
        lines.append(f"{LIBRARIES[library].name}{where}: {note}.")
    return lines


def ranked(row: Mapping[str, Any]) -> bool:
    """Whether a row's time means anything."""
    return not row["wrong"] and not row["failed"]


def cells(row: Mapping[str, Any], label: str, best: float | None) -> list[str]:
    name = LIBRARIES[row["library"]].name
    if row["failed"]:
        return [label, name, *[""] * 6, f"**fails**: {plain(row['failed'])}"]
    found = row["ratio"]
    ratio = "" if found is None or row["wrong"] or row["library"] == "hand" else spread(found)
    time_cell = number(1e3 * row["seconds"])
    if ranked(row) and row["seconds"] == best:
        time_cell = f"**{time_cell}**"
    peak = row["peak"] / 2**20
    return [
        label,
        name,
        "–" if row["passes"] is None else "{} + {}".format(*row["passes"]),
        time_cell,
        ratio,
        "–" if math.isnan(peak) else f"{peak:.2f}",
        scientific(row["own_error"]),
        scientific(row["exact_error"]),
        f"**wrong**: {plain(row['wrong'])}" if row["wrong"] else "",
    ]


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def scientific(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _order(seconds: float) -> float:
    return math.inf if math.isnan(seconds) else seconds


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
