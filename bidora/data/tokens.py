"""Text to token ids."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bilevel.errors import ConfigError, DataError


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
    """Turns texts into what a classifier reads, in memory.

    Rows are cut to ``max_length`` tokens (of a pair, the longer text first) and not padded: leave that to
    ``transformers.DataCollatorWithPadding``, which pads each batch to its longest row.

    Args:
        dataset: With the columns ``text``, ``text_pair`` for pairs, and ``labels``, as in :class:`TextData`.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a row, special ones included.

    Returns:
        A dataset with ``input_ids``, ``attention_mask``, ``token_type_ids`` where the model has them, and ``labels``.

    Raises:
        ConfigError: ``max_length`` is below 1 or more than the model can read.
        DataError: The columns are missing.
    """
    missing = {"text", "labels"} - set(dataset.column_names)
    if missing:
        raise DataError(
            f"expected the columns 'text' and 'labels', got {dataset.column_names}: {sorted(missing)} missing"
        )
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"expected max_length from 1 to {tokenizer.model_max_length}, the most that this model reads, "
            f"got {max_length}"
        )
    pairs = dataset["text_pair"][:] if "text_pair" in dataset.column_names else None
    encoding = tokenizer(dataset["text"][:], pairs, truncation=True, max_length=max_length)
    columns = {name: encoding[name] for name in tokenizer.model_input_names if name in encoding}
    return Dataset.from_dict(columns | {"labels": dataset["labels"][:]})
