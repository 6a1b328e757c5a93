"""Betty's problem classes: what a user subclasses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from bilevel.errors import ConfigError, ParameterError
from bilevel.interop.betty.configs import Config
from bilevel.interop.betty.data import converted
from bilevel.stepper import Scheduler

if TYPE_CHECKING:
    from bilevel.interop.betty.engine import Engine

__all__ = ["HigherIterativeProblem", "ImplicitProblem", "IterativeProblem", "Problem"]


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
        if not str(name).isidentifier():
            raise ConfigError(f"name of a problem must be an identifier, not {name!r}: others reach it as self.<name>")
        config = Config() if config is None else config
        if not isinstance(config, Config):
            raise ConfigError(
                f"config of problem {name!r} must be a bilevel.interop.betty.Config, not {type(config).__name__}"
            )
        self._name = name
        self._config = config
        self._engine: Engine | None = None
        self._owned: tuple[str, ...] | None = None
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
        assert self.module is not None
        return self.module(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls :meth:`forward`."""
        return self.forward(*args, **kwargs)

    def get_batch(self) -> Any:
        """Returns the next batch; override it to draw batches yourself.

        The engine calls it where it is overridden, and draws from the loaders otherwise.
        """
        batches = tuple(self.get_batch_single_loader(place) for place in range(len(self._loaders)))
        return batches[0] if len(batches) == 1 else batches

    def get_batch_single_loader(self, idx: int) -> Any:
        """Returns the next batch of one of the loaders, from iterators of the problem's own."""
        if self.train_data_iterator is None or self.epoch_counter is None:
            self.train_data_iterator = [iter(loader) for loader in self._loaders]
            self.epoch_counter = [0] * len(self._loaders)
        try:
            batch = next(self.train_data_iterator[idx])
        except StopIteration:
            if idx == 0 and self.is_implemented("epoch_callback"):
                self.epoch_callback()  # type: ignore[attr-defined]
            self.epoch_counter[idx] += 1
            self.train_data_iterator[idx] = iter(self._loaders[idx])
            batch = next(self.train_data_iterator[idx])
        return converted(batch, self.device)

    def parameters(self) -> Sequence[Tensor]:
        """Returns the module's parameters."""
        assert self.module is not None
        return list(self.module.parameters())

    def trainable_parameters(self) -> Sequence[Tensor]:
        """Returns the parameters that the problem trains: those that its optimiser holds, once there is an engine.

        Override it to train fewer of them: the engine takes the others out of the optimiser.
        """
        assert self.module is not None
        # By way of the module: in a hypergradient it holds other values.
        named = dict(self.module.named_parameters())
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
            assert self.optimizer is not None
            self.optimizer.step()

    def clip_grad(self) -> None:
        """Clips the norm of the gradients in ``.grad``."""
        nn.utils.clip_grad_norm_(self.trainable_parameters(), self._config.gradient_clipping)

    def zero_grad(self) -> None:
        """Empties the gradients."""
        for p in self.trainable_parameters():
            p.grad = None

    def get_opt_param_group_for_param(self, param: Tensor) -> dict[str, Any] | None:
        """Returns the optimiser's group that holds a parameter."""
        assert self.optimizer is not None
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return next((group for group in groups if any(p is param for p in group["params"])), None)

    def get_opt_state_for_param(self, param: Tensor) -> dict[str, Any]:
        """Returns the optimiser's state of a parameter."""
        assert self.optimizer is not None
        state: dict[str, Any] = self.optimizer.state[param]
        return state

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of module, optimizer and scheduler; for a whole run use ``Engine.save``."""
        assert self.module is not None
        parts = {"module": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` returned."""
        for name in ("module", "optimizer", "scheduler"):
            part = getattr(self, name)
            if part is not None and name in state_dict:
                part.load_state_dict(state_dict[name])

    def cache_states(self) -> None:
        """Keeps a copy of the states of module and optimizer for :meth:`recover_states`."""
        assert self.module is not None
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        self._cached = copy.deepcopy((self.module.state_dict(), optimizer))

    def recover_states(self) -> None:
        """Puts back what :meth:`cache_states` kept."""
        assert self.module is not None
        module, optimizer = self._cached
        self.module.load_state_dict(module)
        if self.optimizer is not None and optimizer is not None:
            self.optimizer.load_state_dict(optimizer)

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
        """Sets one of the loaders, before there is an engine."""
        loaders = list(self._loaders)
        loaders[idx : idx + 1] = [loader]
        self.train_data_loader = tuple(loaders) if len(loaders) > 1 else loaders[0]

    def log(self, stats: Mapping[str, Any], global_step: int | None) -> None:
        """Writes numbers of the present step as a line and to the logger."""
        from bilevel.interop.betty.log import line

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
                assert self.module is not None
                self.module.to(self.device)
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

    @property
    def _loaders(self) -> tuple[Iterable[Any], ...]:
        loaders = self.train_data_loader
        if isinstance(loaders, tuple):
            return loaders
        return () if loaders is None else (loaders,)

    def _regroup(self) -> None:
        assert self.optimizer is not None
        if self.scheduler is not None:
            raise ParameterError(
                f"problem {self._name!r} has param_groups() and a scheduler that was made for the optimizer's groups "
                "before: define configure_scheduler(), which is called after it"
            )
        self.optimizer.param_groups.clear()
        self.optimizer.state.clear()
        for group in self.param_groups():  # type: ignore[attr-defined]
            self.optimizer.add_param_group(group if isinstance(group, dict) else {"params": group})


class ImplicitProblem(Problem):
    """A problem that others differentiate through by the method that its ``Config.type`` names."""


class IterativeProblem(Problem):
    """A problem that others differentiate through by following its updates (``unrolled``).

    Beside the module, ``self.fmodule(self.params, self.buffers, x)`` calls it. Its ``Config.type`` plays no part.
    """

    def fmodule(self, params: Sequence[Tensor], buffers: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Calls the module with these parameters and buffers."""
        assert self.module is not None
        names = [name for name, _ in self.module.named_parameters()]
        more = [name for name, _ in self.module.named_buffers()]
        values = dict(zip([*names, *more], [*params, *buffers], strict=True))
        return functional_call(self.module, values, args, kwargs)

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The module's parameters as they are now."""
        assert self.module is not None
        return tuple(self.module.parameters())

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The module's buffers as they are now."""
        assert self.module is not None
        return tuple(self.module.buffers())


class HigherIterativeProblem(IterativeProblem):
    """The same; in Betty it needs the package higher, here nothing."""


_FIXED = ("module", "optimizer", "scheduler", "train_data_loader")
