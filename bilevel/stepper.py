"""A problem's updates, made by the user's own optimiser and scheduler."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import ConfigError, ParameterError, unknown_name

__all__ = ["EVALUATE", "Scheduler", "Stepper", "check_optimizer", "make_scheduler"]

# Not public. In a torch that lacks one of these, steps are made as torch wraps them.
_profiles: Callable[[], bool] | None = getattr(torch.autograd, "_profiler_enabled", None)
_hooks_of_all: list[Mapping[int, Any] | None] = [
    getattr(sys.modules[Optimizer.__module__], f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post")
]

_trains = operator.attrgetter("requires_grad")

EVALUATE = "evaluate/"
"""What the name of a metric starts with that comes from a problem's ``evaluate()``."""


@runtime_checkable
class Scheduler(Protocol):
    """What every learning-rate scheduler has: torch's own, those of transformers, or the user's."""

    optimizer: Optimizer

    @property
    def step(self) -> Callable[..., None]:
        """Moves on by one step; with a metric where it asks for one."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state back."""


class Stepper:
    """Makes updates with gradients that were taken elsewhere, as a hand-written loop would after ``backward()``.

    The optimiser and the scheduler are the user's objects; neither is rebuilt, and whatever ``.grad`` parameters hold
    stays theirs.

    Args:
        name: The problem's name, for messages.
        optimizer: A torch optimiser.
        owned: Its parameters that require gradients, by name, in the order in which gradients will come.
        scheduler: A learning-rate scheduler of this optimiser, or a callable that makes one from it.
        scheduler_metric: Which number a scheduler that asks for one is given (``ReduceLROnPlateau``): ``"loss"``, the
            default, or another value that the problem's loss returns, both after each update; or ``"evaluate/NAME"``
            for one that its ``evaluate()`` returns, after each evaluation and only then.
        max_grad_norm: Clips the gradients' norm.

    Raises:
        ConfigError: An optimiser that an engine cannot drive, or a scheduler of another one; a metric for a scheduler
            that asks for none.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        owned: Mapping[str, Tensor],
        *,
        scheduler: Scheduler | Callable[[Optimizer], Scheduler] | None = None,
        scheduler_metric: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        check_optimizer(name, optimizer)
        self._name = name
        self._names = tuple(owned)
        self._parameters = tuple(owned.values())
        self._max_grad_norm = max_grad_norm
        self._of_torch = type(optimizer) is getattr(torch.optim, type(optimizer).__name__, None)
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else make_scheduler(name, scheduler, optimizer)
        self.metric = _metric(name, self.scheduler, scheduler_metric)

    @property
    def needs_evaluation(self) -> bool:
        """Whether the scheduler waits for a metric of ``evaluate()``."""
        return self.metric is not None and self.metric.startswith(EVALUATE)

    def check(self) -> None:
        """Raises where the optimiser does not hold what it held when the problem was made.

        Raises:
            ParameterError: A parameter was added to the optimiser, taken out of it, frozen or unfrozen.
        """
        self._held()

    def _held(self) -> list[Tensor]:
        """Returns what the optimiser holds, checked; frozen parameters are among it."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        trainable = held if all(map(_trains, held)) else list(filter(_trains, held))
        if len(trainable) == len(self._parameters) and all(map(operator.is_, trainable, self._parameters)):
            return held
        now, before = {id(p) for p in trainable}, {id(p): n for n, p in zip(self._names, self._parameters, strict=True)}
        more = [tuple(p.shape) for p in trainable if id(p) not in before]
        less = [name for key, name in before.items() if key not in now]
        changes = [f"{len(more)} it did not hold or that were frozen (shapes {more[:3]})"] if more else []
        changes += [f"{', '.join(less[:3])}{', …' if len(less) > 3 else ''} no longer"] if less else []
        raise ParameterError(
            f"the optimizer of problem {self._name!r} holds other trainable parameters than when the problem was made: "
            f"{' and '.join(changes) or 'the same ones in another order'}. What a problem owns is fixed when it is "
            "made: make the problem and its engine again after add_param_group() or a change of requires_grad."
        )

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        """Makes one update of the owned parameters, and moves the scheduler on.

        Args:
            gradients: One a parameter; they are not changed.
            values: What the loss returned: ``"loss"`` and further metrics. Read only where the scheduler asks.

        Raises:
            ParameterError: See :meth:`check`.
            UnknownNameError: The scheduler asks for a metric that the loss did not return; the update has been made.
        """
        with self.holding(self.own(gradients)):
            if self._max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
            written = _as_written(type(self.optimizer).step) if self._goes_bare() else None
            if written is None:
                self.optimizer.step()
            else:
                with torch.no_grad():
                    written(self.optimizer)
        self.advance_scheduler(values)

    def holding(self, gradients: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Lets the parameters hold gradients in the body, and what they held before after it.

        Args:
            gradients: One a parameter. They may be changed in place.

        Raises:
            ParameterError: See :meth:`check`.
        """
        return _Holding(self._held(), self._parameters, gradients)

    def advance_scheduler(self, values: Mapping[str, Any]) -> None:
        """Moves the scheduler on, if there is one and it does not wait for an evaluation.

        Args:
            values: As for :meth:`update`.

        Raises:
            UnknownNameError: The scheduler asks for a metric that is not among the values.
        """
        if self.scheduler is None or self.needs_evaluation:
            return
        if self.metric is None:
            self.scheduler.step()
            return
        if self.metric not in values:
            raise unknown_name(f"scheduler_metric of problem {self._name!r}", self.metric, values)
        self.scheduler.step(_number(values[self.metric]))

    def own(self, gradients: Sequence[Tensor], *, changed: bool = False) -> list[Tensor]:
        """Returns gradients in the parameters' dtypes that may be changed in place, where anybody will do so.

        Args:
            gradients: One a parameter.
            changed: Whether somebody else than clipping and the optimiser will.
        """
        if changed or self._max_grad_norm is not None or self._changes_gradients():
            return [_copied(grad, p) for p, grad in zip(self._parameters, gradients, strict=True)]
        return [
            (grad.detach() if grad.requires_grad else grad)
            # what ``backward()`` would have made: of the same type, and no expanded or sparse tensor
            if type(grad) is Tensor
            and grad.layout is torch.strided
            and grad.dtype is p.dtype
            and grad.stride() == p.stride()
            else _copied(grad, p)
            for p, grad in zip(self._parameters, gradients, strict=True)
        ]

    @property
    def plain(self) -> bool:
        """Whether an update is that of an optimiser of torch's own, without hooks."""
        made: Any = self.optimizer
        hooks = made._optimizer_step_pre_hooks or made._optimizer_step_post_hooks
        return self._of_torch and not hooks and not any(_hooks_of_all)

    def _goes_bare(self) -> bool:
        """Whether nobody sees if a step is made without what torch wraps around it.

        That is a label for profilers, the calls of hooks, marks for compilers and the mode of gradients: for the step
        of SGD on a small model five times its own work. What anybody else has put around it stays, as schedulers do on
        the object and tracers on the class.
        """
        made: Any = self.optimizer
        return (
            _profiles is not None
            and None not in _hooks_of_all
            and self.plain
            and "step" not in vars(made)
            and _as_written(type(made).step) is not None
            and not made.defaults.get("differentiable", False)
            and not _profiles()
        )

    def _changes_gradients(self) -> bool:
        """Whether the optimiser may change gradients in place.

        They may not be its own: autograd can return one tensor for two parameters, or one that a custom function or an
        earlier update's record still holds. Of torch's own only SGD with Nesterov's momentum and ``foreach`` does so.
        """
        return not self.plain or any(group.get("nesterov") for group in self.optimizer.param_groups)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Moves a scheduler on that waits for a metric of ``evaluate()``; does nothing otherwise.

        Args:
            metrics: What the problem's ``evaluate()`` returned.

        Raises:
            UnknownNameError: The metric is not among them.
        """
        if self.scheduler is None or self.metric is None or not self.needs_evaluation:
            return
        key = self.metric.removeprefix(EVALUATE)
        if key not in metrics:
            choices = [EVALUATE + name for name in metrics]
            raise unknown_name(f"scheduler_metric of problem {self._name!r}", self.metric, choices)
        self.scheduler.step(_number(metrics[key]))


def check_optimizer(name: str, optimizer: Optimizer) -> None:
    """Raises for an optimiser that cannot be driven with gradients that were taken elsewhere.

    Raises:
        ConfigError: Its ``step`` must be given a closure (LBFGS), or it wants sparse gradients (SparseAdam).
    """
    kind = type(optimizer).__name__
    if _required_arguments(type(optimizer).step):  # schedulers put a wrapper around that of the object
        raise ConfigError(
            f"optimizer of problem {name!r}: {kind}.step() must be given a closure, that is, it evaluates the loss by "
            "itself and cannot be driven by an engine. Use one that takes a step with given gradients: SGD, Adam, …"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError(
            f"optimizer of problem {name!r}: SparseAdam takes sparse gradients only, and an engine's gradients are "
            "dense, those of nn.Embedding(sparse=True) too. Use Adam, or Adagrad, whose zero gradients move nothing."
        )


def make_scheduler(
    name: str, scheduler: Scheduler | Callable[[Optimizer], Scheduler], optimizer: Optimizer
) -> Scheduler:
    """Returns the scheduler, made from the optimiser where a callable came.

    Raises:
        ConfigError: It is none, or that of another optimiser.
    """
    made: object = scheduler(optimizer) if not isinstance(scheduler, Scheduler) and callable(scheduler) else scheduler
    if not isinstance(made, Scheduler):
        raise ConfigError(
            f"scheduler of problem {name!r} must be a learning-rate scheduler (with step, state_dict, load_state_dict "
            f"and optimizer) or a callable that makes one from the optimizer, not {type(made).__name__}"
        )
    if made.optimizer is not optimizer:
        raise ConfigError(
            f"scheduler of problem {name!r}: this {type(made).__name__} belongs to another optimizer than the "
            f"problem's {type(optimizer).__name__}, and would change nothing here. Make it from the problem's own, or "
            "pass a callable: scheduler=lambda optimizer: …"
        )
    return made


def _metric(name: str, scheduler: Scheduler | None, metric: str | None) -> str | None:
    asked = scheduler is not None and bool(_required_arguments(type(scheduler).step))
    if metric is None:
        return "loss" if asked else None
    if not asked:
        kind = "it has no scheduler" if scheduler is None else f"{type(scheduler).__name__}.step() asks for none"
        raise ConfigError(f"problem {name!r} has scheduler_metric={metric!r}, but {kind}: leave it out")
    if metric in ("", EVALUATE):
        raise ConfigError(
            f"scheduler_metric of problem {name!r} must name a value of its loss, 'loss' say, or 'evaluate/NAME', not "
            f"{metric!r}"
        )
    return metric


@functools.lru_cache
def _as_written(step: Callable[..., Any]) -> Callable[..., Any] | None:
    """Returns a step without what torch wraps around it; None where somebody else has wrapped it, too."""
    while hasattr(step, "__wrapped__"):
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch."):
            return None
        step = step.__wrapped__
    return step


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    """Returns what a method, as its class has it, must be given besides its object."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    _, *parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]


class _Holding(AbstractContextManager[None]):
    __slots__ = ("_gradients", "_held", "_kept", "_owned")

    def __init__(self, held: Sequence[Tensor], owned: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._held = held
        self._owned = owned
        self._gradients = gradients

    def __enter__(self) -> None:
        self._kept = [p.grad for p in self._held]
        try:
            if len(self._held) != len(self._owned):
                for p in self._held:  # a frozen parameter with a gradient of its own would be moved by it
                    p.grad = None
            for p, grad in zip(self._owned, self._gradients, strict=True):
                p.grad = grad
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for p, grad in zip(self._held, self._kept, strict=True):
            p.grad = grad


def _copied(grad: Tensor, parameter: Tensor) -> Tensor:
    """Returns a copy of a gradient in the parameter's dtype and layout."""
    dense = grad.detach() if grad.layout == torch.strided else grad.detach().to_dense()
    with torch.no_grad():
        return torch.empty_like(parameter, requires_grad=False).copy_(dense)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
