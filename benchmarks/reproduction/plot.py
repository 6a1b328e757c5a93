"""One picture a problem: a row for each family of methods, against gradients and against time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter, NullFormatter

from benchmarks.reproduction.methods import ENTRIES, FAMILIES
from benchmarks.reproduction.results import Curve, curve

__all__ = ["draw"]

# Okabe and Ito's colours without yellow, which is illegible on white; black is the line repeated in every panel.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C564B")
MARKERS = "os^Dv<>P"
COMPARED = "conjugate_gradient"
FLOOR = 1e-12


class _Plain(LogFormatter):
    """The same labels, written 0.2 and 1e-6."""

    def __call__(self, x, pos=None):
        return f"{x:g}".replace("e-0", "e-") if super().__call__(x, pos) else ""


def draw(problem: Mapping[str, Any], file: Path) -> None:
    """Writes a problem's picture; the suffix of the file says in which format."""
    curves = {name: curve(cell, problem["minima"]) for name, cell in problem["cells"].items() if cell["runs"]}
    families = [family for family in FAMILIES if any(ENTRIES[name].family == family for name in curves)]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "reproduction"}
    style |= {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(families),
            2,
            figsize=(9.6, 2.35 * len(families) + 0.5),
            sharex="col",
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, family in zip(axes, families, strict=True):
            _family(row, family, curves)
        axes[-1][0].set_xlabel("gradients of the full inner loss (passes / 2)")
        axes[-1][1].set_xlabel("CPU time, seconds")
        figure.suptitle(
            f"{problem['title']}: (h − h*) / (h at the start − h*), median and range of the seeds", fontsize=10
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=110, facecolor="white", metadata=metadata)
        plt.close(figure)


def _family(row: Any, family: str, curves: Mapping[str, Curve]) -> None:
    names = [name for name in curves if ENTRIES[name].family == family]
    for axis, side in zip(row, ("cost", "seconds"), strict=True):
        if COMPARED in curves and COMPARED not in names:
            _line(axis, side, curves[COMPARED], COMPARED, "#555555", "", "--")
        for place, name in enumerate(names):
            _line(axis, side, curves[name], name, COLOURS[place % 8], MARKERS[place % 8], "-")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for scale in (axis.xaxis, axis.yaxis):  # plain text: mathematical text names a font and no substitute
            scale.set_major_formatter(_Plain())
            scale.set_minor_formatter(_Plain(labelOnlyBase=False))
        if len([tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]) > 1:
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    row[0].set_title(FAMILIES[family], fontsize=9, loc="left", fontweight="bold")
    row[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _line(axis: Any, side: str, found: Curve, name: str, colour: str, marker: str, line: str) -> None:
    # the start has neither cost nor time; a median is infinite once half of the runs broke
    places = [place for place, cost in enumerate(found.cost) if cost > 0 and found.gap[place].middle < math.inf]
    at = [getattr(found, side)[place] for place in places]
    spreads = [found.gap[place] for place in places]
    middle, low, high = ([max(getattr(s, key), FLOOR) for s in spreads] for key in ("middle", "low", "high"))
    high = [min(value, max(1.0, *middle)) for value in high]
    axis.plot(at, middle, line, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=name)
    axis.fill_between(at, low, high, color=colour, alpha=0.15 if marker else 0.07, linewidth=0)
