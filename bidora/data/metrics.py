"""How good a classifier is, and how good one that does not read would be."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from bilevel.errors import DataError, NonFiniteError


def classification_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """Returns the share of right answers and two scores that a constant answer cannot win.

    Args:
        predictions: Classes, shape (n,), or logits, shape (n, classes); an array, a CPU tensor or nested sequences.
        labels: Classes, shape (n,).

    Returns:
        ``accuracy``; ``macro_f1``, the mean over the classes that occur of 2·precision·recall/(precision + recall), 0
        for a class never predicted; ``matthews``, the correlation of Matthews, 0 where answers or labels are constant.

    Raises:
        DataError: The shapes do not fit, or there is nothing to compare.
        NonFiniteError: A logit is NaN or infinite.

    Example:
        >>> metrics = classification_metrics([[0.2, 0.8], [1.0, 0.0], [0.3, 0.6]], [1, 0, 0])
        >>> {name: round(value, 3) for name, value in metrics.items()}
        {'accuracy': 0.667, 'macro_f1': 0.667, 'matthews': 0.5}
    """
    predicted, expected = np.asarray(predictions), np.asarray(labels)
    if not np.isfinite(predicted).all():
        raise NonFiniteError("expected finite predictions, got NaN or infinity: the model has diverged")
    if predicted.ndim == 2:
        predicted = predicted.argmax(axis=1)
    if predicted.shape != expected.shape or expected.ndim != 1 or not expected.size:
        raise DataError(
            f"expected predictions of shape (n,) or (n, classes) for labels of shape (n,), n ≥ 1; got "
            f"{np.shape(predictions)} and {expected.shape}"
        )
    with warnings.catch_warnings():
        # With one class on both sides the correlation is 0 by definition, as documented above.
        warnings.filterwarnings("ignore", message="A single label was found")
        matthews = float(matthews_corrcoef(expected, predicted))
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "matthews": matthews,
    }


def majority_baseline(train_labels: Sequence[int], test_labels: Sequence[int]) -> dict[str, float]:
    """Returns the metrics of always answering the most frequent class of the training data (the lowest id of several).

    Example:
        >>> majority_baseline([1, 1, 0], [1, 0, 1, 1])["accuracy"]
        0.75
    """
    if not len(train_labels):
        raise DataError("expected training labels to find the most frequent class of, got none")
    counts = Counter(int(label) for label in train_labels)
    majority = min(counts, key=lambda label: (-counts[label], label))
    return classification_metrics(np.full(len(test_labels), majority), np.asarray(test_labels))
