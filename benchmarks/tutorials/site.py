"""What building the documentation does with the tutorials: runs every study at its small budget and shows the result.

A study that fails fails the build. ``mkdocs serve`` runs none: it would at every change of a file. For a look at the
other pages, ``TUTORIALS=skip mkdocs build`` runs none either.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs runs from anywhere

from benchmarks.tutorials.study import Study, load, names  # noqa: E402

WORKERS = 2
_found: dict[str, Study] = {}


def on_startup(command: str, dirty: bool) -> None:
    """Runs the studies, side by side."""
    if command != "build" or os.environ.get("TUTORIALS") == "skip":
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        for name, study in zip(names(), pool.map(lambda name: _run(name, Path(folder)), names()), strict=True):
            _found[name] = study


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adds what the small budget found to the page of its study."""
    name = Path(page.file.src_uri).stem
    if not page.file.src_uri.startswith("tutorials/") or name not in _found:
        return markdown
    study = _found[name]
    lines = [
        "",
        "## What the build of this page found",
        "",
        f"The same study at its small budget (`{study.about['command']}`), run when this page was built. It shows that "
        f"the code works, not how well:",
        "",
    ]
    for title, table in study.tables.items():
        lines += [f"*{title}*", "", *table.lines(), ""]
    return markdown + "\n".join(lines)


def _run(name: str, folder: Path) -> Study:
    command = [sys.executable, "-m", "benchmarks.tutorials", name, "--budget", "small", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"tutorial {name!r} failed at its small budget:\n{done.stdout}\n{done.stderr}")
    return load(name, folder)
