"""One level of a nested problem, as users declare it."""

from __future__ import annotations

import copy
import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.errors import ConfigError, ParameterError, unknown_name
from bilevel.faults import ModesKept
from bilevel.functional import loss_and_outputs
from bilevel.hooks import check_hooks
from bilevel.hypergrad import Estimator, as_estimator
from bilevel.stepper import Scheduler, Stepper
from bilevel.validation import NamedArguments, check_integer, check_number
from bilevel.vector import Tensors

if TYPE_CHECKING:
    from bilevel.hypergrad import InnerProblem, Response
    from bilevel.result import StepResult

__all__ = ["Problem", "select_parameters"]

ParameterSelection = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


class Problem(NamedArguments, ABC):
    """One level: a module, a loss, and how its parameters are updated.

    Subclass it and write :meth:`loss`. Inside, other problems of the same engine are attributes by their names, and
    calling a problem calls its module::

        class Cleaner(Problem):                       # its name is "cleaner"
            def loss(self, batch):
                x, y = batch
                return F.cross_entropy(self.classifier(x), y)     # the problem named "classifier"

    A problem owns the parameters that its optimiser holds. Only these are differentiated, perturbed or stepped.

    Args:
        module: What holds the parameters. Several problems may share one module and own disjoint parts of it.
        optimizer: A torch optimiser, or a callable that makes one from a list of parameters; None for a problem that is
            differentiated but never stepped.
        data: A ``DataLoader`` or another iterable of batches; None if batches come from outside or are not needed.
        scheduler: A learning-rate scheduler, or a callable that makes one from the optimiser; stepped once an update.
        params: Which of the module's trainable parameters to own, where ``optimizer`` is a callable or None: glob
            patterns over their names (``"*.lora_A.*"``), or a predicate ``(name, parameter) -> bool``. All of them by
            default.
        steps: Updates of this problem for each update of the problem above.
        hypergradient: How problems above differentiate through this one: an estimator, its name or a mapping. The
            engine's by default.
        name: Name in the engine; the class name in snake case by default.
        max_grad_norm: Clips the gradient's norm before an update.
        warmup_steps: Updates that are made once, before the first of those ``steps``.
        accumulate: Batches that are averaged for one update.
        start: The first outer step (counted from 0) in which the problem is updated and differentiated through; before
            it, its parameters are constants.
        stop: The first outer step in which it no longer is; None for never.
        reset: Where the parameters start from each time the problem above is about to be updated: ``"initial"`` for the
            values that they have now, or the name of a problem above, whose parameters of the same names they are then
            copied from (as in MAML). The optimiser's state is emptied too. None: they go on from where they are.
        scheduler_metric: What a scheduler that asks for a number is given (``ReduceLROnPlateau``): ``"loss"``, which is
            the default, or another value that the problem's loss returns, after each update; ``"evaluate/NAME"`` for
            one that its ``evaluate()`` returns, after each of the engine's evaluations and only then.

    Raises:
        ConfigError: A value that makes no sense.
        ParameterError: An optimiser that holds parameters which the module does not, or none that can be trained.
        UnknownNameError: A pattern that matches no trainable parameter, or a misspelt hook.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
        data: Iterable[Any] | None = None,
        scheduler: Scheduler | Callable[[Any], Scheduler] | None = None,
        params: ParameterSelection | None = None,
        steps: int = 1,
        hypergradient: Estimator | str | Mapping[str, Any] | None = None,
        name: str | None = None,
        max_grad_norm: float | None = None,
        warmup_steps: int = 0,
        accumulate: int = 1,
        start: int = 0,
        stop: int | None = None,
        reset: str | None = None,
        scheduler_metric: str | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ParameterError(
                f"{type(self).__name__}: module must be an nn.Module, not {type(module).__name__}. "
                "Wrap loose parameters in nn.ParameterList or nn.ParameterDict."
            )
        self.name = name or _snake_case(type(self).__name__)
        if not self.name.isidentifier() or hasattr(type(self), self.name):
            raise ConfigError(
                f"{self.name!r} cannot name a problem: an identifier that is no attribute of Problem is needed"
            )
        _check_schedule(self.name, steps, warmup_steps, accumulate, start, stop, reset)
        if max_grad_norm is not None:
            check_number(self.name, "max_grad_norm", max_grad_norm, minimum=0.0, exclusive=True)
        self.module = module
        self.data = data
        self.steps = steps
        self.max_grad_norm = max_grad_norm
        self.warmup_steps = warmup_steps
        self.accumulate = accumulate
        self.start, self.stop = start, stop
        self.reset = reset
        self.num_updates = 0
        self.hypergradient = None if hypergradient is None else as_estimator(hypergradient)
        self.method: Estimator | None = None
        """The method by which an engine differentiates through the problem; None where none does."""
        made, named = _optimizer_and_parameters(self.name, module, optimizer, params)
        self.parameter_names: tuple[str, ...] = tuple(named)
        self.parameters: Tensors = tuple(named.values())
        self.stepper = _stepper(self.name, made, named, scheduler, scheduler_metric, max_grad_norm)
        self._devices = tuple(sorted({"cpu", *(p.device.type for p in self.parameters)}))
        # Some optimisers make their state when they are made.
        self._initial_slots = {} if self.optimizer is None or reset is None else self._copied(self.optimizer.state)
        self.initial: Tensors | None = None
        if reset == "initial":
            self.initial = tuple(p.detach().clone() for p in self.parameters)
        self._siblings: Mapping[str, Problem] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Refuses misspelt hooks when the class is defined."""
        super().__init_subclass__(**arguments)
        check_hooks(cls, Problem)

    @abstractmethod
    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the loss on a batch: a scalar tensor, or a mapping with ``"loss"`` and further metrics.

        ``"outputs"`` in the mapping are no metric: they name the model's outputs that the loss was computed from (one
        tensor or several), which the Gauss–Newton curvature needs.

        Parameters must be read from modules (``self(x)``, ``self.module.weight``, ``self.other(x)``) at each call,
        never from variables that were bound to the parameter objects earlier: hypergradients evaluate the loss at
        other values.
        """

    def response_loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns what the parameters are a minimiser of once the updates have converged: :meth:`loss` by default.

        Methods that differentiate the solution, rather than the updates that lead there, take their products of it.
        It is another function than :meth:`loss` where updates do not end at a stationary point of that: under
        constraints (:meth:`project`), it is the loss restricted to the constraints that are active.
        """
        return self.loss(batch)

    def respond(self, estimator: Estimator, lower: InnerProblem) -> Response:
        """Returns the best response of this problem by a method: ``estimator.respond(lower)`` by default.

        To be overridden where the problem falls into independent parts, each of which can be solved by itself.
        """
        return estimator.respond(lower)

    def evaluate(self) -> Mapping[str, float]:
        """Returns validation metrics; called by ``Engine.evaluate`` without gradients. Nothing by default."""
        return {}

    def project(self, values: Tensors) -> Tensors:
        """Returns where an update leads that arrives at ``values``; there itself unless overridden.

        It is part of every update of this problem, and of what ``unrolled`` differentiates: ``w' = P(U(w, g))``.

        Args:
            values: The owned parameters, in the order of ``self.parameters``. Not to be changed in place.

        Returns:
            As many tensors of the same shapes, from operations that autograd knows; they may depend on nothing but
            ``values``.
        """
        return values

    def on_run_start(self, steps: int) -> None:
        """Called when ``Engine.run`` starts, with the number of outer steps to take."""

    def on_step_start(self) -> None:
        """Called before every outer step."""

    def on_step_end(self, result: StepResult) -> None:
        """Called after every outer step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns another problem of the same engine by its name."""
        siblings: Mapping[str, Problem] = self.__dict__.get("_siblings", {})
        if name in siblings:
            return siblings[name]
        if hasattr(type(self), name):  # a property that raised AttributeError: once more, for its own error
            return object.__getattribute__(self, name)
        known = ", ".join(siblings) or "none: the problem is in no engine yet"
        raise AttributeError(
            f"{type(self).__name__!r} has no attribute {name!r} and no problem has this name (problems: {known})"
        )

    def __repr__(self) -> str:
        """Names the problem and what it owns."""
        size = sum(p.numel() for p in self.parameters)
        owned = f"tensors={len(self.parameters)}, parameters={size}"
        return f"{type(self).__name__}(name={self.name!r}, {owned}, steps={self.steps})"

    def attach(self, siblings: Mapping[str, Problem]) -> None:
        """Makes the engine's problems reachable by name."""
        self._siblings = siblings

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimiser, which is fixed when the problem is made."""
        return None if self.stepper is None else self.stepper.optimizer

    @property
    def scheduler(self) -> Scheduler | None:
        """The learning-rate scheduler, which is fixed when the problem is made."""
        return None if self.stepper is None else self.stepper.scheduler

    @property
    def start_source(self) -> str | None:
        """The problem above from whose parameters this one starts, if it does."""
        return None if self.reset == "initial" else self.reset

    @property
    def projects(self) -> bool:
        """Whether :meth:`project` is overridden."""
        return type(self).project is not Problem.project

    @property
    def restricts(self) -> bool:
        """Whether :meth:`response_loss` is overridden."""
        return type(self).response_loss is not Problem.response_loss

    @property
    def updates_plainly(self) -> bool:
        """Whether an update is that of an optimiser of torch's own, and nothing of the user's is part of it."""
        plain = self.stepper is not None and self.stepper.plain and not self.projects
        return plain and type(self).update is Problem.update

    def is_active(self, step: int) -> bool:
        """Whether the problem takes part in an outer step, counted from 0."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def start_values(self) -> Tensors | None:
        """Returns what the parameters start from, or None where they go on from where they are.

        Raises:
            ParameterError: The problem to start from has no parameter of a name, or one of another shape.
        """
        if self.start_source is None:
            return self.initial
        source = self._siblings[self.start_source]
        known = dict(zip(source.parameter_names, source.parameters, strict=True))
        for name, own in zip(self.parameter_names, self.parameters, strict=True):
            if name not in known or known[name].shape != own.shape:
                own_shape = tuple(own.shape)
                found = f"has shape {tuple(known[name].shape)}, not {own_shape}" if name in known else "does not exist"
                raise ParameterError(
                    f"problem {self.name!r} is to start from problem {source.name!r}, whose parameter {name!r} "
                    f"{found}: give both the same module structure"
                )
        return tuple(known[name] for name in self.parameter_names)

    def restart(self) -> None:
        """Puts the parameters where they start from and empties the optimiser's state, if the problem is reset."""
        values = self.start_values()
        if values is None:
            return
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.state.update(self._copied(self._initial_slots))

    def _copied(self, slots: Mapping[Any, Any]) -> dict[Any, Any]:
        """Copies what an optimiser holds, less its parameters."""
        return copy.deepcopy(dict(slots), {id(p): p for p in self.parameters})

    def evaluate_loss(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """Returns the checked scalar loss and the other metrics."""
        label = f"problem {self.name!r}"
        with ModesKept(label, self._devices, self.parameters):
            result = self.loss(batch)
        value, _ = loss_and_outputs(result, label)
        if not isinstance(result, Mapping):
            return value, {}
        return value, {str(key): part for key, part in result.items() if key not in ("loss", "outputs")}

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        """Makes one update of the owned parameters with the given gradients.

        Args:
            gradients: One a parameter.
            values: What the loss returned, ``"loss"`` among them, for a scheduler that asks for a metric.
        """
        if self.stepper is None:
            raise ConfigError(f"problem {self.name!r} has no optimizer and cannot be stepped: pass optimizer=")
        self.stepper.update(gradients, values)
        if self.projects:
            self._put_projected()
        self.num_updates += 1

    @torch.no_grad()
    def _put_projected(self) -> None:
        projected = tuple(self.project(self.parameters))
        shapes, own = ([tuple(part.shape) for part in parts] for parts in (projected, self.parameters))
        if shapes != own:
            raise ParameterError(
                f"project() of problem {self.name!r} must return as many tensors of the same shapes as it was given, "
                f"{own}, and returned {shapes}"
            )
        for parameter, value in zip(self.parameters, projected, strict=True):
            parameter.copy_(value)


def select_parameters(name: str, module: nn.Module, selection: ParameterSelection | None) -> dict[str, nn.Parameter]:
    """Returns the module's trainable parameters that a selection names.

    Raises:
        UnknownNameError: A pattern that matches no trainable parameter.
        ParameterError: No trainable parameter at all.
    """
    trainable = {key: p for key, p in module.named_parameters() if p.requires_grad}
    if selection is None:
        chosen = trainable
    elif callable(selection):
        chosen = {key: p for key, p in trainable.items() if selection(key, p)}
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(key, pattern) for key in trainable):
                frozen = [key for key, _ in module.named_parameters() if fnmatch.fnmatchcase(key, pattern)]
                note = f" ({len(frozen)} frozen ones match, such as {frozen[0]!r})" if frozen else ""
                raise unknown_name(f"parameter pattern of problem {name!r}{note}:", pattern, trainable)
        chosen = {
            key: p for key, p in trainable.items() if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
        }
    if not chosen:
        held = [key for key, _ in module.named_parameters()]
        if not held:
            why = f"its module, a {type(module).__name__}, has no parameters"
        elif not trainable:
            why = f"none of the {len(held)} in its module has requires_grad ({held[0]!r} and so on)"
        else:
            why = f"params= took none of the {len(trainable)} in its module: {', '.join(map(repr, trainable))}"
        raise ParameterError(f"problem {name!r} owns no trainable parameter: {why}")
    return chosen


