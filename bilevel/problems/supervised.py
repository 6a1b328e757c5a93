"""What ready-made problems share: a model fitted to labelled batches, and what is judged by how well it then does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.errors import ConfigError, DataError, GraphError
from bilevel.problems.base import Problem
from bilevel.validation import check_number

__all__ = ["Criterion", "Training", "Validation", "batch_parts", "counterpart", "module_dict"]

Criterion = Callable[..., Tensor]
"""``(outputs, targets) -> scalar``; with ``reduction="none"``, where it is asked for, one value an example."""

Kind = TypeVar("Kind", bound=Problem)


def counterpart(problem: Problem, kind: type[Kind], name: str | None = None) -> Kind:
    """Returns the other problem of an engine that a ready-made one works with.

    Args:
        problem: The problem that looks for another one.
        kind: Of which class that is.
        name: Its name; None where it is the only one of its class.

    Raises:
        GraphError: There is none, or there are several and no name says which.

    Example::

        training = counterpart(self, Training)      # within a loss
    """
    found = {key: other for key, other in problem._siblings.items() if isinstance(other, kind) and other is not problem}
    if name is not None and name in found:
        return found[name]
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    wanted = f"a {kind.__name__}" if name is None else f"the {kind.__name__} {name!r}"
    there = {key: type(other).__name__ for key, other in problem._siblings.items()}
    remedy = "name the one that is meant" if found else "give the engine one"
    raise GraphError(
        f"problem {problem.name!r} works with {wanted}, of which its engine has {len(found)} (problems: {there}): "
        f"{remedy}"
    )


def batch_parts(name: str, batch: Any, *parts: str, remedy: str = "check the data set's examples") -> Any:
    """Returns a batch that has parts of these names; what Python cannot unpack is left to it to refuse.

    Raises:
        DataError: A batch of more or fewer parts, or one tensor or mapping.
    """
    several = isinstance(batch, (tuple, list))
    if (several and len(batch) != len(parts)) or isinstance(batch, (Tensor, Mapping)):
        came = f"{len(batch)} parts" if several else f"a {type(batch).__name__}"
        raise DataError(f"problem {name!r} needs batches ({', '.join(parts)}), and got {came}: {remedy}")
    return batch


def module_dict(what: str, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Returns modules under names of the user's own.

    Raises:
        ConfigError: A name that torch has no place for; ``what`` says of what it is.
    """
    empty = nn.ModuleDict()
    for name in map(str, modules):
        if not name or "." in name or hasattr(empty, name):
            raise ConfigError(
                f"{name!r} cannot be the name of a {what}: it must not be empty, have a dot, or be that of an "
                "attribute of torch's modules"
            )
    return nn.ModuleDict(dict(modules))


class Training(Problem):
    """The usual inner problem: a model fitted to labelled batches ``(inputs, targets)``.

    ``f(w) = criterion(model_w(inputs), targets) + α/2 ‖w‖²``, with the owned parameters in the norm.

    Args:
        module: The model.
        criterion: ``(outputs, targets) -> scalar``; the cross-entropy by default.
        weight_decay: α. Unlike an optimiser's it is part of the loss, so that every hypergradient method sees it; above
            0, f has a minimum even where the model can fit all examples.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, steps, ….

    Raises:
        ConfigError: ``weight_decay`` below 0.
        DataError: Batches of another form (within the loss).

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        criterion: Criterion = F.cross_entropy,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(module, **settings)
        check_number(self.name, "weight_decay", weight_decay, minimum=0.0)
        self.criterion = criterion
        self.weight_decay = weight_decay

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the loss on a batch, with the model's outputs."""
        inputs, targets = batch_parts(self.name, batch, "inputs", "targets")
        outputs = self(inputs)
        return {"loss": self.criterion(outputs, targets) + self.decay(), "outputs": outputs}

    def decay(self) -> Tensor | float:
        """Returns ``α/2 ‖w‖²``: a scalar, or 0 where α is 0."""
        if not self.weight_decay:
            return 0.0
        weights = dict(self.module.named_parameters())
        squares = [weights[name].square().sum() for name in self.parameter_names]
        return self.weight_decay / 2 * torch.stack(squares).sum()


class Validation(Problem):
    """The usual outer problem: its parameters are judged by the trained model's loss on batches ``(inputs, targets)``.

    Args:
        module: Holds what is learned on this level, the hyper-parameters.
        training: The name of the inner problem; None where the engine has one :class:`Training` only.
        criterion: ``(outputs, targets) -> scalar``; the inner problem's by default.
        settings: Those of :class:`~bilevel.Problem`: optimizer, data, ….

    Cost: 1 forward pass of the model a loss.
    """

    def __init__(
        self, module: nn.Module, *, training: str | None = None, criterion: Criterion | None = None, **settings: Any
    ) -> None:
        super().__init__(module, **settings)
        self.training_name = training
        self.criterion = criterion

    def trained(self) -> Training:
        """Returns the inner problem."""
        return counterpart(self, Training, self.training_name)

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the trained model's loss on a batch."""
        inputs, targets = batch_parts(self.name, batch, "inputs", "targets")
        training = self.trained()
        return (self.criterion or training.criterion)(training(inputs), targets)
