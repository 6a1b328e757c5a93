"""BiDoRA fine-tuning: the direction and the magnitude of DoRA's weight decomposition, trained on two splits.

Names are imported when they are first used: transformers and PEFT take seconds to load, and ``bidora --help`` needs
neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidora.analysis import weight_decomposition
    from bidora.arguments import BiDoRATrainingArguments
    from bidora.config import BiDoRAConfig
    from bidora.model import get_bidora_model, parameter_roles, use_exact_dora
    from bidora.problems import Direction, Magnitude
    from bidora.trainer import BiDoRATrainer

__all__ = [
    "BiDoRAConfig",
    "BiDoRATrainer",
    "BiDoRATrainingArguments",
    "Direction",
    "Magnitude",
    "get_bidora_model",
    "parameter_roles",
    "use_exact_dora",
    "weight_decomposition",
]

_HOMES = {
    "BiDoRAConfig": "config",
    "BiDoRATrainer": "trainer",
    "BiDoRATrainingArguments": "arguments",
    "Direction": "problems",
    "Magnitude": "problems",
    "get_bidora_model": "model",
    "parameter_roles": "model",
    "use_exact_dora": "model",
    "weight_decomposition": "analysis",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bidora' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"bidora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
