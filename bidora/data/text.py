"""Labelled text for a classifier: found, checked, and split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from bidora.data.columns import find_columns
from bidora.data.labels import encode, is_missing, label_name, order_names
from bidora.data.sources import DEFAULT_DATA, read_source
from bidora.data.splits import stratified_sample, stratified_split
from bidora.data.table import Table
from bilevel.errors import ConfigError, DataError


@dataclass(frozen=True)
class TextData:
    """Labelled text, ready to be tokenised.

    The datasets have the columns ``text``, ``text_pair`` for pairs of texts, and ``labels`` (ids), and live in memory.

    Attributes:
        source: What was asked for.
        train: What may be learned from; BiDoRA splits it once more.
        validation: For early stopping and choices, None where the source has none.
        test: For the figure that is reported, and nothing else.
        test_origin: Where ``test`` comes from, in words.
        label_names: The name of each class, by id.
        text_columns: The columns of the source that became ``text`` and ``text_pair``.
        label_column: The column that became ``labels``.
    """

    source: str
    train: Dataset
    validation: Dataset | None
    test: Dataset
    test_origin: str
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return len(self.label_names)

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id, as a model's configuration holds them."""
        return dict(enumerate(self.label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Ids by class name, as a model's configuration holds them."""
        return {name: place for place, name in enumerate(self.label_names)}


@dataclass(frozen=True)
class _Rows:
    """One split as lists: each text column, and the names of the classes."""

    texts: tuple[list[str], ...]
    labels: list[str]
    origin: str

    def take(self, rows: Sequence[int]) -> _Rows:
        texts = tuple([column[row] for row in rows] for column in self.texts)
        return _Rows(texts, [self.labels[row] for row in rows], self.origin)


def load_text_data(
    source: str | Path = DEFAULT_DATA,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    test_source: str | Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    test_size: float = 0.2,
    max_rows: int | None = None,
    drop_missing: bool = False,
    seed: int = 0,
) -> TextData:
    """Loads labelled text for classification.

    The test split is the source's own; else its validation split (as in GLUE, whose test labels are secret), which is
    then not available for choices; else a stratified share of the training rows.

    Args:
        source: ``"drug-reviews"`` (packaged: positive or negative) or ``"drug-reviews-3"`` (neutral too); a file (CSV,
            TSV, JSONL or JSON, also gzipped; Parquet); a folder with files named train, validation and test; or a hub
            id such as ``"nyu-mll/glue"``.
        text_columns: One column, or two for pairs; by default the usual names.
        label_column: The column with the class, text or integers; by default the usual names.
        label_names: The classes in the order of their ids, for a model that exists. By default those that the source
            declares, else those that occur in the training rows, sorted.
        test_source: Where the test rows are, if not in ``source``.
        subset: Configuration of a hub set, such as ``"rte"``.
        revision: Commit or branch of a hub set.
        test_size: Share of the training rows to hold out where there is no other test split.
        max_rows: Most rows of each split, drawn at random in the classes' proportions.
        drop_missing: Leave rows out that lack a text or a label, instead of refusing them.
        seed: Chooses the rows that are held out or drawn.

    Raises:
        ConfigError: ``test_size`` or ``max_rows`` is out of range, or ``label_names`` repeat.
        DataError: The source cannot be found or read, lacks a column, has missing values, numbers for labels, a single
            class, or labels that training does not have.

    Warns:
        UserWarning: A split has no labels and is left out, or a class has a single row.
    """
    _check_arguments(test_size, max_rows, label_names)
    tables = read_source(source, subset, revision)
    if test_source is not None:
        other = read_source(test_source, subset, revision)
        tables["test"] = other.get("test", other["train"])
    train_table = tables["train"]
    texts, label = find_columns(train_table.names, train_table.origin, text_columns, label_column)
    found = {split: _rows(table, texts, label, drop_missing, split == "train") for split, table in tables.items()}
    rows = {split: split_rows for split, split_rows in found.items() if split_rows is not None}

    declared = tuple(label_names or train_table.class_names.get(label, ()))
    classes = declared or order_names(rows["train"].labels)
    _check_classes(rows["train"], classes, label)
    splits, test_origin = _with_test(rows, classes, test_size, seed)
    expected = "the declared classes" if declared else "those of the training rows"
    datasets = {split: _dataset(part, classes, expected, max_rows, seed) for split, part in splits.items()}
    if len(set(datasets["train"]["labels"])) < 2:
        raise DataError(f"{train_table.origin}: max_rows={max_rows} leaves rows of a single class. Ask for more rows.")
    return TextData(
        source=str(source),
        train=datasets["train"],
        validation=datasets.get("validation"),
        test=datasets["test"],
        test_origin=test_origin,
        label_names=classes,
        text_columns=texts,
        label_column=label,
    )


def _check_arguments(test_size: float, max_rows: int | None, label_names: Sequence[str] | None) -> None:
    if not 0 < test_size < 1:
        raise ConfigError(f"expected test_size between 0 and 1, got {test_size}")
    if max_rows is not None and max_rows < 2:
        raise ConfigError(f"expected max_rows of 2 or more, got {max_rows}")
    if label_names is not None and len(set(label_names)) < max(len(label_names), 2):
        raise ConfigError(f"expected two or more label_names that differ, got {list(label_names)}")


def _rows(table: Table, texts: tuple[str, ...], label: str, drop_missing: bool, required: bool) -> _Rows | None:
    """Reads a split; None if it is not required and has no labels."""
    if table.num_rows == 0:
        raise DataError(f"{table.origin} has no rows: expected at least one, and two classes to learn from.")
    unlabelled = label not in table.names
    if not unlabelled:
        labels = _named(table.column(label), table.class_names.get(label))
        unlabelled = all(is_missing(value) for value in labels)
    if unlabelled and not required:
        warnings.warn(f"{table.origin} has no labels in column {label!r} and is left out", stacklevel=3)
        return None
    find_columns(table.names, table.origin, texts, label)
    columns = [table.column(name) for name in texts]
    gaps = {
        name: [row for row, value in enumerate(column) if is_missing(value)]
        for name, column in zip((*texts, label), (*columns, labels), strict=True)
    }
    missing = {row for rows in gaps.values() for row in rows}
    if missing and not drop_missing:
        where = "; ".join(f"{name!r}: {len(rows)} (rows {_first(rows)})" for name, rows in gaps.items() if rows)
        raise DataError(
            f"{table.origin}: expected a text and a label in each of the {table.num_rows} rows, but cells are empty in "
            f"column {where}. Fill them, or leave these rows out with drop_missing=True."
        )
    kept = [row for row in range(table.num_rows) if row not in missing]
    if not kept:
        raise DataError(f"{table.origin}: no row has both a text and a label.")
    origin = f"{table.origin}: column {label!r}"
    names = [label_name(labels[row], origin) for row in kept]
    return _Rows(
        tuple(_text(column, kept, table, name) for name, column in zip(texts, columns, strict=True)),
        names,
        table.origin,
    )


def _named(labels: list[Any], names: Sequence[str] | None) -> list[Any]:
    """Replaces ids by the names that the source declares; negative ones mark rows without a label."""
    if names is None:
        return labels
    return [None if value is None or value < 0 else names[value] for value in labels]


def _first(rows: list[int]) -> str:
    return ", ".join(str(row + 1) for row in rows[:5]) + (", …" if len(rows) > 5 else "")


def _text(column: list[Any], rows: list[int], table: Table, name: str) -> list[str]:
    values = [column[row] for row in rows]
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, str):
            raise DataError(
                f"{table.origin}: expected text in column {name!r}, got {str(value)[:60]!r} of type "
                f"{type(value).__name__} in row {row + 1}. Name another column with text_columns."
            )
    return values


def _check_classes(train: _Rows, classes: Sequence[str], column: str) -> None:
    distinct = set(train.labels)
    if len(distinct) < 2:
        raise DataError(
            f"{train.origin}: expected two or more classes in column {column!r}, but all {len(train.labels)} rows have "
            f"{next(iter(distinct))!r}. Name another column with label_column, or add rows of other classes."
        )
    if len(distinct) == len(train.labels) > 2:
        raise DataError(
            f"{train.origin}: expected several rows of each class, but column {column!r} has another value in each "
            f"of the {len(train.labels)} rows, such as {sorted(distinct)[:3]}. Name the column of the class with "
            "label_column."
        )


def _with_test(
    rows: dict[str, _Rows], classes: Sequence[str], test_size: float, seed: int
) -> tuple[dict[str, _Rows], str]:
    if "test" in rows:
        return rows, "the source's test split"
    if "validation" in rows:
        return {"train": rows["train"], "test": rows["validation"]}, "the source's validation split"
    train = rows["train"]
    ids = encode(train.labels, classes, train.origin, "the declared classes")
    kept, held_out = stratified_split(ids, test_size, seed)
    origin = f"{len(held_out)} of {len(ids)} training rows, held out"
    return {"train": train.take(kept), "test": train.take(held_out)}, origin


def _dataset(rows: _Rows, classes: Sequence[str], expected: str, max_rows: int | None, seed: int) -> Dataset:
    ids = encode(rows.labels, classes, rows.origin, expected)
    chosen = stratified_sample(ids, max_rows or len(ids), seed)
    columns: dict[str, list[Any]] = dict(zip(("text", "text_pair"), rows.take(chosen).texts, strict=False))
    features = {name: Value("string") for name in columns} | {"labels": ClassLabel(names=list(classes))}
    return Dataset.from_dict(columns | {"labels": [ids[row] for row in chosen]}, features=Features(features))
