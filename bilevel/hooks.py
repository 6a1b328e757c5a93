"""Hooks that a user overrides by name, and the check that the name is one."""

from __future__ import annotations

from bilevel.errors import unknown_name

__all__ = ["check_hooks"]


def check_hooks(cls: type, base: type, prefix: str = "on_") -> None:
    """Refuses a class that defines a hook which its base class does not declare; call it from ``__init_subclass__``.

    A hook that is found by name and misspelt would be skipped in silence. Methods that come from mix-ins count too.

    Args:
        cls: The new class.
        base: The class that declares all hooks, with their defaults.
        prefix: What names of hooks start with.

    Raises:
        UnknownNameError: A method of ``cls`` has a hook's prefix but no hook's name; the message lists the hooks.

    Example:
        >>> class Base:
        ...     def on_step_end(self): ...
        ...     def __init_subclass__(cls): check_hooks(cls, Base)
        >>> class Mine(Base):
        ...     def on_stepend(self): ...
        Traceback (most recent call last):
            ...
        bilevel.errors.UnknownNameError: unknown hook of Mine 'on_stepend': did you mean 'on_step_end'? ...
    """
    declared = [name for name in dir(base) if name.startswith(prefix)]
    for owner in cls.__mro__:
        if owner in base.__mro__:
            continue
        for name, value in vars(owner).items():
            is_method = callable(value) or isinstance(value, classmethod | staticmethod)
            if is_method and name.startswith(prefix) and name not in declared:
                raise unknown_name(f"hook of {cls.__name__}", name, declared)
