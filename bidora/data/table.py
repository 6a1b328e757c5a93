"""A table with named columns, whatever file or library it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bilevel.errors import DataError


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; a column is read when it is asked for.

    Attributes:
        origin: Where it came from, for messages.
        names: The columns, in order.
        num_rows: Their length.
        column: Reads one column.
        class_names: The names behind the integers of a column, where the file declares them.
    """

    origin: str
    names: tuple[str, ...]
    num_rows: int
    column: Callable[[str], list[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def from_columns(origin: str, columns: Mapping[str, list[Any]]) -> Table:
    """Builds a table from lists of equal length."""
    num_rows = len(next(iter(columns.values()))) if columns else 0
    return Table(origin, tuple(columns), num_rows, columns.__getitem__)


def from_records(origin: str, header: list[str], records: Iterable[tuple[int, list[str]]]) -> Table:
    """Builds a table from rows of text fields, each with its line number.

    Raises:
        DataError: Two columns have one name, or a row is shorter or longer than the header.
    """
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{origin}: expected column names that differ, but {repeated} come twice. Rename the columns.")
    rows: list[list[str]] = []
    for line, fields in records:
        if len(fields) == 1 and not fields[0].strip():
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{origin}: line {line} has {len(fields)} fields, but the header has {len(header)} ({header}). "
                "Check the separator and the quotes there: a field that holds the separator must be quoted."
            )
        rows.append(fields)
    return from_columns(origin, {name: [row[place] for row in rows] for place, name in enumerate(header)})


def concatenate(tables: list[Table]) -> Table:
    """Joins shards that have the same columns.

    Raises:
        DataError: The columns differ.
    """
    first, *others = tables
    for other in others:
        if set(other.names) != set(first.names):
            raise DataError(
                f"expected files with the same columns, but {first.origin} has {list(first.names)} "
                f"and {other.origin} has {list(other.names)}"
            )
    if not others:
        return first

    def column(name: str) -> list[Any]:
        return [value for table in tables for value in table.column(name)]

    return Table(first.origin, first.names, sum(table.num_rows for table in tables), column, first.class_names)
