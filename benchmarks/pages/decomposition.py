"""The ΔM/ΔD pictures and tables of the guide to BiDoRA, from adapters that ``bidora train`` left.

python -m benchmarks.pages.decomposition all-linear runs/demo/adapter runs/demo/dora runs/demo/lora
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tutorials.study import ROOT, Study, Table, picture, with_results
from bidora.analysis import LayerChange, WeightDecomposition, weight_decomposition
from bidora.pipeline import load_adapter, load_base
from bidora.report import adapter_label, draw_decomposition

PAGE = ROOT / "docs" / "bidora.md"
FOLDER = ROOT / "docs" / "bidora"


def measured(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns the changes of each adapter's layers, by the name of its method."""
    changes = {}
    for folder in folders:
        loaded = load_adapter(folder)
        change = weight_decomposition(load_base(folder), loaded.model)
        label = adapter_label(loaded.card) or folder.parent.name
        changes[label] = [[layer.name, layer.magnitude, layer.direction] for layer in change.layers]
    return changes


def kept() -> dict[str, dict[str, WeightDecomposition]]:
    """Returns what was measured for each picture of the page."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    return {
        name: {
            label: WeightDecomposition(tuple(LayerChange(*layer) for layer in layers))
            for label, layers in changes.items()
        }
        for name, changes in found.items()
    }


def tabulated(pictures: Mapping[str, Mapping[str, WeightDecomposition]]) -> Study:
    """Returns a table for each picture."""
    columns = ["method", "ΔM, median (range)", "ΔD, median (range)", "slope", "correlation"]
    tables = {name: [_line(*entry) for entry in changes.items()] for name, changes in pictures.items()}
    return Study({name: Table(columns, lines) for name, lines in tables.items()})


def _line(label: str, change: WeightDecomposition) -> list[str]:
    spread = []
    for values in ([layer.magnitude for layer in change.layers], [layer.direction for layer in change.layers]):
        spread.append(f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    return [label, *spread, f"{change.slope:.3f}", f"{change.correlation:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the picture and its table")
    parser.add_argument("adapters", nargs="+", type=Path, help="folders")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(measured(arguments.adapters), indent=1, ensure_ascii=False)
    (FOLDER / f"{arguments.name}.json").write_text(text + "\n", encoding="utf-8")
    pictures = kept()
    picture(lambda figure: draw_decomposition(pictures[arguments.name], figure), FOLDER / arguments.name)
    study = tabulated(pictures)
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), study), encoding="utf-8")
    print(*study.tables[arguments.name].lines(), sep="\n")


if __name__ == "__main__":
    main()
