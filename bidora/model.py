"""Adapts a model, and tells which of its parameters are direction, magnitude and head."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bidora.config import check_config
from bidora.dora import FROZEN_CACHE, ExactDoraVariant, dora_layers, dora_tensors, layer_row_norm
from bidora.norm import zero_norm
from bilevel.errors import ConfigError, ParameterError

__all__ = ["ParameterRoles", "get_bidora_model", "parameter_roles", "use_exact_dora"]

_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def get_bidora_model(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Adapts a model with DoRA layers that compute the exact forward pass; the base is frozen.

    Calls ``peft.get_peft_model``, which changes the model in place, and then :func:`use_exact_dora`. Each magnitude is
    set to ‖V‖ as the forward pass computes it (PEFT computes it in the base's precision), so with B = 0 the adapted
    model's output equals the base model's to the last bit. In rows where W₀ is zero B is not 0 but tiny (2e-14 in V),
    which changes nothing here and keeps plain PEFT, which divides by the norm, from NaN.

    Adapter parameters are float32 (float64 in a float64 base). So are the copies of ``modules_to_save`` where the
    base is float16 or bfloat16: they then convert their inputs, and return float32.

    Args:
        model: Any module; what PEFT does by ``task_type`` needs a transformers model.
        config: A :class:`BiDoRAConfig`. A copy of it is used.
        adapter_name: The adapter's name.

    Returns:
        PEFT's model. What its ``save_pretrained`` writes is a plain DoRA adapter.

    Raises:
        ConfigError: The configuration is none of DoRA's, matches no module, or one that is neither nn.Linear nor
            transformers' Conv1D; or the model has adapters already. The model is then unchanged.
    """
    check_config(config)
    config = copy.deepcopy(config)
    _check_targets(model, config)
    try:
        adapted: PeftModel = get_peft_model(model, config, adapter_name)
    except NoMatchingPeftModuleError as error:
        raise ConfigError(_no_match(model, config)) from error
    use_exact_dora(adapted)
    with torch.no_grad():
        for _, layer, adapter in dora_layers(adapted):
            _initialise(layer, adapter)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            _promote(module.modules_to_save[adapter_name])
    parameter_roles(adapted)
    return adapted


