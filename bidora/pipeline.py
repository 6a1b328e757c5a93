"""From settings to a trained, evaluated and saved adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bidora.arguments import BiDoRATrainingArguments
from bidora.config import BiDoRAConfig
from bidora.data import TextData, classification_metrics, load_text_data, majority_baseline, tokenize
from bidora.loading import load_model_and_tokenizer
from bidora.model import get_bidora_model, use_exact_dora
from bidora.progress import RetrainProgress
from bidora.settings import TrainSettings, resolve_device
from bidora.trainer import BiDoRATrainer
from bilevel import StepResult
from bilevel.errors import DataError

__all__ = [
    "LoadedAdapter",
    "Prepared",
    "RunResult",
    "evaluate",
    "load_adapter",
    "load_base",
    "majority",
    "prepare",
    "train_method",
]

CARD = "bidora.json"
"""File beside the adapter with what ``bidora evaluate`` needs to use it again: data settings and class names."""


@dataclass(frozen=True)
class Prepared:
    """Data ready for training, the same for all methods that are compared."""

    settings: TrainSettings
    text: TextData
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class RunResult:
    """What one method gave.

    Attributes:
        method: Its name.
        metrics: On the test split.
        trainable: Parameters that were trained.
        updates: Optimiser updates of the last phase.
        passes: Forward and backward passes, search included.
        seconds: Wall time of training.
        adapter: Where it was saved.
        search: The search's steps.
        losses: (update, loss) of the last phase.
    """

    method: str
    metrics: Mapping[str, float]
    trainable: int
    updates: int
    passes: tuple[int, int]
    seconds: float
    adapter: Path
    search: Sequence[StepResult] = ()
    losses: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base model, with the card that was saved beside it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    card: Mapping[str, Any] = field(default_factory=dict)


def prepare(settings: TrainSettings) -> Prepared:
    """Loads and tokenises the data."""
    text = load_text_data(
        settings.data,
        text_columns=settings.text_columns or None,
        label_column=settings.label_column,
        subset=settings.subset,
        max_rows=settings.max_rows,
        drop_missing=settings.drop_missing,
        seed=settings.seed,
    )
    _, tokenizer = load_model_and_tokenizer(settings.model, text.num_labels, id2label=text.id2label, seed=settings.seed)
    train, test = (tokenize(part, tokenizer, settings.max_length) for part in (text.train, text.test))
    return Prepared(settings, text, train, test)


def train_method(prepared: Prepared, method: str, folder: Path, *, updates: int | None = None) -> RunResult:
    """Trains one method from the same initial model, on the same data order, and evaluates it on the test split.

    Args:
        prepared: The data and settings.
        method: See :data:`bidora.METHODS`.
        folder: Where to save the adapter (for ``"full"``, the model).
        updates: Updates of the (last) phase; ``settings.steps`` by default.
    """
    settings = replace(prepared.settings, method=method)
    model, tokenizer = _adapted(settings, prepared.text)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arguments = _arguments(settings, folder, updates or settings.steps)
    set_seed(settings.seed)
    trainer = BiDoRATrainer(
        model,
        arguments,
        train_dataset=prepared.train,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RetrainProgress("retrain" if method == "bidora" else method))
    started = time.perf_counter()
    output = trainer.train()
    seconds = time.perf_counter() - started
    metrics = evaluate(model, tokenizer, prepared.test, settings.batch_size)
    _save(trainer, tokenizer, prepared, settings, folder)
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    counts = list(trainer.passes.values())
    return RunResult(
        method=method,
        metrics=metrics,
        trainable=trainable,
        updates=output.global_step,
        passes=(sum(forward for forward, _ in counts), sum(backward for _, backward in counts)),
        seconds=seconds,
        adapter=folder,
        search=tuple(trainer.search_history),
        losses=losses,
    )


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Dataset, batch_size: int = 32
) -> dict[str, float]:
    """Returns accuracy, macro F1 and Matthews correlation of a classifier on tokenised data."""
    arguments = TrainingArguments(
        output_dir="unused",
        per_device_eval_batch_size=batch_size,
        report_to=[],
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer))
    output = trainer.predict(data)
    return classification_metrics(output.predictions, output.label_ids)


def majority(prepared: Prepared) -> dict[str, float]:
    """Returns the metrics of always answering the most frequent class."""
    return majority_baseline(prepared.text.train["labels"], prepared.text.test["labels"])


def load_adapter(folder: str | Path, base: str | None = None) -> LoadedAdapter:
    """Loads what ``bidora train`` saved: an adapter on its base model, or a full model.

    Args:
        folder: The adapter's folder.
        base: Base model; by default the one that the adapter names.

    Raises:
        DataError: The folder holds neither an adapter nor a model.
    """
    path = Path(folder)
    card, names = _read_card(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not (path / "adapter_config.json").is_file():
        return LoadedAdapter(load_model_and_tokenizer(path, len(names), id2label=names).model, tokenizer, card)
    config = PeftConfig.from_pretrained(str(path))
    adapted = PeftModel.from_pretrained(load_base(path, base), str(path))
    if getattr(config, "use_dora", False):
        use_exact_dora(adapted)
    return LoadedAdapter(adapted, tokenizer, card)


def load_base(folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Loads the base model of a saved adapter, with a new head."""
    path = Path(folder)
    card, names = _read_card(path)
    source = base or card.get("model") or PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    return load_model_and_tokenizer(source, len(names), id2label=names).model


