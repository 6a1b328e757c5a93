"""The tutorials: every page shows what its study measured, from an example that a reader can run."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import yaml

from benchmarks.tutorials.study import PAGES, RESULTS, Estimate, Study, Table, load, names, text_of, with_results
from bilevel.cli import main
from bilevel.errors import BilevelWarning
from bilevel.recipe import load_recipe

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def nav() -> str:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return str(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])


@pytest.mark.parametrize("name", names())
def test_a_page_shows_the_numbers_of_its_study(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    study = load(name)
    assert with_results(page, study) == page
    assert study.about["budget"] == "full"
    for theme in ("light", "dark"):
        assert (RESULTS / f"{name}-{theme}.svg").stat().st_size > 1000
        assert f"results/{name}-{theme}.svg#only-{theme}" in page
    assert f"tutorials/{name}.md" in nav()
    assert (ROOT / "examples" / f"{name}.py").is_file()


def test_there_are_studies() -> None:
    assert len(names()) >= 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    assert (PAGES / f"{path.stem}.md").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # a solver may say that it was stopped early
        with pytest.raises(SystemExit) as done:
            main(["run", str(path), "--set", "engine.steps=1", "--set", "engine.progress=false"])
    assert done.value.code == 0
    assert "after step 1" in capsys.readouterr().out


def test_an_estimate_is_the_mean_with_its_t_interval() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(3.182446305284263 * math.sqrt(5 / 3) / 2)  # t(0.975, 3)
    assert str(found) == "2.500 ± 2.054"
    assert str(Estimate.of([0.5, 0.5], digits=1, percent=True)) == "50.0 ± 0.0 %"
    assert str(Estimate.of([0.25])) == "0.250"
    with pytest.raises(ValueError, match="at least one"):
        Estimate.of([])


def test_tables_and_pages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 cells in a table of 1"):
        Table(["a"], [[1, 2]])
    study = Study({"x": Table(["a"], [[1]])})
    with pytest.raises(ValueError, match="markers for"):
        with_results("<!-- results: y -->\n<!-- end -->\n", study)
    assert with_results("<!-- results: x -->\nold\n<!-- end -->\n", study).splitlines()[2:5] == [
        "| a |",
        "| --- |",
        "| 1 |",
    ]


def test_a_study_reads_back_as_it_was_written() -> None:
    study = Study({"x": Table(["a", "b"], [["m", Estimate.of([1.0, 3.0])]])}, {"curve": [1.0, 2.0]}, {"seconds": 1.5})
    assert Study.from_json(json.loads(text_of(study))) == study


def test_few_shot_is_tested_on_characters_that_it_was_not_trained_on() -> None:
    folder = ROOT.parent / "shared" / "data" / "omniglot"
    if not folder.is_dir():
        pytest.skip("Omniglot is not here")
    (train, _), (test, labels) = load_recipe(ROOT / "examples" / "few_shot.py").module.characters(str(folder))
    seen = {drawing.numpy().tobytes() for drawing in train}
    assert not any(drawing.numpy().tobytes() in seen for drawing in test)
    assert len(labels.unique()) == 106
