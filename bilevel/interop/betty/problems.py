"""Betty's problem classes: what a user subclasses."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from bilevel.errors import CheckpointError, ConfigError, ParameterError
from bilevel.interop.betty.configs import Config
from bilevel.interop.betty.data import converted
from bilevel.interop.betty.dependencies import Declared
from bilevel.interop.betty.log import line
from bilevel.slots import called_at
from bilevel.stepper import Scheduler
from bilevel.validation import check_integer

__all__ = ["HigherIterativeProblem", "ImplicitProblem", "IterativeProblem", "Problem"]


HOOKS = (
    "configure_train_data_loader",
    "configure_module",
    "configure_optimizer",
    "configure_scheduler",
    "param_groups",
    "on_inner_loop_start",
    "grad_callback",
    "param_callback",
    "custom_optimizer_step",
    "epoch_callback",
)
"""What users may define beside the methods that there are."""
_SETTINGS = {
    "gas": "gradient_accumulation",
    "precision": "precision",
    "gradient_clipping": "gradient_clipping",
    "warmup_steps": "warmup_steps",
    "log_step": "log_step",
    "log_local_step": "log_local_step",
}
"""Attributes that say what the configuration says, by its field."""
_FIXED = ("module", "optimizer", "scheduler", "train_data_loader")


class Host(Protocol):
    """What a problem asks of its engine."""

    graph: Declared

    def named(self, names: Iterable[str]) -> list[Problem]:
        """Returns problems by their names."""

    def count(self, name: str) -> int:
        """Returns the number of a problem's steps so far."""

    def is_rank_zero(self) -> bool:
        """Whether this is the only process, or the first."""

    def leaf_steps(self, leaf: Problem) -> None:
        """Hears that one of the lowest problems is to step."""


