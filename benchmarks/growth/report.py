"""Exponents, tables and pictures of what :mod:`benchmarks.growth` has measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.growth.axes import AXES, Run
from benchmarks.options import named
from benchmarks.peers.environments import LIBRARIES
from benchmarks.peers.report import ending, plain, scientific

__all__ = ["Fit", "draw", "fit", "lines_of", "name_on_page", "shown"]

NAMES = {key: library.name for key, library in LIBRARIES.items()}
COLOURS = {
    "bilevel": "#2f7ed8",
    "betty": "#d8432f",
    "torchopt": "#e08a00",
    "higher": "#3a9a4f",
    "boat": "#9358c4",
    "learn2learn": "#b0568a",
    "vmap": "#6b8e8e",
}
# Line style and marker of a method.
STYLES = {
    "finite_difference": (":", "v"),
    "identity": ("-.", "^"),
    "neumann": ("--", "s"),
    "conjugate_gradient": ("-", "o"),
    "unrolled": ("-", "D"),
    "unrolled-least_memory": ("--", "d"),
    "forward": ("-.", "P"),
    "exact": (":", "X"),
    "few_shot": ("-", "o"),
    "one_by_one": ("--", "s"),
}


@dataclass(frozen=True)
class Fit:
    """``y ≈ c · x^exponent`` for x from ``low`` to ``high``."""

    exponent: float
    low: float
    high: float

    def __str__(self) -> str:
        text = f"{self.exponent:.2f}".replace("-0.00", "0.00")
        return f"{text} ({short(self.low)}–{short(self.high)})"


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Returns the least-squares exponent over the upper half of the range of x, on logarithmic axes.

    Below, costs that do not depend on x (the interpreter's, for the most part) bend a line down: its slope there says
    nothing of how it goes on. At least the three largest x are taken; None where there are fewer, or a y is not
    positive.
    """
    points = sorted(points)
    if len(points) < 3 or any(y <= 0 for _, y in points):
        return None
    middle = math.sqrt(points[0][0] * points[-1][0])
    upper = [point for point in points if point[0] >= middle]
    upper = upper if len(upper) >= 3 else points[-3:]
    slope, _ = statistics.linear_regression([math.log(x) for x, _ in upper], [math.log(y) for _, y in upper])
    return Fit(slope, upper[0][0], upper[-1][0])


def short(value: float) -> str:
    """Returns a size as text: powers of ten from 10,000 on."""
    if value < 10_000:
        return f"{value:,.0f}"
    exponent = math.floor(math.log10(value))
    mantissa = value / 10**exponent
    power = f"10{str(exponent).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return power if math.isclose(mantissa, 1) else f"{mantissa:.3g}·{power}"


def number(value: float) -> str:
    """Returns three digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def method_label(line: Mapping[str, Any]) -> str:
    """Returns what a line's method is called."""
    labels = {
        "finite_difference": "central differences",
        "identity": "H⁻¹ ≈ I, exact product",
        "neumann": "Neumann",
        "conjugate_gradient": "conjugate gradients",
        "unrolled": "unrolled",
        "unrolled-least_memory": "unrolled, replay",
        "forward": "forward mode",
        "exact": "dense Hessian",
        "few_shot": "vectorised" if line["library"] in ("bilevel", "vmap") else "task by task",
        "one_by_one": "task by task",
    }
    return labels[style_key(line)]


def style_key(line: Mapping[str, Any]) -> str:
    return str(line["key"]).removeprefix(f"{line['library']}-")


def drawn(line: Mapping[str, Any]) -> bool:
    """Whether a line's times mean anything."""
    return bool(line["points"]) and not line["wrong"] and not line["failed"]


