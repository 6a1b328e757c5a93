"""Docstrings as the pages show them: references become links, and examples code.

They are written for readers of the source (``:class:`~bilevel.Engine```, ``Example:``); Markdown knows neither.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs runs from anywhere

MODULES = ("bilevel", "bilevel.problems", "bilevel.errors", "bilevel.callbacks", "bidora")
PUBLIC = {f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__}
"""What has an entry on the pages of names."""


class AsMarkdown(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Returns a docstring in Markdown with the sections that griffe knows.

    Public names become links where their page is known, other references the plain name.
    """
    text = re.sub(r":\w+:`(~?)([\w.]+)`", _reference, text)
    text = re.sub(r"^   (?=\S)", "    ", text, flags=re.M) if re.search(r"^1\. ", text, re.M) else text
    prose, example, rest = text.partition("\nExample:")
    prose = re.sub(r"^( *)>>> .*\n(?:\1\S.*\n?)*", _fenced, prose, flags=re.M)
    if ">>>" in rest:
        example = "\nExamples:"
    return re.sub(r"::$", ":", prose + example + rest, flags=re.M)


def _reference(match: re.Match[str]) -> str:
    short, path = match.groups()
    names = path.split(".")
    shown = (
        names[-1] if short else ".".join(names[next((n for n, name in enumerate(names) if name[0].isupper()), -1) :])
    )
    owner = re.match(r"(?:[a-z_]+\.)+\w+", path)
    return f"[`{shown}`][{path}]" if owner and owner[0] in PUBLIC else f"`{shown}`"


def _fenced(match: re.Match[str]) -> str:
    return f"{match[1]}```pycon\n{match[0].rstrip()}\n{match[1]}```\n"
