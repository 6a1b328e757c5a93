"""Betty's two configurations: the same fields and defaults, and errors by name for values that make no sense."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bilevel
from bilevel import SAMA, ConjugateGradient, Estimator, FiniteDifference, Identity, Neumann
from bilevel.errors import BilevelError, ConfigError, UnknownNameError
from bilevel.hypergrad import available_methods
from bilevel.interop.betty import Config, EngineConfig, ImplicitProblem, configs
from bilevel.interop.betty.configs import LOGGERS, PRECISIONS, STRATEGIES
from bilevel.interop.betty.methods import method_of

CONFIGS = [Config, EngineConfig]

# What a field takes: good values, and bad ones beside those that are of no right type for any field of its kind.
FLAG = ([True, False], [0, 1, 1.0, "True", None, [True]])
TEXT = (["loss", "accuracy"], [None, 3, b"loss", ["loss"]])
METHODS = (
    ["darts", "neumann", "cg", "sama", "fd", *available_methods(), Identity(), {"method": "neumann", "terms": 3}],
    [
        *["", "CG", "reinforce", "newton", "betty:newton", "betty:", 3, None, ["cg"], torch.optim.SGD, Neumann],
        *[{}, {"method": "newton"}, {"method": "neumann", "term": 3}],
    ],
)


def integer(minimum: int) -> tuple[list[Any], list[Any]]:
    return [minimum, minimum + 1, 10**6], [minimum - 1, -(10**6), 2.5, 2.0, math.nan, True, "2", None, [2], (2,)]


def number(minimum: float, *, exclusive: bool) -> tuple[list[Any], list[Any]]:
    bad = [minimum - 0.5, -1e9, math.nan, math.inf, -math.inf, True, "0.1", None, [0.1], 1j]
    return [minimum + 0.25, minimum + 1, 1e6, *([] if exclusive else [minimum])], bad + [minimum] * exclusive


def choice(*choices: str) -> tuple[list[Any], list[Any]]:
    return list(choices), ["", choices[0].upper(), choices[0] + "x", 3, None, True, list(choices), torch.float16]


VALUES: dict[tuple[type, str], tuple[list[Any], list[Any]]] = {
    (Config, "type"): METHODS,
    (Config, "unroll_steps"): integer(1),
    (Config, "first_order"): FLAG,
    (Config, "retain_graph"): FLAG,
    (Config, "allow_unused"): ([True], [False, *FLAG[1]]),
    (Config, "gradient_accumulation"): integer(1),
    (Config, "gradient_clipping"): number(0.0, exclusive=False),
    (Config, "precision"): choice("fp32", "fp16", "bf16"),
    (Config, "initial_dynamic_scale"): number(0.0, exclusive=True),
    (Config, "scale_factor"): number(1.0, exclusive=True),
    (Config, "warmup_steps"): integer(0),
    (Config, "log_step"): ([-1, 0, 1, 10**6], [2.5, math.nan, True, "2", None, [2]]),
    (Config, "log_local_step"): FLAG,
    (Config, "darts_alpha"): number(0.0, exclusive=True),
    (Config, "darts_multitask"): ([False], [True, *FLAG[1]]),
    (Config, "sama_adam_alpha"): number(0.0, exclusive=True),
    (Config, "sama_multitask"): ([False], [True, *FLAG[1]]),
    (Config, "neumann_iterations"): integer(0),
    (Config, "neumann_alpha"): number(0.0, exclusive=True),
    (Config, "cg_iterations"): integer(1),
    (Config, "cg_alpha"): number(0.0, exclusive=True),
    (EngineConfig, "train_iters"): integer(1),
    (EngineConfig, "valid_step"): integer(1),
    (EngineConfig, "logger_type"): choice("none", "tensorboard", "wandb"),
    (EngineConfig, "roll_back"): FLAG,
    (EngineConfig, "backend"): (["nccl", "gloo"], TEXT[1]),
    (EngineConfig, "strategy"): (
        ["default", "cpu", "gpu", "distributed"],
        ["zero", "fsdp", "accelerate", "ddp", *choice("cpu")[1]],
    ),
    (EngineConfig, "early_stopping"): FLAG,
    (EngineConfig, "early_stopping_mode"): choice("min", "max"),
    (EngineConfig, "early_stopping_tolerance"): integer(1),
    (EngineConfig, "early_stopping_metric"): TEXT,
}


def refusal(call: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


EVERY = [pytest.param(cls, field.name, id=field.name) for cls in CONFIGS for field in dataclasses.fields(cls)]


# The same fields


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_fields_have_bettys_names_places_and_defaults(cls: type) -> None:
    theirs = getattr(pytest.importorskip("betty.configs"), cls.__name__)
    expected = [(field.name, field.default) for field in dataclasses.fields(theirs)]
    assert [(field.name, field.default) for field in dataclasses.fields(cls)] == expected
    assert dataclasses.astuple(cls()) == dataclasses.astuple(theirs())


@pytest.mark.parametrize("cls", CONFIGS)
def test_fields_may_be_given_by_their_places(cls: type) -> None:
    theirs = getattr(pytest.importorskip("betty.configs"), cls.__name__)
    places = [VALUES[cls, field.name][0][-1] for field in dataclasses.fields(cls)]
    assert dataclasses.astuple(cls(*places)) == dataclasses.astuple(theirs(*places))


def test_the_table_of_this_test_has_every_field() -> None:
    assert [(cls, field.name) for cls in CONFIGS for field in dataclasses.fields(cls)] == list(VALUES)


def test_bettys_module_names_are_here_too() -> None:
    assert configs.Config is Config
    assert configs.EngineConfig is EngineConfig


# What a field takes


@pytest.mark.parametrize(("cls", "field"), EVERY)
def test_values_that_make_sense_are_kept(cls: type, field: str) -> None:
    for value in VALUES[cls, field][0]:
        config = cls(**{field: value})
        assert getattr(config, field) is value


@pytest.mark.parametrize(("cls", "field"), EVERY)
def test_values_that_make_none_are_refused_by_the_fields_name(cls: type, field: str) -> None:
    for value in VALUES[cls, field][1]:
        message = refusal(lambda value=value: cls(**{field: value}))
        named = r"\bmethod\b" if isinstance(value, dict) else rf"\b{cls.__name__}\.{field}\b"
        assert re.search(named, message), message
        assert not isinstance(value, str) or repr(value) in message, message


@pytest.mark.parametrize(("cls", "field"), EVERY)
def test_a_field_that_is_changed_is_checked_again(cls: type, field: str) -> None:
    for value in VALUES[cls, field][1]:
        config = cls()
        setattr(config, field, value)
        assert refusal(lambda config=config: dataclasses.replace(config)) == refusal(config.fixed)


@pytest.mark.parametrize(
    ("cls", "field", "choices"),
    [
        (Config, "type", ["darts", "neumann", "cg", "sama", *available_methods()]),
        (Config, "precision", PRECISIONS),
        (EngineConfig, "strategy", STRATEGIES),
        (EngineConfig, "logger_type", LOGGERS),
        (EngineConfig, "early_stopping_mode", ["min", "max"]),
    ],
)
def test_an_unknown_choice_lists_those_that_there_are(cls: type, field: str, choices: Any) -> None:
    with pytest.raises(UnknownNameError) as caught:
        cls(**{field: "fancy"})
    assert f"{cls.__name__}.{field} 'fancy'" in str(caught.value)
    for name in choices:
        assert repr(name) in str(caught.value)


def test_a_misspelt_choice_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'neumann'"):
        Config(type="neuman")
    with pytest.raises(UnknownNameError, match="did you mean 'distributed'"):
        EngineConfig(strategy="distribute")


@pytest.mark.parametrize("cls", CONFIGS)
def test_an_unknown_field_lists_those_that_there_are(cls: type) -> None:
    with pytest.raises(UnknownNameError) as caught:
        cls(unrol_step=3)
    assert f"field of {cls.__name__}: 'unrol_step'" in str(caught.value)
    for field in dataclasses.fields(cls):
        assert repr(field.name) in str(caught.value)
    with pytest.raises(UnknownNameError, match="did you mean 'train_iters'"):
        EngineConfig(train_iter=3)


@pytest.mark.parametrize(
    ("cls", "fields", "reason"),
    [
        (Config, {"type": "reinforce"}, "cannot be run"),
        (Config, {"darts_multitask": True}, "displaced"),
        (Config, {"sama_multitask": True}, "displaced"),
        (Config, {"allow_unused": False}, "zero gradient"),
        (EngineConfig, {"strategy": "zero"}, "shards or wraps"),
        (EngineConfig, {"strategy": "fsdp"}, "shards or wraps"),
        (EngineConfig, {"strategy": "accelerate"}, "shards or wraps"),
    ],
    ids=str,
)
def test_what_betty_has_and_we_do_not_is_refused_with_the_reason(
    cls: type, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        cls(**fields)
    assert "not supported" in str(caught.value)
    assert "Choices: " in str(caught.value)


def test_errors_are_what_a_python_user_expects() -> None:
    with pytest.raises(ValueError, match="unroll_steps"):
        Config(unroll_steps=0)
    with pytest.raises(BilevelError, match="unroll_steps"):
        Config(unroll_steps=0)


# A configuration as a value


@pytest.mark.parametrize(("cls", "field"), EVERY)
def test_copies_are_equal_and_their_own(cls: type, field: str) -> None:
    good = VALUES[cls, field][0]
    config = cls(**{field: good[-1]})
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),  # noqa: S301
        dataclasses.replace(config),
    ):
        assert other == config
        assert type(other) is cls
        assert other is not config
        setattr(other, field, good[0])
        assert getattr(config, field) == good[-1]
    assert dataclasses.replace(cls(), **{field: good[-1]}) == config
    assert field in repr(config)


@pytest.mark.parametrize("cls", CONFIGS)
def test_replace_checks(cls: type) -> None:
    first = dataclasses.fields(cls)[1].name
    with pytest.raises(ConfigError, match=first):
        dataclasses.replace(cls(), **{first: "many"})
    with pytest.raises(UnknownNameError, match="'several'"):
        dataclasses.replace(cls(), several=1)


@dataclasses.dataclass
class Longer(Config):
    """A configuration with a field of the user's own."""

    temperature: float = 1.0


