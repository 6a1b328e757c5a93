"""Configuration of the adapter: PEFT's own, with DoRA on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig

from bilevel.errors import ConfigError
from bilevel.validation import NamedArguments

__all__ = ["BiDoRAConfig", "check_config"]


@dataclass
class BiDoRAConfig(NamedArguments, LoraConfig):
    """A ``peft.LoraConfig`` with DoRA on: same fields, same file.

    It adds no field of its own, so the ``adapter_config.json`` that is saved is that of a plain DoRA adapter. The
    settings of the search are training arguments (:class:`bidora.BiDoRATrainingArguments`), not the adapter's.

    With ``lora_dropout`` the semantics are PEFT's: in training, dropout acts on the input of the whole change of the
    layer, ``y = x W₀ᵀ + b + drop(x) (W' − W₀)ᵀ``, at the cost of a second product with W₀; in evaluation there is
    none.

    Raises:
        ConfigError: ``use_dora=False``, or a setting that trains or replaces something besides the direction, the
            magnitude and ``modules_to_save``. See :func:`check_config`.
        UnknownNameError: A misspelt argument.

    Example:
        >>> config = BiDoRAConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        >>> config.use_dora
        True
    """

    # With PEFT's metadata: without it PEFT would not see that a variant is asked for, and build plain LoRA layers.
    use_dora: bool = field(default=True, metadata=LoraConfig.__dataclass_fields__["use_dora"].metadata)

    def __post_init__(self) -> None:
        """Validates as PEFT does, then what BiDoRA needs."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_config(self)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> BiDoRAConfig:
        """Builds the configuration from the content of an ``adapter_config.json``. Mirrors PEFT's method."""
        # PEFT looks the class up by ``peft_type``, which gives a plain LoraConfig
        plain = LoraConfig.from_peft_type(**kwargs)  # type: ignore[no-untyped-call]
        return cls(**{f.name: getattr(plain, f.name) for f in fields(cls) if f.init})


# How PEFT marks the fields that select another forward pass than LoRA's.
_VARIANT = "is_lora_variant"


def check_config(config: LoraConfig) -> None:
    """Raises :class:`~bilevel.errors.ConfigError` unless a configuration describes a plain DoRA adapter."""
    name = type(config).__name__
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"expected a BiDoRAConfig, not {name}")
    if not config.use_dora:
        raise ConfigError(
            f"{name}.use_dora must be True, not {config.use_dora!r}: BiDoRA trains DoRA's magnitude and direction. "
            "For plain LoRA use peft.LoraConfig and peft.get_peft_model"
        )
    if config.bias != "none":
        raise ConfigError(
            f"{name}.bias must be 'none', not {config.bias!r}: biases belong to neither the direction nor the "
            "magnitude. Name the modules to train whole in modules_to_save"
        )
    variants = [f.name for f in fields(config) if f.metadata.get(_VARIANT) and f.name != "use_dora"]
    for other in [*variants, "target_parameters", "trainable_token_indices", "layer_replication"]:
        if getattr(config, other, None):
            raise ConfigError(f"{name}.{other} cannot be combined with BiDoRA: leave it at its default")
    if config.init_lora_weights == "mica":
        raise ConfigError(f"{name}.init_lora_weights='mica' selects a variant that cannot be combined with BiDoRA")
