"""One network at the parameters of many tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from bilevel.errors import DataError
from bilevel.problems.few_shot.batching import BatchedLayers, has_batched_layers
from bilevel.problems.few_shot.sequences import direct_losses, layers_of, outputs_of
from bilevel.slots import called_at

__all__ = ["Displacements", "Mirror", "RatedNetwork", "accuracies", "stacked_losses", "stacked_outputs"]


class Mirror(nn.Module):
    """Parameters under the names that a network gives its own.

    Args:
        values: The values by name; dots lead into submodules.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    setattr(place, part, nn.Module())
                place = place.get_submodule(part)
            setattr(place, last, nn.Parameter(value))

    def values(self) -> dict[str, Tensor]:
        """Returns what stands in the parameters' places now."""
        return dict(self.named_parameters())


class Displacements(Mirror):
    """Displacements, the number of the batch of tasks that they are for, and the chunk size that was chosen.

    The number is -1 before the first batch, the size 0 as long as none was chosen. Both are buffers whether sizes are
    chosen or not, so that a state can be loaded with either.

    Args:
        values: The values by name.
    """

    number: Tensor
    chunk: Tensor

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.register_buffer("number", torch.tensor(-1))
        self.register_buffer("chunk", torch.tensor(0))


class RatedNetwork(nn.Module):
    """A network, and factors of what its parameters' displacements add to them."""

    def __init__(self, network: nn.Module, chosen: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.factors = Mirror({name: torch.ones_like(value) for name, value in chosen.items()})

    def forward(self, *inputs: Any) -> Any:
        """Calls the network."""
        return self.network(*inputs)


def stacked_outputs(
    network: nn.Module,
    values: Mapping[str, Tensor],
    inputs: Tensor,
    *,
    vectorized: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """Returns the network's outputs ``(M, n, …)`` for every task's inputs.

    Args:
        network: The network.
        values: What to put in its parameters' places: of the parameter's shape for all tasks, or ``(M, *shape)``.
        inputs: ``(M, n, …)``.
        vectorized: Whether tasks are evaluated together, by ``torch.func.vmap`` unless it is a sequence that is
            :mod:`known <bilevel.problems.few_shot.sequences>`, or one after the other.
        chunk_size: How many at a time; None for all.
    """
    # Of one task alone, the layers' own operations are faster than those for many.
    vectorized = vectorized and chunk_size != 1 and len(inputs) > 1
    layers = layers_of(network, inputs) if vectorized else None
    if layers is not None and chunk_size is None:
        return outputs_of(layers, values, inputs)
    dimensions = {name: parameter.dim() for name, parameter in network.named_parameters()}
    shared = {name: value for name, value in values.items() if value.dim() == dimensions[name]}
    stacked = {name: value for name, value in values.items() if name not in shared}
    if layers is not None and chunk_size is not None:
        parts = [slice(start, start + chunk_size) for start in range(0, len(inputs), chunk_size)]
        own = [{**shared, **{name: value[part] for name, value in stacked.items()}} for part in parts]
        return torch.cat([outputs_of(layers, each, inputs[part]) for each, part in zip(own, parts, strict=True)])

    def outputs(own: Mapping[str, Tensor], given: Tensor) -> Tensor:
        found: Tensor = called_at(network, {**shared, **own}, (given,))
        return found

    if vectorized and has_batched_layers(network, inputs.device):
        with BatchedLayers():
            return _over_tasks(outputs, True, chunk_size)(stacked, inputs)
    if vectorized:
        return _over_tasks(outputs, True, chunk_size)(stacked, inputs)
    # The backward pass comes after the swap: what it evaluates again, it would evaluate at the wrong parameters.
    with torch.autograd.graph.disable_saved_tensors_hooks(
        "the network evaluates parts of itself again in the backward pass (activation checkpointing), where its "
        "parameters are no task's any more: turn that off for few-shot learning"
    ):
        return _over_tasks(outputs, False, None)(stacked, inputs)


def stacked_losses(
    criterion: Callable[..., Tensor], outputs: Tensor, targets: Tensor, *, vectorized: bool = True
) -> Tensor:
    """Returns ``criterion(outputs[i], targets[i])`` for every task, ``(M,)``.

    Raises:
        DataError: A class for which there is no output.
    """
    try:
        found = direct_losses(criterion, outputs, targets) if vectorized else None
        return _over_tasks(criterion, vectorized, None)(outputs, targets) if found is None else found
    except (IndexError, RuntimeError) as error:
        classes = outputs.dim() == targets.dim() + 1 and not targets.is_floating_point()
        if classes and targets.numel() and int(targets.max()) >= outputs.shape[-1]:
            raise DataError(
                f"a task has the class {int(targets.max())}, and the network {outputs.shape[-1]} outputs: give it as "
                "many as the tasks have ways"
            ) from error
        raise


def accuracies(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Returns the share of right answers of every task, ``(M,)``; None where targets are no classes."""
    if targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
        return None
    return (outputs.detach().argmax(-1) == targets).float().flatten(1).mean(1)


def _over_tasks(function: Callable[..., Tensor], vectorized: bool, chunk_size: int | None) -> Callable[..., Tensor]:
    if vectorized:
        return vmap(function, randomness="different", chunk_size=chunk_size)

    def one_after_the_other(first: Tensor | Mapping[str, Tensor], second: Tensor) -> Tensor:
        if isinstance(first, Tensor):
            return torch.stack([function(one, other) for one, other in zip(first, second, strict=True)])
        each = [{name: value[task] for name, value in first.items()} for task in range(len(second))]
        return torch.stack([function(one, other) for one, other in zip(each, second, strict=True)])

    return one_after_the_other
