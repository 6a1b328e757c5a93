"""Betty's two configurations, with its fields, names and defaults; checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilevel.errors import ConfigError, unknown_name
from bilevel.hypergrad import Estimator
from bilevel.interop.betty.kinds import check_type
from bilevel.validation import check_choice, check_integer, check_number

__all__ = ["Config", "EngineConfig"]

PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FIXED = "_fixed"
STRATEGIES = ("default", "cpu", "gpu", "distributed")
LOGGERS = ("none", "tensorboard", "wandb")


class _Checked:
    """Names unknown fields and their choices, where a dataclass would say ``unexpected keyword argument``."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a field that does not exist, and any change once an engine goes by this object."""
        known = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in known:
            raise unknown_name(f"field of {type(self).__name__}:", name, known)
        if self.__dict__.get(_FIXED):
            raise ConfigError(
                f"{type(self).__name__}.{name} is fixed: the engine that goes by it is made. Make problem and engine "
                "again with another configuration"
            )
        super().__setattr__(name, value)

    def fixed(self) -> Any:
        """Returns a copy that can no longer be changed, after checking it.

        Raises:
            ConfigError: A value that makes no sense.
        """
        copied = dataclasses.replace(self)  # type: ignore[type-var]
        copied.__dict__[_FIXED] = True
        return copied

    def __copy__(self) -> Any:
        """Returns a copy that can be changed."""
        return dataclasses.replace(self)  # type: ignore[type-var]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns a copy that can be changed."""
        return dataclasses.replace(self)  # type: ignore[type-var]

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Refuses fields that do not exist."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields:
            if name not in known:
                raise unknown_name(f"field of {cls.__name__}:", name, known)
        return super().__new__(cls)


