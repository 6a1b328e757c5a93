"""Pruning: which weights a network keeps is learned on validation data, through masks of its weights."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from bilevel.errors import BilevelWarning, ConfigError
from bilevel.problems.supervised import Training, Validation
from bilevel.validation import check_choice, check_number

__all__ = [
    "Mask",
    "MaskedTraining",
    "Pruning",
    "ScoreMask",
    "ThresholdMask",
    "magnitude",
    "mask_weights",
    "prune",
    "sparsity",
]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers that have a weight to prune, output dimension first."""


class Mask(nn.Module, ABC):
    """What a layer computes with: ``w ⊙ σ(s / τ)`` in place of its weight w, for an importance s of each weight.

    A weight is kept where its importance is above 0; as τ falls to 0, the mask becomes that choice. It is a
    parametrisation (:mod:`torch.nn.utils.parametrize`): parameters are read at each call. Subclasses hold the
    parameters that the outer problem learns, and those only; their importance must have two derivatives in w.

    Args:
        temperature: τ.

    Raises:
        ConfigError: A temperature that is not above 0.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """τ; it may be changed between steps. A setting: no checkpoint holds it, so that a schedule sets it anew."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_number(type(self).__name__, "temperature", value, minimum=0.0, exclusive=True)
        self._temperature = value

    @abstractmethod
    def importance(self, weight: Tensor) -> Tensor:
        """Returns s, of the weight's shape or one that expands to it."""

    def values(self, weight: Tensor) -> Tensor:
        """Returns the mask, between 0 and 1."""
        return torch.sigmoid(self.importance(weight) / self.temperature).expand_as(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the masked weight."""
        return weight * self.values(weight)


class ThresholdMask(Mask):
    """Keeps weights above a learned threshold t > 0: ``s = w²/t² − 1``, so that ``s > 0`` where ``|w| > t``.

    The square has all derivatives, where ``|w|`` has a kink at 0, and the ratio none of the weights' scale. The mask of
    a weight of 0 is ``σ(−1/τ)``, not 0.

    Args:
        weight: The layer's weight as it is.
        per: One threshold for the ``"layer"``, or one for each output ``"unit"``.
        start: Where t starts; at the median of the layer's ``|w|`` by default. With one for all layers, as
            :func:`magnitude` finds it, the search starts from magnitude pruning.
        temperature: τ.

    Raises:
        ConfigError: A field out of range; weights whose median is 0, without ``start``.
    """

    def __init__(
        self, weight: Tensor, *, per: str = "layer", start: float | None = None, temperature: float = 0.2
    ) -> None:
        super().__init__(temperature)
        check_choice("ThresholdMask", "per", per, ("layer", "unit"))
        shape = (len(weight) if per == "unit" else 1, *[1] * (weight.dim() - 1))
        threshold = weight.new_full(shape, _start("ThresholdMask", weight, start))
        self.log_threshold = nn.Parameter(threshold.detach().log())

    def threshold(self) -> Tensor:
        """Returns t."""
        return self.log_threshold.exp()

    def importance(self, weight: Tensor) -> Tensor:
        """See :meth:`Mask.importance`."""
        return (weight / self.threshold()).square() - 1


class ScoreMask(Mask):
    """Keeps what has a positive score s, learned for each weight or output unit.

    The inner loss reads w and the mask through their product only, as in BiP (Zhang et al., NeurIPS 2022, arXiv
    2210.04092), whose masks are binary and whose scores are projected to the largest ones.

    Args:
        weight: The layer's weight as it is.
        per: A score for each ``"weight"``, or for each output ``"unit"``, which stays or goes as a whole.
        start: The magnitude c at which scores start at 0: ``s = log(|w|/c)``, cut to [−1, 1], with the root mean square
            of a unit in the place of ``|w|``; the median of the layer's ``|w|`` by default.
        temperature: τ.

    Raises:
        ConfigError: A field out of range; weights whose median is 0, without ``start``.
    """

    def __init__(
        self, weight: Tensor, *, per: str = "weight", start: float | None = None, temperature: float = 0.2
    ) -> None:
        super().__init__(temperature)
        check_choice("ScoreMask", "per", per, ("weight", "unit"))
        size = weight.detach().abs()
        if per == "unit":
            size = size.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (weight.dim() - 1))
        self.scores = nn.Parameter((size / _start("ScoreMask", weight, start)).log().clamp(-1.0, 1.0))

    def importance(self, weight: Tensor) -> Tensor:
        """See :meth:`Mask.importance`."""
        return self.scores


class _FixedMask(nn.Module):
    """Zeros that stay zero while the rest of a weight is trained."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def mask_weights(
    network: nn.Module,
    make: Callable[[Tensor], Mask] = ThresholdMask,
    *,
    layers: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Puts a mask on the weight of every linear and convolutional layer, in place, and returns the network.

    Args:
        network: What is to be pruned, trained already where masks start from its weights.
        make: The mask of a weight: ``ThresholdMask``, ``ScoreMask``, a function that chooses their settings.
        layers: Which layers, by path and module; all by default.

    Raises:
        ConfigError: No layer to mask, or one that has a mask; the network is then as it was.

    Example:
        >>> import torch
        >>> network = mask_weights(torch.nn.Linear(4, 2), lambda w: ThresholdMask(w, per="unit", start=0.1))
        >>> network.parametrizations.weight[0].threshold().shape
        torch.Size([2, 1])
    """
    chosen = {path: layer for path, layer in _layers(network) if layers is None or layers(path, layer)}
    if not chosen:
        raise ConfigError(f"layers= takes none of {[path for path, _ in _layers(network)]}")
    for path, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ConfigError(f"the weight of layer {path!r} is parametrised already: prune a network once")
    masks = [make(layer.weight) for layer in chosen.values()]  # all of them, before any layer is changed
    for layer, mask in zip(chosen.values(), masks, strict=True):
        parametrize.register_parametrization(layer, "weight", mask)
    return network


def magnitude(network: nn.Module, share: float) -> float:
    """Returns the magnitude below which a share of all weights of linear and convolutional layers is.

    Raises:
        ConfigError: No such layer; a share that is not within (0, 1); more zeros than the share.
    """
    _check_share("magnitude", share)
    found = torch.cat([layer.weight.detach().abs().flatten() for _, layer in _layers(network)]).sort().values
    count = min(round(share * len(found)), len(found) - 1)
    value = float(found[max(count - 1, 0) : count + 1].double().mean())  # between the last to go and the first to stay
    if found[count] == 0:
        raise ConfigError(f"more than a share of {share} of the weights is 0: there is no magnitude to cut at")
    return value


class MaskedTraining(Training):
    """The inner problem of pruning: trains every parameter of a network but those of its masks.

    Args:
        module: The network, after :func:`mask_weights`.
        settings: Those of :class:`~bilevel.problems.Training`: criterion, optimizer, data, ….

    Raises:
        ConfigError: A network without masks.
    """

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        learned = {id(p) for _, _, mask in _masks(module) for p in mask.parameters()}
        if not isinstance(settings.get("optimizer"), Optimizer):
            settings.setdefault("params", lambda _, parameter: id(parameter) not in learned)
        super().__init__(module, **settings)


class Pruning(Validation):
    """The outer problem of pruning: learns the masks, under a budget of weights.

    ``min over λ of F(λ, w*(λ)) + β (d / d* − 1)₊²`` where λ are the masks' parameters, ``w*(λ)`` minimises the training
    loss of the masked network, d is the mean of all masks (the density) and d* the budget.

    The penalty is no barrier: the density ends a little above d* where weights are worth it. Masks may also settle
    between 0 and 1; :meth:`evaluate` then shows a density apart from the share that is kept, and a lower τ helps.
    :func:`prune` cuts to an exact share in any case.

    Args:
        module: The network that :class:`MaskedTraining` trains, after :func:`mask_weights`.
        density: d*, the share of the masked weights that may stay.
        strength: β.
        settings: Those of :class:`~bilevel.problems.Validation`: training, criterion, optimizer, data, ….

    Raises:
        ConfigError: A network without masks; a density that is not within (0, 1]; a negative strength.

    Cost: 1 forward pass of the network a loss, as without masks.

    Example::

        cut = magnitude(network, share=0.95)
        mask_weights(network, lambda weight: ThresholdMask(weight, per="unit", start=cut))
        pruning = Pruning(network, density=0.05, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), data=validation)
        training = MaskedTraining(network, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=train)
        Engine([pruning, training], EngineConfig(steps=300), hypergradient="identity").run()
        found = prune(network, share=0.95)
    """

    def __init__(self, module: nn.Module, *, density: float, strength: float = 1.0, **settings: Any) -> None:
        learned = {id(p) for _, _, mask in _masks(module) for p in mask.parameters()}
        check_number("Pruning", "density", density, minimum=0.0, exclusive=True)
        if density > 1:
            raise ConfigError(f"Pruning.density is a share of the weights, at most 1, not {density!r}")
        check_number("Pruning", "strength", strength, minimum=0.0)
        if not isinstance(settings.get("optimizer"), Optimizer):
            settings.setdefault("params", lambda _, parameter: id(parameter) in learned)
        super().__init__(module, **settings)
        self.target, self.strength = density, strength

    def density(self) -> Tensor:
        """Returns d."""
        found = [mask.values(weight).flatten() for _, weight, mask in _masks(self.module)]
        return torch.cat(found).mean()

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the trained network's loss on a batch, plus the penalty."""
        found = super().loss(batch)
        assert isinstance(found, Tensor)
        return found + self.strength * (self.density() / self.target - 1).clamp_min(0).square()

    def evaluate(self) -> Mapping[str, float]:
        """Returns ``density``, the mean of the masks, and ``kept``, the share of weights whose mask is above 1/2."""
        kept = torch.cat([_kept(weight, mask).flatten() for _, weight, mask in _masks(self.module)])
        return {"density": float(self.density().detach()), "kept": float(kept.double().mean())}


