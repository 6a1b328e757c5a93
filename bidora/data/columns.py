"""Which columns hold the text and which the label."""

from __future__ import annotations

from collections.abc import Sequence

from bilevel.errors import DataError

_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
_TEXTS = (
    *("text", "sentence", "review", "content", "comment", "tweet", "question", "document", "message", "utterance"),
    *("query", "body", "abstract", "description", "title", "seq", "sequence"),
)
_LABELS = (
    *(
        "label",
        "labels",
        "class",
        "category",
        "target",
        "rating",
        "sentiment",
        "stars",
        "topic",
        "intent",
        "gold_label",
    ),
    "y",
)


def find_columns(
    names: Sequence[str], origin: str, text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[tuple[str, ...], str]:
    """Returns the one or two text columns and the label column: the named ones, or the usual names.

    Raises:
        DataError: A named column does not exist, or no usual name does; the columns are listed.
    """
    texts = _guess_texts(names) if text_columns is None else tuple(text_columns)
    label = _guess(names, _LABELS) if label_column is None else label_column
    missing = [name for name in (*texts, label or "") if name and name not in names]
    if missing:
        raise DataError(f"{origin} has no column {_list(missing)}; it has {_list(names)}. Name columns that exist.")
    if not texts:
        raise DataError(
            f"{origin}: none of the columns {_list(names)} has a usual name of a text (such as {_list(_TEXTS[:3])}, "
            f"or pairs such as {_list(_PAIRS[0])}). Name one or two with text_columns; where these look like values, "
            "the file lacks a header."
        )
    if label is None:
        raise DataError(
            f"{origin}: none of the columns {_list(names)} has a usual name of a label (such as {_list(_LABELS[:3])}). "
            "Name it with label_column."
        )
    if len(texts) > 2 or len({*texts, label}) <= len(texts):
        raise DataError(
            f"expected one or two text columns and another one as the label, got {_list(texts)} and {label!r}."
        )
    return texts, label


def _guess_texts(names: Sequence[str]) -> tuple[str, ...]:
    for pair in _PAIRS:
        found = [_guess(names, (name,)) for name in pair]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    one = _guess(names, _TEXTS)
    return () if one is None else (one,)


def _guess(names: Sequence[str], usual: Sequence[str]) -> str | None:
    by_lower_case = {name.strip().lower(): name for name in reversed(names)}
    return next((by_lower_case[name] for name in usual if name in by_lower_case), None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
