"""What a user's class defines beside ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from bilevel.errors import unknown_name

__all__ = ["check_spelling", "defined"]

_OURS = __name__.rpartition(".")[0] + "."
_CLOSE = 0.9
_HELPERS = {"validations"}
"""Near enough to a hook, and plausible names of something else."""


def defined(cls: type) -> set[str]:
    """Returns the names that a class and its bases define, apart from those of this package."""
    return {name for each in cls.__mro__ if not each.__module__.startswith(_OURS) for name in vars(each)}


def check_spelling(cls: type, hooks: Sequence[str]) -> None:
    """Raises for a method that is meant to be a hook and would never be called.

    Args:
        cls: The user's class.
        hooks: What users may define.

    Raises:
        UnknownNameError: A method has nearly the name of a hook that the class does not define.
    """
    names = defined(cls)
    missing = [hook for hook in hooks if hook not in names]
    for name in names - set(hooks) - set(dir(object)) - _HELPERS:
        if callable(getattr(cls, name, None)) and difflib.get_close_matches(name, missing, n=1, cutoff=_CLOSE):
            raise unknown_name(f"method of {cls.__name__} (it would never be called):", name, hooks)
