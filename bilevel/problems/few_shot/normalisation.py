"""Batch normalisation of many tasks at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from bilevel.errors import ParameterError

__all__ = ["OneNormalisation", "takes_statistics"]


def takes_statistics(network: nn.Module) -> bool:
    """Whether a network has layers that normalise by the statistics of the batch they are given."""
    return any(isinstance(part, _NormBase) and part.running_mean is None for part in network.modules())


class OneNormalisation(TorchFunctionMode):
    """Within ``torch.func.vmap`` over tasks: batch normalisation of M tasks by C channels as one of M·C channels.

    ``vmap`` by itself normalises all tasks at once and then applies each task's own scale and shift in two more passes
    over the activations, whose second derivatives take many more. The numbers are the same to rounding.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces ``batch_norm`` where it keeps no running statistics."""
        if func is F.batch_norm:
            found = _statistics_of_the_batch(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _statistics_of_the_batch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if running_mean is not None or running_var is not None or not training:
        return None
    found: Tensor = _Normalised.apply(input, weight, bias, eps)  # type: ignore[no-untyped-call]
    return found


class _Normalised(Function):
    """``F.batch_norm`` of a batched input: only its rule for ``vmap`` is ever used."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        raise ParameterError(
            "a layer with batch normalisation is given the same input for all tasks, one that does not depend on the "
            "tasks' inputs: evaluate tasks one after the other, Adaptation(vectorized=False)"
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: the rule below calls an operation that autograd knows."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Any, bias: Any, eps: float) -> Any:
        """Makes tasks and channels one dimension."""
        count = info.batch_size

        def flat(values: Tensor | None, place: int | None) -> Tensor | None:
            if values is None:
                return None
            return (values.expand(count, -1) if place is None else values.movedim(place, 0)).reshape(-1)

        x = x.unsqueeze(1).expand(-1, count, *x.shape[1:]) if dims[0] is None else x.movedim(dims[0], 1)
        joined = x.reshape(x.shape[0], count * x.shape[2], *x.shape[3:])
        found = F.batch_norm(joined, None, None, flat(weight, dims[1]), flat(bias, dims[2]), True, 0.0, eps)
        return found.reshape(found.shape[0], count, -1, *found.shape[2:]), 1
