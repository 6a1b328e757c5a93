"""The pages hold together: links, tables, lists, pictures, symbols, and the list of pages."""

from __future__ import annotations

import functools
import inspect
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify, unique

import bidora
import bilevel
import bilevel.callbacks
import bilevel.problems
import bilevel.single_loop
from benchmarks import cost_plot
from benchmarks.pages import reference
from tests.pages import DOCS, PAGES, ROOT, blocks, name_of, prose

SITE = [page for page in PAGES if page.is_relative_to(DOCS)]
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^(#{1,6}) +(.*?)(?: +#+)?$")


def without_code(line: str) -> str:
    return re.sub(r"(`+).+?\1", lambda match: "x" * len(match[0]), line)


# Links


@functools.cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the site makes them, those of generated parts among them."""
    found: set[str] = set()
    text = reference.MARKER.sub(lambda marker: reference.part(marker[1]), page.read_text(encoding="utf-8"))
    for _, line in prose(page, text):
        if heading := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", heading[2])
            unique(slugify(re.sub(r"[`*]", "", text), "-"), found)
    return found


def broken_links(page: Path, text: str | None = None) -> Iterator[str]:
    for number, line in prose(page, text):
        for link in LINK.finditer(without_code(line)):
            target, _, anchor = link["target"].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            where = f"{name_of(page)}:{number}: {link['target']}"
            file = (page.parent / target) if target else page
            if not file.is_file():
                yield f"{where}: no such file"
            elif link["picture"] and not link["text"].strip():
                yield f"{where}: a picture without words"
            elif file.suffix == ".md" and anchor and anchor not in anchors(file):
                yield f"{where}: no such heading"
            elif page.is_relative_to(DOCS) and not file.resolve().is_relative_to(DOCS):
                yield f"{where}: outside of the site"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a](no_such.md)", "no such file"),
        ("[a](choose.md#no-such)", "no such heading"),
        ("[a](#no-such)", "no such heading"),
        ("![](architecture.svg)", "without words"),
        ("[a](../README.md)", "outside of the site"),
    ],
)
def test_a_broken_link_is_noticed(text: str, says: str) -> None:
    found = list(broken_links(DOCS / "index.md", f"{text}\n"))
    assert len(found) == 1
    assert says in found[0]


def test_whole_links_are_not() -> None:
    text = "[a](choose.md#in-a-minute) `[b](c)` [d](https://example.org/x) ![e](architecture.svg)\n"
    assert list(broken_links(DOCS / "index.md", text)) == []


# The list of pages


def listed(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for part in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
        yield from listed(part)


def test_every_page_is_listed_once() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    nav = Counter(listed(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]))
    assert nav == Counter(str(page.relative_to(DOCS)) for page in SITE)


# What Markdown passes over in silence


def malformed(page: Path, text: str | None = None) -> Iterator[str]:
    """Yields rows with another number of cells than their table's head, and lists that would be read as prose."""
    width, previous, place = None, "", 0
    for number, line in prose(page, text):
        if number != place + 1:  # a block of code was in between
            width, previous = None, ""
        place = number
        cells = without_code(line.strip()).replace(r"\|", "").strip("|").count("|") + 1
        if line.lstrip().startswith("|"):
            width = cells if width is None else width
            if cells != width:
                yield f"{name_of(page)}:{number}: {cells} cells in a table of {width}"
            if not previous.startswith("|") and previous.strip() and not previous.startswith("<!--"):
                yield f"{name_of(page)}:{number}: a table that follows its paragraph without an empty line"
        else:
            width = None
        item = re.match(r"([-*] |\d+\. )", line)
        within = re.match(r"([-*] |\d+\. | +\S|<)", previous)
        if item and previous.strip() and not within:
            yield f"{name_of(page)}:{number}: a list that follows its paragraph without an empty line"
        # A list's item may go on at the margin; what follows it is still the list.
        previous = previous if line.strip() and within and not item and not line.startswith("|") else line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_and_lists_are_read_as_such(page: Path) -> None:
    assert list(malformed(page)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("| a | b |\n|---|---|\n| 1 |\n", "1 cells in a table of 2"),
        ("| a |\n|---|\n| `x` | 2 |\n", "2 cells in a table of 1"),
        ("Text:\n| a |\n|---|\n| 1 |\n", "a table that follows"),
        ("Text:\n- a\n- b\n", "a list that follows"),
        ("Text:\n1. a\n2. b\n", "a list that follows"),
    ],
)
def test_a_malformed_table_or_list_is_noticed(text: str, says: str) -> None:
    found = list(malformed(DOCS / "index.md", text))
    assert len(found) == 1
    assert says in found[0]


def test_well_formed_ones_are_not() -> None:
    text = "| a | b |\n|---|---|\n| `x | y` | z \\| z |\n\nText:\n\n- a\ngoes on\n- b\n  goes on\n- c\n"
    assert list(malformed(DOCS / "index.md", text)) == []


