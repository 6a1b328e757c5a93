"""The README and the pages of the site, as blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "INDENTED", "PAGES", "ROOT", "Block", "blocks", "name_of", "prose"]

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
INDENTED = "indented"

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})\s*(?P<info>.*)$")
CONTAINER = re.compile(r"^(\s*)([-*+]|\d+\.|!!!|\?\?\?|===|:::)(\s|\+|$)")


@dataclass(frozen=True)
class Block:
    """A block of code: between fences, or indented by four spaces (``language`` is then ``"indented"``)."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Returns the blocks of a page in their order."""
    return [part for part in _parts(page, text) if isinstance(part, Block)]


def prose(page: Path, text: str | None = None) -> list[tuple[int, str]]:
    """Returns the numbered lines that are no code."""
    return [part for part in _parts(page, text) if not isinstance(part, Block)]


def _parts(page: Path, text: str | None) -> Iterator[Block | tuple[int, str]]:
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    place, contained, blank = 0, False, True
    while place < len(lines):
        line = lines[place]
        fence = FENCE.match(line)
        if fence:
            closing = re.compile(rf"^ *{fence['marks'][0]}{{{len(fence['marks'])},}} *$")
            end = next((k for k in range(place + 1, len(lines)) if closing.match(lines[k])), None)
            assert end is not None, f"{name_of(page)}:{place + 1}: the fence is not closed"
            indent = len(fence["indent"])
            body = "".join(
                f"{inner[min(indent, len(inner) - len(inner.lstrip())) :]}\n" for inner in lines[place + 1 : end]
            )
            info = fence["info"].split()
            yield Block(page, place + 1, info[0] if info else "", body)
            place, blank = end + 1, False
            continue
        if line.strip() and not line.startswith(" "):
            contained = bool(CONTAINER.match(line))
        if line.startswith("    ") and line.strip() and blank and not contained:
            end = place
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            yield Block(
                page, place + 1, INDENTED, "".join(f"{inner[4:]}\n" for inner in lines[place:end]).rstrip() + "\n"
            )
            place, blank = end, True
            continue
        yield place + 1, line
        blank = not line.strip()
        place += 1
