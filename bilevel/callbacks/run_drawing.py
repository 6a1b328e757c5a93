"""The picture of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_run"]

Array = npt.NDArray[np.float64]

LOG_FROM_RATIO = 30.0
"""Positive values that span more than this are drawn on a logarithmic axis."""

MARKERS_UP_TO = 40
"""So few values are drawn as dots on the line."""

LONGEST_LABEL = 32
CONTEXT = 7
"""Characters that stay of what all labels have in common."""


@dataclass(frozen=True)
class _Panel:
    """Lines that share axes.

    Attributes:
        title: What they show.
        lines: Values by label.
        logarithmic: Whether a logarithmic axis is wanted wherever the values are positive.
        dots: Whether the values are drawn as dots without a line.
        crosses: By label: where to put a cross beside the dot.
    """

    title: str
    lines: Mapping[str, Array]
    logarithmic: bool = False
    dots: bool = False
    crosses: Mapping[str, npt.NDArray[np.bool_]] | None = None


def draw_run(steps: npt.NDArray[np.int64], values: Mapping[str, Array], title: str) -> Figure:
    """Returns the picture: a panel for each problem's loss, for the outer parameters, and for the solves' residuals.

    Args:
        steps: Numbers of the steps.
        values: By name: ``"loss/P"``, ``"outer/LABEL"``, ``"residual/P"``, and ``"failed/P"``, which is 1 where a solve
            failed.
        title: Stands above.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = list(_panels(values))
    count = max(1, len(panels))
    figure = Figure(figsize=(9.0, 2.2 * count + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    all_axes = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, steps, panel)
    all_axes[-1].set_xlabel("outer step", fontsize=9)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    margin = max(1.0, 0.02 * float(steps[-1] - steps[0]))
    all_axes[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
    return figure


def _panels(values: Mapping[str, Array]) -> Iterator[_Panel]:
    for name, line in _named(values, "loss/").items():
        gaps = int((~np.isfinite(line)).sum())
        note = f" ({gaps} skipped or not finite)" if gaps else ""
        yield _Panel(f"loss of {_short(name)}{note}", {name: line})
    if outer := _named(values, "outer/"):
        yield _Panel("outer parameters", outer)
    residuals = {name: line for name, line in _named(values, "residual/").items() if np.isfinite(line).any()}
    if residuals:
        failed = {name: line == 1.0 for name, line in _named(values, "failed/").items()}
        yield _Panel("relative residual of the solves", residuals, logarithmic=True, dots=True, crosses=failed)


def _named(values: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): line for name, line in values.items() if name.startswith(prefix)}


def _draw(axes: Axes, steps: npt.NDArray[np.int64], panel: _Panel) -> None:
    style = "o" if panel.dots else "o-" if len(steps) <= MARKERS_UP_TO else "-"
    failures = False
    for place, (name, label) in enumerate(zip(panel.lines, _labels(list(panel.lines)), strict=True)):
        line = np.where(np.isfinite(panel.lines[name]), panel.lines[name], np.nan)
        axes.plot(steps, line, style, color=f"C{place % 10}", markersize=3, linewidth=1.2, label=label)
        crossed = panel.crosses[name] if panel.crosses and name in panel.crosses else np.zeros(len(line), dtype=bool)
        if crossed.any():
            axes.plot(steps[crossed], line[crossed], "x", color="red", label="_" if failures else "failed")
            failures = True
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    if not any(np.isfinite(line).any() for line in panel.lines.values()):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        axes.set_yticks([])
    elif _on_log_axis(list(panel.lines.values()), wanted=panel.logarithmic):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(useOffset=False, axis="y")
    if len(panel.lines) > 1 or failures:
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False, borderaxespad=0.0)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _on_log_axis(lines: Sequence[Array], *, wanted: bool) -> bool:
    seen = np.concatenate([line[np.isfinite(line)] for line in lines])
    if not seen.size or seen.min() <= 0:
        return False
    return wanted or bool(seen.max() / seen.min() > LOG_FROM_RATIO)


def _labels(names: Sequence[str]) -> list[str]:
    """Returns names that are short and still differ: most of what they all begin and end with goes first."""
    labels = list(names)
    if len(names) > 1 and max(map(len, names)) > LONGEST_LABEL:
        head, tail = _common(names) - CONTEXT, _common([name[::-1] for name in names]) - CONTEXT
        labels = [f"…{name[head:]}" if head > 1 else name for name in labels]
        labels = [f"{name[:-tail]}…" if tail > 1 else name for name in labels]
    # matplotlib hides what starts with an underscore
    return [f" {_short(label)}" if label.startswith("_") else _short(label) for label in labels]


def _common(names: Sequence[str]) -> int:
    """Returns with how many characters all names begin."""
    letters = zip(*names, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, letters))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 13]}…{text[-12:]}"
