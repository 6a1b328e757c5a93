"""Metrics of several batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["mean_metrics"]


def mean_metrics(metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Averages what the loss returned for several batches; those of one batch are returned as they are."""
    if len(metrics) == 1:
        return metrics[0]
    found: dict[str, list[float]] = {}
    for one in metrics:
        for key, value in one.items():
            found.setdefault(key, []).append(float(value))
    return {key: sum(values) / len(values) for key, values in found.items()}
