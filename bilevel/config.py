"""Names ↔ dataclasses: files and overrides in, validated objects out.

A schema is a dataclass. Its nested dataclasses are sections, an :class:`~bilevel.Estimator` is a section with the key
``method`` (or just the method's name), and everything else is a value of the field's type. Structure is walked here, so
that a key which nothing reads is an error with its full dotted path; single values are validated by pydantic.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Generic, NoReturn, TypeVar, overload

import pydantic
import pydantic_core

from bilevel.errors import BilevelError, ConfigError, UnknownNameError, unknown_name, warn
from bilevel.hypergrad import Estimator, Neumann, as_estimator, available_methods
from bilevel.schema import (
    MAPPINGS,
    SEQUENCES,
    SchemaField,
    admits_none,
    describe_type,
    dotted_keys,
    element_of,
    estimator_at,
    is_estimator,
    schema_fields,
    section_class,
    without_none,
)
from bilevel.settings import EngineConfig
from bilevel.sources import KeyPath, Override, Source, parse_override, read_source

__all__ = ["RunConfig", "dump_config", "load_config"]

T = TypeVar("T")
RecipeT = TypeVar("RecipeT")
PathOrMapping = str | os.PathLike[str] | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[RecipeT]):
    """Everything that a run is configured by; ``RunConfig[Config]`` checks the section ``recipe`` against a dataclass.

    Attributes:
        engine: The engine's settings.
        hypergradient: The method for problems that name none themselves.
        recipe: The recipe's own settings: its ``Config``, or a mapping that nothing has checked.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    hypergradient: Estimator = field(default_factory=Neumann)
    recipe: RecipeT = field(default_factory=typing.cast("Any", dict))


@overload
def load_config(
    path: PathOrMapping = None, overrides: Sequence[str] = (), *, defaults: RunConfig[T] | None = None
) -> RunConfig[T]: ...


@overload
def load_config(
    path: PathOrMapping = None, overrides: Sequence[str] = (), *, schema: type[T], defaults: T | None = None
) -> T: ...


@overload
def load_config(path: PathOrMapping, overrides: Sequence[str], schema: type[T], *, defaults: T | None = None) -> T: ...


def load_config(
    path: PathOrMapping = None,
    overrides: Sequence[str] = (),
    schema: type[Any] = RunConfig,
    *,
    defaults: Any = None,
) -> Any:
    """Returns a validated configuration from a file and overrides; keys that are not given keep their defaults.

    An override that changes a method drops the fields that the file gives to the *other* method, and warns which;
    fields from overrides are kept, in whatever order they come. Of two overrides of one key the later counts.

    Args:
        path: A TOML, YAML or JSON file; or a mapping, as :func:`dump_config` returns it.
        overrides: ``"key.sub=value"`` each. The value is TOML, else plain text; ``null`` is None.
        schema: The dataclass to build: :class:`RunConfig`, ``RunConfig[YourConfig]`` or any other.
        defaults: An object of the schema whose values count instead of those in the schema's own fields.

    Raises:
        UnknownNameError: A key, method or field that does not exist; the message has its path and the nearest match.
        ConfigError: A value of the wrong type or without sense, or a file that cannot be used; the message says which
            file or override it came from.

    Example:
        >>> config = load_config({"hypergradient": "neumann"}, ["hypergradient.terms=3", "engine.steps=20"])
        >>> config.hypergradient, config.engine.steps
        (Neumann(terms=3), 20)
    """
    if not section_class(schema):
        raise ConfigError(f"a configuration's schema must be a dataclass, not {schema!r}")
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a sequence of strings: write [{overrides!r}]")
    source = read_source(path)
    _put(source, [parse_override(text) for text in overrides], schema, defaults)
    return _Loader(source, schema).section(schema, source.tree, defaults, ())


