"""Labels as a source writes them, and as contiguous ids with names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bilevel.errors import DataError

_INTEGER = re.compile(r"[+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def label_name(value: Any, origin: str) -> str:
    """Returns the name of a class: ``"3"`` for 3, ``"3"`` and ``3.0``, else the text itself.

    Raises:
        DataError: The value is a number with a fraction (regression), or no text, integer or boolean.
    """
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, str):
        value = value.strip()
        if not _DECIMAL.fullmatch(value):
            return str(value)
    if isinstance(value, (str, float)):
        if float(value).is_integer():
            return str(int(float(value)))
        raise DataError(
            f"{origin} holds the number {value}: expected classes, written as text or integers. Regression is not "
            "supported; to classify, turn the numbers into classes first."
        )
    raise DataError(f"{origin} holds {str(value)[:60]!r} of type {type(value).__name__}: expected text or integers.")


def order_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the classes in the order of their ids: numbers by value, text by code point.

    Example:
        >>> order_names(["10", "9", "2", "9"])
        ('2', '9', '10')
    """
    distinct = set(names)
    if all(_INTEGER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def check_labels(labels: Iterable[int], num_labels: int, origin: str = "the data") -> None:
    """Checks that every label is the id of one of a model's classes.

    Args:
        labels: Ids.
        num_labels: The classes of the model, with ids from 0.
        origin: Where the labels came from, for the message.

    Raises:
        DataError: A label is no integer, or out of range.
    """
    for row, label in enumerate(labels):
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise DataError(
                f"{origin}: expected integer labels, got {label!r} of type {type(label).__name__} in row {row}. "
                "Regression is not supported."
            )
        if not 0 <= label < num_labels:
            remedy = "build the model with more classes (num_labels)" if label > 0 else "remove rows without a label"
            raise DataError(
                f"{origin}: expected labels from 0 to {num_labels - 1}, as the model has {num_labels} classes, got "
                f"{label} in row {row}. Correct the label, or {remedy}."
            )


def encode(names: Sequence[str], classes: Sequence[str], origin: str, expected: str) -> list[int]:
    """Maps names to ids.

    Raises:
        DataError: A name is none of the classes; ``expected`` says where these come from.
    """
    ids = {name: place for place, name in enumerate(classes)}
    unknown = sorted({name for name in names if name not in ids})
    if unknown:
        raise DataError(
            f"{origin} has the labels {unknown[:10]}, which are not among {expected}: {list(classes)[:20]}. "
            "Remove those rows or correct the labels."
        )
    return [ids[name] for name in names]
