"""A run's folder of checkpoints: names, order, retention, and what killed writers leave behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bilevel.checkpoint.format import PARTIAL, partial_path, sync_directory
from bilevel.errors import CheckpointError

__all__ = ["Entry", "damaged_files", "duplicate", "entries", "file_name", "prune", "remove_partials", "set_aside"]

DAMAGED = ".damaged"

_SUFFIX = ".safetensors"
_NAME = re.compile(rf"(step|best)-([0-9]+){re.escape(_SUFFIX)}")
_LEFT_BEHIND = re.compile(rf"\.{_NAME.pattern}\.[0-9]+\.[0-9a-f]+{re.escape(PARTIAL)}")


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a folder.

    Attributes:
        step: How many outer steps the engine had taken.
        kind: ``"step"`` or ``"best"``.
        path: The file.
    """

    step: int
    kind: str
    path: Path


def file_name(kind: str, step: int) -> str:
    """Returns the name of a checkpoint's file.

    Example:
        >>> file_name("step", 1200)
        'step-00001200.safetensors'
    """
    return f"{kind}-{step:08d}{_SUFFIX}"


def entries(folder: Path) -> list[Entry]:
    """Returns what is there by name, newest first; at one step, the periodic one before the best one.

    Raises:
        CheckpointError: The folder cannot be read. One that does not exist is empty.
    """
    found = [(match, name) for name in _names(folder) if (match := _NAME.fullmatch(name))]
    listed = [Entry(int(match[2]), match[1], folder / name) for match, name in found]
    return sorted(listed, key=lambda entry: (-entry.step, entry.kind != "step"))


def damaged_files(folder: Path) -> list[Path]:
    """Returns the files that were set aside."""
    return sorted(folder / name for name in _names(folder) if name.endswith(_SUFFIX + DAMAGED))


def duplicate(source: Path, target: Path) -> bool:
    """Gives a finished file a second name; returns whether the file system can do this."""
    temporary = partial_path(target)
    try:
        os.link(source, temporary)
    except OSError:
        return False
    try:
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both names were one file's already
    return True


def set_aside(entry: Entry) -> Path:
    """Renames a damaged file, so that nothing counts it as a checkpoint; returns its new path."""
    target = entry.path.with_name(entry.path.name + DAMAGED)
    os.replace(entry.path, target)
    return target


def prune(folder: Path, kind: str, keep: int) -> None:
    """Removes all files of one kind but the newest ones.

    Args:
        folder: Where.
        kind: ``"step"`` or ``"best"``.
        keep: How many stay.

    Raises:
        OSError: A file cannot be removed.
    """
    _remove(entry.path for entry in [entry for entry in entries(folder) if entry.kind == kind][keep:])


def remove_partials(folder: Path) -> None:
    """Removes unfinished files of writers that were killed. No other writer may be at work in the folder.

    Raises:
        OSError: A file cannot be removed.
    """
    _remove(folder / name for name in _names(folder) if _LEFT_BEHIND.fullmatch(name))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoint folder {folder} cannot be read: {error.strerror or error}") from error
