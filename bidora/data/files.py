"""Local files of labelled text, and folders of them. Nothing is ever unpickled."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_from_disk

from bidora.data.delimited import parse_csv, parse_tsv
from bidora.data.table import Table, concatenate, from_columns
from bilevel.errors import DataError

_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt", ".dill"}
_READABLE = ".csv, .tsv, .jsonl, .json (these also as .gz) or .parquet"
_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "devel"), "validation"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def read_file(path: Path) -> Table:
    """Reads one file, by its suffix.

    Raises:
        DataError: The file is missing, empty, pickled, damaged, or of another format.
    """
    if not path.is_file():
        raise DataError(f"no file at {path}. Check the path.")
    if _is_pickled(path):
        raise DataError(
            f"{path} is a pickled file, which can run any code when it is opened, so it is never read. "
            f"Expected {_READABLE}: save the table in one of these formats."
        )
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _read_parquet(path)
    reader = _TEXT_READERS.get(Path(name.removesuffix(".gz")).suffix)
    if reader is None:
        raise DataError(f"{path} has a suffix that is not known: expected {_READABLE}.")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty: expected a header or records, and rows.")
    return reader(text, str(path))


def read_folder(folder: Path) -> dict[str, Table]:
    """Reads the splits of a folder, by the names of its files; shards (``train-00000-of-00002``) are joined.

    A folder that ``datasets.Dataset.save_to_disk`` wrote is read too, and so is a clone of a hub repository with its
    files in ``data``. One readable file with any name is taken as ``train``.

    Raises:
        DataError: There is nothing readable, or it is not clear what is which.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_saved(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_readable(path))
    if not files and (folder / "data").is_dir():
        return read_folder(folder / "data")
    if not files:
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise DataError(f"{folder} holds no file to read: expected {_READABLE}, found {found or 'nothing'}.")
    groups: dict[str, list[Path]] = {}
    for path in files:
        split = _SPLITS.get(_SHARD.sub("", _stem(path)).lower())
        if split is not None:
            groups.setdefault(split, []).append(path)
    names = [path.name for path in files]
    if not groups and len(files) == 1:
        return {"train": read_file(files[0])}
    if "train" not in groups:
        raise DataError(
            f"{folder} holds {names}, none of which is named train: name it so, or pass one of the files itself."
        )
    for split, paths in groups.items():
        if len(paths) > 1 and not all(_SHARD.search(_stem(path)) for path in paths):
            raise DataError(
                f"{folder} holds {[path.name for path in paths]}, which could each be the {split} split: "
                "keep one of them there, or pass the file itself."
            )
    return {split: concatenate([read_file(path) for path in paths]) for split, paths in groups.items()}


def from_dataset(dataset: Dataset, origin: str) -> Table:
    """Wraps a Hugging Face dataset; columns are decoded one at a time."""
    classes = {
        name: tuple(feature.names) for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)
    }
    return Table(
        origin, tuple(dataset.column_names), len(dataset), lambda name: list(dataset.with_format(None)[name]), classes
    )


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem


def _is_readable(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(".parquet") or Path(name.removesuffix(".gz")).suffix in _TEXT_READERS


def _is_pickled(path: Path) -> bool:
    """Whether a file is a pickle, by its name or by its first bytes (of what it holds, if compressed)."""
    if _PICKLED & {suffix.lower() for suffix in path.suffixes[-2:]}:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as unpacked:
                start = unpacked.read(4)
        if start == b"PK\x03\x04":  # torch.save writes a ZIP archive with a pickle in it
            with zipfile.ZipFile(path) as archive:
                return any(Path(name).suffix in _PICKLED for name in archive.namelist())
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return False  # whatever it is, the reader will say so
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5  # PROTO opcode and the protocol's number


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {data[error.start]:#x} at {error.start}): convert it, for instance with "
            "iconv -f latin1 -t utf-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Check that the file is complete and yours to read."
        ) from error


def _read_parquet(path: Path) -> Table:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
    classes: dict[str, tuple[str, ...]] = {}
    if b"huggingface" in (table.schema.metadata or {}):
        features = Features.from_arrow_schema(table.schema)
        classes = {name: tuple(one.names) for name, one in features.items() if isinstance(one, ClassLabel)}
    return Table(
        str(path), tuple(table.column_names), table.num_rows, lambda name: table.column(name).to_pylist(), classes
    )


def _read_json_lines(text: str, origin: str) -> Table:
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{origin}: line {number} is not JSON: {error}") from error
    return _from_objects(records, origin)


def _read_json(text: str, origin: str) -> Table:
    """A list of objects, an object of lists, or (as often written to .json) one object a line."""
    try:
        content = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return _read_json_lines(text, origin)
        raise DataError(f"{origin} is not JSON: {error}") from error
    if isinstance(content, dict) and content and all(isinstance(values, list) for values in content.values()):
        if len(content) == 1:
            return _from_objects(next(iter(content.values())), origin)
        lengths = {name: len(values) for name, values in content.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{origin}: expected columns of one length, but they have {lengths}.")
        return from_columns(origin, content)
    return _from_objects(content if isinstance(content, list) else [content], origin)


def _from_objects(records: list[Any], origin: str) -> Table:
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(
                f"{origin}: expected objects such as {{'text': …, 'label': …}}, but record {number} is "
                f"{str(record)[:60]!r}."
            )
    names = dict.fromkeys(name for record in records for name in record)
    return from_columns(origin, {name: [record.get(name) for record in records] for name in names})


def _read_saved(folder: Path) -> dict[str, Table]:
    try:
        saved = load_from_disk(str(folder), keep_in_memory=True)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{folder} is no readable dataset folder: {error}") from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return named_splits({name: from_dataset(one, f"{folder} ({name})") for name, one in splits.items()}, str(folder))


def named_splits(tables: dict[str, Table], origin: str) -> dict[str, Table]:
    """Names the splits of a source ``train``, ``validation`` and ``test``: the first match each.

    Raises:
        DataError: None of them is for training.
    """
    splits: dict[str, Table] = {}
    for name, table in tables.items():
        split = _SPLITS.get(re.split(r"[-_.]", name.lower())[0])
        if split is not None:
            splits.setdefault(split, table)
    if "train" not in splits:
        raise DataError(f"{origin} has the splits {list(tables)}: expected one named train.")
    return splits


_TEXT_READERS: dict[str, Callable[[str, str], Table]] = {
    ".csv": parse_csv,
    ".tsv": parse_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
}
