"""Training arguments: Hugging Face's, and the settings of the bilevel search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from bidora.settings import METHODS
from bilevel import Estimator, as_estimator
from bilevel.errors import ConfigError
from bilevel.validation import NamedArguments, check_choice, check_integer, check_number

__all__ = ["BiDoRATrainingArguments"]


@dataclass
class BiDoRATrainingArguments(NamedArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with the settings of the search.

    ``learning_rate``, the schedule (linear, 10 % warm-up unless set otherwise), ``num_train_epochs`` or
    ``max_steps``, evaluation, logging and checkpoints are those of the retraining phase, and of the baselines. The
    search uses the same learning rate, batch size and kind of schedule.

    Attributes:
        method: ``"bidora"`` (search, then retrain), or ``"dora"``, ``"lora"``, ``"full"``: one phase over all
            parameters that require gradients.
        hypergradient: How the magnitude's gradient passes through the direction: an estimator's name or a mapping
            with ``method`` and its fields.
        search_steps: Outer steps of the search; None for ``search_epochs``.
        search_epochs: Epochs of the search over its inner split, where ``search_steps`` is None.
        inner_steps: Direction updates for each magnitude update.
        validation_fraction: Share of the training data that the magnitude is trained on during the search.
        magnitude_learning_rate: Learning rate of the magnitude; None for ``learning_rate``.
        magnitude_weight_decay: Weight decay of the magnitude: above 0 it shrinks the weights' rows.
        orthogonality: γ, weight of the orthogonality penalty on the normalised direction.
    """

    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    method: str = field(default="bidora", metadata={"help": "bidora, dora, lora or full."})
    hypergradient: Any = field(
        default_factory=lambda: {"method": "finite_difference", "epsilon": 0.01},
        metadata={"help": "Name of the hypergradient method, or a mapping with 'method' and its fields."},
    )
    search_steps: int | None = field(default=None, metadata={"help": "Outer steps of the search."})
    search_epochs: float = field(default=3.0, metadata={"help": "Epochs of the search, where search_steps is not set."})
    inner_steps: int = field(default=1, metadata={"help": "Direction updates for each magnitude update."})
    validation_fraction: float = field(default=0.2, metadata={"help": "Share of the data that trains the magnitude."})
    magnitude_learning_rate: float | None = field(default=None, metadata={"help": "None for learning_rate."})
    magnitude_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the magnitude."})
    orthogonality: float = field(default=1e-5, metadata={"help": "Weight of the orthogonality penalty."})

    def __post_init__(self) -> None:
        """Validates the settings of the search, then those of Hugging Face."""
        owner = type(self).__name__
        check_choice(owner, "method", self.method, METHODS)
        check_integer(owner, "inner_steps", self.inner_steps, minimum=1)
        check_number(owner, "search_epochs", self.search_epochs, minimum=0.0, exclusive=True)
        check_number(owner, "orthogonality", self.orthogonality, minimum=0.0)
        check_number(owner, "magnitude_weight_decay", self.magnitude_weight_decay, minimum=0.0)
        check_number(owner, "validation_fraction", self.validation_fraction, minimum=0.0, exclusive=True)
        if self.validation_fraction >= 1.0:
            raise ConfigError(f"{owner}.validation_fraction must be below 1, not {self.validation_fraction}")
        if self.search_steps is not None:
            check_integer(owner, "search_steps", self.search_steps, minimum=1)
        if self.magnitude_learning_rate is not None:
            check_number(owner, "magnitude_learning_rate", self.magnitude_learning_rate, minimum=0.0)
        # kept as a mapping: Hugging Face writes the arguments as JSON
        self.hypergradient = as_estimator(self.hypergradient).describe()
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.method == "bidora":
            self._check_search()

    @property
    def estimator(self) -> Estimator:
        """The hypergradient method of the search."""
        return as_estimator(self.hypergradient)

    def _check_search(self) -> None:
        refused = {
            "fp16": (self.fp16, "use bf16 or float32"),
            "gradient_accumulation_steps > 1": (self.gradient_accumulation_steps > 1, "use a larger batch"),
            "more than one process or GPU": (self.world_size > 1 or self.n_gpu > 1, "run on one device"),
        }
        for what, (given, remedy) in refused.items():
            if given:
                raise ConfigError(f"method 'bidora' does not support {what} in this version: {remedy}")
