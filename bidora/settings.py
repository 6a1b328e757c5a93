"""What ``bidora train`` is configured by: one dataclass for flags, files and Python."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bilevel import Estimator, FiniteDifference
from bilevel.errors import ConfigError
from bilevel.validation import check_choice, check_integer, check_number

__all__ = ["METHODS", "TrainSettings", "resolve_device"]

METHODS = ("bidora", "dora", "lora", "full")
"""What a trainer can run: BiDoRA, and the baselines on the same batches."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training run; the defaults are those of the demo.

    Attributes:
        model: ``"minilm"`` (packaged), a Hugging Face hub id or a folder.
        data: ``"drug-reviews"`` (packaged), a hub id, or a CSV, TSV, JSONL or Parquet file or folder.
        subset: Configuration of a hub data set.
        text_columns: One column of text, or two for pairs; guessed where empty.
        label_column: The column of classes; guessed where None.
        max_length: Tokens that a text is cut to.
        max_rows: Use so many rows of each split at most, drawn at random.
        drop_missing: Leave rows out that lack a text or a label, instead of refusing them.
        method: ``"bidora"``, ``"dora"``, ``"lora"`` or ``"full"``.
        hypergradient: How the magnitude's gradient passes through the direction.
        rank: r of the adapter.
        alpha: ``lora_alpha``; the adapter's scale is alpha / r.
        dropout: ``lora_dropout``.
        target_modules: Name suffixes of the modules to adapt; ``all-linear`` for every linear layer but the
            head; PEFT's choice for the model where empty.
        learning_rate: Peak learning rate of the direction and of the baselines.
        magnitude_learning_rate: Peak learning rate of the magnitude in the search; None for ``learning_rate``.
        batch_size: Examples in a batch.
        search_steps: Outer steps of the search.
        inner_steps: Direction updates for each of them.
        steps: Updates of the retraining.
        orthogonality: Weight of the orthogonality penalty.
        validation_fraction: Share of the training data that the magnitude is trained on.
        seed: Seeds the head, the splits, the order of the data and dropout.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        bf16: Run training passes under bfloat16 autocast.
    """

    model: str = "minilm"
    data: str = "drug-reviews"
    subset: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    max_length: int = 96
    max_rows: int | None = None
    drop_missing: bool = False
    method: str = "bidora"
    hypergradient: Estimator = field(default_factory=lambda: FiniteDifference(epsilon=0.01))
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    learning_rate: float = 1.5e-3
    magnitude_learning_rate: float | None = None
    batch_size: int = 16
    search_steps: int = 20
    inner_steps: int = 1
    steps: int = 120
    orthogonality: float = 1e-5
    validation_fraction: float = 0.2
    seed: int = 0
    device: str = "auto"
    bf16: bool = False

    def __post_init__(self) -> None:
        """Validates the fields that no later stage sees first."""
        owner = "train"
        check_choice(owner, "method", self.method, METHODS)
        check_choice(owner, "device", self.device, ("auto", "cpu", "cuda"))
        for name in ("max_length", "rank", "batch_size", "search_steps", "inner_steps", "steps"):
            check_integer(owner, name, getattr(self, name), minimum=1)
        if self.max_rows is not None:
            check_integer(owner, "max_rows", self.max_rows, minimum=2)
        check_number(owner, "alpha", self.alpha, minimum=0.0, exclusive=True)
        check_number(owner, "dropout", self.dropout, minimum=0.0)
        check_number(owner, "learning_rate", self.learning_rate, minimum=0.0, exclusive=True)
        check_number(owner, "orthogonality", self.orthogonality, minimum=0.0)
        check_number(owner, "validation_fraction", self.validation_fraction, minimum=0.0, exclusive=True)
        if self.validation_fraction >= 1.0:
            raise ConfigError(f"{owner}.validation_fraction must be below 1, not {self.validation_fraction}")
        if self.magnitude_learning_rate is not None:
            check_number(owner, "magnitude_learning_rate", self.magnitude_learning_rate, minimum=0.0)


def resolve_device(device: str) -> str:
    """Returns ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: CUDA was asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no CUDA device here: use device 'cpu' or 'auto', or install a "
            "CUDA build of torch"
        )
    return "cuda" if available and device != "cpu" else "cpu"
