"""Whether an inner problem can serve the method by which it is to be differentiated."""

from __future__ import annotations

from collections.abc import Mapping

from bilevel import distributed
from bilevel.errors import ConfigError, unknown_name, warn
from bilevel.hypergrad import SAMA, Estimator
from bilevel.hypergrad.inner_updates import InnerUpdates
from bilevel.levels.graph import Dependencies
from bilevel.optim import update_of
from bilevel.problems.base import Problem

__all__ = ["check_levels", "check_method", "check_structure"]


def check_structure(problems: Mapping[str, Problem], evaluate_every: int) -> None:
    """Raises for settings of problems that do not fit together.

    Raises:
        UnknownNameError: A problem that is to start from one that does not exist, or is not listed before it.
        ParameterError: One whose parameters do not match.
        ConfigError: A scheduler that waits for evaluations that never come.
    """
    earlier: list[str] = []
    for name, problem in problems.items():
        if problem.start_source is not None:
            if problem.start_source not in earlier:
                kind = f"problem above {name!r} for its reset"
                raise unknown_name(kind, problem.start_source, [*earlier, "initial"])
            problem.start_values()
        if problem.stepper is not None and problem.stepper.needs_evaluation and not evaluate_every:
            raise ConfigError(
                f"the scheduler of problem {name!r} waits for {problem.stepper.metric!r}, which only an evaluation "
                "gives: set EngineConfig(evaluate_every=...)"
            )
        earlier.append(name)


def check_levels(problems: Mapping[str, Problem], dependencies: Dependencies) -> None:
    """Raises for settings that make no sense where a problem stands.

    Raises:
        ConfigError: An outer problem with settings of inner ones; several levels below each other on several ranks.
    """
    for name in dependencies.outer:
        problem = problems[name]
        given = {
            "steps": problem.steps > 1,
            "warmup_steps": problem.warmup_steps > 0,
            "reset": problem.reset is not None,
        }
        wrong = [key for key, meant in given.items() if meant]
        if wrong:
            raise ConfigError(
                f"problem {name!r} is outer: {', '.join(wrong)} of an outer problem has no meaning, since no problem "
                "is above it. Leave it out, or list the problem below the one that depends on it."
            )
    nested = [name for name in dependencies.inner if dependencies.lower[name]]
    if nested and distributed.size() > 1:
        raise ConfigError(
            f"problem {nested[0]!r} has problems below and above it: more than two levels run in one process only "
            "so far"
        )


def check_method(problem: Problem, estimator: Estimator, precision: str, dependencies: Dependencies) -> None:
    """Raises unless an inner problem can serve its method.

    Raises:
        ConfigError: A start that the method does not see, where nothing else makes the problem depend on those above.
            For a method that differentiates the problem's updates: no optimizer, one whose update is not known, graphs
            that cannot be kept, or a field that speaks of the method as a function.
    """
    _check_start(problem, estimator, dependencies)
    error = dependencies.first_derivatives_only.get(problem.name)
    if error is not None and estimator.needs_double_backward:
        raise error
    if not estimator.needs_trajectory:
        _check_restriction(problem, estimator, dependencies)
        return
    if problem.optimizer is None:
        raise ConfigError(
            f"method {estimator.name!r} consumes the updates of problem {problem.name!r}, which has no optimizer"
        )
    extras = {"project()": problem.projects}
    if estimator.needs_update:
        update_of(problem.optimizer, problem.parameters)
        extras["max_grad_norm"] = problem.max_grad_norm is not None
    elif dependencies.depth(problem.name) > 1:
        raise ConfigError(
            f"method {estimator} takes its product where a step of problem {problem.name!r} started, but that is below "
            "a problem that is itself differentiated through, around where both stand: use center='new'"
        )
    elif problem.projects or problem.restricts:
        raise ConfigError(
            f"method {estimator} takes its product where a step of problem {problem.name!r} started, and its project() "
            "or response_loss() is made for where it ended: use center='new'"
        )
    for what, present in extras.items():
        if present and not isinstance(estimator, (InnerUpdates, SAMA)):
            raise ConfigError(
                f"method {estimator.name!r} cannot differentiate through {what} of problem {problem.name!r}: drop "
                "one of them, or use 'sama', or 'unrolled' with steps=1"
            )
    if estimator.keeps_graph:
        _check_graph(problem, estimator, precision, dependencies)
    _check_function_fields(problem, estimator)


def _check_restriction(problem: Problem, estimator: Estimator, dependencies: Dependencies) -> None:
    below = dependencies.lower[problem.name]
    if problem.restricts and below:
        raise ConfigError(
            f"problem {problem.name!r} has a response_loss() of its own and problems below it "
            f"({', '.join(sorted(below))}), whose response method {estimator.name!r} would take at the parameters "
            "themselves: use 'unrolled' for it"
        )


def _check_start(problem: Problem, estimator: Estimator, dependencies: Dependencies) -> None:
    source = problem.start_source
    if source is None or estimator.follows_start:
        return
    moved_by = set(dependencies.responds_to(problem.name)) & set().union(
        *(dependencies.reach[name] for name in (problem.name, *dependencies.lower[problem.name]))
    )
    if not moved_by:
        raise ConfigError(
            f"problem {problem.name!r} depends on {source!r} by its start alone, which method {estimator.name!r} does "
            "not see: its derivative would be zero. Use 'unrolled', or tie the loss to the parameters it starts from "
            "(a proximal term, as in implicit MAML)"
        )


def _check_graph(problem: Problem, estimator: Estimator, precision: str, dependencies: Dependencies) -> None:
    if precision != "float32":
        raise ConfigError(
            f"method {estimator} keeps the graphs of training passes, which precision={precision!r} takes in "
            f"that precision, and products are to be taken in float32 or better: use {_without_graph(estimator)}"
        )
    if dependencies.lower[problem.name]:
        below = ", ".join(sorted(dependencies.lower[problem.name]))
        raise ConfigError(
            f"method {estimator} keeps the graphs of training passes, but the gradient of problem {problem.name!r} "
            f"goes through the problems below it ({below}): use {_without_graph(estimator)}"
        )


def _without_graph(estimator: Estimator) -> str:
    return "memory='replay'" if "memory" in estimator.describe() else "center='new'"


def _check_function_fields(problem: Problem, estimator: Estimator) -> None:
    if not isinstance(estimator, (InnerUpdates, SAMA)):
        return
    kind = type(estimator).__name__
    if estimator.optimizer not in ("sgd", None):
        raise ConfigError(
            f"{kind}.optimizer is for gradient steps as a function; in an engine the updates of problem "
            f"{problem.name!r} are made by its own optimizer, {type(problem.optimizer).__name__}: leave "
            f"optimizer={estimator.optimizer!r} out"
        )
    if estimator.learning_rate is not None:
        warn(
            f"{kind}.learning_rate is not used in an engine: the optimizer of problem {problem.name!r} made the "
            "updates",
        )
