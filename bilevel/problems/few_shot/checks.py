"""What few-shot problems refuse."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from bilevel.data.episodes import Episodes, TaskBatch, TaskSource
from bilevel.errors import BilevelWarning, ConfigError, DataError, ParameterError
from bilevel.problems.base import Problem
from bilevel.validation import check_integer, check_number

__all__ = [
    "batch_of",
    "check_settings",
    "refuse_data",
    "refuse_running_statistics",
    "refuse_settings",
    "warn_of_shared_classes",
]


def batch_of(source: TaskSource | Sequence[TaskBatch], number: int, name: str) -> TaskBatch:
    """Returns a batch of tasks, of a list that is gone through again and again."""
    if isinstance(source, Sequence):
        if not source:
            raise DataError(f"problem {name!r} has no tasks: the list is empty")
        number %= len(source)
    batch = source[number]
    if not isinstance(batch, TaskBatch):
        raise DataError(
            f"problem {name!r} needs batches of tasks (bilevel.problems.TaskBatch); tasks[{number}] is a "
            f"{type(batch).__name__}"
        )
    if len({len(part) for part in batch}) > 1:
        raise DataError(
            f"problem {name!r}: the parts of tasks[{number}] must have one entry a task; they have the shapes "
            f"{[tuple(part.shape) for part in batch]}"
        )
    return batch


def refuse_data(problem: Problem, data: object) -> None:
    """Raises for data or batches that a problem would not look at."""
    if data is not None:
        raise ConfigError(
            f"problem {problem.name!r} takes no data or batches: both problems of few-shot learning see the tasks of "
            "Adaptation(network, tasks, …)"
        )


def refuse_settings(problem: Problem, *fields: str) -> None:
    """Raises for data, and for fields of a problem that mean nothing where every step has a batch of tasks."""
    refuse_data(problem, problem.data)
    usual = {"accumulate": 1, "start": 0, "stop": None}
    for field in fields:
        value = getattr(problem, field)
        if value != usual[field]:
            remedy = "draw more tasks a batch" if field == "accumulate" else "every step adapts to tasks of its own"
            raise ConfigError(f"problem {problem.name!r} takes no {field}, and was given {value!r}: {remedy}")


def warn_of_shared_classes(name: str, tasks: object, held_out: object) -> None:
    """Warns of held-out tasks of classes that are trained on."""
    shared = tasks.shared_classes(held_out) if isinstance(tasks, Episodes) else ()
    if shared:
        few = ", ".join(map(str, shared[:3])) + (", …" if len(shared) > 3 else "")
        warnings.warn(
            f"the held-out tasks of problem {name!r} have classes that it is trained on, {len(shared)} of them "
            f"({few}): evaluate() then does not say how new classes are learned. Give them others, as split_classes "
            "makes them",
            BilevelWarning,
            stacklevel=3,
        )


def check_settings(
    name: str,
    optimizer: object,
    proximal: float,
    chunk_size: int | str | None,
    memory_budget: int | None,
    held_out_batches: int,
    held_out_steps: int | None,
) -> None:
    """Raises for settings of an adaptation that make no sense."""
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise ConfigError(
            f"optimizer of problem {name!r} must be a callable that makes one from a list of parameters, which are "
            f"made here; it is a {type(optimizer).__name__}"
        )
    check_number(name, "proximal", proximal, minimum=0.0)
    check_integer(name, "held_out_batches", held_out_batches, minimum=1)
    sizes = {"chunk_size": None if chunk_size == "auto" else chunk_size, "memory_budget": memory_budget}
    for field, value in {**sizes, "held_out_steps": held_out_steps}.items():
        if isinstance(value, str):
            raise ConfigError(f"{name}.{field} must be an integer of at least 1, 'auto' or None, not {value!r}")
        if value is not None:
            check_integer(name, field, value, minimum=1)
    if memory_budget is not None and chunk_size != "auto":
        raise ConfigError(f"{name}.memory_budget is what chunk_size='auto' keeps to; chunk_size is {chunk_size!r}")


def refuse_running_statistics(name: str, network: nn.Module) -> None:
    """Raises for layers in which tasks would mix."""
    for key, part in network.named_modules():
        if isinstance(part, _NormBase) and part.training and part.running_mean is not None:
            raise ParameterError(
                f"problem {name!r}: layer {key!r} of the network keeps running statistics, in which tasks would mix: "
                f"make it {type(part).__name__}(…, track_running_stats=False), or put it into evaluation mode"
            )