def prune(network: nn.Module, share: float | None = None, *, trainable: bool = False) -> nn.Module:
    """Returns a copy of a masked network whose masks are cut to zeros and ones.

    Kept weights have the values that the masked network computes with.

    Args:
        network: After :func:`mask_weights` and a search; it is not changed.
        share: At least this share of all masked weights becomes 0, those of least importance over all layers; weights
            that are equally important fall together. None: where the importance is not above 0.
        trainable: Leaves the zeros in place as fixed masks, so that the copy can be fine-tuned; ``prune(copy)`` then
            takes them out. Otherwise the layers are plain ones, with the parameter names of the unmasked network.

    Raises:
        ConfigError: A network without masks, or a share that is not within [0, 1).

    A layer that loses all its weights is warned about.
    """
    result = copy.deepcopy(network)
    fixed = list(_parametrised(result, _FixedMask))
    found = [] if fixed else list(_masks(result))
    kept = {path: _kept(weight, mask) for path, weight, mask in found}
    if share is not None:
        _check_share("prune", share)
        if fixed:
            raise ConfigError("the masks of this network are cut already: leave share= out")
        ranks = {path: mask.importance(weight).detach().expand_as(weight) for path, weight, mask in found}
        order = torch.cat([rank.flatten() for rank in ranks.values()]).sort().values
        count = round(share * len(order))
        kept = {
            path: rank > order[count - 1] if count else torch.ones_like(rank).bool() for path, rank in ranks.items()
        }
    for path, layer, _ in fixed or list(_parametrised(result, Mask)):
        if path in kept and not bool(kept[path].any()):
            warnings.warn(f"layer {path!r} loses all its weights", BilevelWarning, stacklevel=2)
        _remove_mask(layer)
        if path in kept:
            with torch.no_grad():
                weight = layer.get_parameter("weight").mul_(kept[path])
            if trainable:
                parametrize.register_parametrization(layer, "weight", _FixedMask(kept[path].to(weight.dtype)))
    return result


