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

    A class of this library whose constructor passes ``**settings`` on has those of its base too. One outside may take
    what it wants from them: it is not asked.

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
        known = _arguments(cls) if named else None
        unknown = [name for name in named if known is not None and name not in known]
        if known is not None and unknown:
            raise unknown_name(f"argument of {cls.__name__}", unknown[0], known)
        return super().__new__(cls)


def _arguments(cls: type) -> list[str] | None:
    """Returns the names of all arguments of a class; None where that cannot be known."""
    found: list[str] = []
    for owner in cls.__mro__:
        if "__init__" not in owner.__dict__:
            continue
        # What a decorator takes itself, an argument's former name say, is not among those of what it wraps.
        _, *parameters = inspect.signature(owner.__dict__["__init__"], follow_wrapped=False).parameters.values()
        rest = [each.name for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
        found += [each.name for each in parameters if each.name not in rest]
        if not rest:
            return found
        if owner.__module__.partition(".")[0] != __name__.partition(".")[0]:
            return None
    return None


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