def dump_config(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain values that JSON can hold; :func:`load_config` makes an equal object of them.

    Args:
        config: A dataclass object, nested as the loader makes them.

    Raises:
        ConfigError: It is none, or holds something that JSON cannot.

    Example:
        >>> dump_config(RunConfig())["hypergradient"]
        {'method': 'neumann', 'terms': 10, 'step_size': 'auto', 'damping': 0.0, 'rtol': 0.0, ...}
    """
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise ConfigError(f"a configuration must be a dataclass object, not {config!r}")
    dumped: dict[str, Any] = _dump(config)
    return dumped


def _dump(value: Any) -> Any:
    if isinstance(value, Estimator):
        return {key: _dump(part) for key, part in value.describe().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _dump(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _dump(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_dump(part) for part in value]
    try:
        return pydantic_core.to_jsonable_python(value)
    except pydantic_core.PydanticSerializationError as error:
        raise ConfigError(f"{value!r} cannot be written as JSON: {error}") from error


def _put(source: Source, overrides: Sequence[Override], schema: Any, defaults: Any) -> None:
    """Puts overrides on top of a source: first those that choose a method, so that the order of the others is free."""
    methods: dict[KeyPath, Override] = {}
    others = []
    for override in overrides:
        parent, last = override.path[:-1], override.path[-1]
        if isinstance(override.value, str) and estimator_at(schema, override.path):
            methods[override.path] = dataclasses.replace(override, path=(*override.path, "method"))
        elif last == "method" and estimator_at(schema, parent):
            methods[parent] = override
        else:
            others.append(override)
    for path, override in methods.items():
        _choose_method(source, override, path, estimator_at(schema, path, defaults))
    for override in others:
        if estimator_at(schema, override.path[:-1]):
            _expand(source, override.path[:-1])
        source.put(override)


def _choose_method(source: Source, override: Override, path: KeyPath, declared: SchemaField | None) -> None:
    section = _expand(source, path)
    old = section.get("method") or getattr(declared and declared.default, "name", None)
    dropped = {key: value for key, value in section.items() if key != "method"}
    new = _canonical(str(override.value))
    if dropped and new in available_methods() and new != _canonical(str(old)):
        warn(
            f"{override} replaces method {old!r} of {source.name}; the settings of that one are dropped: "
            + ", ".join(f"{key}={value!r}" for key, value in dropped.items()),
        )
        for key in dropped:
            del section[key]
    source.put(override)


def _expand(source: Source, path: KeyPath) -> dict[str, Any]:
    """Turns a method that was given by its name, or as an object, into a section, and returns it."""
    tree: Any = source.tree
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return {}  # put() has the error
    value = tree.get(path[-1])
    if isinstance(value, Estimator):
        value = value.describe()
    elif isinstance(value, str):
        value = {"method": value}
    tree[path[-1]] = {} if value is None else value
    return tree[path[-1]] if isinstance(tree[path[-1]], dict) else {}


def _canonical(name: str) -> str:
    if name in available_methods():
        return name
    try:
        return as_estimator(name).name  # an alias
    except BilevelError:
        return name


@dataclass(frozen=True)
class _Loader:
    """Builds objects from plain values, with errors that say where a value came from."""

    source: Source
    schema: Any

    def convert(self, hint: Any, value: Any, default: Any, path: KeyPath) -> Any:
        """Builds a value of the type ``hint``."""
        if value is None and admits_none(hint):
            return None
        core = without_none(hint)
        if core is Any and section_class(type(default)):  # the default says what the schema leaves open
            core = Estimator if isinstance(default, Estimator) else type(default)
        if is_estimator(core):
            return self.estimator(core, value, default, path)
        if section_class(core):
            return self.section(core, value, default, path)
        if (element := element_of(core, MAPPINGS)) and isinstance(value, Mapping):
            return {key: self.convert(element, part, MISSING, (*path, key)) for key, part in value.items()}
        if (element := element_of(core, SEQUENCES)) and isinstance(value, (list, tuple)):
            parts = [self.convert(element, part, MISSING, (*path, str(n))) for n, part in enumerate(value)]
            return tuple(parts) if typing.get_origin(core) is tuple else parts
        return self.value(hint, value, path)

    def section(self, schema: Any, tree: Any, default: Any, path: KeyPath) -> Any:
        """Builds a dataclass object from a mapping; what it lacks comes from ``default`` or the fields' defaults."""
        cls: type = typing.get_origin(schema) or schema
        if isinstance(tree, cls):
            return tree
        fields = schema_fields(schema)
        if not isinstance(tree, Mapping):
            self.fail(path, f"expected a section with the keys {', '.join(fields) or '(none)'}, came {_came(tree)}")
        for key in tree:
            if key not in fields:
                raise self.unknown_key((*path, key), [".".join((*path, name)) for name in fields])
        values, missing = {}, []
        for name, declared in fields.items():
            start = getattr(default, name) if isinstance(default, cls) else declared.default
            section = section_class(without_none(declared.hint))
            if name in tree:
                values[name] = self.convert(declared.hint, tree[name], start, (*path, name))
            elif section and not isinstance(start, section) and not (start is None and admits_none(declared.hint)):
                values[name] = self.convert(declared.hint, {}, MISSING, (*path, name))
            elif start is MISSING:
                missing.append(".".join((*path, name)))
            else:
                values[name] = start
        if missing:
            self.fail(path, f"no value for {', '.join(missing)}, which has no default")
        return self.build(cls, values, path)

    def estimator(self, base: type[Estimator], tree: Any, default: Any, path: KeyPath) -> Estimator:
        """Builds a method from its name or section, whose fields without ``method`` are those of the default's."""
        if isinstance(tree, base):
            return tree
        tree = {"method": tree} if isinstance(tree, str) else tree
        if not isinstance(tree, Mapping):
            self.fail(path, f"expected a method's name or a section with 'method' and its fields, came {_came(tree)}")
        fields = dict(tree)
        name = fields.pop("method", default.name if isinstance(default, Estimator) else None)
        if not isinstance(name, str):
            came, place = (
                (f"came {_came(name)}", (*path, "method")) if name is not None else ("no key 'method' came", path)
            )
            self.fail(place, f"expected the method's name, one of {', '.join(available_methods())}; {came}")
        try:
            cls = available_methods().get(name) or type(as_estimator(name))
        except BilevelError as error:
            self.fail((*path, "method"), str(error), kind=type(error))
        if not issubclass(cls, base):
            self.fail(path, f"expected a method of the kind {base.__name__}, came {name!r}")
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for key in fields:
            if key not in known:
                message = str(unknown_name(f"field of method {cls.name!r}:", key, known))
                self.fail((*path, key), message, kind=UnknownNameError)
        return typing.cast(Estimator, self.section(cls, fields, default, path))

    def value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """Validates a single value. Text becomes a number or truth value only where it was typed as an override."""
        if hint is Any:
            return value
        # A BaseModel has a configuration of its own
        options: Any = {"arbitrary_types_allowed": True}
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(hint, config=options)
        attempts: list[Callable[[], Any]] = [
            lambda: adapter.validate_python(value, strict=True),
            # JSON's rules take a list for a tuple and text for a path.
            lambda: adapter.validate_json(json.dumps(value, default=str), strict=True),
        ]
        if isinstance(value, float) and value.is_integer():
            attempts.append(lambda: adapter.validate_python(int(value), strict=True))
        override = self.source.override_at(path)
        if override and override.path == path and value is not None:
            attempts.append(lambda: adapter.validate_strings(override.text))
        for attempt in attempts:
            try:
                return attempt()
            except pydantic.ValidationError:
                continue
        self.fail(path, f"expected {describe_type(hint)}, came {_came(value)}")

    def build(self, cls: type, values: Mapping[str, Any], path: KeyPath) -> Any:
        """Calls a dataclass, with the file and the section in front of what its own checks say."""
        try:
            return cls(**values)
        except (BilevelError, ValueError, TypeError) as error:
            kind = type(error) if isinstance(error, BilevelError) else ConfigError
            self.fail(path, str(error), kind=kind)

    def unknown_key(self, path: KeyPath, siblings: Sequence[str]) -> UnknownNameError:
        """Says what exists beside an unknown key, or where a key of this name is."""
        dotted = ".".join(path)
        elsewhere = [key for key in dotted_keys(self.schema) if key.rpartition(".")[2] == path[-1]]
        if not siblings:
            note = (
                ": define a dataclass Config in the recipe, and they are its fields" if path[:-1] == ("recipe",) else ""
            )
            message = f"unknown key {dotted!r}: the section {'.'.join(path[:-1])!r} takes no keys{note}"
        elif elsewhere:
            choices = ", ".join(map(repr, sorted(siblings))) or "none"
            message = f"unknown key {dotted!r}: did you mean {elsewhere[0]!r}? Choices: {choices}"
        else:
            message = str(unknown_name("key", dotted, siblings))
        return UnknownNameError(f"{self.source.origin(path)}: {message}")

    def fail(self, path: KeyPath, message: str, *, kind: type[BilevelError] = ConfigError) -> NoReturn:
        """Raises with the origin and, where that does not say it, the key in front of the message."""
        said = not path or path in self.source.overrides
        raise kind(f"{self.source.origin(path)}: {'' if said else '.'.join(path) + ': '}{message}") from None


def _came(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "a truth value",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a section",
    }
    return f"{value!r:.80} ({kinds.get(type(value), type(value).__name__)})"
