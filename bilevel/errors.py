"""The exception tree.

Every error this library raises on purpose derives from :class:`BilevelError`, and from the built-in exception
that a Python user would expect (``ValueError`` for a bad value, ``TypeError`` for a bad type, …). A message says
what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable

import torch
from torch import OutOfMemoryError as TorchOutOfMemoryError

__all__ = [
    "BilevelError",
    "BilevelWarning",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GraphError",
    "HypergradientCheckError",
    "LossError",
    "NonFiniteError",
    "OutOfMemoryError",
    "ParameterError",
    "SolveError",
    "SolveTimeoutError",
    "UnknownNameError",
    "unknown_name",
    "warn",
]

_PACKAGES = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INSIDE = (
    *(os.path.join(_PACKAGES, name, "") for name in ("bilevel", "bidora")),
    os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), ""),
)


class BilevelError(Exception):
    """Base class of every error raised on purpose by ``bilevel`` and ``bidora``."""


class BilevelWarning(UserWarning):
    """Something that is no error and should not pass unseen: a failed solve, a truncated trajectory."""


class ConfigError(BilevelError, ValueError):
    """A setting has a value that makes no sense, alone or together with another one."""


class UnknownNameError(ConfigError):
    """A method, field, hook, pattern or key that does not exist; the message lists what does."""


class ParameterError(BilevelError, ValueError):
    """Parameters of the wrong kind, structure or ownership."""


class GraphError(BilevelError, ValueError):
    """Problems that do not form a nested structure: a missing dependency, a cycle, shared ownership."""


class LossError(BilevelError, TypeError):
    """A loss that is no scalar, or not differentiable in the parameters it should depend on."""


class NonFiniteError(BilevelError, ArithmeticError):
    """A loss or gradient is NaN or infinite; no parameter was changed."""


class SolveError(BilevelError, ArithmeticError):
    """A hypergradient's linear solve failed and the caller asked for an exception."""


class SolveTimeoutError(SolveError, TimeoutError):
    """A hypergradient took longer than ``EngineConfig.solve_timeout``."""


class OutOfMemoryError(BilevelError, TorchOutOfMemoryError, MemoryError):
    """Memory ran out in a step; the message says in which pass. The step is undone, and the memory it held is free."""


class DataError(BilevelError, ValueError):
    """Data that is missing, empty, unreadable or malformed."""


class CheckpointError(BilevelError, ValueError):
    """A checkpoint that cannot be written, is damaged, or belongs to another structure."""


class HypergradientCheckError(BilevelError, AssertionError):
    """``hypergradcheck(..., raise_on_failure=True)`` found a hypergradient outside its tolerance."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
    """Builds the error for a name that does not exist, with the nearest match and the whole list.

    Args:
        kind: What was named, for the message: ``"method"``, ``"field of neumann"``, …
        name: The name that came.
        choices: The names that exist.

    Example:
        >>> print(unknown_name("method", "neuman", ["neumann", "identity"]))
        unknown method 'neuman': did you mean 'neumann'? Choices: 'identity', 'neumann'
    """
    known = sorted(choices)
    match = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {match[0]!r}?" if match else "."
    return UnknownNameError(f"unknown {kind} {name!r}{hint} Choices: {', '.join(map(repr, known)) or 'none'}")


def warn(text: str) -> None:
    """Warns with a :class:`BilevelWarning` at the line of the user's own code that led here: ``engine.run()``, say.

    Args:
        text: What to say.
    """
    level, frame = 2, sys._getframe().f_back
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, BilevelWarning, stacklevel=level)
