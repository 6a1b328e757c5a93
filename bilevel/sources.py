"""Configuration as text: files and ``key.sub=value`` overrides become mappings that know where a value came from."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bilevel.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["Override", "Source", "parse_override", "read_source"]

KeyPath = tuple[str, ...]

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# What pickles (protocol 2 and later) and the archives that torch.save writes begin with.
_BINARY_STARTS = (b"\x80", b"PK\x03\x04")
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")


@dataclass(frozen=True)
class Override:
    """One ``key.sub=value``.

    Attributes:
        path: The key's parts.
        value: The value as TOML has it; the text itself where it is no TOML value; None for ``null``.
        text: The value as it was written.
        written: The whole override as it was written.
    """

    path: KeyPath
    value: Any
    text: str
    written: str

    def __str__(self) -> str:
        return f"override {self.written}"


@dataclass
class Source:
    """Settings from one file or mapping with overrides put on top.

    Attributes:
        tree: Nested mappings.
        name: What to call the file or mapping in a message.
        overrides: Those that were put on top, by key path.
    """

    tree: dict[str, Any]
    name: str
    overrides: dict[KeyPath, Override] = field(default_factory=dict)

    def put(self, override: Override) -> None:
        """Sets one value, making the sections that lead to it.

        Raises:
            ConfigError: The key leads through something that is no section.
        """
        section = self.tree
        for depth, key in enumerate(override.path[:-1], start=1):
            inside = section.setdefault(key, {})
            if not isinstance(inside, dict):
                raise ConfigError(
                    f"{override}: {'.'.join(override.path[:depth])!r} is the value {inside!r} and no section, "
                    f"so nothing in it can be set"
                )
            section = inside
        section[override.path[-1]] = override.value
        self.overrides[override.path] = override

    def override_at(self, path: KeyPath) -> Override | None:
        """Returns the override that set this very key or a section above it."""
        return next((self.overrides[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.overrides), None)

    def origin(self, path: KeyPath) -> str:
        """Returns where the value at ``path`` came from, or those of a section, all of them."""
        tree: Any = self.tree
        for key in path:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return ", ".join(dict.fromkeys(self._origins(path, tree))) or self.name

    def _origins(self, path: KeyPath, tree: Any) -> Iterator[str]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from self._origins((*path, key), value)
        else:
            override = self.override_at(path)
            yield str(override) if override else self.name


def parse_override(text: str) -> Override:
    """Parses ``key.sub=value``; the value is TOML, else plain text, and ``null`` (which TOML lacks) is None.

    Raises:
        ConfigError: No ``=``, or an empty key.

    Example:
        >>> parse_override("hypergradient.terms=10").value, parse_override("hypergradient.method=cg").value
        (10, 'cg')
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"override {text!r} is not of the form key.sub=value, for example hypergradient.method=cg")
    value = value.strip()
    return Override(path, _toml_value(value), value, text.strip())


def _toml_value(text: str) -> Any:
    if text == "null":
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return float(text) if _FLOAT.match(text) else text  # TOML wants a digit on either side of the point
    return parsed["value"] if len(parsed) == 1 else text


def read_source(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> Source:
    """Reads a TOML, YAML or JSON file, or copies a mapping; None is an empty one.

    Raises:
        ConfigError: A file that is missing, unreadable, binary, malformed or of another kind.
    """
    if source is None:
        return Source({}, "no configuration file")
    if isinstance(source, Mapping):
        return Source(_plain(source, "the mapping", ()), "the mapping")
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"configuration must be a path or a mapping, not {type(source).__name__}")
    path = Path(source)
    parse = _PARSERS.get(path.suffix.lower())
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ConfigError(f"{path}: pickled files are refused, since reading one can run any code. {_expected()}")
    if parse is None:
        raise ConfigError(f"{path}: the extension {path.suffix!r} stands for no known format. {_expected()}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearby(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if content.startswith(_BINARY_STARTS):
        raise ConfigError(f"{path}: a pickle or an archive, whatever its name says, and so refused. {_expected()}")
    try:
        tree = parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). {_expected()}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: malformed: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: malformed: {_yaml_message(error)}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: the file must hold keys and values; it holds {tree!r:.60} ({type(tree).__name__})")
    return Source(_plain(tree, str(path), ()), str(path))


def _expected() -> str:
    return f"Write the settings as one of {', '.join(_PARSERS)}."


def _nearby(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PARSERS) if folder.is_dir() else []
    return f". There: {', '.join(found[:8])}" if found else ""


def _plain(tree: Mapping[Any, Any], name: str, path: KeyPath) -> dict[str, Any]:
    """Copies nested mappings as dictionaries and insists on string keys."""
    for key in tree:
        if not isinstance(key, str):
            place = ".".join((*path, repr(key)))
            raise ConfigError(f"{name}: keys must be text, but {place} is of type {type(key).__name__}")
    return {key: _plain_value(value, name, (*path, key)) for key, value in tree.items()}


def _plain_value(value: Any, name: str, path: KeyPath) -> Any:
    if isinstance(value, Mapping):
        return _plain(value, name, path)
    if isinstance(value, list):
        return [_plain_value(part, name, (*path, str(place))) for place, part in enumerate(value)]
    return value


def _repeated(key: str) -> str:
    return f"the key {key!r} occurs twice in one section"


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(_repeated(key))
        result[key] = value
    return result


class _YamlLoader(yaml.SafeLoader):
    """Plain YAML: scalars as in version 1.2 (``1e-3`` is a number, ``no`` is text), no anchors, no repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call, unused-ignore]
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"anchors and aliases are not supported, but {event.anchor!r} is one: write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="keys must be text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=_repeated(key.value), problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        rf"{_FLOAT.pattern[1:-1]}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _parse_yaml(text: str) -> Any:
    tree = yaml.load(text, Loader=_YamlLoader)
    return {} if tree is None else tree


def _yaml_message(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


_PARSERS = {".toml": tomllib.loads, ".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json}
