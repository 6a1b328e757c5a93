"""Packages that only some callbacks need."""

from __future__ import annotations

import importlib.util

from bilevel.errors import ConfigError

__all__ = ["require"]


def require(owner: str, package: str, extra: str) -> None:
    """Raises unless a package is installed, without importing it.

    Args:
        owner: The callback that needs it, for the message.
        package: What is imported.
        extra: The extra of this distribution that installs it.

    Raises:
        ConfigError: The package is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{owner} needs the package {package}, which is not installed: pip install 'bilevel[{extra}]'"
        )