def _optimizer_and_parameters(
    name: str,
    module: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None,
    selection: ParameterSelection | None,
) -> tuple[Optimizer | None, dict[str, Tensor]]:
    if not isinstance(optimizer, Optimizer):
        chosen: dict[str, Tensor] = dict(select_parameters(name, module, selection))
        if optimizer is None:
            return None, chosen
        if not callable(optimizer):
            raise ConfigError(
                f"optimizer of problem {name!r} must be a torch optimizer or a callable that makes one from a list of "
                "parameters, "
                f"not {type(optimizer).__name__}"
            )
        made = optimizer(list(chosen.values()))
        if not isinstance(made, Optimizer):
            raise ConfigError(
                f"optimizer of problem {name!r}: the callable returned a {type(made).__name__}, not a torch optimizer"
            )
        optimizer = made
    elif selection is not None:
        raise ConfigError(
            f"problem {name!r} has both params= and a ready optimizer, which owns what it holds: drop params=, or pass "
            "optimizer=lambda params: …"
        )
    names = {id(p): key for key, p in module.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [tuple(p.shape) for p in held if id(p) not in names]
    if strange:
        raise ParameterError(
            f"the optimizer of problem {name!r} holds {len(strange)} parameters that its module does not have (shapes "
            f"{strange[:3]}). "
            "Make the optimizer from module.parameters()."
        )
    owned: dict[str, Tensor] = {names[id(p)]: p for p in held if p.requires_grad}
    if not owned:
        raise ParameterError(f"the optimizer of problem {name!r} holds no parameter that requires gradients")
    return optimizer, owned


def _check_schedule(
    name: str, steps: int, warmup_steps: int, accumulate: int, start: int, stop: int | None, reset: object
) -> None:
    check_integer(name, "steps", steps, minimum=1)
    check_integer(name, "warmup_steps", warmup_steps, minimum=0)
    check_integer(name, "accumulate", accumulate, minimum=1)
    check_integer(name, "start", start, minimum=0)
    if stop is not None:
        check_integer(name, "stop", stop, minimum=start + 1)
    if reset is not None and not isinstance(reset, str):
        raise ConfigError(
            f"reset of problem {name!r} must be 'initial', the name of a problem above, or None, not {reset!r}"
        )
    if reset is not None and warmup_steps:
        raise ConfigError(
            f"problem {name!r} has both reset= and warmup_steps=, which the reset would undo: drop one of them"
        )


def _stepper(
    name: str,
    optimizer: Optimizer | None,
    owned: Mapping[str, Tensor],
    scheduler: Scheduler | Callable[[Any], Scheduler] | None,
    scheduler_metric: str | None,
    max_grad_norm: float | None,
) -> Stepper | None:
    if optimizer is not None:
        return Stepper(
            name,
            optimizer,
            owned,
            scheduler=scheduler,
            scheduler_metric=scheduler_metric,
            max_grad_norm=max_grad_norm,
        )
    if scheduler is not None:
        raise ConfigError(f"problem {name!r} has a scheduler but no optimizer")
    return None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