class Problem:
    """One level, in Betty's terms. Subclass it by way of :class:`ImplicitProblem` and write :meth:`training_step`.

    Other problems of the engine, its env and its logger are attributes (``self.outer``, ``self.env``,
    ``self.logger``). What is not given here comes from the methods ``configure_module``, ``configure_optimizer``,
    ``configure_scheduler`` and ``configure_train_data_loader``, which are called in the order train data loader,
    module, optimizer, scheduler when the engine is made. Further methods are called if they exist:

    - ``param_groups()``: the optimiser's parameter groups, in place of those it was made with;
    - ``on_inner_loop_start()``: before the first step after the problems above have stepped;
    - ``grad_callback()``: after every backward pass, with the gradients in ``.grad``, which it may change;
    - ``param_callback()``: after every update;
    - ``custom_optimizer_step()``: in place of ``optimizer.step()``;
    - ``epoch_callback()``: when the (first) loader has ended and begins again.

    Args:
        name: Under which the others know it.
        config: Settings; those of ``Config()`` by default.
        module: What holds the parameters.
        optimizer: The optimiser. It is the user's object: its groups and their settings stay, and what it does not hold
            is not trained.
        scheduler: A learning-rate scheduler, stepped every iteration of the problem.
        train_data_loader: An iterable of batches, or a tuple of several.
        extra_config: Anything, as ``self.cfg``.

    Raises:
        ConfigError: ``name`` is no identifier, or ``config`` no :class:`Config`.
    """

    def __init__(
        self,
        name: str,
        config: Config | None = None,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scheduler: Scheduler | None = None,
        train_data_loader: Iterable[Any] | tuple[Iterable[Any], ...] | None = None,
        extra_config: Any = None,
    ) -> None:
        self._name = _checked_name(name)
        self._config = _checked_config(name, config)
        self._engine: Host | None = None
        self._owned: tuple[str, ...] | None = None
        self._live: dict[str, Tensor] | None = None
        self._loaders: tuple[Iterable[Any], ...] = ()
        self._listed: list[Iterable[Any]] | None = None
        self._cached: Any = None
        self.cfg = extra_config
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_data_loader = train_data_loader
        self.train_data_iterator: list[Any] | None = None
        self.epoch_counter: list[int] | None = None
        self.cur_batch: Any = None
        self.device: Any = None
        self.env: Any = None
        self.logger: Any = None
        self.training = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses another module, optimizer, scheduler or loader, once an engine drives those that there were."""
        if name in _SETTINGS:
            raise ConfigError(f"{name} of problem {self.__dict__.get('_name')!r} is set by Config.{_SETTINGS[name]}")
        if name in _FIXED and self.__dict__.get("_owned") is not None and value is not getattr(self, name):
            raise ConfigError(
                f"{name} of problem {self._name!r} cannot be replaced: it is fixed when the engine is made. Change it "
                "in place (load_state_dict, copy_, the optimizer's groups), or make problem and engine again"
            )
        super().__setattr__(name, value)

    def training_step(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """Returns the loss on a batch, or a mapping with ``"loss"`` and what is to be logged.

        It is evaluated once when the engine is made, to see whose parameters it uses, and again at other parameter
        values in every hypergradient.
        """
        raise NotImplementedError(f"problem {self._name!r} needs a training_step(self, batch)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module; what ``self.other(x)`` does in another problem."""
        return self._module()(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :meth:`forward`."""
        return self.forward(*args, **kwargs)

    def get_batch(self) -> Any:
        """Returns the next batch; override it to draw batches yourself.

        The engine calls it where it is overridden, and draws from the loaders otherwise.
        """
        if not self._loaders:
            raise ConfigError(f"problem {self._name!r} has no loader to draw from, or is in no engine yet")
        batches = tuple(self.get_batch_single_loader(place) for place in range(len(self._loaders)))
        return batches[0] if len(batches) == 1 else batches

    def get_batch_single_loader(self, idx: int) -> Any:
        """Returns the next batch of one of the loaders, from iterators of the problem's own."""
        if self.train_data_iterator is None or self.epoch_counter is None:
            raise ConfigError(
                f"the engine draws the batches of problem {self._name!r}: to draw them yourself override "
                "get_batch(), or iterate over the loader itself"
            )
        if not 0 <= idx < len(self.train_data_iterator):
            raise ConfigError(f"problem {self._name!r} has {len(self._loaders)} loaders: there is no number {idx}")
        try:
            batch = next(self.train_data_iterator[idx])
        except StopIteration:
            if idx == 0 and self.is_implemented("epoch_callback"):
                self.epoch_callback()  # type: ignore[attr-defined]
            self.epoch_counter[idx] += 1
            self.train_data_iterator[idx] = iter(self._loaders[idx])
            batch = next(self.train_data_iterator[idx])
        return converted(batch, self.device, self._name)

    def step(self, global_step: int | None = None) -> None:
        """Steps, and lets the problems above step that are due; for use in an engine's own ``train_step``.

        Args:
            global_step: The number of the iteration, which the engine knows.

        Raises:
            ConfigError: The problem has others below it, or stepped in this iteration already.
        """
        if self._engine is None:
            raise ConfigError(f"step() of problem {self._name!r}: make an engine with it first")
        self._engine.leaf_steps(self)

    def parameters(self) -> Sequence[Tensor]:
        """Returns the module's parameters."""
        return list(self._module().parameters())

    def trainable_parameters(self) -> Sequence[Tensor]:
        """Returns the parameters that the problem trains: those that its optimiser holds, once there is an engine.

        Override it to train fewer of them: the engine takes the others out of the optimiser.
        """
        # By way of the module: in a hypergradient it holds other values.
        named = dict(self._module().named_parameters())
        return list(named.values()) if self._owned is None else [named[name] for name in self._owned]

    def meta_trainable_parameters(self) -> Sequence[Tensor]:
        """Returns :meth:`trainable_parameters`; an override is refused."""
        return self.trainable_parameters()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clips, if the configuration says so, and updates the parameters with the gradients in ``.grad``."""
        if self._config.gradient_clipping > 0.0:
            self.clip_grad()
        if self.is_implemented("custom_optimizer_step"):
            self.custom_optimizer_step(*args, **kwargs)  # type: ignore[attr-defined]
        else:
            self._optimizer().step()

    def clip_grad(self) -> None:
        """Clips the norm of the gradients in ``.grad``."""
        nn.utils.clip_grad_norm_(self.trainable_parameters(), self._config.gradient_clipping)

    def zero_grad(self) -> None:
        """Empties the gradients."""
        for p in self.trainable_parameters():
            p.grad = None

    def get_opt_param_group_for_param(self, param: Tensor) -> dict[str, Any] | None:
        """Returns the optimiser's group that holds a parameter."""
        groups: list[dict[str, Any]] = self._optimizer().param_groups
        own = self._held(param)
        return next((group for group in groups if any(p is own for p in group["params"])), None)

    def get_opt_state_for_param(self, param: Tensor) -> dict[str, Any]:
        """Returns the optimiser's state of a parameter."""
        state: dict[str, Any] = self._optimizer().state[self._held(param)]
        return state

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of module, optimizer and scheduler; for a whole run use ``Engine.save``."""
        parts: dict[str, Any] = {"module": self._module(), "optimizer": self._optimizer(), "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` returned."""
        for name in ("module", "optimizer", "scheduler"):
            part = getattr(self, name)
            if part is not None:
                if name not in state_dict:
                    known = ", ".join(state_dict) or "nothing"
                    raise CheckpointError(f"the state of problem {self._name!r} has no {name!r}; it has {known}")
                part.load_state_dict(state_dict[name])

    def cache_states(self) -> None:
        """Keeps a copy of the states of module and optimizer for :meth:`recover_states`."""
        self._cached = copy.deepcopy((self._module().state_dict(), self._optimizer().state_dict()))

    def recover_states(self, clean: bool = True) -> None:
        """Puts back what :meth:`cache_states` kept.

        Args:
            clean: Whether to let go of it.

        Raises:
            ConfigError: Nothing is kept.
        """
        if self._cached is None:
            raise ConfigError(f"problem {self._name!r} has no states to recover: call cache_states() first")
        module, optimizer = self._cached
        self._module().load_state_dict(module)
        self._optimizer().load_state_dict(copy.deepcopy(optimizer))  # which goes on with the tensors it is given
        if clean:
            self._cached = None

    def set_module(self, module: nn.Module) -> None:
        """Sets the module, before there is an engine."""
        self.module = module

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Sets the optimizer, before there is an engine."""
        self.optimizer = optimizer

    def set_scheduler(self, scheduler: Scheduler) -> None:
        """Sets the scheduler, before there is an engine."""
        self.scheduler = scheduler

    def set_train_data_loader(self, loader: Iterable[Any], idx: int = 0) -> None:
        """Sets one of the loaders, before there is an engine.

        Raises:
            ConfigError: There is no loader with this number.
        """
        given = self.train_data_loader
        loaders = [given] if not isinstance(given, tuple) else list(given)
        check_integer("set_train_data_loader()", "idx", idx, minimum=0)
        if idx >= len(loaders):
            raise ConfigError(f"problem {self._name!r} has {len(loaders)} loaders: there is no number {idx}")
        loaders[idx] = loader
        self.train_data_loader = tuple(part for part in loaders if part is not None) if len(loaders) > 1 else loader

    def log(self, stats: Mapping[str, Any], global_step: int | None) -> None:
        """Writes numbers of the present step as a line and to the logger."""
        if self.logger is None:
            raise ConfigError(f"problem {self._name!r} has no logger: it is in no engine yet")
        where = "" if global_step is None else f"[Global Step {global_step}] "
        self.logger.info(f'[Problem "{self._name}"] {where}[Local Step {self.count}] {line(stats)}')
        local = global_step is None or self._config.log_local_step
        self.logger.log(stats, tag=self._name, step=self.count if local else global_step)

    def is_implemented(self, fn_name: str) -> bool:
        """Whether the problem has a method of this name."""
        return callable(getattr(self, fn_name, None))

    def is_rank_zero(self) -> bool:
        """Whether this is the only process, or the first."""
        return self._engine is None or self._engine.is_rank_zero()

    def gradient_accumulation_boundary(self) -> bool:
        """Whether the present step ends an accumulation."""
        return self.count % self._config.gradient_accumulation == 0

    def train(self) -> None:
        """Puts the module into training mode."""
        self.training = True
        if self.module is not None:
            self.module.train()

    def eval(self) -> None:
        """Puts the module into evaluation mode."""
        self.training = False
        if self.module is not None:
            self.module.eval()

    @property
    def name(self) -> str:
        """Under which the others know it."""
        return self._name

    @property
    def config(self) -> Config:
        """The settings."""
        return self._config

    @property
    def count(self) -> int:
        """Steps of this problem so far, of one batch each."""
        return 0 if self._engine is None else self._engine.count(self._name)

    @property
    def children(self) -> list[Problem]:
        """The problems that step before this one."""
        return [] if self._engine is None else self._engine.named(self._engine.graph.children[self._name])

    @property
    def parents(self) -> list[Problem]:
        """The problems that step after this one."""
        return [] if self._engine is None else self._engine.named(self._engine.graph.parents[self._name])

    @property
    def paths(self) -> list[list[Problem]]:
        """The chains along which this problem's hypergradient flows."""
        engine = self._engine
        return [] if engine is None else [engine.named(path) for path in engine.graph.paths[self._name]]

    @property
    def gas(self) -> int:
        """Batches an update."""
        return self._config.gradient_accumulation

    @property
    def precision(self) -> str:
        """That of the training passes."""
        return self._config.precision

    @property
    def gradient_clipping(self) -> float:
        """Largest norm of the gradient; 0 for no clipping."""
        return self._config.gradient_clipping

    @property
    def warmup_steps(self) -> int:
        """Steps before those above take their first."""
        return self._config.warmup_steps

    @property
    def log_step(self) -> int:
        """Steps between log lines."""
        return self._config.log_step

    @property
    def log_local_step(self) -> bool:
        """Whether numbers are logged by the problem's own steps."""
        return self._config.log_local_step

    @property
    def leaf(self) -> bool:
        """Whether no problem steps before this one."""
        return not self.children

    def initialize(self) -> None:
        """Calls what is configured by methods, and puts the module on the device; called by the engine.

        Raises:
            ConfigError: No loader and no ``get_batch``, no module, or no optimizer.
            ParameterError: ``param_groups`` with a scheduler that was made before.
        """
        for part in ("train_data_loader", "module", "optimizer"):
            if getattr(self, part) is None and self.is_implemented(f"configure_{part}"):
                setattr(self, part, getattr(self, f"configure_{part}")())
            if getattr(self, part) is None and not (part == "train_data_loader" and self.draws_itself):
                instead = " or get_batch()" if part == "train_data_loader" else ""
                raise ConfigError(
                    f"problem {self._name!r} has no {part}: pass {part}= or define configure_{part}(){instead}"
                )
            if part == "module":
                self._module().to(self.device)
        self._take_loaders()
        self._optimizer()
        for hook in HOOKS:
            if hasattr(self, hook) and not self.is_implemented(hook):
                raise ConfigError(f"{hook} of problem {self._name!r} must be a method, not {getattr(self, hook)!r}")
        if self.is_implemented("param_groups"):
            self._regroup()
        if self.scheduler is None and self.is_implemented("configure_scheduler"):
            self.scheduler = self.configure_scheduler()  # type: ignore[attr-defined]

    @property
    def draws_itself(self) -> bool:
        """Whether the user's own ``get_batch`` is where batches come from."""
        own = type(self)
        return (
            own.get_batch is not Problem.get_batch or own.get_batch_single_loader is not Problem.get_batch_single_loader
        )

    def _take_loaders(self) -> None:
        given = self.train_data_loader
        if given is not None and given is self._listed:
            return  # by an engine that could not be made
        self._loaders = given if isinstance(given, tuple) else () if given is None else (given,)
        if given is None:
            return
        if not self._loaders:
            raise ConfigError(f"train_data_loader of problem {self._name!r} is an empty tuple: it holds no loader")
        self.epoch_counter = [0] * len(self._loaders)
        # As in Betty, a list of loaders from here on.
        self.train_data_loader = self._listed = list(self._loaders)
        if self.draws_itself:
            self.train_data_iterator = [iter(loader) for loader in self._loaders]
            return
        for loader in self._loaders:
            if isinstance(loader, DataLoader) and loader.generator is None:
                # What Betty's iterator over it draws here: the modules made next get the same weights from a seed.
                torch.empty((), dtype=torch.int64).random_()

    def _held(self, tensor: Tensor) -> Tensor:
        """Returns the parameter in whose place the module holds a tensor: in a hypergradient it is another one."""
        name = next((name for name, p in self._module().named_parameters() if p is tensor), None)
        return tensor if self._live is None or name is None else self._live.get(name, tensor)

    def _module(self) -> nn.Module:
        if not isinstance(self.module, nn.Module):
            raise ConfigError(
                f"module of problem {self._name!r} must be an nn.Module, not {self.module!r}: pass module= or define "
                "configure_module() (which the engine calls)"
            )
        return self.module

    def _optimizer(self) -> Optimizer:
        if not isinstance(self.optimizer, Optimizer):
            raise ConfigError(
                f"optimizer of problem {self._name!r} must be a torch optimizer, not {self.optimizer!r}: pass "
                "optimizer= or define configure_optimizer() (which the engine calls)"
            )
        return self.optimizer

    def _regroup(self) -> None:
        optimizer = self._optimizer()
        if self.scheduler is not None:
            raise ParameterError(
                f"problem {self._name!r} has param_groups() and a scheduler that was made for the optimizer's groups "
                "before: define configure_scheduler(), which is called after it"
            )
        groups = self.param_groups()  # type: ignore[attr-defined]
        groups = list(groups) if isinstance(groups, Iterator) else groups
        kinds = {dict if isinstance(part, dict) else type(part) for part in groups} if _listed(groups) else {object}
        if not kinds <= {dict} and not all(issubclass(kind, Tensor) for kind in kinds):
            raise ConfigError(
                f"param_groups() of problem {self._name!r} must return a list of the optimizer's groups, "
                f"[{{'params': …, 'lr': …}}, …], or of parameters, not {type(groups).__name__}"
            )
        optimizer.param_groups.clear()
        optimizer.state.clear()
        loose = [part for part in groups if isinstance(part, Tensor)]
        for group in [{"params": loose}] if loose else groups:
            optimizer.add_param_group(group)


class ImplicitProblem(Problem):
    """A problem that others differentiate through by the method that its ``Config.type`` names."""


class IterativeProblem(Problem):
    """A problem that others differentiate through by following its updates (``unrolled``).

    Beside the module, ``self.fmodule(self.params, self.buffers, x)`` calls it. Its ``Config.type`` plays no part.
    """

    def fmodule(self, params: Sequence[Tensor], buffers: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Calls the module with these parameters and buffers."""
        names = [name for name, _ in self._module().named_parameters()]
        more = [name for name, _ in self._module().named_buffers()]
        values = dict(zip([*names, *more], [*params, *buffers], strict=True))
        return called_at(self._module(), values, args, kwargs)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The module's parameters as they are now."""
        return tuple(self._module().parameters())

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The module's buffers as they are now."""
        return tuple(self._module().buffers())


class HigherIterativeProblem(IterativeProblem):
    """The same; in Betty it needs the package higher, here nothing."""


def _listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"name of a problem must be an identifier, not {name!r}: others reach it as self.<name>")
    return name


def _checked_config(name: str, config: object) -> Config:
    if config is None:
        return Config()
    if not isinstance(config, Config):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(f"config of problem {name!r} must be a bilevel.interop.betty.Config, not {kind}")
    return config
