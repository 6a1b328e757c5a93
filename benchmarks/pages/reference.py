"""The configuration reference, written from the dataclasses and the commands themselves whenever the pages are built.

A page says ``<!-- reference: NAME -->`` where a part belongs. What the code does not document fails the build.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs runs from anywhere

import bilevel
import bilevel.callbacks
import bilevel.cli
from bilevel.hypergrad import Estimator, available_methods
from bilevel.schema import admits_none, describe_type, is_estimator, schema_fields, section_class, without_none

MARKER = re.compile(r"^<!-- reference: (.+?) -->$", re.M)
REFERS = re.compile(r"(\blikewise|, see `\w+`)\.$")  # to what a base class says of the same field
PROBE = "?"  # a value that no field admits: what a refusal says is what is admitted
WORDS = {
    "true or false": "`True` or `False`",
    "True or False": "`True` or `False`",
    "or None": "or `None`",
    "null": "`None`",
    "Any": "any",
    "Path": "a path",
    "a list such as ['a', 'b']": "a list of text",
    "list[str]": "repeatable",
    "'auto'": '`"auto"`',
}
OPEN = {"recipe": "the keys of its `Config`", "hypergradient": "a [method](#methods), its name, or a mapping"}
"""What fields of no declared type admit."""


@dataclass(frozen=True)
class Row:
    """One thing that can be set."""

    name: str
    values: str
    default: str
    meaning: str


def documented(cls: type) -> dict[str, str]:
    """Returns what the docstrings of a class and its bases say of each attribute or argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "") + "\n"
        for section in re.findall(r"^(?:Attributes|Args):\n((?:    .*\n|\n)*)", text, re.M):
            for name, meaning in re.findall(r"^    (\w+): +(.*?)(?=^    \w|\Z)", section, re.M | re.S):
                words = as_markdown(" ".join(meaning.split()))
                if name not in found or not REFERS.search(words):
                    found[name] = words
    return found


def as_markdown(text: str) -> str:
    """Turns what our docstrings use of reStructuredText into Markdown, fit for a table's cell."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`").replace("|", "\\|")


def fields_of(cls: type, only: Callable[[str], bool] = lambda name: True) -> list[Row]:
    """Returns the fields of a dataclass: what they admit is asked of the class itself.

    Raises:
        ValueError: A field that no docstring describes.
    """
    meanings = documented(cls)
    declared = schema_fields(cls)
    help_texts = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(cls)}
    names = [name for name in _own_first(cls, declared) if only(name)]
    rows = []
    for name in names:
        field = declared[name]
        values = OPEN[name] if field.hint is Any else admitted(lambda n=name: _again(cls, n), name, field.hint)
        rows.append(Row(name, values, shown(field.default), meanings.get(name) or help_texts[name]))
    _refuse_undescribed(cls.__name__, rows)
    return rows


def arguments_of(cls: type) -> list[Row]:
    """Returns the arguments of a class that is no dataclass, as its docstring describes them."""
    meanings = documented(cls)
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    rows = [
        Row(p.name, "", "" if p.default is p.empty else shown(p.default), meanings.get(p.name, "")) for p in parameters
    ]
    _refuse_undescribed(cls.__name__, rows)
    return rows


def options_of(command: Callable[..., None]) -> list[Row]:
    """Returns the arguments and options of a command."""
    hints = typing.get_type_hints(command, include_extras=True)
    rows = []
    for parameter in inspect.signature(command).parameters.values():
        hint, info = typing.get_args(hints[parameter.name])[:2]
        core = without_none(hint)
        if type(info).__name__ == "ArgumentInfo":
            name, values = (info.metavar or parameter.name.upper()).strip("[]."), ""
        else:
            # within Annotated, typer takes the first name for the default
            flags = [flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]
            name = "`, `".join(flags or [f"--{parameter.name.replace('_', '-')}"])
            values = f"`{info.metavar}`" if info.metavar else "" if core is bool else _in_words(describe_type(core))
        rows.append(Row(name, values, _option_default(parameter.default), as_markdown(info.help or "")))
    _refuse_undescribed(command.__name__, rows)
    return rows


def admitted(build: Callable[[], object], name: str, hint: Any) -> str:
    """Returns which values a field admits: what its class says when it refuses one, else its type in words."""
    none = " or `None`" if admits_none(hint) else ""
    if section_class(without_none(hint)) and not is_estimator(without_none(hint)):
        return "a section"
    if is_estimator(without_none(hint)):
        return f"a [method](#methods){none}"
    try:
        build()
    except (TypeError, ValueError) as error:
        choices = re.search(r"Choices: (.+)$", str(error))
        if choices is not None and f".{name}" in str(error):
            return ", ".join(f"`{choice}`" for choice in choices[1].replace("'", '"').split(", ")) + none
        said = re.search(rf"\.{name} must be (.+?), not '", str(error))
        if said is not None:
            word = " or a word" if str in typing.get_args(hint) and "'" not in said[1] else ""
            return _in_words(said[1]) + word + ("" if said[1].endswith("None") else none)
    return _in_words(describe_type(hint))


def shown(value: Any) -> str:
    """Returns a default as Python writes it."""
    if value is MISSING:
        return "required"
    if isinstance(value, bilevel.EngineConfig):
        return "its own"
    return f"`{value!r}`".replace("'", '"')


def table(rows: Sequence[Row], heading: str) -> list[str]:
    """Returns rows as a Markdown table, without columns that are empty throughout."""
    columns = {
        heading: [f"`{row.name}`" for row in rows],
        "values": [row.values for row in rows],
        "default": [row.default for row in rows],
        "meaning": [row.meaning for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(kept), ["---"] * len(kept), *map(list, zip(*kept.values(), strict=True))]
    return ["", *("| " + " | ".join(line) + " |" for line in lines), ""]


def methods() -> Iterator[str]:
    """Yields every method that is installed."""
    for name, cls in available_methods().items():
        public = getattr(bilevel, cls.__name__, None) is cls
        yield from (f"### {name}", "")
        yield f"[`{cls.__name__}`][bilevel.{cls.__name__}]: {cls.summary}." if public else f"{cls.summary}."
        notes = {"For": cls.purpose, "Cost": cls.cost, "Memory": cls.storage, "Needs": cls.needs}
        yield " ".join(f"*{label}:* {text}." for label, text in notes.items() if text)
        rows = fields_of(cls)
        yield from table(rows, "field") if rows else ("", "It has no fields.", "")


def problem() -> Iterator[str]:
    """Yields the arguments of a problem."""
    yield from table(arguments_of(bilevel.Problem), "argument")


def callbacks() -> Iterator[str]:
    """Yields every callback with its arguments."""
    for name in bilevel.callbacks.__all__:
        cls = getattr(bilevel.callbacks, name)
        if cls is bilevel.Callback:
            continue
        rows = arguments_of(cls)
        yield from (f"### {name}", "", f"[`{name}`][bilevel.callbacks.{name}]")
        yield from table(rows, "argument") if rows else ("", "It takes no arguments.", "")


def train_settings() -> Iterator[str]:
    """Yields what ``bidora train`` is configured by."""
    from bidora.settings import TrainSettings

    yield from table(fields_of(TrainSettings), "key")


def training_arguments() -> Iterator[str]:
    """Yields the arguments that are BiDoRA's own, or have another default than Hugging Face's."""
    from bidora import BiDoRATrainingArguments

    yield from table(fields_of(BiDoRATrainingArguments, only=own_training_arguments().__contains__), "argument")


def own_training_arguments() -> list[str]:
    """Returns the names of the fields that ``transformers.TrainingArguments`` does not have so."""
    from bidora import BiDoRATrainingArguments

    return [name for name in BiDoRATrainingArguments.__annotations__ if not name.startswith("_")]


def adapter() -> Iterator[str]:
    """Yields PEFT's fields that BiDoRA fixes, found by setting each of them."""
    from bidora import BiDoRAConfig
    from bidora.config import check_config
    from bilevel.errors import ConfigError

    refused = {}
    for field in dataclasses.fields(BiDoRAConfig):
        changed = copy.copy(BiDoRAConfig())
        setattr(changed, field.name, None if field.name == "use_dora" else PROBE)
        try:
            check_config(changed)
        except ConfigError:
            refused[field.name] = field.default
    yield from table([Row(name, "", shown(default), "") for name, default in refused.items()], "field that must stay")


