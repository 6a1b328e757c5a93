"""Adapts a model, and tells which of its parameters are direction, magnitude and head."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from bidora.config import check_config
from bidora.dora import FROZEN_CACHE, ExactDoraVariant
from bidora.kernels import Kernels, check_kernels
from bidora.layers import DoraLayer, direction_names, layer_matrices, layer_norm
from bidora.norm import zero_norm
from bidora.variants import dora_layers, exact_variant, unsupported
from bilevel.errors import ConfigError, ParameterError

__all__ = ["ParameterRoles", "get_bidora_model", "parameter_roles", "use_exact_dora"]


def get_bidora_model(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Adapts a model with DoRA layers that compute the exact forward pass; the base is frozen.

    Calls ``peft.get_peft_model``, which changes the model in place, and then :func:`use_exact_dora`. Each magnitude is
    set to ‖V‖ as the forward pass computes it (PEFT computes it in the base's precision), so with B = 0 the adapted
    model's output equals the base model's to the last bit. In rows where W₀ is zero B is not 0 but tiny (2e-14 in V),
    which changes nothing here and keeps plain PEFT, which divides by the norm, from NaN. (In an embedding A is the one
    that starts at 0, and one entry of it is tiny.)

    Adapts nn.Linear, transformers' Conv1D, nn.Conv1d to nn.Conv3d (one group, no dilation, padded by zeros: see
    :func:`bidora.variants.unsupported`) and nn.Embedding, whose magnitudes are one a dimension, as PEFT's.

    Adapter parameters are float32 (float64 in a float64 base). So are the copies of ``modules_to_save`` where the
    base is float16 or bfloat16: they then convert their inputs, and return float32.

    Args:
        model: Any module; what PEFT does by ``task_type`` needs a transformers model.
        config: A :class:`BiDoRAConfig`. A copy of it is used.
        adapter_name: The adapter's name.

    Returns:
        PEFT's model. What its ``save_pretrained`` writes is a plain DoRA adapter.

    Raises:
        ConfigError: The configuration is none of DoRA's, matches no module, or one that cannot be adapted; or the
            model has adapters already. The model is then unchanged.
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


def use_exact_dora(model: PeftModel, *, kernels: Kernels = "auto") -> PeftModel:
    """Installs the exact forward on every DoRA layer of a model, e.g. one that ``PeftModel.from_pretrained`` loaded.

    Outputs stay equal to rounding; derivatives become those of the exact forward, and zero rows finite. Calling it
    again does no harm, and forgets remembered norms of base weights. Adapters that are added later, of any kind, need
    another call: linear layers with exact adapters only are told to take their inputs in the dtype they come in.

    Args:
        model: A model with DoRA adapters; changed in place.
        kernels: How linear layers are computed, see :mod:`bidora.kernels`: "auto" by fused GPU kernels where they
            apply, "torch" never by these, "fused" raises where something is in their way (on a CPU the same function
            runs over torch operations). Other layers have torch operations only.

    Returns:
        The same model.

    Raises:
        ConfigError: A DoRA layer is of an unsupported kind.
        ParameterError: There is no DoRA layer.
        UnknownNameError: ``kernels`` is none of the three.
    """
    check_kernels(kernels)
    found: list[tuple[LoraLayer, str, LoraVariant]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_magnitude_vector:
            continue
        for adapter in module.lora_magnitude_vector:
            variant = exact_variant(module, adapter, kernels)
            if isinstance(variant, str):
                raise ConfigError(
                    f"{name} cannot have the exact DoRA forward: {variant}. Take it out of target_modules"
                )
            found.append((module, adapter, variant))
    if not found:
        raise ParameterError(
            f"{type(model).__name__} has no DoRA layer: adapt it by get_bidora_model, or load a DoRA adapter"
        )
    for layer, adapter, variant in found:
        layer.lora_variant[adapter] = variant
        layer._caches.pop(FROZEN_CACHE, None)
        if isinstance(layer, Linear):
            exact = (isinstance(layer.lora_variant.get(name), ExactDoraVariant) for name in layer.lora_A)
            layer.cast_input_dtype_enabled = not all(exact)
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
    for name, layer, adapter in dora_layers(model):
        direction += [f"{name}.{own}" for own in direction_names(layer, adapter)]
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
    resolved = _maybe_include_all_linear_layers(copy.copy(config), model)
    matched = {name: module for name, module in model.named_modules() if check_target_module_exists(resolved, name)}
    matched.pop("", None)
    if not matched:
        raise ConfigError(_no_match(model, config))
    for name, module in matched.items():
        reason = unsupported(module)
        if reason is not None:
            raise ConfigError(
                f"{name} cannot be adapted: {reason}. Give target_modules that match only such layers, or name it in "
                f"exclude_modules. {_candidates(model)}"
            )


def _no_match(model: nn.Module, config: LoraConfig) -> str:
    targets = config.target_modules or []
    patterns = [targets] if isinstance(targets, str) else sorted(targets)
    names = _adaptable_names(model)
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


def _adaptable_names(model: nn.Module) -> list[str]:
    """Returns names of the modules that can be adapted, embeddings last."""
    modules = [(name, module) for name, module in model.named_modules() if name and unsupported(module) is None]
    return [name for name, module in sorted(modules, key=lambda item: isinstance(item[1], nn.Embedding))]


def _candidates(model: nn.Module) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in _adaptable_names(model))
    return f"Modules of this model that can be adapted end in: {_listed(leaves) or 'none'}"


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _initialise(layer: DoraLayer, adapter: str) -> None:
    """Sets m to ‖V‖, and V in zero rows to something that is zero to us and not to a division."""
    weight, (lora_A, lora_B, magnitude), scaling = layer_matrices(layer, adapter)
    norm = layer_norm(layer, adapter)
    magnitude.copy_(norm)
    zero = norm == 0
    if scaling == 0 or not bool(zero.any()):
        return
    tiny = 0.1 * zero_norm(norm.dtype) / abs(scaling)
    if isinstance(layer, Embedding):  # where PEFT starts with A = 0, and B random
        inner = int(lora_B[zero].abs().amin(0).argmax())
        length = float(lora_B[zero, inner].abs().max())
        if length > 0 and not lora_A.any():
            lora_A[inner, int(weight.norm(dim=0, dtype=norm.dtype).argmax())] = tiny / length
        return
    inner = int(lora_A.norm(dim=1).argmax())
    length = float(lora_A[inner].norm())
    if length > 0:
        lora_B[zero, inner] = tiny / length


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
