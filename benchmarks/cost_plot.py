"""Draws the table of costs: the error of a hypergradient against the time of an outer step, for light and dark pages.

    python -m benchmarks.cost_plot [--page docs/choose.md]

The numbers are those of the page, so that table and picture cannot differ; ``python -m benchmarks.cost --page``
measures them. Methods on the line have no other that is both cheaper and nearer; solves that said *diverged* are drawn
as crosses.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tutorials.study import picture

ROOT = Path(__file__).resolve().parents[1]
Place = tuple[float, float]
Box = tuple[float, float, float, float]
LEADER = 10.0  # pixels from a point beyond which a line leads to its name
PAGE = ROOT / "docs" / "choose.md"
STEM = ROOT / "docs" / "costs"
BREAK = 5e-2  # between the two panels: above, methods that keep the direction; below, solutions
WORDS = {
    "warm_start=True": "warm",
    "preconditioner='nystrom'": "preconditioned",
    "max_iterations=5": "5 iterations",
    "products='finite_difference'": "difference products",
    "curvature='gauss_newton'": "gauss-newton",
    "rank=50": "rank 50",
    "memory='graph'": "graph",
    "mode='forward'": "forward",
    "difference='forward'": "forward",
    "center='old'": "old point",
    "multiplier=100.0": "multiplier 100",
}


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    label: str
    time: float
    error: float
    failed: bool


def table(page: str) -> str:
    """Returns the page's table of costs."""
    found = re.search(r"<!-- results: costs -->\n(.*?)<!-- end -->", page, re.S)
    if found is None:
        raise SystemExit("the page has no marks <!-- results: costs --> and <!-- end -->")
    return found[1].strip() + "\n"


def stamp(page: str) -> str:
    """Returns what ties a picture to its table."""
    return "costs " + hashlib.sha256(table(page).encode()).hexdigest()[:16]


def points(page: str) -> list[Point]:
    """Reads the rows."""
    found = []
    for line in table(page).splitlines()[2:]:
        name, _, time, _, error, _ = (cell.strip() for cell in line.strip("| ").split(" | "))
        number, _, remark = error.partition(" ")
        found.append(Point(label(name), float(time.removesuffix(" ×")), float(number), "diverged" in remark))
    return found


def label(name: str) -> str:
    """Shortens a row's name for the picture: ``conjugate_gradient max_iterations=5`` becomes ``cg, 5 iterations``."""
    method, _, settings = name.partition("` ")
    method = method.strip("`").replace("conjugate_gradient", "cg")
    return ", ".join([method, *(WORDS.get(setting, setting) for setting in settings.split(", ") if setting)])


def front(found: list[Point]) -> list[Point]:
    """Returns the methods that no other one beats, cheapest first; those that are alike in both with each other."""
    best, kept = math.inf, list[Point]()
    for point in sorted((p for p in found if not p.failed), key=lambda p: (p.time, p.error)):
        alike = bool(kept) and (point.time, point.error) == (kept[-1].time, kept[-1].error)
        if point.error < best or alike:
            best = point.error
            kept.append(point)
    return kept


def stairs(chosen: list[Point]) -> list[tuple[float, float]]:
    """Returns the corners of the line through the front."""
    corners = []
    for point, following in zip(chosen, [*chosen[1:], None], strict=True):
        end = following.time if following else 1e3
        corners += [(point.time, point.error), (end, point.error)]
    return corners


