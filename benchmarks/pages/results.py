"""Results and the pages that show them: ``docs/benchmarks/results/NAME.json``, between a page's marks.

What a page shows of NAME stands between ``<!-- results: NAME -->`` and the next ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "RESULTS", "kept", "load", "marks", "rounded", "save", "with_texts", "write_page"]

PAGES = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
RESULTS = PAGES / "results"


def marks(page: str) -> list[str]:
    """Returns the names in a page's marks."""
    return re.findall(r"<!-- results: (.+?) -->\n", page)


def with_texts(page: str, texts: Mapping[str, Sequence[str]]) -> str:
    """Returns a page with lines between the marks of their names.

    Raises:
        ValueError: A name has no mark, or several, or one that is not closed.
    """
    for name, lines in texts.items():
        pattern = rf"(<!-- results: {re.escape(name)} -->\n)((?!<!-- results:).)*?(<!-- end -->)"
        text = "\n".join(["", *lines, "", ""])
        page, count = re.subn(pattern, lambda match, text=text: match[1] + text + match[3], page, flags=re.S)
        if count != 1:
            raise ValueError(f"{count} places for the results {name!r}, each <!-- results: {name} --> … <!-- end -->")
    return page


def save(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``FOLDER/NAME.json``: a line for each entry of a list, numbers of six digits."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {_json(row)}" for row in value) + "\n ]"
        else:
            text = _json(value)
        parts.append(f" {json.dumps(key)}: {text}")
    file = folder / f"{name}.json"
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return file


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Reads what :func:`save` wrote."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def kept(page: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Reads those results that a page has marks for."""
    return {name: load(name, folder) for name in marks(page) if (folder / f"{name}.json").exists()}


def write_page(page: Path, lines_of: Callable[[Mapping[str, Any]], Sequence[str]]) -> None:
    """Puts all kept results that a page has marks for into it, as ``lines_of`` shows them."""
    text = page.read_text(encoding="utf-8")
    shown = {name: lines_of(result) for name, result in kept(text).items()}
    page.write_text(with_texts(text, shown), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Returns a value whose numbers have six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _json(value: Any) -> str:
    return json.dumps(rounded(value), ensure_ascii=False)
