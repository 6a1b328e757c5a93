"""The names that ``Config.type`` may have."""

from __future__ import annotations

from collections.abc import Mapping

from bilevel.errors import ConfigError, unknown_name
from bilevel.hypergrad import Estimator, as_estimator, available_methods

__all__ = ["PREFIX", "check_type"]

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


def _choices() -> list[str]:
    return [*dict.fromkeys([*OURS, *available_methods(), "fd"])]
