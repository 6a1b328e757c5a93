"""Configuration: files and overrides become validated objects, or an error that says where, what and what else."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bilevel import (
    ConjugateGradient,
    EngineConfig,
    Estimator,
    Exact,
    FiniteDifference,
    Identity,
    Neumann,
    Unrolled,
    load_config,
)
from bilevel.config import RunConfig, dump_config
from bilevel.errors import BilevelWarning, ConfigError, UnknownNameError
from bilevel.hypergrad import Certificate

numbers = st.floats(min_value=1e-12, max_value=1e6)
whole = st.integers(min_value=1, max_value=10**6)
# PyYAML writes U+0085 as it is when it is allowed Unicode, and reads it back as a line break.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=8)
certificates = st.builds(Certificate, strong_convexity=st.just("estimate") | numbers, probes=whole)
implicit = {
    "curvature": st.sampled_from(["hessian", "gauss_newton"]),
    "certificate": st.none() | certificates,
}
differences = {"products": st.just("finite_difference"), "difference_step": st.just("auto") | numbers}
estimators = st.one_of(
    st.builds(FiniteDifference, epsilon=st.one_of(numbers, st.just("auto"))),
    st.just(Identity()),
    st.builds(Neumann, terms=whole, step_size=st.one_of(numbers, st.just("auto")), damping=numbers, **implicit),
    st.builds(ConjugateGradient, max_iterations=whole, rtol=numbers, damping=numbers, **differences),
    st.builds(Exact, damping=numbers, **implicit),
    st.builds(Unrolled, steps=st.none() | whole, learning_rate=st.none() | numbers),
)


@st.composite
def engine_configs(draw: st.DrawFn) -> EngineConfig:
    fallback = draw(st.none() | estimators.filter(lambda method: not method.needs_trajectory))
    batches, restores = draw(whole), draw(st.booleans())
    return EngineConfig(
        steps=draw(whole),
        seed=draw(st.integers(0, 2**31)),
        hypergradient_batch="fresh" if batches > 1 else draw(st.sampled_from(["last", "fresh"])),
        num_hypergradient_batches=batches,
        on_solve_failure="fallback" if fallback else draw(st.sampled_from(["warn", "raise"])),
        fallback=fallback,
        on_non_finite=draw(st.sampled_from(["raise", "skip"])) if restores else "raise",
        precision=draw(st.sampled_from(["float32", "bfloat16"])),
        restore_on_error=restores,
        evaluate_every=draw(st.integers(0, 100)),
        progress=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Optimizer:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Config:
    name: str = "run"
    folder: Path = Path("data")
    size: int = 8
    rate: float = 0.5
    shuffle: bool = True
    kind: Literal["linear", "mlp"] = "linear"
    widths: tuple[int, ...] = (4, 4)
    limit: int | None = None
    optimizer: Optimizer = Optimizer()
    heads: dict[str, Optimizer] = field(default_factory=dict)
    lower: Estimator | None = None
    candidates: tuple[Estimator, ...] = ()


recipes = st.builds(
    Config,
    name=texts,
    folder=st.sampled_from([Path("a/b"), Path("c")]),
    size=st.integers(-(10**9), 10**9),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    shuffle=st.booleans(),
    kind=st.sampled_from(["linear", "mlp"]),
    widths=st.lists(whole, max_size=3).map(tuple),
    limit=st.none() | whole,
    optimizer=st.builds(Optimizer, rate=numbers, betas=st.tuples(numbers, numbers)),
    heads=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.builds(Optimizer, rate=numbers), max_size=2),
    lower=st.none() | estimators,
    candidates=st.lists(estimators, max_size=2).map(tuple),
)
SCHEMA = RunConfig[Config]


def load(*overrides: str, path: Any = None) -> RunConfig[Config]:
    return load_config(path, overrides, SCHEMA)


def refused(*overrides: str, path: Any = None, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load(*overrides, path=path)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


# --- what goes in comes out -------------------------------------------------------------------------------------------


@given(engine=engine_configs(), hypergradient=estimators, recipe=recipes)
def test_what_was_dumped_loads_as_an_equal_object(
    engine: EngineConfig, hypergradient: Estimator, recipe: Config
) -> None:
    config = RunConfig(engine=engine, hypergradient=hypergradient, recipe=recipe)
    assert load_config(dump_config(config), (), SCHEMA) == config


@given(engine=engine_configs(), hypergradient=estimators, recipe=recipes)
def test_a_dump_survives_json_and_yaml_files(
    tmp_path_factory: pytest.TempPathFactory, engine: EngineConfig, hypergradient: Estimator, recipe: Config
) -> None:
    config = RunConfig(engine=engine, hypergradient=hypergradient, recipe=recipe)
    folder = tmp_path_factory.mktemp("dump")
    (folder / "c.json").write_text(json.dumps(dump_config(config)), encoding="utf-8")
    (folder / "c.yaml").write_text(yaml.safe_dump(dump_config(config), allow_unicode=True), encoding="utf-8")
    assert load(path=folder / "c.json") == config
    assert load(path=folder / "c.yaml") == config


def leaves_of(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@given(hypergradient=estimators)
def test_overrides_say_the_same_as_a_file(hypergradient: Estimator) -> None:
    overrides = [
        f"hypergradient.{key}={value}" for key, value in leaves_of(dump_config(hypergradient)) if value is not None
    ]
    assert load(*overrides).hypergradient == hypergradient
    assert load(*reversed(overrides)).hypergradient == hypergradient


def test_nothing_given_means_the_defaults() -> None:
    assert load() == RunConfig(engine=EngineConfig(), hypergradient=Neumann(), recipe=Config())
    assert load_config() == RunConfig()


def test_three_formats_and_overrides_make_the_same_object(write: Callable[[str, str], Path]) -> None:
    expected = RunConfig(engine=EngineConfig(steps=7), hypergradient=Neumann(terms=3), recipe=Config(rate=1e-3))
    toml = '[engine]\nsteps = 7\n[hypergradient]\nmethod = "neumann"\nterms = 3\n[recipe]\nrate = 1e-3\n'
    # YAML 1.1 would read 1e-3 as text
    yml = "engine:\n  steps: 7\nhypergradient: {method: neumann, terms: 3}\nrecipe:\n  rate: 1e-3\n"
    js = '{"engine": {"steps": 7}, "hypergradient": {"method": "neumann", "terms": 3}, "recipe": {"rate": 1e-3}}'
    for name, content in (("a.toml", toml), ("a.yaml", yml), ("a.yml", yml), ("a.json", js)):
        assert load(path=write(name, content)) == expected, name
    assert load("engine.steps=7", "hypergradient.terms=3", "recipe.rate=1e-3") == expected


def test_defaults_of_a_caller_count_instead_of_the_schemas() -> None:
    defaults = RunConfig(
        engine=EngineConfig(steps=3), hypergradient=Exact(damping=0.5), recipe=Config(size=2, rate=9.0)
    )
    found = load_config(None, ["recipe.size=5", "engine.seed=1", "hypergradient.damping=0.25"], defaults=defaults)
    assert found.engine == EngineConfig(steps=3, seed=1)
    assert found.hypergradient == Exact(damping=0.25)
    assert found.recipe == Config(size=5, rate=9.0)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("recipe.name=2024", "name", "2024"),
        ("recipe.name=", "name", ""),
        ("recipe.name=null", "name", None),
        ("recipe.name='null'", "name", "null"),
        ("recipe.folder=a/b", "folder", Path("a/b")),
        ("recipe.size=1e3", "size", 1000),
        ("recipe.rate=.5", "rate", 0.5),
        ("recipe.rate=3", "rate", 3.0),
        ("recipe.shuffle=false", "shuffle", False),
        ("recipe.shuffle=False", "shuffle", False),
        ("recipe.widths=[1, 2, 3]", "widths", (1, 2, 3)),
        ("recipe.limit=null", "limit", None),
        ("recipe.limit=3", "limit", 3),
        ("recipe.kind=mlp", "kind", "mlp"),
        ("recipe.optimizer.rate=2", "optimizer", Optimizer(rate=2.0)),
        ("recipe.heads.left.rate=2", "heads", {"left": Optimizer(rate=2.0)}),
        ("recipe.lower=cg", "lower", ConjugateGradient()),
        ("recipe.lower={method='neumann', terms=1}", "lower", Neumann(terms=1)),
        (
            "recipe.candidates=['cg', {method='neumann', terms=1}]",
            "candidates",
            (ConjugateGradient(), Neumann(terms=1)),
        ),
    ],
)
def test_an_override_is_read_as_the_fields_type(override: str, key: str, value: Any) -> None:
    if key == "name" and value is None:
        assert "expected text, came null" in refused(override)
    else:
        assert getattr(load(override).recipe, key) == value


# --- choosing another method ------------------------------------------------------------------------------------------


def test_another_method_drops_the_files_fields_and_says_so(write: Callable[[str, str], Path]) -> None:
    path = write("a.toml", '[hypergradient]\nmethod = "neumann"\nterms = 4\n')
    for override in ("hypergradient.method=cg", "hypergradient=cg"):
        with pytest.warns(BilevelWarning, match=r"cg replaces method 'neumann' of .*a\.toml.* dropped: terms=4"):
            assert load(override, path=path).hypergradient == ConjugateGradient()


def test_another_method_keeps_fields_of_overrides_in_any_order(write: Callable[[str, str], Path]) -> None:
    path = write("a.toml", '[hypergradient]\nmethod = "neumann"\nterms = 4\n')
    overrides = ["hypergradient.max_iterations=3", "hypergradient.method=conjugate_gradient"]
    for order in (overrides, overrides[::-1]):
        with pytest.warns(BilevelWarning, match="dropped: terms=4"):
            assert load(*order, path=path).hypergradient == ConjugateGradient(max_iterations=3)


@pytest.mark.parametrize("section", ['method = "cg"\nrtol = 0.5', 'method = "conjugate_gradient"\nrtol = 0.5'])
def test_naming_the_same_method_again_drops_nothing(write: Callable[[str, str], Path], section: str) -> None:
    path = write("a.toml", f"[hypergradient]\n{section}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("hypergradient.method=cg", path=path).hypergradient == ConjugateGradient(rtol=0.5)


def test_a_field_can_be_added_to_a_method_given_by_name() -> None:
    assert load("hypergradient.rtol=0.5", path={"hypergradient": "cg"}).hypergradient == ConjugateGradient(rtol=0.5)
    assert load("hypergradient.terms=5", path={"hypergradient": Neumann(damping=1.0)}).hypergradient == Neumann(
        5, damping=1
    )


def test_the_fallback_is_a_method_like_any_other() -> None:
    config = load("engine.on_solve_failure=fallback", "engine.fallback.method=cg", "engine.fallback.damping=0.1")
    assert config.engine.fallback == ConjugateGradient(damping=0.1)
    assert load("engine.fallback=null").engine.fallback is None
    message = refused("engine.fallback=cg")
    assert message.startswith("override engine.fallback=cg: engine: ")
    assert "on_solve_failure='fallback'" in message


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("engine.stpes=3", ["unknown key 'engine.stpes'", "did you mean 'engine.steps'?", "'engine.seed'"]),
        ("engin.steps=3", ["unknown key 'engin'", "did you mean 'engine'?", "'hypergradient', 'recipe'"]),
        ("steps=3", ["unknown key 'steps'", "did you mean 'engine.steps'?"]),
        ("terms=3", ["unknown key 'terms'", "did you mean 'hypergradient.terms'?"]),
        ("hypergradient.trems=3", ["unknown field of method 'neumann': 'trems'", "did you mean 'terms'?"]),
        ("hypergradient.method=neuman", ["unknown method 'neuman'", "did you mean 'neumann'?", "'identity'"]),
        ("hypergradient=neuman", ["unknown method 'neuman'", "did you mean 'neumann'?"]),
        ("recipe.optimizer.rat=1", ["unknown key 'recipe.optimizer.rat'", "did you mean 'recipe.optimizer.rate'?"]),
        ("recipe.heads.left.rat=1", ["unknown key 'recipe.heads.left.rat'", "'recipe.heads.left.rate'"]),
        ("engine.precision=bfloat", ["unknown value of EngineConfig.precision 'bfloat'", "did you mean 'bfloat16'?"]),
    ],
)
def test_an_unknown_name_lists_what_exists(override: str, parts: list[str]) -> None:
    message = refused(override, kind=UnknownNameError)
    assert message.startswith(f"override {override}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.steps=many", "expected an integer, came 'many' (text)"),
        ("engine.steps=true", "expected an integer, came True (a truth value)"),
        ("engine.steps=1.5", "expected an integer, came 1.5 (a number)"),
        ("engine.steps.x=1", "engine.steps: expected an integer, came {'x': 1} (a section)"),
        ("engine.progress=7", "expected true or false, came 7 (an integer)"),
        ("engine=3", "expected a section with the keys steps, "),
        ("hypergradient=3", "expected a method's name or a section with 'method' and its fields, came 3 (an integer)"),
        ("hypergradient.method=3", "expected the method's name, one of finite_difference, "),
        ("hypergradient.terms=ten", "expected an integer, came 'ten' (text)"),
        ("recipe.widths=1", "expected a list such as [1, 2], came 1 (an integer)"),
        ("recipe.kind=cnn", "expected one of 'linear', 'mlp', came 'cnn' (text)"),
        ("recipe.limit=none", "expected an integer or null, came 'none' (text)"),
        ("recipe.lower.rtol=1", "recipe.lower: expected the method's name, one of finite_difference, "),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_came(override: str, expected: str) -> None:
    assert refused(override).startswith(f"override {override}: {expected}")


@pytest.mark.parametrize("value", ['"3"', "true", "3.5", "[3]", "{ x = 3 }"])
def test_a_wrong_type_in_a_file_names_the_file_and_key(write: Callable[[str, str], Path], value: str) -> None:
    path = write("a.toml", f"[engine]\nsteps = {value}\n")
    assert refused(path=path).startswith(f"{path}: engine.steps: expected an integer, came ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.steps=0", "EngineConfig.steps must be an integer of at least 1, not 0"),
        ("hypergradient.terms=-1", "Neumann.terms must be an integer of at least"),
        ("hypergradient.damping=nan", "Neumann.damping must be a finite number"),
    ],
)
def test_a_value_that_makes_no_sense_names_its_override(override: str, message: str) -> None:
    assert refused(override).startswith(f"override {override}: {override.partition('.')[0]}: {message}")


@pytest.mark.parametrize("override", ["engine.steps", "=3", "engine..steps=3", ".steps=3", ""])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    assert f"override {override!r} is not of the form key.sub=value" in refused(override)


def test_an_override_cannot_go_into_a_value(write: Callable[[str, str], Path]) -> None:
    path = write("a.toml", "[engine]\nsteps = 5\n")
    assert "'engine.steps' is the value 5 and no section" in refused("engine.steps.x=1", path=path)


def test_overrides_are_no_single_string() -> None:
    with pytest.raises(ConfigError, match=r"write \['engine.steps=3'\]"):
        load_config(None, "engine.steps=3")


def test_required_settings_are_asked_for() -> None:
    @dataclass(frozen=True)
    class Required:
        size: int
        rate: float

    with pytest.raises(ConfigError, match=r"no value for size, rate, which has no default"):
        load_config(None, (), Required)
    assert load_config(None, ["size=1", "rate=2"], Required) == Required(1, 2.0)


def test_a_schema_is_a_dataclass() -> None:
    with pytest.raises(ConfigError, match="must be a dataclass"):
        load_config(None, (), dict)
    with pytest.raises(ConfigError, match="must be a dataclass object"):
        dump_config({"engine": 3})


def test_what_json_cannot_hold_is_not_dumped() -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        dump_config(RunConfig(recipe={"x": object()}))


# --- files ------------------------------------------------------------------------------------------------------------


class Trap:
    """Would leave a trace if anything unpickled it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pt", "a.bin", "a.toml", "a.yaml", "a.json"])
