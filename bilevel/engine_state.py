"""An engine's complete state, out and in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.checkpoint import describe_differences
from bilevel.errors import CheckpointError
from bilevel.randomness import capture, generator_devices, restore

if TYPE_CHECKING:
    from bilevel.engine import Engine
    from bilevel.problems import Problem

__all__ = ["engine_state", "load_engine_state"]


def engine_state(engine: Engine) -> dict[str, Any]:
    """Returns the state as nested containers of tensors, numbers and strings."""
    devices = generator_devices(p for problem in engine.problems.values() for p in problem.parameters)
    return {
        "step_count": engine.step_count,
        "skipped_steps": engine.skipped_steps,
        "passes": [engine.passes.forward, engine.passes.backward],
        "problems": {name: _problem_state(problem) for name, problem in engine.problems.items()},
        "streams": {name: stream.state_dict() for name, stream in engine.streams.items()},
        "estimators": engine.estimator_states,
        "generators": capture(devices),
        "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in engine.callbacks],
    }


def load_engine_state(engine: Engine, state: Mapping[str, Any]) -> None:
    """Takes a state back, after comparing its structure with the engine's.

    Raises:
        CheckpointError: The state is that of an engine with other problems, parameters or callbacks; nothing has
            changed.
    """
    _check(engine, state)
    for name, problem in engine.problems.items():
        _load_problem(problem, state["problems"][name])
    for name, stream in engine.streams.items():
        stream.load_state_dict(state["streams"][name])
    for callback, (_, saved) in zip(engine.callbacks, state["callbacks"], strict=True):
        callback.load_state_dict(saved)
    engine.estimator_states = state["estimators"]
    engine.step_count, engine.skipped_steps = state["step_count"], state["skipped_steps"]
    engine.passes.forward, engine.passes.backward = state["passes"]
    restore(state["generators"])


def _problem_state(problem: Problem) -> dict[str, Any]:
    return {
        "parameters": dict(zip(problem.parameter_names, problem.parameters, strict=True)),
        "buffers": dict(problem.module.named_buffers()),
        "optimizer": None if problem.optimizer is None else problem.optimizer.state_dict(),
        "scheduler": None if problem.scheduler is None else problem.scheduler.state_dict(),
    }


def _load_problem(problem: Problem, state: Mapping[str, Any]) -> None:
    live: dict[str, Tensor] = {
        **dict(zip(problem.parameter_names, problem.parameters, strict=True)),
        **{f"buffer {key}": buffer for key, buffer in problem.module.named_buffers()},
    }
    saved = {**state["parameters"], **{f"buffer {key}": value for key, value in state["buffers"].items()}}
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(saved[key])
    if problem.optimizer is not None:
        problem.optimizer.load_state_dict(state["optimizer"])
    if problem.scheduler is not None:
        problem.scheduler.load_state_dict(state["scheduler"])


def _check(engine: Engine, state: Mapping[str, Any]) -> None:
    try:
        differences = _differences(engine, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint holds no engine state: {error!r}") from error
    if differences:
        shown = "\n  ".join(differences[:10]) + (
            f"\n  … and {len(differences) - 10} more" if len(differences) > 10 else ""
        )
        raise CheckpointError(f"the checkpoint belongs to another structure; nothing was loaded:\n  {shown}")


def _differences(engine: Engine, state: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if list(state["problems"]) != list(engine.problems):
        return [f"problems {', '.join(state['problems'])} were saved; this engine has {', '.join(engine.problems)}"]
    for name, problem in engine.problems.items():
        saved, own = state["problems"][name], _problem_state(problem)
        for part in ("parameters", "buffers"):
            found += [f"{name} {part}: {line}" for line in describe_differences(own[part], saved[part])]
        for part in ("optimizer", "scheduler"):
            if (saved[part] is None) != (own[part] is None):
                found.append(f"{name}: {part} {'missing here' if own[part] is None else 'missing in the file'}")
    names = [type(callback).__name__ for callback in engine.callbacks]
    if [entry[0] for entry in state["callbacks"]] != names:
        found.append(f"callbacks {[entry[0] for entry in state['callbacks']]} were saved; this engine has {names}")
    return found
