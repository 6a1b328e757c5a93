"""What an engine is made of, checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bilevel.callbacks import Callback
from bilevel.errors import ConfigError, GraphError
from bilevel.interop.betty.configs import Config, EngineConfig
from bilevel.interop.betty.dependencies import Declared
from bilevel.interop.betty.envs import Env
from bilevel.interop.betty.overrides import check_spelling, defined
from bilevel.interop.betty.problems import IterativeProblem, Problem
from bilevel.settings import EngineConfig as Settings

__all__ = ["check_arguments", "check_problems"]

INTERNAL = frozenset(
    {
        "check_leaf",
        "configure_systems",
        "dfs",
        "find_paths",
        "initialize",
        "parse_config",
        "parse_dependency",
        "set_problem_attr",
    }
)
"""What Betty's engine calls and ours does not: an override would do nothing."""
_MEANT = {
    "steps": "EngineConfig.train_iters",
    "precision": "Config.precision of each problem",
    "evaluate_every": "EngineConfig.valid_step",
    "hypergradient_batch": "Betty's algorithm (the last update's batch)",
}


def check_arguments(
    engine: object, problems: object, config: object, env: object, settings: object, callbacks: object
) -> list[Problem]:
    """Returns the problems, once all arguments of an engine are what they must be.

    Raises:
        ConfigError: One is not; the message names it.
        GraphError: Problems that are none, twice there, of the same name, or in another engine.
    """
    check_spelling(type(engine), ["validation"])
    for name in defined(type(engine)) & INTERNAL:
        raise ConfigError(
            f"{type(engine).__name__} overrides {name}(), which the engine does not call here: only validation() and "
            "train_step() are the user's"
        )
    if not isinstance(config, EngineConfig):
        raise ConfigError(
            f"config must be a bilevel.interop.betty.EngineConfig, not {_kind(config)}; our engine's own settings go "
            "to settings="
        )
    if config.early_stopping and not callable(getattr(engine, "validation", None)):
        raise ConfigError(
            "EngineConfig.early_stopping=True needs a validation() method of the engine, whose numbers it watches"
        )
    if env is not None and not isinstance(env, Env):
        raise ConfigError(f"env must be an instance of bilevel.interop.betty.Env, not {_kind(env)}")
    if not isinstance(callbacks, (list, tuple)) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise ConfigError(f"callbacks must be a list of bilevel.callbacks, not {callbacks!r}")
    _check_settings(settings)
    return _checked_problems(problems)


def check_problems(problems: Sequence[Problem], graph: Declared, config: EngineConfig) -> None:
    """Raises for settings that are not supported where a problem stands.

    Raises:
        ConfigError: The message names the field and the choices.
    """
    known = {problem.name: problem for problem in problems}
    for name, problem in known.items():
        settings: Config = problem.config
        over = [other for path in graph.paths[name] for other in path[1:-1]]
        plain = [other for other in over if not isinstance(known[other], IterativeProblem)]
        if not settings.first_order and plain:
            raise ConfigError(
                f"Config.first_order=False of problem {name!r} is not supported over {plain[0]!r}, which is no "
                "IterativeProblem: Betty drops the hypergradient there without a word. Choices: True"
            )
        middle = graph.parents[name] and graph.children[name]
        if config.roll_back and (middle or len(graph.parents[name]) > 1):
            raise ConfigError(
                f"EngineConfig.roll_back=True is for two levels, with one problem above each; {name!r} stands between "
                "others or below several. Choices: False"
            )
        overrides = {"cache_states", "recover_states"} & defined(type(problem))
        if config.roll_back and overrides:
            raise ConfigError(
                f"problem {name!r} overrides {sorted(overrides)[0]}(), which EngineConfig.roll_back=True does not "
                "call: parameters, buffers and optimizer are rolled back by the engine"
            )


def _checked_problems(problems: object) -> list[Problem]:
    if not isinstance(problems, Iterable) or isinstance(problems, (Mapping, str)):
        raise GraphError(f"problems must be a list of problems, not {problems!r}")
    checked: list[Problem] = []
    for problem in problems:
        if not isinstance(problem, Problem):
            raise GraphError(
                f"problems must be instances of bilevel.interop.betty's problem classes; got a {_kind(problem)}"
            )
        if problem._engine is not None:
            raise GraphError(f"problem {problem.name!r} belongs to another engine already: make problems anew")
        if problem.name in [other.name for other in checked]:
            raise GraphError(f"two problems are named {problem.name!r}, or one of them is listed twice")
        problem.config.fixed()  # it may have been changed since it was made
        checked.append(problem)
    if not checked:
        raise GraphError("an engine needs a problem; got none")
    return checked


def _check_settings(settings: object) -> None:
    if settings is None:
        return
    if not isinstance(settings, Settings):
        raise ConfigError(f"settings must be a bilevel.EngineConfig, not {_kind(settings)}")
    plain = Settings()
    for field, instead in _MEANT.items():
        if getattr(settings, field) != getattr(plain, field):
            raise ConfigError(f"settings.{field} has no meaning here: it is {instead} that says so. Leave it out")
    if settings.on_non_finite != "raise":
        raise ConfigError(
            f"settings.on_non_finite={settings.on_non_finite!r} is not supported: a left-out iteration would put the "
            "counts of problems and accumulations out of step. Choices: 'raise'"
        )


def _kind(value: object) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}" + (" (the class)" if isinstance(value, type) else "")
