"""What a study measures, and how it is written: a JSON file, tables in a page, a picture for light and dark pages."""

from __future__ import annotations

import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks.pages import results

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "tutorials"
RESULTS = PAGES / "results"
BUDGETS = ("small", "full")
THEMES = {"light": "black", "dark": "white"}
NOT_STUDIES = ("__init__", "__main__", "site", "study")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half of its 95 % t-interval; NaN for a single seed."""

    mean: float
    half_width: float
    count: int
    digits: int = 3
    percent: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, digits: int = 3, percent: bool = False) -> Estimate:
        numbers = [float(value) for value in values]
        if not numbers:
            raise ValueError("an estimate needs at least one value")
        half = math.nan
        if len(numbers) > 1:
            half = float(stats.t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
        return cls(statistics.fmean(numbers), half, len(numbers), digits, percent)

    def __str__(self) -> str:
        scale, unit = (100.0, " %") if self.percent else (1.0, "")
        spread = "" if math.isnan(self.half_width) else f" ± {scale * self.half_width:.{self.digits}f}"
        return f"{scale * self.mean:.{self.digits}f}{spread}{unit}"


@dataclass(frozen=True)
class Table:
    """Columns and rows; a cell is a text, a number or an :class:`Estimate`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")

    def lines(self) -> list[str]:
        """Returns the Markdown."""
        cells = [list(self.columns), ["---"] * len(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        return ["| " + " | ".join(line) + " |" for line in cells]


@dataclass(frozen=True)
class Study:
    """What was measured.

    Attributes:
        tables: By the names that the page's markers use.
        data: Whatever the picture is drawn from, as JSON knows it.
        about: Machine, versions, budget, command, seconds.
    """

    tables: Mapping[str, Table]
    data: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        tables = {
            name: {"columns": list(table.columns), "rows": [[_plain(cell) for cell in row] for row in table.rows]}
            for name, table in self.tables.items()
        }
        return {"about": dict(self.about), "tables": tables, "data": dict(self.data)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Study:
        tables = {
            name: Table(table["columns"], [[_rich(cell) for cell in row] for row in table["rows"]])
            for name, table in found["tables"].items()
        }
        return cls(tables, found["data"], found["about"])


def shown(cell: Any) -> str:
    """Returns a cell as a page shows it."""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def names() -> list[str]:
    """Returns the studies that there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _is_study(path))


def perform(name: str, budget: str) -> Study:
    """Runs a study.

    Args:
        name: A module of this package.
        budget: ``"small"`` or ``"full"``.
    """
    module = importlib.import_module(f"benchmarks.tutorials.{name}")
    settings = getattr(module, budget.upper())
    torch.set_num_threads(1)
    started = time.perf_counter()
    study: Study = module.run(settings)
    about = {
        "budget": budget,
        "settings": repr(settings),
        "command": f"python -m benchmarks.tutorials {name} --budget {budget}",
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, one thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Study(study.tables, study.data, {**about, **study.about})


def save(name: str, study: Study, folder: Path) -> None:
    """Writes ``NAME.json``, ``NAME-light.svg`` and ``NAME-dark.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text_of(study), encoding="utf-8")
    draw = getattr(importlib.import_module(f"benchmarks.tutorials.{name}"), "draw", None)
    if draw is not None:
        picture(lambda figure: draw(study, figure), folder / name)


def text_of(study: Study) -> str:
    """Returns the JSON: a line for each table and each part of the data, whose numbers have six digits."""
    parts = {key: results.rounded(part) if key == "data" else part for key, part in study.as_json().items()}
    sections = [
        f"{json.dumps(key)}: {{\n" + ",\n".join(f" {json.dumps(k)}: {_line(v)}" for k, v in part.items()) + "\n}"
        for key, part in parts.items()
    ]
    return "{\n" + ",\n".join(sections) + "\n}\n"


def load(name: str, folder: Path = RESULTS) -> Study:
    """Reads what :func:`save` wrote."""
    return Study.from_json(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def picture(draw: Callable[[Any], None], stem: Path) -> None:
    """Draws twice: ``STEM-light.svg`` and ``STEM-dark.svg``, on no background, in the page's colour of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    for theme, ink in THEMES.items():
        inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
        style = dict.fromkeys(inks, ink) | {"svg.hashsalt": stem.name, "font.size": 11, "legend.framealpha": 0.0}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(8.0, 4.5), layout="constrained")
            figure.patch.set_alpha(0.0)
            draw(figure)
            for axes in figure.axes:
                axes.patch.set_alpha(0.0)
            figure.savefig(stem.with_name(f"{stem.name}-{theme}.svg"), metadata={"Date": None}, transparent=True)


def with_results(page: str, study: Study) -> str:
    """Returns a page's text with its tables as the study has them.

    Raises:
        ValueError: A marker names no table of the study, or a table has no marker.
    """
    marked = [name for name in results.marks(page) if name not in results.kept(page)]  # those are other benchmarks'
    if sorted(marked) != sorted(study.tables):
        raise ValueError(f"the page has markers for {sorted(marked)}, the study tables {sorted(study.tables)}")
    return results.with_texts(page, {name: table.lines() for name, table in study.tables.items()})


def _is_study(path: Path) -> bool:
    return path.stem not in NOT_STUDIES and not path.stem.startswith("_") and "\nFULL" in path.read_text("utf-8")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _plain(cell: Any) -> Any:
    if isinstance(cell, Estimate):
        return {"estimate": [cell.mean, cell.half_width, cell.count, cell.digits, cell.percent]}
    return cell


def _rich(cell: Any) -> Any:
    return Estimate(*cell["estimate"]) if isinstance(cell, dict) else cell
