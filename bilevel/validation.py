"""Checks of configuration fields, run when a dataclass is constructed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bilevel.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NamedArguments", "check_choice", "check_integer", "check_number"]


class NamedArguments:
    """Base of classes that name the arguments they have where one is misspelt; Python names the wrong one only.

    A class whose constructor passes ``**settings`` on is not asked: what they are is known further up.

    Example:
        >>> class Solver(NamedArguments):
        ...     def __init__(self, *, terms=10, rtol=0.0): ...
        >>> Solver(term=3)
        Traceback (most recent call last):
            ...
        bilevel.errors.UnknownNameError: unknown argument of Solver 'term': did you mean 'terms'? Choices: 'rtol', ...
    """

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Refuses a misspelt argument."""
        if cls.__init__ is object.__init__ and (args or named):  # which would take anything beside another __new__
            raise TypeError(f"{cls.__name__}() takes no arguments")
        if named:
            _, *parameters = inspect.signature(cls.__init__).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            known = [parameter.name for parameter in parameters]
            unknown = [name for name in named if name not in known]
            if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise unknown_name(f"argument of {cls.__name__}", unknown[0], known)
        return super().__new__(cls)


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
