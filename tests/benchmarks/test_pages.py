"""The pages of benchmarks show what was measured: every result is on one page, as its command writes it."""

from __future__ import annotations

import argparse
import importlib
import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.options import add_append, add_results, earlier, keep, measures, new_parser
from benchmarks.pages.results import PAGES, RESULTS, kept, load, marks, save, with_texts, write_page
from benchmarks.peers.report import as_told

DOCS = PAGES.parent
WRITERS = {
    "benchmarks/index.md": ("benchmarks.peers.report", "lines_of"),
    "benchmarks/growth.md": ("benchmarks.growth.report", "shown"),
    "benchmarks/overhead.md": ("benchmarks.overhead", "lines_of"),
    "benchmarks/compiled.md": ("benchmarks.peers.report", "lines_of"),
    "benchmarks/bidora_step.md": ("benchmarks.bidora_step", "lines_of"),
    "benchmarks/dora.md": ("benchmarks.dora_gpu", "lines_of"),
    "tutorials/few_shot.md": ("benchmarks.few_shot_speed", "lines_of"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_page_shows_its_results(name: str, tmp_path: Path) -> None:
    module, lines_of = WRITERS[name]
    text = (DOCS / name).read_text(encoding="utf-8")
    copy = tmp_path / "page.md"
    copy.write_text(text, encoding="utf-8")
    write_page(copy, getattr(importlib.import_module(module), lines_of))
    assert copy.read_text(encoding="utf-8") == text, f"write it again: --page docs/{name}"


def test_every_result_is_on_one_page_and_every_page_has_a_writer() -> None:
    shown = Counter(mark for name in WRITERS for mark in marks((DOCS / name).read_text(encoding="utf-8")))
    assert {path.stem: shown[path.stem] for path in RESULTS.glob("*.json")} == {
        path.stem: 1 for path in RESULTS.glob("*.json")
    }
    pages = {f"benchmarks/{path.name}" for path in PAGES.glob("*.md")}
    assert {name for name in pages if marks((DOCS / name).read_text(encoding="utf-8"))} <= set(WRITERS)


def test_what_is_kept_of_the_peers_is_finite_and_names_no_folder_of_a_machine() -> None:
    found = kept((PAGES / "index.md").read_text(encoding="utf-8"))
    assert found
    for result in found.values():
        assert "/" not in result["about"]["command"]
        for row in result["rows"]:
            assert math.isfinite(row.get("own_error", 0.0)) or row["wrong"] or row["failed"]


def test_the_pictures_of_growth_are_there() -> None:
    text = (PAGES / "growth.md").read_text(encoding="utf-8")
    for name in kept(text):
        for theme in ("light", "dark"):
            assert f"{name}-{theme}.svg#only-{theme}" in text
            assert (PAGES / f"{name}-{theme}.svg").exists()


def test_a_command_is_told_without_what_is_of_one_machine() -> None:
    places = ["--json", "/tmp/x", "--save", "--page", "docs/p.md"]
    given = ["few_shot", "--data", "/home/me/data", *places, "--rounds", "3", "--environments=e"]
    assert as_told(given) == ["few_shot", "--data", "data", "--rounds", "3", "--environments=e"]


class Understood(Exception):  # noqa: N818  (no error)
    pass


def test_commands_that_are_told_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every result that names one: its arguments are parsed, and nothing runs."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    texts = [str(result) for name in WRITERS for result in kept((DOCS / name).read_text(encoding="utf-8")).values()]
    commands = {command for text in texts for command in re.findall(r"python -m (benchmarks\.[^`'\"]+)", text)}
    assert commands
    for command in commands:
        module, *arguments = shlex.split(command)
        found = importlib.import_module(module)
        main = getattr(found, "main", None) or importlib.import_module(f"{module}.__main__").main
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Understood):
            main()


# Marks


def test_only_what_is_between_the_marks_of_a_name_changes() -> None:
    page = "a\n<!-- results: x -->\nold\n<!-- end -->\nb\n<!-- results: y -->\nkept\n<!-- end -->\n"
    assert marks(page) == ["x", "y"]
    new = with_texts(page, {"x": ["| 1 |", r"\1"]})
    assert new == page.replace("old\n", "\n| 1 |\n\\1\n\n")
    assert with_texts(new, {"x": ["| 1 |", r"\1"]}) == new


@pytest.mark.parametrize(
    "page",
    [
        "a page",
        "<!-- results: x -->\nnot closed",
        "<!-- results: x -->\nnot closed\n<!-- results: y -->\nkept\n<!-- end -->\n",
        2 * "<!-- results: x -->\n<!-- end -->\n",
    ],
)
def test_a_result_without_one_place_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"[02] places for the results 'x'"):
        with_texts(page, {"x": ["a"]})


# Commands


def test_save_and_load(tmp_path: Path) -> None:
    result: dict[str, Any] = {"about": {"torch": "2"}, "rows": [{"seconds": 1 / 3}, {"seconds": 2.0}]}
    file = save("x", result, tmp_path)
    assert re.sub(r"\s+", " ", file.read_text(encoding="utf-8")).count("seconds") == 2
    assert load("x", tmp_path) == {"about": {"torch": "2"}, "rows": [{"seconds": 0.333333}, {"seconds": 2.0}]}


def test_a_page_alone_measures_nothing(tmp_path: Path) -> None:
    parser = new_parser("")
    add_results(parser)
    assert measures(parser.parse_args([]))
    assert not measures(parser.parse_args(["--page", "p.md"]))
    options = parser.parse_args(["--page", "p.md", "--json", str(tmp_path)])
    assert measures(options)
    keep("x", {"rows": []}, options)
    assert load("x", tmp_path) == {"rows": []}
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", "results.json"])


def test_results_are_appended_to_what_is_kept_where_that_is_asked_for() -> None:
    parser = new_parser("")
    add_append(parser)
    plain, more = parser.parse_args([]), parser.parse_args(["--append"])
    assert earlier("overhead", more) == load("overhead")
    assert earlier("overhead", plain) == earlier("nothing of this name", more) == {}