def draw(found: list[Point], figure: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # measures texts
    figure.set_dpi(72)  # as svg files have it, so that a place in pixels is the same there
    figure.set_size_inches(9.0, 8.6)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    chosen = front(found)
    for axes, inside in ((upper, lambda p: p.error >= BREAK), (lower, lambda p: p.error < BREAK)):
        shown = [point for point in found if inside(point)]
        axes.set(xscale="log", yscale="log")
        axes.grid(True, which="major", alpha=0.25)
        axes.plot(*zip(*stairs(chosen), strict=True), lw=1.2)
        for failed, marker in ((False, "o"), (True, "x")):
            rows = [p for p in shown if p.failed is failed]
            colours = ["C0" if p in chosen else "C1" for p in rows]
            axes.scatter([p.time for p in rows], [p.error for p in rows], c=colours, marker=marker, s=30, zorder=3)
        axes.set_xlim(1.0, 260)
    upper.set_ylim(BREAK, 6)
    lower.set_ylim(5e-8, BREAK)
    lower.set_xlabel("time of an outer step, beside one with plain gradients only")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    lower.set_xticks(ticks, [f"{tick} ×" for tick in ticks])
    lower.set_xticks([], minor=True)
    figure.supylabel("relative error of the hypergradient")
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes in (upper, lower):
        place_labels(axes, [p for p in found if (p.error >= BREAK) == (axes is upper)], chosen)


def place_labels(axes: Any, shown: list[Point], chosen: list[Point]) -> None:
    """Writes each name at the nearest place where it covers nothing and is nobody else's."""
    frame, dot = axes.get_window_extent(), 5.0
    at = {p: axes.transData.transform((p.time, p.error)) for p in shown}
    corners = [tuple(axes.transData.transform(corner)) for corner in stairs(chosen)]
    taken = [(x - dot, y - dot, x + dot, y + dot) for x, y in at.values()]
    taken += [(*map(min, a, b), *map(max, a, b)) for a, b in itertools.pairwise(corners)]
    names: list[Box] = []
    crowd = {p: sum(math.dist(at[p], at[q]) < 60 for q in shown) for p in shown}
    for point in sorted(shown, key=lambda p: (-crowd[p], p.time)):
        here = at[point]
        weight = "bold" if point in chosen else "normal"
        text = axes.text(0, 0, point.label, fontsize=9, weight=weight, transform=None)
        size = text.get_window_extent(axes.figure.canvas.get_renderer())
        for box in around(*here, size):
            leader = [lerp(here, nearest(box, here), k / 20) for k in range(21)]
            far = math.dist(leader[-1], here) > LEADER
            others = [at[q] for q in shown if q is not point and math.dist(at[q], here) > dot]
            mine = far or all(math.dist(nearest(box, q), q) > math.dist(leader[-1], here) + 4 for q in others)
            crossed = any(covers(name, place) for name in names for place in leader)
            passes = far and any(math.dist(place, q) < dot for q in others for place in leader)
            if mine and inside(box, frame) and not (crossed or passes or any(overlap(box, other) for other in taken)):
                break
        else:
            raise SystemExit(f"no room for {point.label}")
        taken.append(box)
        names.append(box)
        text.set_position((box[0] + 2, box[1] + 1))
        if far:
            axes.plot(*zip(here, leader[-1], strict=True), lw=0.7, color="0.5", transform=None, zorder=1)
            taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in leader]


def lerp(a: Place, b: Place, share: float) -> Place:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def nearest(box: Box, place: Place) -> Place:
    """Returns the place of a box that is nearest to another place."""
    return min(max(place[0], box[0]), box[2]), min(max(place[1], box[1]), box[3])


def covers(box: Box, place: Place) -> bool:
    return nearest(box, place) == (place[0], place[1])


def around(x: float, y: float, size: Any) -> Iterator[Box]:
    """Yields boxes for a text beside a point, the nearest ones first."""
    for radius in range(8, 400, 4):
        for step in range(24):
            cosine, sine = math.cos(math.pi * step / 12), math.sin(math.pi * step / 12)
            left = x + radius * cosine - size.width * (0.0 if cosine > 0.2 else 1.0 if cosine < -0.2 else 0.5)
            bottom = y + radius * sine - size.height / 2
            yield left - 2, bottom - 1, left + size.width + 2, bottom + size.height + 1


def inside(box: Box, frame: Any) -> bool:
    return bool(frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1)


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="The page with the table.")
    parser.add_argument("--output", type=Path, default=STEM, help="The pictures' path without -light.svg, -dark.svg.")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    picture(lambda figure: draw(points(page), figure), arguments.output)
    for theme in ("light", "dark"):
        path = arguments.output.with_name(f"{arguments.output.name}-{theme}.svg")
        path.write_text(path.read_text(encoding="utf-8").replace("<svg ", f"<!-- {stamp(page)} -->\n<svg ", 1))


if __name__ == "__main__":
    main()
