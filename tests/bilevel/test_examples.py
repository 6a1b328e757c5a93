"""The examples that clean data do what they say, by every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bilevel import Engine, load_config
from bilevel.cli import main
from bilevel.errors import ConfigError
from bilevel.recipe import Recipe, load_recipe

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ("engine.steps=25", "engine.progress=false", "recipe.num_train=300")
METHODS = ("finite_difference", "identity", "neumann", "conjugate_gradient", "exact", "unrolled")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(EXAMPLES / "hyper_cleaning.py")


def built(recipe: Recipe, *overrides: str) -> Engine:
    torch.manual_seed(0)
    return recipe.build(load_config(None, overrides, recipe.schema, defaults=recipe.defaults))


@pytest.fixture(scope="module")
def run_by(recipe: Recipe) -> Callable[[str], Engine]:
    """One short run a method, all from the same start."""
    found: dict[str, Engine] = {}

    def run(method: str) -> Engine:
        if method not in found:
            found[method] = built(recipe, *SMALL, f"hypergradient={method}")
            found[method].run()
        return found[method]

    return run


@pytest.fixture(scope="module")
def no_cleaning(recipe: Recipe) -> float:
    """The same classifier after as many updates, with equal weights."""
    classifier: Any = built(recipe, *SMALL).problems["classifier"]
    x, y, _ = classifier.data[0]
    for _ in range(25 * classifier.steps):
        classifier.optimizer.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        classifier.optimizer.step()
    return float(classifier.evaluate()["accuracy"])


@pytest.mark.parametrize("method", METHODS)
def test_cleaning_beats_no_cleaning(run_by: Callable[[str], Engine], no_cleaning: float, method: str) -> None:
    assert run_by(method).evaluate()["classifier/accuracy"] > no_cleaning + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_wrong_labels_get_lower_weights(run_by: Callable[[str], Engine], method: str) -> None:
    problems: Any = run_by(method).problems
    weights, wrong = problems["cleaner"].weights().detach(), problems["classifier"].digits.wrong
    assert float(weights[wrong].mean()) < 0.5 * float(weights[~wrong].mean())
    assert run_by(method).evaluate()["cleaner/auc"] > 0.85


def test_methods_for_one_quantity_agree(run_by: Callable[[str], Engine]) -> None:
    """Finite differences approximate the identity's product; conjugate gradients solve the exact method's system."""
    for approximate, reference in (("finite_difference", "identity"), ("conjugate_gradient", "exact")):
        one, other = (run_by(method).problems["cleaner"].parameters[0].detach() for method in (approximate, reference))
        assert float((one - other).norm() / other.norm()) < 0.05, approximate


def test_the_data_is_what_it_says(recipe: Recipe) -> None:
    config = load_config(None, SMALL, recipe.schema, defaults=recipe.defaults).recipe
    digits, clean = recipe.module.Digits(config), recipe.module.Digits(replace(config, wrong=0.0))
    assert torch.equal(digits.train[0], clean.train[0])
    assert torch.equal(digits.train[1] != clean.train[1], digits.wrong)
    assert len(digits.train[0]) + len(digits.trusted[0]) + len(digits.test[0]) == 1797
    assert torch.equal(digits.train[2], torch.arange(300))
    counts = clean.train[1].bincount(minlength=10)
    assert int(counts.max() - counts.min()) <= 2  # stratified
    share = float(digits.wrong.float().mean())
    assert abs(share - config.wrong) < 4 * math.sqrt(config.wrong * (1 - config.wrong) / config.num_train)
    other = recipe.module.Digits(replace(config, seed=1))
    assert not torch.equal(other.train[0], digits.train[0])


def test_mnist_is_there_too(recipe: Recipe) -> None:
    engine: Any = built(recipe, *SMALL, "recipe.data=mnist", "recipe.num_trusted=200")
    assert engine.problems["classifier"].module.in_features == 784
    before = engine.problems["classifier"].loss(engine.problems["classifier"].data[0])["loss"]
    engine.run(2)
    assert engine.problems["classifier"].loss(engine.problems["classifier"].data[0])["loss"] < before
    with pytest.raises(ConfigError, match=r"'cifar'.*'digits', 'mnist'"):
        built(recipe, "recipe.data=cifar")


def test_the_command_line_of_its_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example, file = str(EXAMPLES / "hyper_cleaning.py"), str(EXAMPLES / "hyper_cleaning.toml")
    with pytest.raises(SystemExit) as ended:
        main(["run", example, "--config", file, "--steps", "2", "--set", "hypergradient.terms=3"])
    assert ended.value.code == 0
    assert "classifier/accuracy" in capsys.readouterr().out


def test_the_settings_file_says_what_the_defaults_are(recipe: Recipe) -> None:
    defaults = load_config(None, ["hypergradient=neumann"], recipe.schema, defaults=recipe.defaults)
    assert load_config(EXAMPLES / "hyper_cleaning.toml", (), recipe.schema) == defaults


def test_a_weight_network_learns_that_large_losses_are_wrong_labels() -> None:
    recipe = load_recipe(EXAMPLES / "weight_network.py")
    engine: Any = built(recipe, "engine.progress=false")
    images = engine.problems["classifier"].images
    assert abs(float(images.wrong.float().mean()) - 0.4) < 0.05
    engine.run(60)
    weights = engine.problems["weight_network"].weights(torch.tensor([0.1, 6.0])).detach()
    assert float(weights[0]) > 0.8
    assert float(weights[1]) < 0.5
    assert engine.evaluate()["classifier/accuracy"] > 0.8


def test_rare_classes_are_rare() -> None:
    recipe = load_recipe(EXAMPLES / "weight_network.py")
    labels = built(recipe, "recipe.task=imbalanced").problems["classifier"].images.train[1]  # type: ignore[attr-defined]
    counts = labels.bincount(minlength=10)
    assert int(counts[0]) == 300
    assert int(counts[9]) < 20
    with pytest.raises(ConfigError, match=r"'noisy'"):
        built(recipe, "recipe.task=noise")
