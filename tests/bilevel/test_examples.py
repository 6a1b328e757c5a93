"""Examples do what they say: every method cleans the labels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bilevel import Engine, load_config
from bilevel.cli import main
from bilevel.recipe import Recipe, load_recipe

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ("engine.steps=10", "engine.progress=false", "recipe.num_train=300")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(EXAMPLES / "hyper_cleaning.py")


@pytest.fixture(scope="module")
def runs(recipe: Recipe) -> dict[str, Engine]:
    """One short run a method, all from the same start."""
    found = {}
    for method in recipe.module.METHODS:
        config = load_config(None, [*SMALL, f"hypergradient={method}"], recipe.schema, defaults=recipe.defaults)
        torch.manual_seed(0)
        found[method] = recipe.build(config)
        found[method].run()
    return found


@pytest.fixture(scope="module")
def no_cleaning(recipe: Recipe) -> float:
    config = load_config(None, SMALL, recipe.schema, defaults=recipe.defaults)
    digits = recipe.module.Digits(config.recipe)
    torch.manual_seed(0)
    return float(recipe.module.baseline(config, digits.train, torch.ones(len(digits.wrong))))


METHODS = ("finite_difference", "identity", "neumann", "conjugate_gradient", "exact", "unrolled")


def test_all_methods_are_compared(recipe: Recipe) -> None:
    assert recipe.module.METHODS == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_cleaning_beats_no_cleaning(runs: dict[str, Engine], no_cleaning: float, method: str) -> None:
    assert runs[method].evaluate()["classifier/accuracy"] > no_cleaning + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_wrong_labels_get_lower_weights(runs: dict[str, Engine], method: str) -> None:
    cleaner = runs[method].problems["cleaner"]
    weights, wrong = cleaner.weights().detach(), cleaner.digits.wrong  # type: ignore[attr-defined]
    assert float(weights[wrong].mean()) < 0.5 * float(weights[~wrong].mean())
    assert runs[method].evaluate()["cleaner/auc"] > 0.85


def test_methods_for_one_quantity_agree(runs: dict[str, Engine]) -> None:
    """Finite differences approximate the identity's product; conjugate gradients solve the exact method's system."""
    logits = {method: run.problems["cleaner"].parameters[0].detach() for method, run in runs.items()}
    for approximate, reference in (("finite_difference", "identity"), ("conjugate_gradient", "exact")):
        distance = (logits[approximate] - logits[reference]).norm() / logits[reference].norm()
        assert float(distance) < 0.02, (approximate, float(distance))


def test_the_data_is_what_it_says(recipe: Recipe) -> None:
    config = load_config(None, SMALL, recipe.schema, defaults=recipe.defaults).recipe
    digits = recipe.module.Digits(config)
    clean = recipe.module.Digits(type(config)(num_train=config.num_train, wrong=0.0))
    assert torch.equal(digits.train[0], clean.train[0])
    assert torch.equal(digits.train[1] != clean.train[1], digits.wrong)
    assert len(digits.train[0]) + len(digits.trusted[0]) + len(digits.test[0]) == 1797
    share = float(digits.wrong.float().mean())
    assert abs(share - config.wrong) < 4 * math.sqrt(config.wrong * (1 - config.wrong) / config.num_train)


def test_the_command_line_of_its_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example, file = str(EXAMPLES / "hyper_cleaning.py"), str(EXAMPLES / "hyper_cleaning.toml")
    with pytest.raises(SystemExit) as ended:
        main(["run", example, "--config", file, "--steps", "2", "--set", "hypergradient.terms=3"])
    assert ended.value.code == 0
    assert "classifier/accuracy" in capsys.readouterr().out


def test_the_settings_file_says_what_the_defaults_are(recipe: Recipe) -> None:
    defaults = load_config(None, (), recipe.schema, defaults=recipe.defaults)
    assert load_config(EXAMPLES / "hyper_cleaning.toml", (), recipe.schema) == defaults
