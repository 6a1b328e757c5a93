"""Labelled text, from a packaged set, a hub id, a file or a folder to tokenised splits; and a classifier's metrics."""

from bidora.data.labels import check_labels
from bidora.data.metrics import classification_metrics, majority_baseline
from bidora.data.sources import DEFAULT_DATA
from bidora.data.splits import stratified_split
from bidora.data.text import TextData, load_text_data
from bidora.data.tokens import tokenize

__all__ = [
    "DEFAULT_DATA",
    "TextData",
    "check_labels",
    "classification_metrics",
    "load_text_data",
    "majority_baseline",
    "stratified_split",
    "tokenize",
]