COLUMNS = ("library", "method", "ms", "exponent of time", "peak MiB", "exponent of memory", "error")


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Returns an axis's table and what is to be said below it, in Markdown."""
    axis = AXES[result["axis"]]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for line in result["rows"]:
        if not drawn(line):
            continue
        (x, first, small), (last_x, last, large) = line["points"][0], line["points"][-1]
        times, peaks = ([(p[0], p[i]) for p in line["points"]] for i in (1, 2))
        cells = [
            NAMES[line["library"]],
            method_label(line),
            f"{number(1e3 * first)} at {short(x)}, {number(1e3 * last)} at {short(last_x)}",
            str(fit(times) or "–"),
            f"{number(small / 2**20)}, {number(large / 2**20)}",
            str(fit(peaks) or "–"),
            scientific(line["error"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    told = result["about"]
    problem = axis.problem[Run(told["size"], result["device"]).key]
    lines += ["", ending(result, f"Problem: {problem}")]
    notes = [f"{name_of(line)}: {stopped(line)}." for line in result["rows"] if line["stopped"] and drawn(line)]
    notes += [f"Not drawn: {name_of(line)}: {why_not(line)}." for line in result["rows"] if not drawn(line)]
    notes += [f"{NAMES[library]}: {why}." for library, why in result["absent"].items()]
    return lines + ([""] + [f"- {note}" for note in notes] if notes else [])


def name_of(line: Mapping[str, Any]) -> str:
    return f"{NAMES[line['library']]}, {method_label(line)}"


def stopped(line: Mapping[str, Any]) -> str:
    return f"not tried at {short(line['at'])}, since {plain(line['stopped'])}"


def why_not(line: Mapping[str, Any]) -> str:
    if line["failed"]:
        return f"fails: {plain(line['failed']).rstrip('.')}"
    if line["wrong"]:
        return f"wrong: {plain(line['wrong'])}"
    return plain(line["stopped"]) or "nothing was measured"


def draw(result: Mapping[str, Any], figure: Any) -> None:
    """Draws time and memory of an axis, on logarithmic axes; dotted lines have slope 1."""
    import matplotlib

    ink = matplotlib.rcParams["text.color"]
    lines = [line for line in result["rows"] if drawn(line)]
    figure.set_size_inches(9.0, 4.4 + 0.24 * math.ceil(len(lines) / 3))
    panels = figure.subplots(1, 2)
    for axes, column, scale, label in zip(panels, (1, 2), (1e3, 2**-20), ("ms a step", "peak MiB"), strict=True):
        for line in lines:
            style, marker = STYLES[style_key(line)]
            xs, ys = ([p[0] for p in line["points"]], [scale * p[column] for p in line["points"]])
            colour, width = COLOURS.get(line["library"], ink), 2.0 if line["library"] == "bilevel" else 1.2
            axes.plot(xs, ys, style, marker=marker, color=colour, linewidth=width, markersize=4, label=name_of(line))
        axes.set(xscale="log", yscale="log", xlabel=AXES[result["axis"]].quantity, ylabel=label)
        guides(axes, ink)
        axes.grid(True, which="major", alpha=0.2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def guides(axes: Any, ink: str) -> None:
    """Gives a panel at least two decades, so that what is flat looks flat, and draws slope 1 across it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    widen = max(1.0, (100 * low / high) ** 0.5)
    low, high = low / widen, high * widen
    start = low / 10 ** math.ceil(math.log10(right / left))
    while start < high:
        axes.plot([left, right], [start, start * right / left], ":", color=ink, alpha=0.3, linewidth=0.8)
        start *= 10
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.minorticks_off()


def name_on_page(axis: str, device: str) -> str:
    """Returns what an axis's results and pictures are called."""
    return named(f"growth-{axis}", device)


def shown(result: Mapping[str, Any]) -> list[str]:
    """Returns what the page shows of an axis: pictures, one for each theme, and the table."""
    text = f"Time and memory against {AXES[result['axis']].quantity}"
    name = name_on_page(result["axis"], result["device"])
    pictures = [f"![{text}]({name}-{theme}.svg#only-{theme})" for theme in ("light", "dark")]
    if result["device"] == "cuda":
        pictures = ["On a GPU:", "", *pictures]
    return [*pictures, "", *lines_of(result)]
