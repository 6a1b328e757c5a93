"""The reference pages: nothing that is public or can be set is missing, and nothing is described in words of old."""

from __future__ import annotations

import dataclasses
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bilevel
from benchmarks.pages import docstrings, reference
from bidora import BiDoRAConfig, BiDoRATrainingArguments
from bidora.settings import TrainSettings
from bilevel.hypergrad import available_methods

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
PUBLIC = (
    *("bilevel", "bilevel.problems", "bilevel.errors", "bilevel.callbacks", "bilevel.single_loop"),
    *("bilevel.interop.betty", "bidora"),
)
DIRECTIVES = [
    (page.relative_to(DOCS).as_posix(), path)
    for page in sorted(DOCS.rglob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M)
]
METHODS = available_methods()
CONFIGURED = [bilevel.RunConfig, bilevel.EngineConfig, bilevel.Certificate, TrainSettings, *METHODS.values()]


def named(path: str) -> Any:
    """Returns what a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


# Names


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_one_page_once(module: str) -> None:
    where: dict[int, list[str]] = {}
    for page, path in DIRECTIVES:
        where.setdefault(id(named(path)), []).append(f"{page}: {path}")
    content = importlib.import_module(module)
    places = {name: where.get(id(getattr(content, name)), []) for name in content.__all__}
    assert {name: found for name, found in places.items() if len(found) != 1} == {}


def test_every_entry_of_the_pages_of_names_has_its_line_of_prose() -> None:
    bare = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for group in re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.M)[1:]:
            listed = re.findall(r"^- \[`\w+`\]\[([\w.]+)\]: .{8,}\.$", group, re.M)
            entries = re.findall(r"^::: ([\w.]+)$", group, re.M)
            prose = re.search(r"^[A-Z].{20,}", group, re.M)
            if listed != entries and not (len(entries) <= 1 and prose):
                bare.append(f"{page.name}: {group.splitlines()[0]}: {set(listed) ^ set(entries) or 'another order'}")
    assert bare == []


@pytest.mark.parametrize("module", PUBLIC)
def test_fields_of_public_dataclasses_are_described(module: str) -> None:
    content = importlib.import_module(module)
    classes = [cls for cls in map(content.__dict__.get, content.__all__) if isinstance(cls, type)]
    missing = {
        cls.__name__: fields
        for cls in classes
        if dataclasses.is_dataclass(cls) and cls not in (BiDoRAConfig, BiDoRATrainingArguments)  # PEFT's, transformers'
        if (fields := {field.name for field in dataclasses.fields(cls)} - set(reference.documented(cls)))
    }
    assert missing == {}


# Settings


def rows(text: str) -> dict[str, list[str]]:
    """Returns the cells of Markdown tables, by the first one's words."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {word: cells for cells in lines for word in re.findall(r"`([^`]+)`", cells[0])}


@pytest.mark.parametrize("cls", CONFIGURED, ids=lambda cls: cls.__name__)
def test_every_field_is_in_the_reference(cls: type) -> None:
    found = {row.name: row for row in reference.fields_of(cls)}
    assert set(found) == {field.name for field in dataclasses.fields(cls) if field.init}
    assert all(len(row.meaning) > 3 and row.default and row.values for row in found.values())


def test_every_method_and_every_part_is_on_the_page() -> None:
    assert sorted(reference.MARKER.findall(REFERENCE)) == sorted(reference.PARTS)
    page = reference.on_page_markdown(REFERENCE, None)
    assert "<!-- reference" not in page
    headings = re.findall(r"^### (.+)$", page, re.M)
    assert len(headings) == len(set(headings))
    assert {*METHODS, "engine", "certificate", "bilevel run", "bidora merge"} <= set(headings)
    names = rows(page)
    assert {*BiDoRATrainingArguments.__annotations__, "patience", "warmup_steps", "--set", "-s"} <= set(names)


def test_what_a_field_admits_is_what_its_class_says() -> None:
    engine = {row.name: row for row in reference.fields_of(bilevel.EngineConfig)}
    assert engine["precision"].values == '`"bfloat16"`, `"float16"`, `"float32"`'
    assert engine["steps"].values == "an integer of at least 1"
    assert engine["solve_timeout"].values == "a finite number above 0 or `None`"
    assert engine["restore_on_error"].values == "`True` or `False`"
    assert engine["fallback"].values == "a [method](#methods) or `None`"
    neumann = {row.name: row for row in reference.fields_of(bilevel.Neumann)}
    assert neumann["step_size"].values == 'a finite number above 0 or `"auto"`'
    assert neumann["step_size"].default == '`"auto"`'
    for name in ("precision", "on_non_finite", "hypergradient_batch"):
        for choice in re.findall(r'`"(\w+)"`', engine[name].values):
            bilevel.EngineConfig(**{name: choice})


def test_shared_fields_are_described_where_they_are_declared() -> None:
    assert reference.documented(bilevel.Neumann)["curvature"] == reference.documented(bilevel.MINRES)["curvature"]
    center = reference.documented(bilevel.OneStep)["center"]  # the class itself refers to its base
    assert center == reference.documented(bilevel.OneStep.__mro__[1])["center"]
    assert '"old"' in center


def test_fields_that_an_adapter_cannot_have_are_found_by_trying_them() -> None:
    refused = rows(reference.part("adapter"))
    assert {"use_dora", "bias", "layer_replication", "target_parameters"} <= set(refused)
    assert not {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"} & set(refused)


def test_a_field_without_a_description_stops_the_build() -> None:
    @dataclass(frozen=True)
    class Bare:
        """Has two fields.

        Attributes:
            first: Is described
                on two lines.
        """

        first: int = 1
        second: int = 2

    assert reference.documented(Bare) == {"first": "Is described on two lines."}
    with pytest.raises(ValueError, match="Bare: no docstring describes second"):
        reference.fields_of(Bare)


def test_an_unknown_part_stops_the_build() -> None:
    with pytest.raises(ValueError, match="no part 'engines' of the reference"):
        reference.on_page_markdown("<!-- reference: engines -->", None)


# Docstrings


def test_references_become_links_or_plain_names() -> None:
    text = ":class:`~bilevel.Engine`, :meth:`bilevel.Engine.save`, :class:`~bilevel.errors.DataError`"
    assert docstrings.as_markdown(text) == (
        "[`Engine`][bilevel.Engine], [`Engine.save`][bilevel.Engine.save], [`DataError`][bilevel.errors.DataError]"
    )
    text = ":attr:`stop_reason`, :mod:`bilevel.implicit_function`, :meth:`Rule.update`, :class:`~bilevel.levels.Plan`"
    assert docstrings.as_markdown(text) == "`stop_reason`, `implicit_function`, `Rule.update`, `Plan`"


def test_examples_become_code() -> None:
    text = "Sums.\n\nExample:\n    >>> 1 + 1\n    2\n"
    assert "\nExamples:\n    >>> 1 + 1" in docstrings.as_markdown(text)
    text = "Sums::\n\n    1 + 1\n\n1. First:\n\n   >>> x = 1\n   >>> x\n   1\n\nEnd."
    assert docstrings.as_markdown(text) == (
        "Sums:\n\n    1 + 1\n\n1. First:\n\n    ```pycon\n    >>> x = 1\n    >>> x\n    1\n    ```\n\nEnd."
    )
