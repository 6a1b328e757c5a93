"""What logs keep of a step, nested for JSON or flat for tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.errors import ConfigError

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.problems import Problem
    from bilevel.result import SolveInfo, StepResult

__all__ = ["Cell", "flatten", "learning_rates", "step_record"]

Cell = float | int | str | None


def step_record(engine: Engine, result: StepResult, evaluated: Mapping[str, float], *, seconds: bool) -> dict[str, Any]:
    """Returns what is known of a step, nested; see :class:`~bilevel.callbacks.JSONLinesLog` for the fields.

    Args:
        engine: The engine that stepped; its callbacks' ``values()`` are collected.
        result: What the step did.
        evaluated: What ``evaluate()`` returned in it; empty where it was not called.
        seconds: Whether to include the wall time, which differs from run to run.

    Raises:
        ConfigError: Two callbacks publish a value of the same name.
    """
    record: dict[str, Any] = {
        "step": result.step,
        "loss": dict(result.losses),
        "gradient_norm": dict(result.gradient_norms),
        "metric": dict(result.metrics),
        "solve": {name: _solve(info) for name, info in result.solves.items()},
        "passes": {"forward": result.passes[0], "backward": result.passes[1]},
        "learning_rate": {name: rates for name, p in engine.problems.items() if (rates := learning_rates(p))},
        "skipped": result.skipped,
    }
    if result.overflows:
        record["overflows"] = dict(result.overflows)
    if evaluated:
        record["evaluate"] = dict(evaluated)
    if values := _published(engine):
        record["values"] = values
    if seconds:
        record["seconds"] = result.seconds
    return record


def flatten(record: Mapping[str, Any]) -> dict[str, Cell]:
    """Returns a record's entries by names such as ``"loss/outer"``; callbacks' own values keep their names.

    Raises:
        ConfigError: A callback publishes a value under a name that is in use.
    """
    flat: dict[str, Cell] = {}
    for key, value in record.items():
        if key != "values":
            _flatten(key, value, flat)
    for name, value in record.get("values", {}).items():
        if name in flat:
            raise ConfigError(f"a callback publishes a value named {name!r}, as logs name one of their own: rename it")
        flat[name] = value
    return flat


def learning_rates(problem: Problem) -> list[float]:
    """Returns the learning rates of a problem's parameter groups as they are now; none without an optimiser."""
    groups = [] if problem.optimizer is None else problem.optimizer.param_groups
    return [float(group["lr"]) for group in groups if "lr" in group]


def _flatten(name: str, value: Any, flat: dict[str, Cell]) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(f"{name}/{key}", part, flat)
    elif isinstance(value, list):
        for place, part in enumerate(value):
            _flatten(name if len(value) == 1 else f"{name}/{place}", part, flat)
    else:
        flat[name] = value


def _solve(info: SolveInfo) -> dict[str, Cell]:
    return {
        "method": info.method,
        "status": info.status.value,
        "residual": _known(info.residual),
        "iterations": info.iterations,
        "products": info.products,
        "error_bound": info.error_bound,
        "inner_gradient_norm": _known(info.inner_gradient_norm),
    }


def _known(number: float) -> float | None:
    """Returns None for NaN, which stands for "not known" in these fields."""
    return None if math.isnan(number) else number


def _published(engine: Engine) -> dict[str, float]:
    values: dict[str, float] = {}
    for callback in engine.callbacks:
        for name, value in callback.values().items():
            if name in values:
                raise ConfigError(f"two callbacks publish a value named {name!r}: keep one of them")
            values[name] = float(value)
    return values
