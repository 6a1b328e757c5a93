"""All parts together: taken at once, and put back all or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bilevel.checkpoint import DamagedError, StructureError
from bilevel.engine_state.generators import GENERATORS
from bilevel.engine_state.part import Part
from bilevel.engine_state.problem import BUFFERS, OPTIMIZERS, PARAMETERS, SCHEDULERS, UPDATES
from bilevel.engine_state.run import CALLBACKS, COUNTS, ESTIMATORS, METHODS, SCALES, STREAMS
from bilevel.errors import CheckpointError

if TYPE_CHECKING:
    from bilevel.engine import Engine

__all__ = ["PARTS", "engine_state", "load_engine_state"]

# In the order in which they are put back: what may fail by code of others first, generators last.
PARTS: tuple[Part, ...] = (
    METHODS,
    STREAMS,
    CALLBACKS,
    SCHEDULERS,  # some set learning rates when they are loaded, which the optimisers then overwrite
    OPTIMIZERS,
    SCALES,
    ESTIMATORS,
    UPDATES,
    PARAMETERS,
    BUFFERS,
    COUNTS,
    GENERATORS,
)

_TELLING_FIRST = (PARAMETERS, BUFFERS, *(part for part in PARTS if part not in (PARAMETERS, BUFFERS)))
_SHOWN = 10


def engine_state(engine: Engine) -> dict[str, Any]:
    """Returns the state as nested containers of tensors, numbers and text. It may share memory with the engine."""
    return {"problems": list(engine.problems), **{part.name: part.take(engine) for part in PARTS}}


def load_engine_state(engine: Engine, state: Mapping[str, Any]) -> None:
    """Takes a state back, after comparing all of it with the engine.

    Raises:
        CheckpointError: The state is that of an engine of another structure (``StructureError``, with the differences),
            is no engine's state (``DamagedError``), or could not be taken by data, a callback, an optimiser or a
            scheduler. The engine is then as it was.

    Cost: a copy of the engine's present state is held while the new one is taken.
    """
    _check(engine, state)
    # Drawing batches, which going to a position in the data does, may leave other generators behind where it fails.
    undo = [("generators", GENERATORS.undo(engine))]
    part = PARTS[0]
    try:
        for part in PARTS:
            undo.append((part.name, part.undo(engine)))
            part.put(engine, state[part.name])
    except BaseException as error:
        notes = _put_back(undo)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the checkpoint's {part.name} could not be loaded: {error}. "
            + ("The engine is as it was before." if not notes else " ".join(notes))
        ) from error


def _put_back(undo: list[tuple[str, Callable[[], None]]]) -> list[str]:
    """Undoes what was done, and returns what could not be undone."""
    notes = []
    for name, put_back in reversed(undo):
        try:
            put_back()
        except Exception as error:
            notes.append(f"What the engine had before as {name} could not be put back: {error}.")
    return notes


def _check(engine: Engine, state: Mapping[str, Any]) -> None:
    differences: list[str] = []
    where = "problems"
    try:
        saved = list(state["problems"])
        if saved != list(engine.problems):
            raise StructureError(
                f"the checkpoint belongs to another structure; nothing was loaded:\n  problems {', '.join(saved)} were "
                f"saved; this engine has {', '.join(engine.problems)}"
            )
        unknown = set(state) - {"problems", *(part.name for part in PARTS)}
        if unknown:
            raise ValueError(f"unknown parts: {', '.join(sorted(map(str, unknown)))}")
        for part in _TELLING_FIRST:
            where = part.name
            differences += part.differences(engine, state[part.name])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedError(
            f"the checkpoint holds no engine state (its {where}: {error!r}); nothing was loaded"
        ) from error
    if differences:
        more = len(differences) - _SHOWN
        shown = "\n  ".join(differences[:_SHOWN]) + (f"\n  … and {more} more" if more > 0 else "")
        raise StructureError(f"the checkpoint belongs to another structure; nothing was loaded:\n  {shown}")
