"""What ``Config.type`` and the fields that go with it mean here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.errors import ConfigError, unknown_name
from bilevel.hypergrad import (
    SAMA,
    ConjugateGradient,
    Estimator,
    FiniteDifference,
    Neumann,
    as_estimator,
    available_methods,
)

if TYPE_CHECKING:
    from bilevel.interop.betty.configs import Config

__all__ = ["check_type", "method_of"]

OURS = ("darts", "neumann", "cg", "sama")
"""Betty's names, with Betty's fields and our gradients."""
PREFIX = "betty:"


def check_type(kind: object) -> None:
    """Raises unless ``Config.type`` names a method.

    Raises:
        ConfigError: Something else than a name, a mapping or an estimator, or ``"reinforce"``.
        UnknownNameError: No such method, or no such field of it.
    """
    if kind == "reinforce":
        raise ConfigError(
            "Config.type='reinforce' is not supported: the released one cannot be run, since it reads what problems do "
            f"not have. Choices: {', '.join(map(repr, _choices()))}"
        )
    if isinstance(kind, str):
        if kind not in _choices():
            raise unknown_name("value of Config.type", kind, _choices())
    elif isinstance(kind, (Estimator, Mapping)):
        try:
            as_estimator(kind)
        except ConfigError as error:
            error.args = (f"Config.type: {error}", *error.args[1:])
            raise
    else:
        raise ConfigError(
            f"Config.type must be the name of a method, a mapping with 'method', or an estimator, not {kind!r}. "
            f"Names: {', '.join(map(repr, _choices()))}"
        )


def method_of(config: Config) -> Estimator:
    """Returns the estimator that a configuration means.

    ``darts`` and ``sama`` take a central difference whose displacement has Betty's length, ``neumann`` has Betty's
    K + 1 summands, and ``cg`` makes the iterations that it is told, unless the residual vanishes earlier.
    """
    kind = config.type
    if isinstance(kind, Estimator):
        return kind
    if isinstance(kind, Mapping):
        return as_estimator(kind)
    if kind.startswith(PREFIX):
        return as_estimator({"method": kind, **_fields(kind.removeprefix(PREFIX), config)})
    if kind == "darts":
        return FiniteDifference(epsilon=config.darts_alpha)
    if kind == "neumann":
        return Neumann(terms=config.neumann_iterations, step_size=config.neumann_alpha, rtol=0.0)
    if kind == "cg":
        return ConjugateGradient(max_iterations=config.cg_iterations, rtol=0.0)
    if kind == "sama":
        return SAMA(epsilon=config.sama_adam_alpha)
    return as_estimator(kind)


def _fields(kind: str, config: Config) -> dict[str, Any]:
    """Returns the fields of Betty's own function."""
    if kind == "darts":
        return {"alpha": config.darts_alpha}
    if kind == "sama":
        return {"alpha": config.sama_adam_alpha}
    if kind == "neumann":
        return {"iterations": config.neumann_iterations, "alpha": config.neumann_alpha}
    return {"iterations": config.cg_iterations, "alpha": config.cg_alpha}


def _choices() -> list[str]:
    return [*dict.fromkeys([*OURS, *available_methods(), "fd"])]