@dataclass
class Config(_Checked):
    """The settings of one problem: Betty's ``Config``, field by field.

    Attributes:
        type: How one differentiates through this problem: ``"darts"``, ``"neumann"``, ``"cg"`` or ``"sama"``, with the
            fields below; any method of ours by name, as a mapping with ``method`` and its fields, or as an estimator;
            ``"betty:darts"`` and the like for Betty's own functions.
        unroll_steps: Updates of this problem for each step of the problems above it.
        first_order: On a problem above others: as in Betty, ``False`` makes sense over an ``IterativeProblem`` only,
            and is refused elsewhere.
        retain_graph: Accepted; has no effect (graphs live as long as they are needed).
        allow_unused: Only True: parameters that a loss does not reach have a zero gradient.
        gradient_accumulation: Batches whose mean gradient makes one update. Each counts as an iteration.
        gradient_clipping: Largest norm of the gradient; 0 for no clipping.
        precision: ``"fp32"``, or ``"fp16"`` or ``"bf16"`` for autocast in this problem's training passes.
        initial_dynamic_scale: The first loss scale, for fp16.
        scale_factor: By which it grows, for fp16.
        warmup_steps: Iterations of this problem before the problems above take their first step.
        log_step: Iterations of this problem between log lines; 0 or less for none.
        log_local_step: Log by the problem's own iterations, not the engine's.
        darts_alpha: R of ``"darts"``: the inner parameters are displaced by R/‖v‖ · v, of length R.
        darts_multitask: Only False.
        sama_adam_alpha: The same for ``"sama"``.
        sama_multitask: Only False.
        neumann_iterations: K of ``"neumann"``: Hessian products; the sum has K + 1 summands.
        neumann_alpha: α of ``α Σₖ (I − αH)ᵏ v``.
        cg_iterations: Iterations of ``"cg"``.
        cg_alpha: Accepted; the solution of ``Hq = v`` does not depend on it.

    Raises:
        ConfigError: A value that makes no sense, or that is not supported; the message names field and choices.
        UnknownNameError: A field or choice that does not exist.
    """

    type: str | Estimator | Mapping[str, Any] = "darts"
    unroll_steps: int = 1
    first_order: bool = True
    retain_graph: bool = False
    allow_unused: bool = True

    gradient_accumulation: int = 1
    gradient_clipping: float = 0.0

    precision: str = "fp32"
    initial_dynamic_scale: float = 4096.0
    scale_factor: float = 2.0

    warmup_steps: int = 0

    log_step: int = -1
    log_local_step: bool = False

    darts_alpha: float = 0.01
    darts_multitask: bool = False

    sama_adam_alpha: float = 1.0
    sama_multitask: bool = False

    neumann_iterations: int = 1
    neumann_alpha: float = 1.0

    cg_iterations: int = 1
    cg_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Checks all fields."""
        _check_flags(self, "first_order", "retain_graph", "allow_unused", "log_local_step")
        _check_flags(self, "darts_multitask", "sama_multitask")
        check_integer("Config", "unroll_steps", self.unroll_steps, minimum=1)
        check_integer("Config", "gradient_accumulation", self.gradient_accumulation, minimum=1)
        check_integer("Config", "warmup_steps", self.warmup_steps, minimum=0)
        if isinstance(self.log_step, bool) or not isinstance(self.log_step, int):
            raise ConfigError(f"Config.log_step must be an integer (0 or less for no log), not {self.log_step!r}")
        check_integer("Config", "neumann_iterations", self.neumann_iterations, minimum=0)
        check_integer("Config", "cg_iterations", self.cg_iterations, minimum=1)
        check_number("Config", "gradient_clipping", self.gradient_clipping, minimum=0.0)
        check_number("Config", "scale_factor", self.scale_factor, minimum=1.0, exclusive=True)
        for name in ("initial_dynamic_scale", "darts_alpha", "sama_adam_alpha", "neumann_alpha", "cg_alpha"):
            check_number("Config", name, getattr(self, name), minimum=0.0, exclusive=True)
        check_choice("Config", "precision", self.precision, tuple(PRECISIONS))
        check_type(self.type)
        if not self.allow_unused:
            raise ConfigError(
                "Config.allow_unused=False is not supported: parameters that a loss does not reach have a zero "
                "gradient. Choices: True"
            )
        for name in ("darts_multitask", "sama_multitask"):
            if getattr(self, name):
                raise ConfigError(
                    f"Config.{name}=True is not supported: Betty leaves the inner parameters displaced by it, which "
                    "makes another algorithm of the run. Choices: False"
                )


@dataclass
class EngineConfig(_Checked):
    """The settings of the engine: Betty's ``EngineConfig``, field by field.

    Attributes:
        train_iters: Iterations, each of which is one batch of every problem with none below it.
        valid_step: Iterations between calls of ``Engine.validation``.
        logger_type: ``"none"``, ``"tensorboard"`` or ``"wandb"``: where numbers go, beside the lines on stdout.
        roll_back: After the problem above has stepped, take the unrolled updates back and make the last one again,
            under the new outer parameters. For two levels.
        backend: Of torch.distributed, for ``strategy="distributed"``.
        strategy: ``"default"`` (cuda where there is one), ``"cpu"``, ``"gpu"``, or ``"distributed"`` for data
            parallelism under ``torchrun``.
        early_stopping: Whether to end the run when a metric that ``validation`` returns no longer improves.
        early_stopping_mode: ``"min"`` or ``"max"``.
        early_stopping_tolerance: Validations in a row without improvement that end the run.
        early_stopping_metric: The metric's name.

    Raises:
        ConfigError: A value that makes no sense, or that is not supported; the message names field and choices.
        UnknownNameError: A field or choice that does not exist.
    """

    train_iters: int = 50000
    valid_step: int = 500

    logger_type: str = "none"

    roll_back: bool = False

    backend: str = "nccl"
    strategy: str = "default"

    early_stopping: bool = False
    early_stopping_mode: str = "min"
    early_stopping_tolerance: int = 5
    early_stopping_metric: str = "loss"

    def __post_init__(self) -> None:
        """Checks all fields."""
        check_integer("EngineConfig", "train_iters", self.train_iters, minimum=1)
        check_integer("EngineConfig", "valid_step", self.valid_step, minimum=1)
        check_integer("EngineConfig", "early_stopping_tolerance", self.early_stopping_tolerance, minimum=1)
        _check_flags(self, "roll_back", "early_stopping")
        check_choice("EngineConfig", "logger_type", self.logger_type, LOGGERS)
        check_choice("EngineConfig", "early_stopping_mode", self.early_stopping_mode, ("min", "max"))
        for name in ("backend", "early_stopping_metric"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"EngineConfig.{name} must be text, not {getattr(self, name)!r}")
        if self.strategy in ("zero", "fsdp", "accelerate"):
            raise ConfigError(
                f"EngineConfig.strategy={self.strategy!r} is not supported: it shards or wraps parameters, whose "
                f"values hypergradients swap. Choices: {', '.join(map(repr, STRATEGIES))}"
            )
        check_choice("EngineConfig", "strategy", self.strategy, STRATEGIES)


def _check_flags(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{type(config).__name__}.{name} must be True or False, not {value!r}")
