"""Going on from the newest good checkpoint of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.checkpoint import DamagedError, MissingError, damaged_files, entries
from bilevel.errors import CheckpointError, warn

if TYPE_CHECKING:
    from bilevel.engine import Engine

__all__ = ["resume_engine"]


def resume_engine(engine: Engine, folder: str | os.PathLike[str]) -> int | None:
    """Loads the newest good checkpoint that the callback ``Checkpoints`` wrote to a folder.

    A damaged file is reported by a :class:`~bilevel.errors.BilevelWarning`, and the one before it is taken.

    Args:
        engine: Made as the one that was saved.
        folder: Where the checkpoints are.

    Returns:
        The number of outer steps that the engine has now taken; None where the folder holds no checkpoint or does not
        exist, and nothing was changed.

    Raises:
        CheckpointError: All checkpoints are damaged, the newest good one is of an engine of another structure, or the
            folder cannot be read. Nothing has changed then.
    """
    where = Path(folder)
    reasons: list[str] = []
    for entry in entries(where):
        try:
            engine.load(entry.path)
        except (DamagedError, MissingError) as error:
            reasons.append(f"{entry.path.name}: {error}")
            continue
        if reasons:
            _warn(f"resumed from {entry.path.name}, because later checkpoints are damaged:", reasons)
        return engine.step_count
    if reasons:
        listed = "\n  ".join(reasons)
        raise CheckpointError(
            f"all {len(reasons)} checkpoints in {where} are damaged; nothing was loaded:\n  {listed}\nTo start again, "
            "move them away or name another folder"
        )
    left = damaged_files(where)
    if left:
        _warn(f"{where} holds no checkpoint but damaged ones that were set aside:", [path.name for path in left])
    return None


def _warn(text: str, lines: list[str]) -> None:
    warn("\n  ".join([text, *lines]))