def too_long(page: Path, text: str | None = None) -> list[str]:
    """Returns the lines of code that the column of text cannot hold: see docs/stylesheets/extra.css."""
    return [
        f"{block.where}: {len(line)} characters: {line[:40]}…"
        for block in blocks(page, text)
        for line in block.text.splitlines()
        if len(line) > 120
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_column(page: Path) -> None:
    assert too_long(page) == []


def test_a_line_that_is_too_long_is_noticed() -> None:
    assert too_long(DOCS / "index.md", f"```python\n{'x' * 120}\n```\n") == []
    assert len(too_long(DOCS / "index.md", f"```python\n{'x' * 121}\n```\n")) == 1


# Pictures


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_a_picture_for_light_pages_has_one_for_dark_pages(page: Path) -> None:
    lines = [link for _, line in prose(page) for link in LINK.findall(line)]
    themed = {theme: [t for _, _, t in lines if t.endswith(f"#only-{theme}")] for theme in ("light", "dark")}
    assert [target.replace("light", "dark") for target in themed["light"]] == themed["dark"]


@pytest.mark.parametrize("name", ["architecture.svg", "concepts.svg"])
def test_a_drawing_is_whole(name: str) -> None:
    root = ElementTree.parse(DOCS / name).getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert root.attrib["aria-label"]
    for element in root.iter():
        if element.tag.endswith("text"):
            assert 0 < float(element.attrib["x"]) < width
            assert 0 < float(element.attrib["y"]) < height
    markers = {element.attrib["id"] for element in root.iter() if element.tag.endswith("marker")}
    ends = {element.attrib["marker-end"] for element in root.iter() if "marker-end" in element.attrib}
    assert ends == {f"url(#{marker})" for marker in markers}


# Error against cost


def test_the_picture_of_costs_is_that_of_the_table() -> None:
    page = cost_plot.PAGE.read_text(encoding="utf-8")
    for theme in ("light", "dark"):
        picture = cost_plot.STEM.with_name(f"{cost_plot.STEM.name}-{theme}.svg").read_text(encoding="utf-8")
        assert cost_plot.stamp(page) in picture, "draw it again: python -m benchmarks.cost_plot"


def test_every_method_is_in_the_picture_under_a_name_of_its_own() -> None:
    found = cost_plot.points(cost_plot.PAGE.read_text(encoding="utf-8"))
    names = [point.label for point in found]
    assert len(set(names)) == len(names) >= 25
    methods = {bilevel.as_estimator(name.split(",")[0]).name for name in names}
    assert methods == {name for name in bilevel.hypergrad.available_methods() if not name.startswith("betty:")}


def test_nothing_is_cheaper_and_nearer_than_the_front() -> None:
    found = cost_plot.points(cost_plot.PAGE.read_text(encoding="utf-8"))
    chosen = cost_plot.front(found)
    for point in found:
        others = [(q.time, q.error) for q in found if not q.failed and (q.time, q.error) != (point.time, point.error)]
        beaten = point.failed or any(time <= point.time and error <= point.error for time, error in others)
        assert beaten != (point in chosen)


# Errors


def test_questions_are_answered_with_messages() -> None:
    page = DOCS / "faq.md"
    answers = [block for block in blocks(page) if block.language == "output"]
    entries = [line for _, line in prose(page) if line.startswith("### ")]
    assert len(answers) >= 12
    assert len(entries) >= 12
    raised = {block.text.split(":")[0] for block in answers}
    assert {"GraphError", "ParameterError", "LossError", "DataError", "ConfigError", "OutOfMemoryError"} <= raised


# Symbols


def greek(text: str) -> set[str]:
    return {letter for letter in text if unicodedata.name(letter, "").startswith("GREEK")}


def documented() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield name_of(page), page.read_text(encoding="utf-8")
    for module in (bilevel, bidora, bilevel.callbacks, bilevel.problems, bilevel.single_loop):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", inspect.getdoc(getattr(module, name)) or ""


def test_every_greek_letter_is_in_the_glossary() -> None:
    known = greek((DOCS / "glossary.md").read_text(encoding="utf-8"))
    assert {where: greek(text) - known for where, text in documented() if greek(text) - known} == {}


def test_a_symbol_has_one_line_of_the_glossary_for_each_meaning() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    table = text.partition("## Symbols")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(rows)) >= 25
    for symbol in ("λ", "w", "v", "H", "q", "F(λ, w)", "f(w, λ)", "dF/dλ"):
        assert f"`{symbol}`" in rows


def test_the_core_s_formulas_have_the_glossary_s_letters() -> None:
    """The two problems and the hypergradient are written in one way wherever they are written."""
    texts = dict(documented())
    for where in ("README.md", "docs/index.md", "docs/concepts.md"):
        assert "min over λ of F(λ, w*(λ))      where      w*(λ) = argmin over w of f(w, λ)" in texts[where]
    assert "dF/dλ = ∂F/∂λ − (∂²f/∂λ∂w) q" in texts["docs/concepts.md"]
    drawing = (DOCS / "concepts.svg").read_text(encoding="utf-8")
    for formula in ("F(λ, w)", "f(w, λ)", "v = ∂F/∂w", "H q = v", "H = ∂²f/∂w²", "dF/dλ = ∂F/∂λ − (∂²f/∂λ∂w) q"):
        assert formula in drawing