def commands(app: Any, program: str) -> Iterator[str]:
    """Yields the subcommands of a command line with their options."""
    for registered in app.registered_commands:
        name = registered.name or registered.callback.__name__
        yield from (f"### {program} {name}", "", as_markdown(inspect.getdoc(registered.callback) or ""))
        yield from table(options_of(registered.callback), "option")


def bidora_commands() -> Iterator[str]:
    """Yields those of ``bidora``."""
    import bidora.cli

    yield from commands(bidora.cli.app, "bidora")


PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    "run": lambda: iter(table(fields_of(bilevel.RunConfig), "section")),
    "engine": lambda: iter(table(fields_of(bilevel.EngineConfig), "key")),
    "methods": methods,
    "certificate": lambda: iter(table(fields_of(bilevel.Certificate), "field")),
    "problem": problem,
    "callbacks": callbacks,
    "bidora train": train_settings,
    "training arguments": training_arguments,
    "adapter": adapter,
    "bilevel commands": lambda: commands(bilevel.cli.app, "bilevel"),
    "bidora commands": bidora_commands,
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the parts of the reference where a page asks for them.

    Raises:
        ValueError: There is no such part, or a field of it is not documented.
    """
    return MARKER.sub(lambda match: part(match[1]), markdown)


def part(name: str) -> str:
    """Returns one part as Markdown."""
    if name not in PARTS:
        raise ValueError(f"there is no part {name!r} of the reference: choose of {', '.join(PARTS)}")
    return "\n".join(PARTS[name]())


def _again(cls: type, name: str) -> object:
    return cls(**{name: PROBE})


def _option_default(value: Any) -> str:
    if value is None or value is False or value is inspect.Parameter.empty:
        return ""
    return f"`{value}`"


def _own_first(cls: type, declared: Mapping[str, Any]) -> list[str]:
    return list(cls.defaults()) if issubclass(cls, Estimator) else list(declared)


def _in_words(described: str) -> str:
    for word, text in WORDS.items():
        described = re.sub(rf"(?<![\w`]){re.escape(word)}(?![\w`])", text, described)
    return described


def _refuse_undescribed(owner: str, rows: Sequence[Row]) -> None:
    missing = [row.name for row in rows if not row.meaning.strip()]
    if missing:
        raise ValueError(f"{owner}: no docstring describes {', '.join(missing)}")
