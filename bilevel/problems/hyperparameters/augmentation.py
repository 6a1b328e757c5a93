"""Augmentation of learned strength."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bilevel.errors import LossError
from bilevel.problems.hyperparameters.base import Hyperparameter
from bilevel.validation import check_number

__all__ = ["Augmentation", "Noise", "RandomBrightness", "RandomShift", "uniform"]


class Augmentation(Hyperparameter):
    """Inputs changed at random by a learned strength ``exp(λ)``; a subclass writes :meth:`augment`.

    Only training sees it: the validation loss is taken on the inputs as they are. Random numbers must come from torch's
    generators, so that all passes of one derivative see the same ones.

    Args:
        initial: The strength that it starts from, above 0.

    Raises:
        ConfigError: ``initial`` is not above 0.
        LossError: Inputs of a kind that cannot be augmented (within the loss).

    Example::

        class Contrast(Augmentation):
            def augment(self, inputs, strength):
                return inputs * (1 + strength * uniform(inputs))
    """

    least_dimensions: ClassVar[int] = 1

    def __init__(self, initial: float = 0.1) -> None:
        super().__init__()
        check_number(type(self).__name__, "initial", initial, minimum=0.0, exclusive=True)
        self.log = nn.Parameter(torch.tensor(math.log(initial)))

    def value(self) -> Tensor:
        """Returns the strength."""
        return self.log.exp()

    def augment(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """Returns changed inputs, differentiable in the strength; with strength 0, the inputs."""
        raise NotImplementedError(f"{type(self).__name__} must define augment(inputs, strength)")

    def inputs(self, inputs: Any) -> Any:
        """Returns the augmented inputs."""
        usable = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim >= self.least_dimensions
        if not usable:
            what = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs)
            raise LossError(
                f"{type(self).__name__} changes floating-point inputs of at least {self.least_dimensions} dimensions, "
                f"examples first, not {what}"
            )
        return self.augment(inputs, self.value())


def uniform(inputs: Tensor) -> Tensor:
    """Returns a number of [−1, 1] for each example, in a shape that goes with ``inputs``."""
    return inputs.new_empty(inputs.shape[0], *[1] * (inputs.ndim - 1)).uniform_(-1, 1)


class Noise(Augmentation):
    """Gaussian noise of learned standard deviation: ``x + exp(λ) ε``."""

    def augment(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """See :meth:`Augmentation.augment`."""
        return inputs + strength * torch.randn_like(inputs)


class RandomBrightness(Augmentation):
    """Brightness of an example changed by up to the learned strength: ``x + exp(λ) u`` with u in [−1, 1]."""

    def augment(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """See :meth:`Augmentation.augment`."""
        return inputs + strength * uniform(inputs)


class RandomShift(Augmentation):
    """Images ``(N, …, height, width)`` moved by up to the learned number of pixels, each way; zeros move in.

    Between pixels it interpolates bilinearly, as a product with two banded matrices, which every method can
    differentiate (``grid_sample`` has no second derivative). Cost: 2 products of images with square matrices.
    """

    least_dimensions: ClassVar[int] = 3

    def augment(self, inputs: Tensor, strength: Tensor) -> Tensor:
        """See :meth:`Augmentation.augment`."""
        images = inputs.reshape(inputs.shape[0], -1, *inputs.shape[-2:])
        rows, columns = (_moved(size, strength * uniform(images)) for size in images.shape[-2:])
        return (rows @ images @ columns.transpose(-1, -2)).reshape(inputs.shape)


def _moved(size: int, offset: Tensor) -> Tensor:
    """Returns the matrices that take place i from place ``i + offset``, interpolated between its two neighbours."""
    places = torch.arange(size, device=offset.device, dtype=offset.dtype)
    return (1 - (places[:, None] + offset - places).abs()).clamp(min=0)
