"""What can be wrong with a checkpoint, where the difference decides what happens next."""

from __future__ import annotations

from bilevel.errors import CheckpointError

__all__ = ["DamagedError", "MissingError", "StructureError"]


class DamagedError(CheckpointError):
    """The file is not what was written: truncated, changed, of another kind. An older checkpoint may be good."""


class MissingError(CheckpointError):
    """There is no such file."""


class StructureError(CheckpointError):
    """The file is good and belongs to an engine of another structure. Older ones of the same run do too."""
