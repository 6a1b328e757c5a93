"""Recipes: Python files that define ``build(config) -> Engine``, and what can be wrong with one."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import typing
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.config import RunConfig
from bilevel.engine import Engine
from bilevel.errors import BilevelError, ConfigError
from bilevel.schema import section_class

__all__ = ["Recipe", "RecipeError", "load_recipe", "place_in"]


class RecipeError(BilevelError):
    """A recipe's own code raised; the cause is attached, and the message names the line."""


@dataclass(frozen=True)
class _NoSettings:
    """What a recipe without a ``Config`` takes."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been imported.

    Attributes:
        path: Its file.
        module: The module.
        schema: What :func:`~bilevel.load_config` checks its configuration against.
        defaults: What counts for settings that are not given: the recipe's ``DEFAULTS``, if it has them.
    """

    path: Path
    module: ModuleType
    schema: type[RunConfig[Any]]
    defaults: RunConfig[Any] | None

    def build(self, config: RunConfig[Any]) -> Engine:
        """Calls the recipe's ``build``.

        Raises:
            ConfigError: It cannot be called with one argument, or returns something else than an engine.
            RecipeError: It raises an error that is none of ours.
        """
        build = self.module.build
        try:
            inspect.signature(build).bind(config)
        except TypeError as error:
            raise ConfigError(f"{self.path}: build must be callable as build(config): {error}") from error
        with self.located():
            engine = build(config)
        if not isinstance(engine, Engine):
            raise ConfigError(f"{self.path}: build(config) must return an Engine; it returned {engine!r:.80}")
        return engine

    @contextmanager
    def located(self) -> Iterator[None]:
        """Runs the body, with the line of the recipe in front of what its code raises; our own errors pass."""
        with _located(self.path):
            yield


def load_recipe(path: Path) -> Recipe:
    """Imports a recipe under a name of its own. What lies beside its file can be imported by it, as by a script.

    Raises:
        ConfigError: No such file, no ``build``, a ``Config`` that is no dataclass, or ``DEFAULTS`` of a wrong kind.
        RecipeError: Its code raises.
    """
    if path.suffix != ".py":
        raise ConfigError(f"{path}: a recipe must be a Python file (.py) that defines build(config)")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. A recipe is a Python file that defines build(config)")
    # Under this name dataclasses find the module that their annotations refer to.
    name = f"_bilevel_recipe_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with _located(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "build", None)):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{path}: a recipe must define build(config) -> Engine; its functions are: {', '.join(functions) or 'none'}"
        )
    config = getattr(module, "Config", None)
    if config is not None and not section_class(config):
        raise ConfigError(f"{path}: Config must be a dataclass, against which the section 'recipe' can be checked")
    schema = typing.cast("Any", RunConfig)[config or _NoSettings]
    defaults = getattr(module, "DEFAULTS", None)
    if defaults is not None and not isinstance(defaults, RunConfig):
        raise ConfigError(f"{path}: DEFAULTS must be a RunConfig, not {type(defaults).__name__}")
    return Recipe(path, module, schema, defaults)


@contextmanager
def _located(path: Path) -> Iterator[None]:
    try:
        yield
    except BilevelError:
        raise
    except SyntaxError as error:
        raise RecipeError(f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}") from error
    except Exception as error:
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
        raise RecipeError(f"{place_in(path, error) or path}: {type(error).__name__}: {error}{notes}") from error


def place_in(path: Path, error: BaseException) -> str:
    """Returns the last line of a file that an error passed through, as ``file:line, in function``; empty if none."""
    own = path.resolve()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == own]
    return f"{path}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""
