"""The two levels: a model fitted under hyper-parameters, and hyper-parameters judged by the validation loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.errors import ConfigError, GraphError, unknown_name
from bilevel.problems.hyperparameters.base import Hyperparameter, Value
from bilevel.problems.hyperparameters.tasks import Tasks
from bilevel.problems.supervised import Criterion, Training, Validation, batch_parts, counterpart, module_dict
from bilevel.vector import Tensors

__all__ = ["Hyperparameters", "Tuned"]


class Tuned(Training):
    """The inner problem: a model fitted under hyper-parameters that :class:`Hyperparameters` learns.

    ``f(w, λ) = Σ over tasks of ℓ(model(x̃), ỹ) + penalties``, where each part of λ says, in turn, what x̃ and ỹ are made
    of the batch, how tasks are weighed, and what is added.

    Args:
        module: The model.
        criterion: ``(outputs, targets) -> scalar``, the cross-entropy by default; or :class:`Tasks`.
        hyperparameters: The name of the outer problem; None where the engine has one :class:`Hyperparameters` only.
        settings: Those of :class:`~bilevel.Problem`. The decay of weights is a part of λ, :class:`WeightDecay`.

    Raises:
        ConfigError: A ``weight_decay``.
        GraphError: The engine has no :class:`Hyperparameters`, or several and no name says which.
        UnknownNameError: A part for a task that the criterion does not have (within the loss).

    Cost: 1 forward pass a loss.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        criterion: Criterion = F.cross_entropy,
        hyperparameters: str | None = None,
        **settings: Any,
    ) -> None:
        if "weight_decay" in settings:
            raise ConfigError(
                f"{type(self).__name__} takes its decay from the hyper-parameters: leave weight_decay out and add "
                "WeightDecay(model, initial=...) to them, with requires_grad_(False) if it is not to be learned"
            )
        super().__init__(module, criterion=criterion, **settings)
        self.hyperparameters_name = hyperparameters

    def parts(self) -> dict[str, Hyperparameter]:
        """Returns the outer problem's parts, by name."""
        parts = counterpart(self, Hyperparameters, self.hyperparameters_name).parts
        for name, part in parts.items():
            if part.inner not in (kind.__name__ for kind in type(self).__mro__):
                raise GraphError(
                    f"part {name!r} ({type(part).__name__}) needs an inner problem of class {part.inner}, not "
                    f"{type(self).__name__}, which would pass it over"
                )
            self._check_tasks(name, part)
        return parts

    def named_weights(self) -> dict[str, Tensor]:
        """Returns the model's parameters by name, as they are at this evaluation."""
        return dict(self.module.named_parameters())

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the training loss on a batch ``(inputs, targets)``, with the model's outputs."""
        inputs, targets = batch_parts(self.name, batch, "inputs", "targets")
        parts = self.parts().values()
        for part in parts:
            inputs = part.inputs(inputs)
        outputs = self(inputs)
        losses: Mapping[str, Tensor] = self._losses(outputs, targets)
        for part in parts:
            losses = part.losses(losses)
        total = sum(losses.values()) + sum(part.penalty(self.named_weights()) for part in parts)
        shown = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
        return {"loss": total, "outputs": shown}

    def _losses(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        criterion = self.criterion
        if not isinstance(criterion, Tasks):
            return {"": criterion(outputs, self._targets(targets, outputs, ""))}
        found = {}
        for task, each in criterion.criteria.items():
            own, wanted = criterion.part(outputs, task, "outputs"), criterion.part(targets, task, "targets")
            found[task] = each(own, self._targets(wanted, own, task))
        return found

    def _check_tasks(self, name: str, part: Hyperparameter) -> None:
        if part.tasks is None:
            return
        if not isinstance(self.criterion, Tasks):
            raise ConfigError(
                f"part {name!r} is for the tasks {', '.join(part.tasks)}, and the criterion of problem {self.name!r} "
                "has none: pass criterion=Tasks(...), or leave tasks= out"
            )
        for task in part.tasks:
            if task not in self.criterion.criteria:
                raise unknown_name(f"task of part {name!r}", task, self.criterion.criteria)

    def _targets(self, targets: Any, outputs: Any, task: str) -> Any:
        for part in self.parts().values():
            targets = part.targets(targets, outputs, task)
        return targets


class Hyperparameters(Validation):
    """The outer problem: hyper-parameters of several kinds, judged together by the validation loss.

    ``min over λ of F(w*(λ))`` with ``w*(λ) = argmin over w of f(w, λ)``, the loss of :class:`Tuned`; F is the plain
    criterion on plain validation batches: no augmentation, no smoothing, no penalty, main tasks only.

    As many hyper-parameters as validation examples can fit the validation set itself: judge the result on data that
    neither problem has seen.

    Args:
        parts: The kinds, by names of one's own; they apply in this order.
        training: See :class:`~bilevel.problems.Validation`.
        criterion: F's; the inner problem's by default.
        settings: Those of :class:`~bilevel.Problem`.

    Raises:
        ConfigError: No parts, a part that is no :class:`Hyperparameter` or overrides none of its hooks, or a name that
            torch has no place for.

    Cost: 1 forward pass a loss. One hypergradient serves all parts, whatever their number.

    Example::

        model = nn.Linear(64, 10)
        parts = {"decay": WeightDecay(model, per="element"), "smoothing": LabelSmoothing(0.1), "noise": Noise(0.1)}
        outer = Hyperparameters(parts, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), data=validation)
        inner = Tuned(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), data=training, steps=20)
        Engine([outer, inner], EngineConfig(steps=100), hypergradient="conjugate_gradient").run()
        outer.values()["smoothing"]
    """

    def __init__(
        self,
        parts: Mapping[str, Hyperparameter],
        *,
        training: str | None = None,
        criterion: Criterion | None = None,
        **settings: Any,
    ) -> None:
        if not parts:
            raise ConfigError("Hyperparameters needs a mapping from names to at least one Hyperparameter")
        for name, part in parts.items():
            if not isinstance(part, Hyperparameter):
                raise ConfigError(f"hyper-parameter {name!r} must be a Hyperparameter, not {type(part).__name__}")
            if not part.enters():
                raise ConfigError(
                    f"hyper-parameter {name!r} ({type(part).__name__}) enters the training loss nowhere: it overrides "
                    f"none of {', '.join(part.hooks)}"
                )
        super().__init__(module_dict("hyper-parameter", parts), training=training, criterion=criterion, **settings)

    @property
    def parts(self) -> dict[str, Hyperparameter]:
        """The kinds, by name."""
        return {name: cast(Hyperparameter, part) for name, part in cast(nn.ModuleDict, self.module).items()}

    def values(self) -> dict[str, Value]:
        """Returns every part's :meth:`~Hyperparameter.value`, without gradients."""
        return {name: _detached(part.value()) for name, part in self.parts.items()}

    def evaluate(self) -> Mapping[str, float]:
        """Returns the values: single numbers each, of larger tensors the least, median and largest."""
        found: dict[str, float] = {}
        for name, value in self.values().items():
            numbers = dict(value) if isinstance(value, Mapping) else {"": value}
            if all(number.numel() == 1 for number in numbers.values()):
                found.update({f"{name}/{key}" if key else name: float(number) for key, number in numbers.items()})
                continue
            every = torch.cat([number.flatten() for number in numbers.values()])
            found.update({f"{name}/{key}": float(getattr(every, key)()) for key in ("min", "median", "max")})
        return found

    @property
    def projects(self) -> bool:
        """Whether a part has bounds."""
        return any(type(part).project is not Hyperparameter.project for part in self.parts.values())

    def project(self, values: Tensors) -> Tensors:
        """Returns the parts' projections of their own values."""
        found = dict(zip(self.parameter_names, values, strict=True))
        for name, part in self.parts.items():
            own = {key: value for key, value in found.items() if key.startswith(f"{name}.")}
            moved = part.project({key.removeprefix(f"{name}."): value for key, value in own.items()})
            found.update({f"{name}.{key}": value for key, value in moved.items()})
        return tuple(found[name] for name in self.parameter_names)


def _detached(value: Value) -> Value:
    return {name: each.detach() for name, each in value.items()} if isinstance(value, Mapping) else value.detach()
