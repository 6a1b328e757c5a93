"""The command line: what it does with a recipe, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bilevel import Engine, load_config
from bilevel.cli import main
from bilevel.hypergrad import available_methods
from bilevel.recipe import load_recipe

HEAD = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from bilevel import Engine, EngineConfig, Exact, Problem
from bilevel.config import RunConfig

def sgd(params):
    return torch.optim.SGD(params, lr=0.3)

class Outer(Problem):
    def loss(self, batch):
        return (self.inner.module.weight - 1.0).square().sum()
    def evaluate(self):
        return {"distance": (self.inner.module.weight - 1.0).abs().max()}

class Inner(Problem):
    def loss(self, batch):
        return 2 * (self.module.weight - self.outer.module.weight).square().sum()

def problems():
    return [Outer(nn.Linear(2, 2, bias=False), optimizer=sgd), Inner(nn.Linear(2, 2, bias=False), optimizer=sgd)]

"""
BUILD = """
def build(config):
    return Engine(problems(), config.engine, config.hypergradient)
"""


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def bilevel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Calls the command line in a folder of its own; boxes and line breaks are taken out of what it prints."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])

    def call(*arguments: str) -> Run:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out
        return Run(int(ended.value.code or 0), captured.out, " ".join(re.sub(r"[─│╭╮╰╯]", " ", captured.err).split()))

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    def write(body: str = BUILD, name: str = "recipe.py") -> str:
        (tmp_path / name).write_text(HEAD + textwrap.dedent(body))
        return name

    return write


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_trains_and_prints_a_summary(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:
    run = bilevel("run", recipe(), "--steps", "12", "--set", "hypergradient.method=cg")
    assert run.code == 0
    for part in (
        "after step 12",
        "outer",
        "inner",
        "conjugate_gradient",
        "converged",
        "outer/distance",
        "passes",
        "seconds",
    ):
        assert part in run.out
    assert "nowhere: add --output FOLDER" in run.out
    assert max(map(len, run.out.splitlines())) <= 80
    assert "step 12/12" in run.err


def test_run_writes_settings_state_and_summary(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path
) -> None:
    run = bilevel("run", recipe(), "--steps", "3", "--seed", "5", "--output", "out/deep", "-s", "hypergradient.terms=4")
    assert run.code == 0
    folder = tmp_path / "out" / "deep"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "state.safetensors", "summary.json"]
    made = load_recipe(tmp_path / "recipe.py")
    settings = load_config(folder / "config.json", (), made.schema)
    assert (settings.engine.steps, settings.engine.seed, settings.hypergradient.describe()["terms"]) == (3, 5, 4)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert set(summary["losses"]) == {"outer", "inner"}
    engine = made.build(settings)
    engine.load(folder / "state.safetensors")
    assert engine.step_count == 3
    assert engine.evaluate()["outer/distance"] == pytest.approx(summary["metrics"]["outer/distance"])


def test_the_same_seed_gives_the_same_result(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path
) -> None:
    name = recipe()
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert bilevel("run", name, "--steps", "2", "--seed", seed, "--output", folder).code == 0
    a, b, c = (json.loads((tmp_path / folder / "summary.json").read_text())["losses"] for folder in "abc")
    assert a == b != c


def test_a_recipes_defaults_count_until_something_else_is_given(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path
) -> None:
    body = """
    @dataclass(frozen=True)
    class Config:
        scale: float = 1.0
        tag: str = "none"

    DEFAULTS = RunConfig(engine=EngineConfig(steps=2), hypergradient=Exact(damping=0.5), recipe=Config(scale=3.0))

    def build(config):
        assert config.recipe == Config(scale=3.0, tag="mine"), config.recipe
        assert config.hypergradient == Exact(damping=0.25), config.hypergradient
        return Engine(problems(), config.engine, config.hypergradient)
    """
    (tmp_path / "c.toml").write_text("[hypergradient]\ndamping = 0.25\n")
    run = bilevel("run", recipe(body), "--config", "c.toml", "--set", "recipe.tag=mine")
    assert (run.code, "after step 2" in run.out) == (0, True), run.err


