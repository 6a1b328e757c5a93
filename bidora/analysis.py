"""How training moved magnitude and direction: DoRA's weight-decomposition analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bidora.layers import DoraLayer, layer_weight, weight_rows
from bilevel.errors import ParameterError

__all__ = ["LayerChange", "WeightDecomposition", "weight_decomposition"]


@dataclass(frozen=True)
class LayerChange:
    """Change of one weight, mean over its rows.

    Attributes:
        name: The layer, as in the model before it was adapted.
        magnitude: ΔM, mean of ``|‖w'‖ − ‖w‖|``.
        direction: ΔD, mean of ``1 − cos(w', w)``, from 0 to 2.
    """

    name: str
    magnitude: float
    direction: float


@dataclass(frozen=True)
class WeightDecomposition:
    """Changes of all layers. Tables of several checkpoints may be joined: ``WeightDecomposition(a.layers + b.layers)``.

    Attributes:
        layers: One entry a layer.
    """

    layers: tuple[LayerChange, ...]

    @property
    def slope(self) -> float:
        """Least-squares slope of ΔM on ΔD over the layers; NaN where ΔD does not vary."""
        direction, magnitude = self._centred()
        return float(direction @ magnitude / (direction @ direction))

    @property
    def correlation(self) -> float:
        """Pearson correlation of ΔM and ΔD over the layers; NaN where either does not vary."""
        direction, magnitude = self._centred()
        return float(direction @ magnitude / (direction.norm() * magnitude.norm()))

    def _centred(self) -> tuple[Tensor, Tensor]:
        direction = torch.tensor([layer.direction for layer in self.layers], dtype=torch.float64)
        magnitude = torch.tensor([layer.magnitude for layer in self.layers], dtype=torch.float64)
        return direction - direction.mean(), magnitude - magnitude.mean()


Source = nn.Module | Mapping[str, Tensor]


def weight_decomposition(before: Source, after: Source) -> WeightDecomposition:
    """Returns ΔM and ΔD of every layer, and how they go together.

        ΔM = mean over rows |‖w'‖ − ‖w‖|        ΔD = mean over rows (1 − ⟨w', w⟩ / (‖w'‖ ‖w‖))

    over the rows w of W (out, in). The rows are a convolution's filters; of an adapted embedding, which has a magnitude
    for each dimension, they are the dimensions. Full fine-tuning and DoRA move the two in opposite senses, LoRA in the
    same one. A row that is zero on one side counts as cos = 0, on both as cos = 1.

    Computed in float64, one dense weight at a time.

    Args:
        before: The model before training, or its weights: a state dict, or any mapping of names to tensors. Note
            that adapting changes a model in place: take the state dict before, or load the model again.
        after: The same after training. Where a side is a model with LoRA or DoRA adapters, these layers with their
            effective weights are compared, as the forward pass sees them; otherwise all linear and convolution layers,
            or all matrices, that stand on both sides.

    Raises:
        ParameterError: No layer stands on both sides, a shape differs, or an adapter's weight is not known.

    Source: Liu et al. 2024 (arXiv 2402.09353), section 3.2.

    Example:
        >>> change = weight_decomposition({"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[8.0, 6.0]])})
        >>> print(f"{change.layers[0].magnitude:.2f} {change.layers[0].direction:.2f}")
        5.00 0.04
    """
    old, new = _Weights(before), _Weights(after)
    names = _common(old, new)
    layers = tuple(_change(name, old.get(name, new), new.get(name, old)) for name in names)
    return WeightDecomposition(layers)


class _Weights:
    """Weights by layer name, (out, in), of either kind of source."""

    def __init__(self, source: Source) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.adapted: set[str] = set()
        if isinstance(source, Mapping):
            factor = next((key for key in source if ".lora_" in key), None)
            if factor is not None:
                raise ParameterError(f"expected whole weights, but {factor!r} is an adapter's: pass the model itself")
            self.tensors = {
                key.removesuffix(".weight"): value
                for key, value in source.items()
                if value.ndim == 2 or (value.ndim > 2 and key.endswith(".weight"))
            }
        else:
            self.modules, self.adapted = _layers(source)

    @property
    def names(self) -> list[str]:
        return [*self.modules, *self.tensors]

    def get(self, name: str, other: _Weights) -> Tensor:
        if name in self.modules:
            return _effective_weight(name, self.modules[name])
        # a state dict holds a layer's weight as the layer does
        return _rows(other.modules.get(name), self.tensors[name])

    def is_embedding(self, name: str) -> bool:
        return isinstance(self.modules.get(name), nn.Embedding)


def _common(old: _Weights, new: _Weights) -> list[str]:
    known = set(old.names)
    adapted = old.adapted | new.adapted

    def counts(name: str) -> bool:
        return name in adapted if adapted else not (old.is_embedding(name) or new.is_embedding(name))

    names = [name for name in new.names if name in known and counts(name)]
    if not names:
        raise ParameterError(
            f"expected weights of the same layers before and after, but none stands on both sides: before has "
            f"{', '.join(old.names[:3]) or 'none'} …, after has {', '.join(new.names[:3]) or 'none'} …"
        )
    return names


_KINDS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """Returns layers by their names in the base model, and which of them carry an adapter."""
    layers: dict[str, nn.Module] = {}
    adapted: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        plain = name.removeprefix("base_model.model.")
        tuner = isinstance(module, BaseTunerLayer)
        if tuner or isinstance(module, _KINDS):
            layers[plain] = module
        if tuner:
            adapted.add(plain)
            inside = (*inside, f"{name}.")
    return layers, adapted


@torch.no_grad()
def _effective_weight(name: str, module: nn.Module) -> Tensor:
    if not isinstance(module, DoraLayer):
        if isinstance(module, BaseTunerLayer):
            raise ParameterError(f"the effective weight of {name}, a {type(module).__name__}, is not known")
        assert isinstance(module.weight, Tensor)
        return _rows(module, module.weight)
    base = _effective_weight(name, module.get_base_layer())
    if module.merged or module.disable_adapters:
        return base
    active = [adapter for adapter in module.active_adapters if adapter in module.scaling]
    if len(active) > 1:
        raise ParameterError(f"{name} has {len(active)} active adapters: activate one of {', '.join(active)}")
    for adapter in active:
        if adapter in module.lora_magnitude_vector:
            return layer_weight(module, adapter)
        if adapter in module.lora_variant:
            kind = type(module.lora_variant[adapter]).__name__
            raise ParameterError(f"the effective weight of {name} with adapter {adapter!r} ({kind}) is not known")
        if getattr(module.get_base_layer(), "groups", 1) != 1:
            raise ParameterError(f"the effective weight of {name}, a convolution of several groups, is not known")
        return base + weight_rows(module, module.get_delta_weight(adapter)).flatten(1)
    return base


def _rows(module: nn.Module | None, weight: Tensor) -> Tensor:
    """Returns a weight, stored as such a module does, as a matrix with DoRA's rows."""
    transposed = isinstance(getattr(module, "base_layer", module), (Conv1D, nn.Embedding))
    return weight.T if transposed else weight.flatten(1)


def _change(name: str, old: Tensor, new: Tensor) -> LayerChange:
    if old.shape != new.shape:
        raise ParameterError(f"layer {name!r} has shape {tuple(old.shape)} before and {tuple(new.shape)} after")
    w, v = old.detach().double(), new.detach().to(old.device).double()
    w_norm, v_norm = w.norm(dim=1), v.norm(dim=1)
    product = w_norm * v_norm
    cosine = (w * v).sum(1) / torch.where(product > 0, product, 1.0)
    cosine = torch.where((w_norm == 0) & (v_norm == 0), 1.0, cosine).clamp(-1, 1)
    return LayerChange(name, float((v_norm - w_norm).abs().mean()), float((1 - cosine).mean()))
