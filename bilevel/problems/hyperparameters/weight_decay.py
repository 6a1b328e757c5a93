"""Weight decay: one for a model, one a tensor, one an input, one an element."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bilevel.problems.base import ParameterSelection
from bilevel.problems.hyperparameters.per_parameter import PerParameter
from bilevel.validation import check_number

__all__ = ["WeightDecay"]


class WeightDecay(PerParameter):
    """Weight decay ``½ Σᵢ exp(λᵢ) wᵢ²`` in the training loss.

    One decay is what a grid search finds as well; one an input switches inputs off that do not matter, as automatic
    relevance determination does; one an element is for large validation sets: as many decays as validation examples fit
    these by heart. Gradient descent on the inner problem is stable for learning rates below ``2 / (L + decay)``
    with the largest curvature L: ``maximum`` keeps it so.

    Args:
        model: Whose parameters are decayed.
        per: ``"model"`` for one decay, ``"tensor"`` for one a parameter tensor, ``"input"`` for one an input of a layer
            (a column of a weight), ``"element"`` for one a number.
        initial: The decay that all start from.
        params: Which parameters are decayed (``"*weight"``); all trainable ones by default.
        maximum: Largest decay; none by default.

    Raises:
        ConfigError: ``initial`` is not above 0, or ``maximum`` below it.
        UnknownNameError: An unknown ``per``, or a pattern that matches no trainable parameter.

    Sources: Larsen et al. 1996; Lorraine et al., AISTATS 2020 (arXiv 1911.02590), for one an element.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per: str = "model",
        initial: float = 1e-3,
        params: ParameterSelection | None = None,
        maximum: float | None = None,
    ) -> None:
        super().__init__(model, per=per, initial=initial, params=params)
        if maximum is not None:
            check_number("WeightDecay", "maximum", maximum, minimum=initial)
        self.maximum = maximum

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns ``½ Σᵢ exp(λᵢ) wᵢ²``."""
        parts = [(self.of(name) * weight.square()).sum() for name, weight in self.chosen(weights).items()]
        return torch.stack(parts).sum() / 2

    def project(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns ``min(λ, log maximum)``."""
        if self.maximum is None:
            return values
        return {name: value.clamp(max=math.log(self.maximum)) for name, value in values.items()}