@pytest.mark.filterwarnings("default")
def test_dropped_settings_are_said_in_one_line(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text('[hypergradient]\nmethod = "neumann"\nterms = 4\n')
    run = bilevel("run", recipe(), "-c", "c.toml", "--steps", "1", "--set", "hypergradient=cg")
    assert run.code == 0
    assert "warning: override hypergradient=cg replaces method 'neumann' of c.toml" in run.err


@pytest.mark.filterwarnings("default")
def test_a_recipe_that_ignores_its_settings_is_told_so(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:
    name = recipe("def build(config):\n    return Engine(problems(), EngineConfig(steps=2))\n")
    run = bilevel("run", name, "--steps", "3", "--set", "hypergradient=cg")
    assert run.code == 0
    assert "does not run with the settings engine.steps, hypergradient" in run.err


def test_a_recipe_may_import_what_lies_beside_it(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "beside_the_recipe.py").write_text("STEPS = 1\n")
    name = recipe(f"import beside_the_recipe\n{BUILD}")
    assert bilevel("run", name, "--steps", "1").code == 0


def test_two_recipes_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"VALUE = {value}\ndef build(config): ...\n")
    first, second = (load_recipe(tmp_path / folder / "same.py").module for folder in "ab")
    assert (first.VALUE, second.VALUE) == (1, 2)


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("def biuld(config): ...", ["recipe.py: a recipe must define build(config) -> Engine", "biuld"]),
        ("def build(config): return 3", ["recipe.py: build(config) must return an Engine; it returned 3"]),
        ("def build(): ...", ["recipe.py: build must be callable as build(config)"]),
        ("class Config: ...\ndef build(config): ...", ["recipe.py: Config must be a dataclass"]),
        ("DEFAULTS = {}\ndef build(config): ...", ["recipe.py: DEFAULTS must be a RunConfig, not dict"]),
        (
            "import nothing_of_this_name",
            ["RecipeError", "recipe.py:<1>, in <module>: ModuleNotFoundError", "--debug"],
        ),
        (
            "def build(config):\n    return 1 / 0",
            ["recipe.py:<2>, in build: ZeroDivisionError: division by zero"],
        ),
        (
            "def build(config):\n    return torch.zeros(2) @ torch.zeros(3)",
            ["recipe.py:<2>, in build: RuntimeError"],
        ),
        ("def build(config:\n    return 3", ["recipe.py:", "SyntaxError"]),
        ("def build(config):\n    return Engine([])", ["GraphError", "raised from recipe.py:<2>, in build"]),
        (
            "class P(Problem):\n    def on_stop(self): ...",
            ["unknown hook of P 'on_stop'", "raised from recipe.py:<1>"],
        ),
    ],
)
def test_a_wrong_recipe_is_one_message_with_its_line(
    bilevel: Callable[..., Run], recipe: Callable[..., str], body: str, parts: list[str]
) -> None:
    run = bilevel("run", recipe(body))
    assert run.code == 2
    assert run.out == ""
    assert "Traceback" not in run.err
    for part in parts:  # <n> is the n-th line of the body
        expected = re.sub("<(.)>", lambda found: str(HEAD.count("\n") + int(found[1])), part)
        assert expected.replace(" ", "") in run.err.replace(" ", "")  # a long path is broken anywhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.py"], "missing.py: no such file"),
        (["run", "notes.txt"], "notes.txt: a recipe must be a Python file (.py)"),
        (["run", "recipe.py", "--config", "missing.toml"], "missing.toml: no such file"),
        (
            ["run", "recipe.py", "--set", "hypergradient.method=neuman"],
            "unknown method 'neuman': did you mean 'neumann'?",
        ),
        (
            ["run", "recipe.py", "--set", "hypergradient.trems=3"],
            "unknown field of method 'neumann': 'trems': did you mean",
        ),
        (["run", "recipe.py", "--set", "engine.stpes=3"], "unknown key 'engine.stpes': did you mean 'engine.steps'?"),
        (["run", "recipe.py", "--set", "recipe.x=3"], "the section 'recipe' takes no keys: define a dataclass Config"),
        (["run", "recipe.py", "--set", "engine.steps"], "is not of the form key.sub=value"),
        (["run", "recipe.py", "--steps", "0"], "EngineConfig.steps must be an integer of at least 1, not 0"),
        (["run", "recipe.py", "--steps", "many"], "Invalid value for '--steps'"),
        (["run", "recipe.py", "--stpes", "3"], "No such option: --stpes"),
        (["run"], "Missing argument 'RECIPE.py'"),
        (["rnu"], "No such command 'rnu'"),
        (["check", "missing.py"], "missing.py: no such file"),
        (["run", "recipe.py", "--output", "full"], "--output full exists and is not empty"),
        (["run", "recipe.py", "--output", "recipe.py"], "--output recipe.py is a file: name a folder"),
        (["run", "recipe.py", "--output", "recipe.py/sub"], "--output recipe.py/sub cannot be written to"),
    ],
)
def test_a_wrong_command_is_one_message_and_code_2(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    recipe()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    run = bilevel(*arguments)
    assert run.code == 2
    assert message in run.err
    assert "Traceback" not in run.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]