def test_a_pickle_is_refused_whatever_its_name(write: Callable[[str, bytes], Path], tmp_path: Path, name: str) -> None:
    trace = tmp_path / "unpickled"
    path = write(name, pickle.dumps(Trap(trace)))
    message = refused(path=path)
    assert message.startswith(f"{path}: ")
    assert "refused" in message
    assert ".toml, .yaml, .yml, .json" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "[engine", "malformed"),
        ("a.toml", "[engine]\nsteps = 1\nsteps = 2\n", "malformed"),
        ("a.json", '{"engine": {"steps": 1, "steps": 2}}', "the key 'steps' occurs twice in one section"),
        ("a.json", '{"engine": ', "malformed"),
        ("a.json", "[1]", "the file must hold keys and values; it holds [1] (list)"),
        ("a.json", "null", "the file must hold keys and values"),
        (
            "a.yaml",
            "engine:\n  steps: 1\n  steps: 2\n",
            "the key 'steps' occurs twice in one section (line 3, column 3)",
        ),
        ("a.yaml", "engine: &a {steps: 1}\n", "anchors and aliases are not supported, but 'a' is one"),
        ("a.yaml", "engine: {steps: *a}\n", "anchors and aliases are not supported, but 'a' is one"),
        ("a.yaml", "engine: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.yaml", "engine: [1\n", "malformed"),
        ("a.yaml", "1: 2\n", "keys must be text, but 1 is of type int"),
        ("a.yaml", "recipe: {candidates: [{1: 2}]}", "keys must be text, but recipe.candidates.0.1 is of type int"),
        ("a.yaml", "? [1]\n: 2\n", "keys must be text"),
        ("a.yaml", "text\n", "the file must hold keys and values; it holds 'text' (str)"),
        ("a.ini", "", "the extension '.ini' stands for no known format"),
        ("a", "", "the extension '' stands for no known format"),
        ("a.toml", b"\xff\xfe", "not UTF-8 text (byte 0)"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    write: Callable[[str, str | bytes], Path], name: str, content: str | bytes, message: str
) -> None:
    path = write(name, content)
    found = refused(path=path)
    assert found.startswith(f"{path}: ")
    assert message in found


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other.toml").touch()
    (tmp_path / "folder.toml").mkdir()
    assert "no such file. There: folder.toml, other.toml" in refused(path=tmp_path / "run.toml")
    assert "cannot be read: Is a directory" in refused(path=tmp_path / "folder.toml")
    assert "must be a path or a mapping, not int" in refused(path=3)


def test_empty_files_are_empty_configurations(write: Callable[[str, str], Path]) -> None:
    assert load(path=write("a.toml", "")) == load(path=write("a.yaml", "# nothing\n")) == load()


@pytest.mark.parametrize("text", ["no", "on", "off", "yes", "1:30", "010", "2024-01-01", "0x1f"])
def test_yaml_text_that_version_1_1_turns_into_something_else_stays_text(
    write: Callable[[str, str], Path], text: str
) -> None:
    assert load(path=write("a.yaml", f"recipe:\n  name: {text}\n")).recipe.name == text
