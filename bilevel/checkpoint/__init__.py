"""State on disk: one safetensors file with JSON in its header, written whole or not at all, never a pickle."""

from bilevel.checkpoint.errors import DamagedError, MissingError, StructureError
from bilevel.checkpoint.folder import (
    Entry,
    damaged_files,
    duplicate,
    entries,
    file_name,
    prune,
    remove_partials,
    set_aside,
)
from bilevel.checkpoint.format import read_state, write_state
from bilevel.checkpoint.lock import FolderLock

__all__ = [
    "DamagedError",
    "Entry",
    "FolderLock",
    "MissingError",
    "StructureError",
    "damaged_files",
    "duplicate",
    "entries",
    "file_name",
    "prune",
    "read_state",
    "remove_partials",
    "set_aside",
    "write_state",
]
