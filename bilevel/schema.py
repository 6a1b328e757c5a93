"""What a dataclass says about the configuration it is built from: keys, sections, methods, types."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from bilevel.errors import ConfigError
from bilevel.hypergrad import Estimator
from bilevel.sources import KeyPath

__all__ = [
    "MAPPINGS",
    "SEQUENCES",
    "SchemaField",
    "admits_none",
    "describe_type",
    "dotted_keys",
    "element_of",
    "estimator_at",
    "is_estimator",
    "schema_fields",
    "section_class",
    "without_none",
]

MAPPINGS = (dict, collections.abc.Mapping)
SEQUENCES = (list, tuple, collections.abc.Sequence)


@dataclass(frozen=True)
class SchemaField:
    """A field of a schema: its type, and its default or MISSING."""

    hint: Any
    default: Any


def schema_fields(schema: Any) -> dict[str, SchemaField]:
    """Returns the fields of a dataclass, or of a generic one with its argument, that can be set."""
    cls = typing.get_origin(schema) or schema
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise ConfigError(f"the types of {cls.__name__}'s fields cannot be resolved: {error}") from error
    arguments = dict(zip(getattr(cls, "__parameters__", ()), typing.get_args(schema), strict=False))
    result = {}
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        hint = hints[f.name]
        result[f.name] = SchemaField(arguments.get(hint, Any) if isinstance(hint, TypeVar) else hint, default)
    return result


def without_none(hint: Any) -> Any:
    """Strips ``None`` from a union."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return typing.Union[tuple(part for part in typing.get_args(hint) if part is not types.NoneType)]  # noqa: UP007


def admits_none(hint: Any) -> bool:
    """Returns whether None is a value of the type."""
    return hint in (Any, None, types.NoneType) or types.NoneType in typing.get_args(hint)


def section_class(hint: Any) -> type | None:
    """Returns the dataclass that a section is built as, or None for a value."""
    cls = typing.get_origin(hint) or hint
    return cls if isinstance(cls, type) and dataclasses.is_dataclass(cls) else None


def is_estimator(hint: Any) -> bool:
    """Returns whether values of the type are methods."""
    return isinstance(hint, type) and issubclass(hint, Estimator)


def element_of(hint: Any, containers: tuple[type, ...]) -> Any:
    """Returns the type of a container's sections, or None if it is no such container or has no sections."""
    if typing.get_origin(hint) not in containers:
        return None
    arguments = [part for part in typing.get_args(hint) if part is not Ellipsis]
    return arguments[-1] if arguments and section_class(without_none(arguments[-1])) else None


def estimator_at(schema: Any, path: KeyPath, defaults: Any = None) -> SchemaField | None:
    """Returns the field at a key path if it holds an estimator, with its default in ``defaults`` if there are any."""
    found = SchemaField(schema, defaults)
    for key in path:
        hint = without_none(found.hint)
        if element := element_of(hint, MAPPINGS):
            found = SchemaField(element, MISSING)
        elif section_class(hint) and not is_estimator(hint) and key in (fields := schema_fields(hint)):
            found = SchemaField(fields[key].hint, getattr(found.default, key, fields[key].default))
        else:
            return None
    return found if path and is_estimator(without_none(found.hint)) else None


def dotted_keys(schema: Any, path: KeyPath = ()) -> Iterator[str]:
    """Yields the dotted keys of a schema's values."""
    for name, f in schema_fields(schema).items():
        hint = without_none(f.hint)
        if is_estimator(hint):
            fields = dataclasses.fields(f.default) if isinstance(f.default, Estimator) else ()
            yield from (".".join((*path, name, key)) for key in ("method", *(each.name for each in fields)))
        elif section_class(hint):
            yield from dotted_keys(hint, (*path, name))
        else:
            yield ".".join((*path, name))


def describe_type(hint: Any) -> str:
    """Returns a type in words, for a message."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in SEQUENCES:
        return "a list such as [1, 2]" if int in typing.get_args(hint) else "a list such as ['a', 'b']"
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")
