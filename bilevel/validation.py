"""Checks of configuration fields, run when a dataclass is constructed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bilevel.errors import ConfigError, unknown_name

__all__ = ["check_choice", "check_integer", "check_number"]


def check_number(
    owner: str, field: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False, auto: bool = False
) -> None:
    """Raises :class:`~bilevel.errors.ConfigError` unless ``value`` is a finite number, at least (or above) ``minimum``.

    Args:
        owner: The class that has the field, for the message.
        field: The field's name.
        value: What came.
        minimum: Smallest admissible value.
        exclusive: Whether ``minimum`` itself is refused.
        auto: Whether the string ``"auto"`` is admissible too.
    """
    if auto and value == "auto":
        return
    relation = "above" if exclusive else "at least"
    expected = "a finite number" + (f" {relation} {minimum:g}" if minimum > -math.inf else "")
    expected += " or 'auto'" if auto else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{owner}.{field} must be {expected}, not {value!r}")
    if value < minimum or (exclusive and value == minimum):
        raise ConfigError(f"{owner}.{field} must be {expected}, not {value!r}")


def check_integer(owner: str, field: str, value: object, *, minimum: int) -> None:
    """Raises :class:`~bilevel.errors.ConfigError` unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{owner}.{field} must be an integer of at least {minimum}, not {value!r}")


def check_choice(owner: str, field: str, value: object, choices: Sequence[str]) -> None:
    """Raises :class:`~bilevel.errors.UnknownNameError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise unknown_name(f"value of {owner}.{field}", str(value), choices)