def use_exact_dora(model: PeftModel) -> PeftModel:
    """Installs the exact forward on every DoRA layer of a model, e.g. one that ``PeftModel.from_pretrained`` loaded.

    Outputs stay equal to rounding; derivatives become those of the exact forward, and zero rows finite. Calling it
    again does no harm, and forgets remembered norms of base weights. Adapters that are added later need another call.

    Args:
        model: A model with DoRA adapters; changed in place.

    Returns:
        The same model.

    Raises:
        ConfigError: A DoRA layer is of an unsupported kind.
        ParameterError: There is no DoRA layer.
    """
    found: list[tuple[LoraLinear, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_magnitude_vector:
            continue
        reason = _unsupported(module.get_base_layer())
        if reason is None and type(module) is not LoraLinear:
            reason = f"PEFT adapts it by {type(module).__name__}"
        for adapter in module.lora_magnitude_vector:
            variant = module.lora_variant.get(adapter)
            if reason is None and type(variant) not in (DoraLinearVariant, ExactDoraVariant):
                reason = f"its variant is {type(variant).__name__}"
            if reason is not None:
                raise ConfigError(f"{name} cannot have the exact DoRA forward: {reason}. Take it out of target_modules")
            assert isinstance(module, LoraLinear)
            found.append((module, adapter))
    if not found:
        raise ParameterError(
            f"{type(model).__name__} has no DoRA layer: adapt it by get_bidora_model, or load a DoRA adapter"
        )
    for layer, adapter in found:
        layer.lora_variant[adapter] = ExactDoraVariant()
        layer._caches.pop(FROZEN_CACHE, None)
    return model


@dataclass(frozen=True)
class ParameterRoles:
    """Names of an adapted model's parameters, as in ``named_parameters()``, by their role.

    Attributes:
        direction: A and B of every DoRA layer (``lora_A``, ``lora_B``).
        magnitude: m of every DoRA layer (``lora_magnitude_vector``).
        head: The trainable copies of ``modules_to_save``: the task head.
    """

    direction: tuple[str, ...]
    magnitude: tuple[str, ...]
    head: tuple[str, ...]


def parameter_roles(model: nn.Module) -> ParameterRoles:
    """Returns which parameters of the active adapter are direction, magnitude and head, whether or not frozen now.

    Raises:
        ParameterError: There is no layer with the exact forward, or a parameter outside the three roles requires
            gradients.
    """
    direction: list[str] = []
    magnitude: list[str] = []
    for name, _, adapter in dora_layers(model):
        direction += [f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight"]
        magnitude.append(f"{name}.lora_magnitude_vector.{adapter}.weight")
    if not magnitude:
        raise ParameterError(
            f"{type(model).__name__} has no active layer with the exact DoRA forward: adapt it by get_bidora_model, "
            "or call use_exact_dora on a loaded PEFT model"
        )
    head = [
        f"{name}.modules_to_save.{adapter}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for adapter in module.active_adapters
        for key, _ in module.modules_to_save[adapter].named_parameters()
    ]
    roles = ParameterRoles(tuple(direction), tuple(magnitude), tuple(head))
    known = {*direction, *magnitude, *head}
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in known]
    if others:
        raise ParameterError(
            f"expected only direction, magnitude and head to require gradients, but {len(others)} more do: "
            f"{_listed(others)}. Freeze them, or name their modules in modules_to_save"
        )
    return roles


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Raises unless PEFT will adapt something, and only what is supported; PEFT itself finds out too late."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"the {type(model).__name__} has PEFT adapters already: take them off by unload() or merge_and_unload(), "
            "or load the base model again"
        )
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in LoraModel.target_module_mapping:
            raise ConfigError(
                f"target_modules is not given, and there is no default for model type {kind!r}: name "
                f"the modules to adapt. {_candidates(model)}"
            )
        config.target_modules = list(LoraModel.target_module_mapping[kind])
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    matched = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    matched.pop("", None)
    if not matched:
        raise ConfigError(_no_match(model, config))
    for name, module in matched.items():
        reason = _unsupported(module)
        if reason is not None:
            raise ConfigError(
                f"{name} cannot be adapted: {reason}. Give target_modules that match only such layers. "
                f"{_candidates(model)}"
            )


def _unsupported(module: nn.Module) -> str | None:
    """Returns why a base layer cannot be adapted, or None."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return f"it is a {type(module).__name__}; this version adapts nn.Linear and transformers' Conv1D"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in _WEIGHT_DTYPES:
        return (
            f"its weight is a {type(weight).__name__} of {weight.dtype}, and quantised or sharded ones are unsupported"
        )
    return None


def _no_match(model: nn.Module, config: LoraConfig) -> str:
    targets = config.target_modules or []
    patterns = [targets] if isinstance(targets, str) else sorted(targets)
    names = _linear_names(model)
    known = [*dict.fromkeys(name.rpartition(".")[2] for name in names), *names]
    near = [match for pattern in patterns for match in difflib.get_close_matches(pattern, known, n=1)]
    hint = f": did you mean {' and '.join(map(repr, dict.fromkeys(near)))}?" if near else "."
    also = {
        key: getattr(config, key)
        for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    }
    limits = ", ".join(f"{key}={value!r}" for key, value in also.items() if value)
    return (
        f"target_modules {_listed(patterns)} match no module of the {type(model).__name__}"
        f"{f' (with {limits})' if limits else ''}{hint} {_candidates(model)}"
    )


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and isinstance(module, (nn.Linear, Conv1D))]


def _candidates(model: nn.Module) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in _linear_names(model))
    return f"Linear modules of this model end in: {_listed(leaves) or 'none'}"


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _initialise(layer: LoraLinear, adapter: str) -> None:
    """Sets m to ‖V‖, and V in zero rows to something that is zero to us and not to a division."""
    _, (lora_A, lora_B, magnitude), scaling = dora_tensors(layer, adapter)
    norm = layer_row_norm(layer, adapter)
    magnitude.copy_(norm)
    longest = int(lora_A.norm(dim=1).argmax())
    length = abs(scaling) * float(lora_A[longest].norm())
    zero = norm == 0
    if length > 0 and bool(zero.any()):
        lora_B[zero, longest] = 0.1 * zero_norm(norm.dtype) / length


def _promote(head: nn.Module) -> None:
    """Makes a low-precision head float32: steps and differences of it would be lost in rounding."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
        head.float()
        head.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)


def _inputs_to_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def convert(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}
