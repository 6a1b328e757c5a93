"""Betty's ``Engine``, run by ours."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bilevel import distributed
from bilevel.callbacks import Callback
from bilevel.errors import ConfigError, DataError
from bilevel.interop.betty.checks import check_arguments, check_problems
from bilevel.interop.betty.clock import Clock, Pace, Turn
from bilevel.interop.betty.configs import EngineConfig
from bilevel.interop.betty.dependencies import Declared, declared
from bilevel.interop.betty.driver import Driver, Run
from bilevel.interop.betty.envs import Env
from bilevel.interop.betty.level import Level, check_pace
from bilevel.interop.betty.log import Log, flat, line
from bilevel.interop.betty.patience import Patience
from bilevel.interop.betty.problems import Problem
from bilevel.randomness import preserved
from bilevel.result import Hypergradient, StepResult
from bilevel.settings import EngineConfig as Settings
from bilevel.validation import check_integer

__all__ = ["Engine"]

Edges = Mapping[Problem, Iterable[Problem]]


class Engine:
    """Runs problems as Betty does: same loop, same counting; gradients, data and state are our engine's.

    Subclass it and write ``validation(self)``, which is called every ``valid_step`` iterations in evaluation mode and
    returns a mapping of numbers (or None). Problems are attributes by their names, here and among each other.

    Args:
        problems: All problems.
        config: Betty's settings.
        dependencies: ``{"u2l": {upper: [lower, …]}, "l2u": {lower: [upper, …]}}``.
        env: What the problems share.
        settings: Our engine's further settings: seed of the data, what happens where a solve fails, and so on. Its
            ``steps``, ``precision``, ``evaluate_every`` and ``hypergradient_batch`` are Betty's business and refused.
            Without it no progress bar is shown, and the data's order follows the seed that was given to
            ``torch.manual_seed``.
        callbacks: Our callbacks (checkpoints, logs, plots); a step is an iteration.

    Raises:
        ConfigError: A setting of the wrong type, or that is not supported; the message names field and choices.
        GraphError: Dependencies that are cyclic, incomplete, or not what the losses use.

    Example:
        >>> import torch
        >>> from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem
        >>> class Outer(ImplicitProblem):
        ...     def training_step(self, batch):
        ...         return (self.inner.module.weight - 1.0).square().sum()
        >>> class Inner(ImplicitProblem):
        ...     def training_step(self, batch):
        ...         return (self.module.weight - self.outer.module.weight).square().sum() / 2
        >>> def part(kind, name, config):
        ...     module = torch.nn.Linear(1, 1, bias=False)
        ...     sgd = torch.optim.SGD(module.parameters(), lr=0.5)
        ...     return kind(name, config, module, sgd, train_data_loader=[(0,)])
        >>> outer, inner = part(Outer, "outer", Config()), part(Inner, "inner", Config(type="cg", unroll_steps=20))
        >>> dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
        >>> engine = Engine([outer, inner], EngineConfig(train_iters=100), dependencies)  # doctest: +ELLIPSIS
        [...
        >>> engine.run()  # doctest: +ELLIPSIS
        [...
        >>> round(float(outer.module.weight.detach()), 3)
        1.0
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineConfig | None = None,
        dependencies: Mapping[str, Edges] | None = None,
        env: Env | None = None,
        *,
        settings: Settings | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        config = EngineConfig() if config is None else config
        self.problems = check_arguments(self, problems, config, env, settings, callbacks)
        self.config: EngineConfig = config.fixed()
        self.env = env
        self.dependencies = dependencies
        self.graph: Declared = declared(self.problems, {} if dependencies is None else dependencies)
        check_problems(self.problems, self.graph, self.config)
        _join(self.config)
        self.device = _device(self.config)
        self.logger = Log(self.config.logger_type, quiet=not self.is_rank_zero())
        self.early_stopping = Patience(
            self.config.early_stopping_metric, self.config.early_stopping_mode, self.config.early_stopping_tolerance
        )
        self._continues = False
        validates = self.is_implemented("validation")
        self._run = Run(self.early_stopping, self.config.valid_step, self._validate if validates else None)
        self._waiting: list[str] = []
        self._check_names()
        try:
            self._initialise()
            self.driver = self._build(settings, callbacks)
        except BaseException:
            self._let_go()
            raise
        for problem in self.problems:
            problem._config = problem.config.fixed()
        self._report()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses what the engine counts, or what its configuration says."""
        if name in ("global_step", "train_iters", "valid_step", "logger_type", "leaves"):
            raise ConfigError(
                f"{name} of the engine cannot be set: iterations are counted by train_step(), and everything else is "
                "said by EngineConfig and the dependencies"
            )
        super().__setattr__(name, value)

    def run(self, iterations: int | None = None) -> None:
        """Runs ``config.train_iters`` iterations; after :meth:`load` or :meth:`resume`, those that are left of them.

        Ends early where validation no longer improves (if the configuration says so) or a signal comes (Ctrl-C), and
        raises what our engine's :meth:`~bilevel.Engine.run` raises.

        Args:
            iterations: How many, if not that.
        """
        if iterations is not None:
            check_integer("run()", "iterations", iterations, minimum=1)
        else:
            iterations = self.config.train_iters - (self.global_step - self._run.start if self._continues else 0)
            if self._continues and self.config.early_stopping and self.early_stopping.over:
                iterations = 0
        if not self._continues:
            self._run.start = self.global_step
        self._continues = False
        if iterations < 1:
            self.logger.info(f"Nothing to do: {self.global_step} iterations have been made")
            return
        self.train()
        try:
            self._run.active = True
            self.driver.run(iterations)
        finally:
            self._run.active = False
            self.logger.close()
        self.cleanup()

    def train_step(self) -> StepResult:
        """Makes one iteration: a batch of every lowest problem, and of those above that are due.

        May be overridden, to do something before (draw a task, say) and after: call ``super().train_step()`` in it, or
        ``leaf.step(global_step=self.global_step)`` for all of :attr:`leaves`; they step with the last of them.

        Returns:
            What our engine reports of it.
        """
        return self.driver.iterate()

    def _around(self) -> None:
        self._waiting = []
        self.train_step()

    def leaf_steps(self, leaf: Problem) -> None:
        """Makes an iteration once each of the lowest problems was told to step.

        Raises:
            ConfigError: It is not among them, or was told so twice.
        """
        waiting = self._waiting or list(self.graph.leaves)
        if leaf.name not in waiting:
            raise ConfigError(
                f"step() of problem {leaf.name!r}: it is called once an iteration, of the lowest problems only "
                f"({', '.join(map(repr, self.graph.leaves))}); the others step when they are due"
            )
        self._waiting = [name for name in waiting if name != leaf.name]
        if not self._waiting:
            self.driver.iterate()

    @property
    def train_iters(self) -> int:
        """Iterations of a run."""
        return self.config.train_iters

    @property
    def valid_step(self) -> int:
        """Iterations between validations."""
        return self.config.valid_step

    @property
    def logger_type(self) -> str:
        """Where numbers go."""
        return self.config.logger_type

    @property
    def global_step(self) -> int:
        """Iterations so far; within one, its number."""
        driver: Driver | None = self.__dict__.get("driver")  # there is none while problems are initialised
        if driver is None:
            return 0
        shown = next((level.shown for level in driver.levels.values() if level.shown is not None), None)
        return max(driver.step_count, driver.present) if shown is None else shown[1]

    @property
    def leaves(self) -> list[Problem]:
        """The problems with none below them."""
        return self.named(self.graph.leaves)

    def train(self) -> None:
        """Puts all problems into training mode."""
        for problem in self.problems:
            problem.train()

    def eval(self) -> None:
        """Puts all problems into evaluation mode."""
        for problem in self.problems:
            problem.eval()

    def do_validation(self) -> bool:
        """Whether this process validates: the first one, where there is a ``validation`` method."""
        return self.is_implemented("validation") and self.is_rank_zero()

    def hypergradient(self, problem: str | None = None) -> Hypergradient:
        """Returns the present hypergradient of a problem; see :meth:`bilevel.Engine.hypergradient`.

        Batches of a ``get_batch`` of the user's own are drawn for it; random generators are put back.
        """
        drawn = [other for other in self.problems if other.draws_itself]
        with preserved(self.driver.devices):
            return self.driver.hypergradient(problem, {other.name: other.get_batch() for other in drawn})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the complete state: see :meth:`bilevel.Engine.save`."""
        self.driver.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a state that :meth:`save` wrote: see :meth:`bilevel.Engine.load`."""
        self.driver.load(path)
        self._continues = True

    def resume(self, folder: str | os.PathLike[str]) -> int | None:
        """Continues from the newest good checkpoint in a folder: see :meth:`bilevel.Engine.resume`."""
        steps = self.driver.resume(folder)
        self._continues = steps is not None
        return steps

    def is_rank_zero(self) -> bool:
        """Whether this is the only process, or the first."""
        return distributed.rank() == 0

    def is_implemented(self, fn_name: str) -> bool:
        """Whether the engine has a method of this name."""
        return callable(getattr(self, fn_name, None))

    def cleanup(self) -> None:
        """Says that the run is over."""
        self.logger.info("Multilevel optimization finished!")

    def set_dependency(self, dependencies: Mapping[str, Edges]) -> None:
        """Is refused: make the engine again.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("dependencies are fixed when the engine is made: make it again with the new ones")

    def named(self, names: Iterable[str]) -> list[Problem]:
        """Returns problems by their names."""
        known = {problem.name: problem for problem in self.problems}
        return [known[name] for name in names]

    def count(self, name: str) -> int:
        """Returns the number of a problem's steps so far."""
        driver: Driver | None = self.__dict__.get("driver")
        shown = None if driver is None else driver.levels[name].shown
        return self._clock.counts[name] if shown is None else shown[0]

    def __repr__(self) -> str:
        """Names the problems."""
        return f"{type(self).__name__}([{', '.join(problem.name for problem in self.problems)}])"

    def _check_names(self) -> None:
        for problem in self.problems:
            for owner in (self, *(other for other in self.problems if other is not problem)):
                if hasattr(owner, problem.name) or problem.name in ("driver", "_clock"):
                    raise ConfigError(
                        f"a problem cannot be named {problem.name!r}: this is an attribute of {type(owner).__name__}"
                    )

    def _initialise(self) -> None:
        env = self.env
        for problem in self.problems:
            for owner in self._owners(problem):
                setattr(owner, problem.name, problem)
        if env is not None:
            env.configure_device(self.device)
            env.initialize()
        for problem in self.problems:
            problem._engine = self
            problem.device, problem.env, problem.logger = self.device, env, self.logger
            problem.initialize()

    def _owners(self, problem: Problem) -> list[object]:
        """Returns the objects that have a problem as an attribute."""
        owners = [self, self.env, *(other for other in self.problems if other is not problem)]
        return [owner for owner in owners if owner is not None]

    def _let_go(self) -> None:
        """Leaves the problems free for another engine, where this one could not be made."""
        for problem in self.problems:
            problem._engine = problem._owned = problem._live = None
            for owner in self._owners(problem):
                vars(owner).pop(problem.name, None)

    def _build(self, settings: Settings | None, callbacks: Sequence[Callback]) -> Driver:
        known = {problem.name: problem for problem in self.problems}
        paces = {
            name: Pace(problem.config.unroll_steps * problem.config.gradient_accumulation, problem.config.warmup_steps)
            for name, problem in known.items()
        }
        self._clock = Clock(self.graph, paces)
        levels = [self._level(known[name]) for name in self.graph.names]
        check_pace({level.name: level for level in levels}, self.graph, paces)
        ours = replace(settings or _settings(), steps=self.config.train_iters)
        around = None if type(self).train_step is Engine.train_step else self._around
        driver = Driver(levels, self.graph, self._clock, ours, callbacks, self._told, self._run, around)
        _broadcast(levels)
        return driver

    def _level(self, problem: Problem) -> Level:
        parents, children = self.graph.parents[problem.name], self.graph.children[problem.name]
        level = Level(
            problem,
            has_parents=bool(parents),
            has_children=bool(children),
            rank=distributed.rank(),
            size=distributed.size(),
        )
        level.rolls_back = self.config.roll_back and bool(parents)
        return level

    def _told(self, turn: Turn, values: Mapping[str, Any]) -> None:
        problem = self.driver.levels[turn.name].user
        step = problem.config.log_step
        if step > 0 and turn.count % step == 0:
            problem.log({"loss": values["loss"], **self.driver.levels[turn.name].said}, self.global_step)

    def _validate(self) -> Mapping[str, Any]:
        """Returns what the user's ``validation`` says, the same on all processes, and stops where it says so.

        Raises:
            DataError: It failed on the first process; on the others. What it raised there is raised there.
        """
        stats: Mapping[str, Any] | None = {}
        try:
            if self.do_validation():
                stats = None
                stats = self._validated()
        finally:  # the others wait, also where it failed
            stats = self._shared(stats)
        if self.config.early_stopping and self.early_stopping(stats):
            self.logger.info("Early stopping is executed!")
            self.driver.stop("early stopping")
        return stats

    def _validated(self) -> Mapping[str, Any]:
        self.eval()
        try:
            stats = _checked_stats(self.validation())  # type: ignore[attr-defined]
        finally:
            self.train()
        self.logger.info(f"[Validation] [Global Step {self.global_step}] {line(stats)}")
        self.logger.log(stats, tag="validation", step=self.global_step)
        return stats

    def _shared(self, stats: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Returns the first process's numbers; None stands for a validation that failed."""
        if distributed.size() == 1:
            return stats or {}
        said = [None if stats is None else flat(stats)]
        dist.broadcast_object_list(said, 0)
        if said[0] is None and not self.is_rank_zero():
            raise DataError("validation() failed on the first process: what it raised is said there")
        return said[0] or {}

    def _report(self) -> None:
        for problem in self.problems:
            uppers, lowers = ([other.name for other in several] for several in (problem.parents, problem.children))
            paths = [[other.name for other in path] for path in problem.paths]
            self.logger.info(f"Problem {problem.name!r}: uppers {uppers}, lowers {lowers}, paths {paths}")


def _settings() -> Settings:
    """Returns our settings where none are given: the data's order follows what was given to ``torch.manual_seed``."""
    return Settings(progress=False, seed=torch.initial_seed() % 2**32)


def _checked_stats(stats: object) -> Mapping[str, Any]:
    if stats is None:
        return {}
    if not isinstance(stats, Mapping):
        raise ConfigError(
            f"validation() must return a mapping of numbers, such as {{'loss': 0.5}}, or None, not {stats!r}"
        )
    return stats


def _broadcast(levels: Sequence[Level]) -> None:
    """Lets all processes begin with the first one's parameters and buffers."""
    if distributed.size() > 1:
        for level in levels:
            for tensor in level.module.state_dict().values():
                dist.broadcast(tensor, 0)


def _join(config: EngineConfig) -> None:
    """Joins the process group, if the configuration asks for one and there is none."""
    if config.strategy != "distributed" or dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            "EngineConfig.strategy='distributed' needs the processes that torchrun starts: run the program by "
            "torchrun, or choose 'default', 'cpu' or 'gpu'"
        )
    dist.init_process_group(config.backend)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(config: EngineConfig) -> str | torch.device:
    """Returns where problems live: a name, as in Betty, but for one of several devices."""
    if config.strategy == "cpu" or (config.strategy == "distributed" and config.backend == "gloo"):
        return "cpu"
    if config.strategy == "default" and not torch.cuda.is_available():
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(f"EngineConfig.strategy={config.strategy!r} needs a CUDA device, and torch finds none")
    if config.strategy == "distributed":
        device = torch.device("cuda", distributed.rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)  # objects are broadcast by way of the present device
        return device
    return "cuda"
