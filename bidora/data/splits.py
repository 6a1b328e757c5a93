"""Seeded splits that keep the shares of the classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from bilevel.errors import ConfigError, DataError


def stratified_split(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits rows in two, each class in the same proportion.

    Of a class with n rows, ``fraction * n`` go into the second part, rounded so that the parts have the sizes
    ``len(labels) - k`` and ``k = round(fraction * len(labels))`` where possible; a class with at least two rows has one
    in either part at least. The same arguments give the same rows on every platform.

    Args:
        labels: The class of each row.
        fraction: Share of the second part, in (0, 1).
        seed: Chooses which rows go where.

    Returns:
        The rows of the first part and those of the second, both ascending.

    Raises:
        ConfigError: The fraction is out of range.
        DataError: No class has two rows, so that the second part would be empty.

    Warns:
        UserWarning: A class has a single row, which is then in the first part only.

    Example:
        >>> stratified_split([0, 0, 0, 0, 1, 1], fraction=0.5)
        ([0, 1, 5], [2, 3, 4])
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"expected a fraction between 0 and 1, got {fraction}")
    rows = _rows_by_class(labels)
    single = [label for label, members in rows.items() if len(members) == 1]
    if len(single) == len(rows):
        raise DataError(
            f"cannot split {len(labels)} rows in two: no class has more than one row ({len(rows)} classes). "
            "Expected classes with several rows each; check the label column."
        )
    if single:
        warnings.warn(
            f"classes {single[:10]} have a single row, which stays in the first part of the split", stacklevel=2
        )
    shares = _quotas([len(members) for members in rows.values()], math.floor(fraction * len(labels) + 0.5))
    second: list[int] = []
    random = np.random.RandomState(seed)
    for share, members in zip(shares, rows.values(), strict=True):
        order = random.permutation(len(members))
        size = 0 if len(members) == 1 else min(max(share, 1), len(members) - 1)
        second.extend(members[place] for place in order[:size])
    chosen = set(second)
    return [row for row in range(len(labels)) if row not in chosen], sorted(second)


def stratified_sample(labels: Sequence[int], size: int, seed: int = 0) -> list[int]:
    """Draws ``size`` rows without replacement, each class in its proportion; ascending."""
    if size >= len(labels):
        return list(range(len(labels)))
    rows = _rows_by_class(labels)
    random = np.random.RandomState(seed)
    chosen: list[int] = []
    for share, members in zip(_quotas([len(members) for members in rows.values()], size), rows.values(), strict=True):
        chosen.extend(members[place] for place in random.permutation(len(members))[:share])
    return sorted(chosen)


def _rows_by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        rows[label].append(row)
    return rows


def _quotas(counts: Sequence[int], total: int) -> list[int]:
    """Divides ``total`` in proportion to ``counts``: whole parts first, then one each to the largest remainders."""
    whole = sum(counts)
    quotas = [count * total // whole for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda place: (-(counts[place] * total % whole), place))
    for place in by_remainder[: total - sum(quotas)]:
        quotas[place] += 1
    return quotas