def sparsity(network: nn.Module) -> dict[str, float]:
    """Returns the share of zeros in each linear and convolutional layer's weight, by path, and in all: ``"total"``."""
    zeros = {path: (layer.weight == 0).flatten() for path, layer in _layers(network)}
    shares = {path: float(part.double().mean()) for path, part in zeros.items()}
    return {**shares, "total": float(torch.cat(list(zeros.values())).double().mean())}


def _start(owner: str, weight: Tensor, start: float | None) -> float:
    if start is not None:
        check_number(owner, "start", start, minimum=0.0, exclusive=True)
        return start
    median = float(weight.detach().abs().median())
    if median == 0:
        raise ConfigError(f"{owner} starts at the median of |w|, which is 0: pass start=")
    return median


def _check_share(owner: str, share: float) -> None:
    check_number(owner, "share", share, minimum=0.0)
    if share >= 1:
        raise ConfigError(f"{owner}: the share of weights that become 0 must be below 1, not {share!r}")


def _layers(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Returns path and layer of all that have a weight to prune (typed as the simplest of them)."""
    found = [(path, cast(nn.Linear, layer)) for path, layer in network.named_modules() if isinstance(layer, LAYERS)]
    if not found:
        raise ConfigError(f"{type(network).__name__} has no linear or convolutional layer to prune")
    return found


def _kept(weight: Tensor, mask: Mask) -> Tensor:
    return (mask.importance(weight) > 0).expand_as(weight)


def _remove_mask(layer: nn.Module) -> None:
    """Leaves the masked weight in its place."""
    # A copy of a parametrised module shares its class, of which torch would remove the property for all of them.
    own = type(layer)
    layer.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    names = [name for name in layer._parameters if name != "weight"]
    for name in names:  # the weight is last now, and was first
        layer._parameters[name] = layer._parameters.pop(name)


def _parametrised(network: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yields path, layer and parametrisation of every weight that has one of a kind."""
    for path, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            first = layer.parametrizations.weight[0]
            if isinstance(first, kind):
                yield path, layer, first


def _masks(network: nn.Module) -> Iterator[tuple[str, Tensor, Mask]]:
    """Yields path, unmasked weight and mask of every masked layer; read at each call, never kept."""
    empty = True
    for path, layer, mask in _parametrised(network, Mask):
        empty = False
        assert isinstance(mask, Mask)
        yield path, layer.parametrizations.weight.original, mask  # type: ignore[union-attr, misc]
    if empty:
        raise ConfigError(f"{type(network).__name__} has no masks: call mask_weights(network) first")
