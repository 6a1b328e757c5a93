"""A log of one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from bilevel.callbacks.log_file import LogFile

__all__ = ["JSONLinesLog"]


class JSONLinesLog(LogFile):
    """Writes one JSON object a step to a file.

    Its fields, each by problem name where it is a mapping:

    - ``step``: number of the step, from 1.
    - ``loss``, ``gradient_norm``: the last of the step.
    - ``metric``, ``evaluate``: further values of the losses, and what ``evaluate()`` returned, by ``"problem/metric"``;
      ``evaluate`` only where it was called. Called outside of a step, it makes a row of its own.
    - ``solve``: ``method``, ``status``, ``residual``, ``iterations``, ``products``, ``error_bound`` and
      ``inner_gradient_norm`` of each best-response product; null where a number is not known.
    - ``passes``: ``forward`` and ``backward``.
    - ``learning_rate``: of every parameter group, after the step: that of the next update.
    - ``skipped``: the problem for which the step was skipped, or null.
    - ``overflows``: updates left out since gradients overflowed in float16, where there were any.
    - ``values``: what other callbacks publish (:meth:`Callback.values`), where there is any.
    - ``seconds``: wall time of the step, if asked for.

    JSON has no NaN and no infinity: they are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which Python's
    ``float()`` and JavaScript's ``Number()`` read. Everything else reads back as the same float.

    The file is flushed every step. The state keeps its length, and a resumed run cuts it back to that: the file of an
    interrupted and resumed run is that of an uninterrupted one, bit for bit, unless ``seconds`` are in it. Where the
    disk is full, rows are lost with a warning and counted in ``lost_rows``; the run goes on. Under data parallelism,
    rank 0 writes its own values.

    Args:
        path: The file; missing folders are made.
        overwrite: Whether a new run may replace what is in the file.
        seconds: Whether rows hold the wall time of the step.

    Raises:
        ConfigError: When the run starts: the file is not empty and this is a new run, or it cannot be opened.
        CheckpointError: When a resumed run starts: the file is shorter than the state says, or missing.

    Example:
        >>> log = JSONLinesLog("run.jsonl")  # Engine(..., callbacks=[log])
    """

    def _rows(self, record: Mapping[str, Any]) -> bytes:
        return json.dumps(_representable(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _representable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _representable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_representable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
