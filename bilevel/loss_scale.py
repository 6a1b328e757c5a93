"""Loss scaling: gradients of float16 passes without underflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import CheckpointError, NonFiniteError
from bilevel.validation import check_integer, check_number
from bilevel.vector import Tensors, is_finite, promote, scale

__all__ = ["LossScale", "LossScaling"]

_SMALLEST = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale moves; the defaults are those of ``torch.amp.GradScaler``.

    Attributes:
        initial: The first scale. Powers of two, with factors that are powers of two, scale without rounding.
        growth: Factor after ``interval`` updates in a row without overflow.
        backoff: Factor after an overflow.
        interval: See ``growth``.
    """

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_number("LossScaling", "initial", self.initial, minimum=0.0, exclusive=True)
        check_number("LossScaling", "growth", self.growth, minimum=1.0, exclusive=True)
        check_number("LossScaling", "backoff", self.backoff, minimum=0.0, exclusive=True)
        check_number("LossScaling", "1 / backoff", 1 / self.backoff, minimum=1.0, exclusive=True)
        check_integer("LossScaling", "interval", self.interval, minimum=1)


class LossScale:
    """The scale of one problem's loss.

    float16 holds no number below 6e-8: small gradients vanish in a backward pass. So the loss is multiplied before it
    and the gradients are divided after it; where they overflow, the update is left out and the scale backs off::

        grads = scale.unscaled(torch.autograd.grad(scale.scaled(loss), inputs))
        scale.update(overflow=grads is None)      # once an update, however many batches it takes
        if grads is not None:
            ...                                   # clip, step

    The semantics are those of ``torch.amp.GradScaler``, which works on ``.grad`` and on an optimiser, and here neither
    exists yet.

    Args:
        name: The problem's name, for messages.
        settings: How the scale moves.

    Attributes:
        value: The scale now.
        good: Updates in a row without overflow since it last changed.
        overflows: Updates left out so far.
    """

    def __init__(self, name: str, settings: LossScaling | None = None) -> None:
        self._name = name
        self.settings = settings or LossScaling()
        self.value = self.settings.initial
        self.good = 0
        self.overflows = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss times the scale, in float32 or better; differentiable."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def unscaled(self, gradients: Sequence[Tensor]) -> Tensors | None:
        """Returns gradients of the scaled loss over the scale, in float32 or better; None where one is not finite.

        Changes nothing: see :meth:`update`.
        """
        divided = scale(1.0 / self.value, promote(gradients))
        return divided if is_finite(divided) else None

    def update(self, *, overflow: bool) -> None:
        """Moves the scale after an update was made, or left out because of an overflow.

        Raises:
            NonFiniteError: The gradients overflow however small the scale is, so that scaling is not the reason.
        """
        if not overflow:
            self.good += 1
            if self.good == self.settings.interval:
                self.good = 0
                grown = self.value * self.settings.growth
                # Past the largest float32 the scaled loss itself would be infinite.
                self.value = grown if grown < torch.finfo(torch.float32).max else self.value
            return
        self.overflows += 1
        self.good = 0
        self.value *= self.settings.backoff
        if self.value < _SMALLEST:
            raise NonFiniteError(
                f"the gradient of problem {self._name!r} is not finite even at a loss scale of {self.value:.1e}, so "
                "that scaling is not the reason: look for a division by zero or a square root at zero in its loss, or "
                "use precision='bfloat16' or 'float32'. No parameter was changed"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state: three numbers."""
        return {"value": self.value, "good": self.good, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back.

        Raises:
            CheckpointError: It is no state of a loss scale; nothing has changed.
        """
        try:
            value, good, overflows = float(state["value"]), int(state["good"]), int(state["overflows"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"problem {self._name!r}: the checkpoint holds no loss scale: {error!r}") from error
        if not (math.isfinite(value) and value > 0 and good >= 0 and overflows >= 0):
            raise CheckpointError(f"problem {self._name!r}: {dict(state)} is no state of a loss scale")
        self.value, self.good, self.overflows = value, good, overflows