def test_a_subclass_may_add_fields() -> None:
    config = Longer(temperature=2.0, type="cg")
    assert (config.temperature, config.type) == (2.0, "cg")
    assert ImplicitProblem("inner", config).config is config
    with pytest.raises(UnknownNameError, match="field of Longer: 'temprature'.*did you mean 'temperature'"):
        Longer(temprature=2.0)
    with pytest.raises(ConfigError, match="unroll_steps"):
        Longer(unroll_steps=0)


# A type and its fields


FIELDS: dict[str, Any] = {
    "darts_alpha": 0.03,
    "sama_adam_alpha": 0.7,
    "neumann_iterations": 4,
    "neumann_alpha": 0.2,
    "cg_iterations": 6,
    "cg_alpha": 0.3,
}

EXPECTED: dict[str, tuple[Estimator, tuple[str, ...]]] = {
    "darts": (FiniteDifference(epsilon=0.03), ("darts_alpha",)),
    "sama": (SAMA(epsilon=0.7), ("sama_adam_alpha",)),
    "neumann": (Neumann(terms=4, step_size=0.2, rtol=0.0), ("neumann_iterations", "neumann_alpha")),
    "cg": (ConjugateGradient(max_iterations=6, rtol=0.0), ("cg_iterations",)),
}
"""By type, our estimator for :data:`FIELDS`, and the fields that it reads."""

