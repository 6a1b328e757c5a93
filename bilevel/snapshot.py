"""The state before a step, to go back to where the step is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.problems import Problem

__all__ = ["Snapshot"]


class Snapshot:
    """Copies of all owned parameters, buffers, optimiser and scheduler states.

    Args:
        problems: Whose state.
        modules: All their modules that hold buffers.
    """

    def __init__(self, problems: Sequence[Problem], modules: Iterable[nn.Module]) -> None:
        self._problems = problems
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in _tensors(problems, modules)]
        self._optimizers = [_optimizer_state(problem) for problem in problems]
        self._schedulers = [
            None if problem.scheduler is None else copy.deepcopy(problem.scheduler.state_dict()) for problem in problems
        ]

    def restore(self) -> None:
        """Puts everything back, in place."""
        with torch.no_grad():
            for tensor, kept in self._tensors:
                tensor.copy_(kept)
        for problem, state, scheduler in zip(self._problems, self._optimizers, self._schedulers, strict=True):
            if problem.optimizer is not None and state is not None:
                problem.optimizer.state.clear()
                problem.optimizer.state.update(state[0])
                for group, kept_group in zip(problem.optimizer.param_groups, state[1], strict=True):
                    group.update(kept_group)
            if problem.scheduler is not None and scheduler is not None:
                problem.scheduler.load_state_dict(scheduler)


def _tensors(problems: Iterable[Problem], modules: Iterable[nn.Module]) -> list[Tensor]:
    found: dict[int, Tensor] = {id(p): p for problem in problems for p in problem.parameters}
    for module in modules:
        found.update({id(b): b for b in module._buffers.values() if b is not None})
    return list(found.values())


def _optimizer_state(problem: Problem) -> tuple[dict[Any, Any], list[dict[str, Any]]] | None:
    if problem.optimizer is None:
        return None
    state = {
        parameter: {
            key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in slots.items()
        }
        for parameter, slots in problem.optimizer.state.items()
    }
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in problem.optimizer.param_groups
    ]
    return state, groups