def _read_card(path: Path) -> tuple[dict[str, Any], dict[int, str]]:
    card_file = path / CARD
    if not card_file.is_file():
        raise DataError(f"{path} {_why_no_card(path)}")
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
        names = {place: str(name) for place, name in enumerate(card["label_names"])}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{card_file} is damaged: {error!r}") from error
    return card, names


def _why_no_card(path: Path) -> str:
    expected = "expected a folder that `bidora train` wrote (its 'adapter' folder"
    if not path.is_dir():
        return f"is no folder: {expected})"
    if (path / "adapter" / CARD).is_file():
        return f"holds no {CARD}: {expected}: {path / 'adapter'})"
    if (path / "adapter_config.json").is_file():
        return (
            f"holds no {CARD}, which `bidora train` writes: this adapter was saved from Python. There, "
            "peft.PeftModel.from_pretrained loads it, merge_and_unload() merges it, and bidora.weight_decomposition "
            "says how far it moved"
        )
    return f"holds no {CARD}: {expected})"


def _adapted(settings: TrainSettings, text: TextData) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Returns the model with its adapter, initialised by the seed alone."""
    attention = "eager" if settings.method == "bidora" and settings.hypergradient.needs_double_backward else None
    model, tokenizer = load_model_and_tokenizer(
        settings.model, text.num_labels, id2label=text.id2label, seed=settings.seed, attention=attention
    )
    nn.Module.to(model, resolve_device(settings.device))
    if settings.method == "full":
        return model, tokenizer
    set_seed(settings.seed)
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _targets(settings.target_modules),
    }
    if settings.method == "bidora":
        return get_bidora_model(model, BiDoRAConfig(**common)), tokenizer
    return get_peft_model(model, LoraConfig(use_dora=settings.method == "dora", **common)), tokenizer


def _targets(names: Sequence[str]) -> str | list[str] | None:
    """Returns PEFT's ``target_modules``: its special word stands alone, and not in a list."""
    return "all-linear" if list(names) == ["all-linear"] else list(names) or None


def _arguments(settings: TrainSettings, folder: Path, updates: int) -> BiDoRATrainingArguments:
    return BiDoRATrainingArguments(
        output_dir=str(folder),
        method=settings.method,
        hypergradient=settings.hypergradient.describe(),
        learning_rate=settings.learning_rate,
        magnitude_learning_rate=settings.magnitude_learning_rate,
        per_device_train_batch_size=settings.batch_size,
        search_steps=settings.search_steps,
        inner_steps=settings.inner_steps,
        max_steps=updates,
        orthogonality=settings.orthogonality,
        validation_fraction=settings.validation_fraction,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=resolve_device(settings.device) == "cpu",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=False,
    )


def _save(
    trainer: BiDoRATrainer,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    settings: TrainSettings,
    folder: Path,
) -> None:
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    card = {
        "label_names": list(prepared.text.label_names),
        "text_columns": list(prepared.text.text_columns),
        "label_column": prepared.text.label_column,
        "model": settings.model,
        "data": settings.data,
        "subset": settings.subset,
        "max_length": settings.max_length,
        "settings": {**asdict(settings), "hypergradient": settings.hypergradient.describe()},
    }
    (folder / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