def test_overwriting_must_be_asked_for(bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path) -> None:
    name = recipe()
    assert bilevel("run", name, "--steps", "1", "--output", "out").code == 0
    assert bilevel("run", name, "--steps", "2", "--output", "out").code == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 1
    assert bilevel("run", name, "--steps", "2", "--output", "out", "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


BREAKS = """
class Inner(Inner):
    count = 0
    def loss(self, batch):
        self.count += 1
        if self.count > 9:
            {error}
        return super().loss(batch)
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("raise KeyError('column')", 2, "in loss: KeyError: 'column'"),
        ("return super().loss(batch) * float('nan')", 2, "the loss of problem 'inner' is nan"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_a_run_that_ends_early_loses_no_step(
    bilevel: Callable[..., Run], recipe: Callable[..., str], tmp_path: Path, error: str, code: int, message: str
) -> None:
    name = recipe(BREAKS.format(error=error) + BUILD)
    run = bilevel("run", name, "--steps", "50", "--output", "out")
    assert run.code == code
    assert message in run.err
    found = re.search(r"state after step (\d+) saved in out", run.err)
    assert found
    made = load_recipe(tmp_path / "recipe.py")
    engine = made.build(load_config(None, (), made.schema))
    engine.load(tmp_path / "out" / "state.safetensors")
    assert engine.step_count == int(found[1]) > 0


def test_debug_shows_the_traceback(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:
    run = bilevel("run", recipe("def build(config):\n    return 1 / 0"), "--debug")
    assert run.code == 2
    assert "Traceback (most recent call last)" in run.err
    assert "ZeroDivisionError" in run.err


# --- check and methods ------------------------------------------------------------------------------------------------


def test_check_prints_the_report_and_its_verdict_is_the_exit_code(
    bilevel: Callable[..., Run], recipe: Callable[..., str]
) -> None:
    name = recipe()
    good = bilevel("check", name, "--set", "hypergradient=cg")
    assert (good.code, "passed" in good.out) == (0, True)
    # the inner Hessian is 4 I: the identity is off by a factor of 4
    bad = bilevel("check", name, "--set", "hypergradient=identity")
    assert (bad.code, "FAILED" in bad.out) == (1, True)
    assert bilevel("check", name, "--set", "hypergradient=identity", "--rtol", "10").code == 0


@pytest.mark.parametrize("reference", ["exact", "unrolled", "central_difference"])
def test_check_takes_a_reference_and_prints_json(
    bilevel: Callable[..., Run], recipe: Callable[..., str], reference: str
) -> None:
    solved = recipe(
        """
        def build(config):
            outer, inner = problems()
            inner.module.load_state_dict(outer.module.state_dict())  # its solution
            return Engine([outer, inner], config.engine, config.hypergradient)
        """
    )
    right = bilevel("check", solved, "--set", "hypergradient=cg", "--reference", reference, "--json")
    report = json.loads(right.out)
    assert (right.code, report["verdict"], report["reference"]) == (0, "passed", reference)
    assert report["reference_error"] < 1e-6
    wrong = bilevel("check", solved, "--set", "hypergradient=identity", "-r", reference, "--json")
    assert (wrong.code, json.loads(wrong.out)["verdict"]) == (1, "FAILED")
    assert json.loads(wrong.out)["causes"]
    unsolved = bilevel("check", recipe(), "--set", "hypergradient=cg", "-r", reference)
    assert unsolved.code == (0 if reference == "exact" else 1)  # the first judges the method alone
    assert "the inner problem is not solved" in unsolved.out


def test_check_lists_the_references(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:
    run = bilevel("check", recipe(), "-r", "exakt")
    assert run.code == 2
    assert "did you mean 'exact'? Choices: 'central_difference', 'exact', 'unrolled'" in run.err


def test_check_can_train_first(bilevel: Callable[..., Run], recipe: Callable[..., str]) -> None:
    run = bilevel("check", recipe(), "--after", "4")
    assert run.code == 0
    assert "step 4/4" in run.err


def test_methods_lists_every_method_with_its_fields_within_80_columns(bilevel: Callable[..., Run]) -> None:
    every = bilevel("methods")
    assert every.code == 0
    assert max(map(len, every.out.splitlines())) <= 80
    for name, cls in available_methods().items():
        assert name in every.out
        run = bilevel("methods", name)
        assert max(map(len, run.out.splitlines())) <= 80
        for key, value in cls().describe().items():
            if key != "method":
                assert f"{key} = {value!r}" in run.out
        assert "\n" in run.out
        for text in (cls.purpose, cls.cost, cls.storage, cls.needs):
            assert text
            assert text.split()[0] in run.out
    assert "conjugate_gradient" in bilevel("methods", "cg").out
    wrong = bilevel("methods", "conjugate_gradent")
    assert wrong.code == 2
    assert "did you mean 'conjugate_gradient'?" in wrong.err.replace("\n", " ")


def test_methods_as_json_can_be_fed_back(bilevel: Callable[..., Run]) -> None:
    listed: dict[str, Any] = json.loads(bilevel("methods", "--json").out)
    assert list(listed) == list(available_methods())
    for name, described in listed.items():
        assert {"fields", "summary", "cost", "needs"} <= set(described)
        settings = {"hypergradient": {"method": name, **described["fields"]}}
        assert load_config(settings).hypergradient == available_methods()[name]()


def test_a_recipe_builds_an_engine_from_python_too(recipe: Callable[..., str], tmp_path: Path) -> None:
    recipe()
    made = load_recipe(tmp_path / "recipe.py")
    assert isinstance(made.build(load_config(None, ["engine.progress=false"], made.schema)), Engine)
