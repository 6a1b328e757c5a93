"""What a run shows: a table, a plot, and a file of results."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from bidora.analysis import WeightDecomposition
from bidora.pipeline import RunResult

__all__ = ["adapter_label", "draw_decomposition", "results_table", "save_decomposition", "save_plot", "save_results"]

NAMES = {"bidora": "BiDoRA", "dora": "DoRA", "lora": "LoRA", "full": "full fine-tuning"}


def results_table(results: Sequence[RunResult], majority: Mapping[str, float], title: str) -> Table:
    """Returns the methods beside the majority class.

    Passes are forward / backward passes over a batch, in thousands where large.
    """
    table = Table(title=title, caption="passes: forward / backward, over one batch each")
    for name in ("method", "accuracy", "macro F1", "trained", "updates", "passes", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_row("majority class", f"{majority['accuracy']:.3f}", f"{majority['macro_f1']:.3f}", "0", "", "", "")
    for result in results:
        updates = str(result.updates)
        if result.search:
            updates = f"{len(result.search)} + {result.updates}"
        table.add_row(
            NAMES[result.method],
            f"{result.metrics['accuracy']:.3f}",
            f"{result.metrics['macro_f1']:.3f}",
            f"{result.trainable:,}",
            updates,
            f"{result.passes[0]} / {result.passes[1]}",
            f"{result.seconds:.0f}",
        )
    return table


def save_plot(results: Sequence[RunResult], path: Path) -> None:
    """Saves the losses of all methods, and the hypergradient's norm where there was a search, as a PNG."""
    searches = [result for result in results if result.search]
    figure = Figure(figsize=(10 if searches else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if searches else 1, squeeze=False)[0]
    left = axes[0]
    for result in searches:
        steps = [step.step for step in result.search]
        for problem, style, label in (("direction", "-", "inner: direction"), ("magnitude", "--", "outer: magnitude")):
            _curve(left, steps, [step.losses[problem] for step in result.search], f"search, {label}", style)
    for result in results:
        offset = len(result.search)
        updates = [offset + step for step, _ in result.losses]
        label = "retraining" if result.search else NAMES[result.method]
        _curve(left, updates, [loss for _, loss in result.losses], label, "-")
    for result in searches:
        left.axvline(len(result.search) + 0.5, color="0.6", linewidth=1, linestyle=":")
    left.set(xlabel="step", ylabel="loss (running mean)", title="Losses")
    left.legend(fontsize=8)
    for result in searches:
        norms = [step.gradient_norms["magnitude"] for step in result.search]
        axes[1].plot([step.step for step in result.search], norms, color="tab:red", linewidth=1.2)
        axes[1].set(xlabel="search step", ylabel="Euclidean norm", yscale="log", title="Hypergradient of the magnitude")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def save_results(
    results: Sequence[RunResult], majority: Mapping[str, float], settings: Mapping[str, Any], path: Path
) -> None:
    """Saves settings, metrics, passes and losses as JSON."""
    content = {
        "settings": settings,
        "majority": dict(majority),
        "methods": [
            {
                "method": result.method,
                "metrics": dict(result.metrics),
                "trainable_parameters": result.trainable,
                "updates": result.updates,
                "passes": list(result.passes),
                "seconds": result.seconds,
                "adapter": str(result.adapter),
                "losses": list(result.losses),
                "search": [
                    {"step": s.step, "losses": dict(s.losses), "hypergradient_norm": s.gradient_norms["magnitude"]}
                    for s in result.search
                ],
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def adapter_label(card: Mapping[str, Any]) -> str | None:
    """Returns what the method of a saved adapter is called, or None where its card does not say."""
    return NAMES.get(card.get("settings", {}).get("method", ""))


def draw_decomposition(changes: Mapping[str, WeightDecomposition], figure: Figure) -> None:
    """Draws ΔM over ΔD: a mark for each layer, and for each adapter the least-squares line whose slope is reported."""
    axis = figure.subplots()
    for (label, change), marker in zip(changes.items(), itertools.cycle("os^Dv")):
        direction = [layer.direction for layer in change.layers]
        magnitude = [layer.magnitude for layer in change.layers]
        slope, middle = change.slope, sum(direction) / len(direction)
        text = f"{label}: slope {slope:.3g}, correlation {change.correlation:.2f}"
        marks = axis.scatter(direction, magnitude, marker=marker, s=22, alpha=0.8, label=text)
        if math.isfinite(slope):
            ends = [min(direction), max(direction)]
            level = sum(magnitude) / len(magnitude)
            axis.plot(ends, [level + slope * (end - middle) for end in ends], color=marks.get_facecolor()[0])
    axis.set(xlabel="ΔD: mean of 1 − cos(w′, w)", ylabel="ΔM: mean of |‖w′‖ − ‖w‖|", title="One mark a layer")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def save_decomposition(changes: Mapping[str, WeightDecomposition], path: Path) -> None:
    """Saves the picture of :func:`draw_decomposition`, by the suffix of ``path``."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_decomposition(changes, figure)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"backend": "Agg"}):
        figure.savefig(path, dpi=150)


def _curve(axis: Any, steps: Sequence[int], values: Sequence[float], label: str, style: str) -> None:
    """Draws a running mean over a tenth of the run, with the raw values behind it."""
    if not steps:
        return
    width = max(1, len(values) // 10)
    means = [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
    (line,) = axis.plot(steps, means, style, label=label, linewidth=1.6)
    axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