THEIRS: dict[str, dict[str, str]] = {
    "betty:darts": {"alpha": "darts_alpha"},
    "betty:sama": {"alpha": "sama_adam_alpha"},
    "betty:neumann": {"iterations": "neumann_iterations", "alpha": "neumann_alpha"},
    "betty:cg": {"iterations": "cg_iterations", "alpha": "cg_alpha"},
}
"""By type, the fields of Betty's own functions and those of ``Config``."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_type_means_an_estimator_of_ours_with_its_fields(kind: str) -> None:
    expected, _ = EXPECTED[kind]
    assert method_of(Config(type=kind, **FIELDS)) == expected


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_type_reads_its_own_fields_and_no_others(kind: str) -> None:
    expected, read = EXPECTED[kind]
    for field, value in FIELDS.items():
        other = {**FIELDS, field: 2 * value}
        assert (method_of(Config(type=kind, **other)) != expected) == (field in read)


def test_betty_runs_as_many_iterations_as_it_is_told_and_so_do_these() -> None:
    """The defaults: one iteration of conjugate gradient, two summands, a radius of 0.01."""
    assert method_of(Config()) == FiniteDifference(epsilon=0.01)
    assert method_of(Config(type="cg")) == ConjugateGradient(max_iterations=1, rtol=0.0)
    assert method_of(Config(type="neumann")) == Neumann(terms=1, step_size=1.0, rtol=0.0)
    assert method_of(Config(type="sama")) == SAMA(epsilon=1.0)


@pytest.mark.parametrize("kind", THEIRS)
def test_bettys_own_functions_get_the_fields_too(kind: str) -> None:
    pytest.importorskip("betty")
    method = method_of(Config(type=kind, **FIELDS))
    assert method.name == kind
    for ours, theirs in THEIRS[kind].items():
        assert getattr(method, ours) == FIELDS[theirs]


def test_other_methods_come_with_their_own_fields() -> None:
    estimator = Neumann(terms=7)
    assert method_of(Config(type=estimator, **FIELDS)) is estimator
    assert method_of(Config(type={"method": "neumann", "terms": 7}, **FIELDS)) == estimator
    assert method_of(Config(type={"method": "cg"}, **FIELDS)) == ConjugateGradient()
    assert method_of(Config(type="identity", **FIELDS)) == Identity()
    assert method_of(Config(type="fd", **FIELDS)) == FiniteDifference()
    assert method_of(Config(type="conjugate_gradient", **FIELDS)) == ConjugateGradient()


@pytest.mark.parametrize("kind", METHODS[0], ids=repr)
def test_every_type_that_is_taken_means_an_estimator(kind: Any) -> None:
    if str(kind).startswith("betty:"):
        pytest.importorskip("betty")
    assert isinstance(method_of(Config(type=kind)), Estimator)


def test_a_mapping_with_a_wrong_field_names_method_and_choices() -> None:
    with pytest.raises(UnknownNameError, match="field of method 'neumann': 'term'.*'terms'"):
        Config(type={"method": "neumann", "term": 3})


# The wrong class


@pytest.mark.parametrize(
    "config", [EngineConfig(), bilevel.EngineConfig(), {"type": "cg"}, "cg", 3, Config], ids=lambda c: type(c).__name__
)
def test_a_problem_wants_this_config(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"config of problem 'inner' must be a bilevel\.interop\.betty\.Config"):
        ImplicitProblem("inner", config)


def test_bettys_own_config_is_not_this_one() -> None:
    """As after changing one of two imports."""
    theirs = pytest.importorskip("betty.configs").Config()
    with pytest.raises(ConfigError, match=r"config of problem 'inner' must be a bilevel\.interop\.betty\.Config"):
        ImplicitProblem("inner", theirs)


def test_without_a_config_a_problem_has_the_defaults() -> None:
    """Betty's crashes there."""
    assert ImplicitProblem("inner").config == Config()
    assert ImplicitProblem("inner", None).config == Config()
    assert ImplicitProblem("inner").config is not ImplicitProblem("inner").config
