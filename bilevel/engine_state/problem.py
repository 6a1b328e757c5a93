"""Parts of the state that every problem has: parameters, buffers, optimiser, scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.engine_state.part import compatible, copied, count, per_problem, tensor_differences
from bilevel.optimizer_state import once

if TYPE_CHECKING:
    from bilevel.problems import Problem

__all__ = ["BUFFERS", "OPTIMIZERS", "PARAMETERS", "SCHEDULERS", "UPDATES"]

# --- parameters and buffers -------------------------------------------------------------------------------------------


def _parameters(problem: Problem) -> dict[str, Tensor]:
    return dict(zip(problem.parameter_names, problem.parameters, strict=True))


def _buffers(problem: Problem) -> dict[str, Tensor]:
    return dict(problem.module.named_buffers())


def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in live.items():
            place, value = once(tensor, saved[key])
            place.copy_(value)


PARAMETERS = per_problem(
    "parameters",
    _parameters,
    lambda problem, saved: tensor_differences(_parameters(problem), saved),
    lambda problem, saved: _copy_into(_parameters(problem), saved),
)
BUFFERS = per_problem(
    "buffers",
    _buffers,
    lambda problem, saved: [f"buffer {line}" for line in tensor_differences(_buffers(problem), saved)],
    lambda problem, saved: _copy_into(_buffers(problem), saved),
)

# --- optimisers -------------------------------------------------------------------------------------------------------


def _take_optimizer(problem: Problem) -> dict[str, Any] | None:
    if problem.optimizer is None:
        return None
    return {
        "kind": type(problem.optimizer).__qualname__,
        "groups": _groups(problem, problem.optimizer),
        "state": problem.optimizer.state_dict(),
    }


def _groups(problem: Problem, optimizer: Optimizer) -> list[list[str]]:
    """Returns the names of the parameters of each group, the frozen ones that an optimiser may hold included."""
    names = {id(parameter): name for name, parameter in problem.module.named_parameters()}
    return [[names.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]


def _optimizer_differences(problem: Problem, saved: Mapping[str, Any] | None) -> list[str]:
    optimizer, own = problem.optimizer, _take_optimizer(problem)
    if optimizer is None or own is None or saved is None:
        return _presence("optimizer", own, saved)
    if saved["kind"] != own["kind"]:
        return [f"optimizer {saved['kind']} was saved; this engine has {own['kind']}"]
    if len(saved["groups"]) != len(own["groups"]):
        return [f"optimizer: {len(saved['groups'])} parameter groups were saved; here are {len(own['groups'])}"]
    lines = []
    for place, (there, here) in enumerate(zip(saved["groups"], own["groups"], strict=True)):
        if there != here:
            lines.append(f"optimizer: group {place} held {', '.join(there)}; here it holds {', '.join(here)}")
    return lines or _option_differences(own["state"], saved["state"]) + _slot_differences(optimizer, saved["state"])


def _option_differences(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    lines = []
    for place, (here, there) in enumerate(zip(own["param_groups"], saved["param_groups"], strict=True)):
        if here["params"] != there["params"]:
            raise ValueError(f"group {place} of the optimizer's state counts other parameters than it names")
        for key in (key for key in here if key in there and key != "params"):
            if not compatible(here[key], there[key]):
                lines.append(f"optimizer: {key} of group {place} was {there[key]!r:.60}; here it is {here[key]!r:.60}")
    return lines


def _slot_differences(optimizer: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """Compares what the optimiser remembers of each parameter, with its own memory, or with the parameter's shape."""
    lines = []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, slots in saved["state"].items():
        if type(place) is not int or not 0 <= place < len(parameters):
            raise ValueError(f"the optimizer's state has an entry for {place!r:.40}, which is no parameter's number")
        parameter = parameters[place]
        live = optimizer.state.get(parameter, {})
        for key, value in slots.items():
            shapes = _shapes(optimizer, parameter, live.get(key))
            if isinstance(value, Tensor) and shapes and value.shape not in shapes:
                lines.append(f"optimizer: {key} of parameter {place} has shape {tuple(value.shape)}")
            elif key in live and not compatible(live[key], value):
                lines.append(f"optimizer: {key} of parameter {place} does not fit the one here")
    return lines


def _shapes(optimizer: Optimizer, parameter: Tensor, live: Any) -> list[torch.Size]:
    """Returns the shapes that a tensor of an optimiser's memory may have; none where that is not known."""
    if isinstance(live, Tensor):
        return [live.shape]
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    if not is_torchs or type(optimizer).__name__ == "Adafactor":  # factored moments
        return []
    return [parameter.shape, torch.Size([]), torch.Size([1])]


def _put_optimizer(problem: Problem, saved: Mapping[str, Any] | None) -> None:
    if problem.optimizer is None or saved is None:
        return
    optimizer, options = problem.optimizer, [dict(group) for group in problem.optimizer.param_groups]
    optimizer.load_state_dict(copied(saved["state"]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # torch casts what is remembered of a parameter to its dtype: what was kept in float32 would lose its last bits
    for place, slots in saved["state"]["state"].items():
        held = optimizer.state[parameters[place]]
        for key, value in slots.items():
            if isinstance(value, Tensor) and isinstance(held.get(key), Tensor) and held[key].dtype != value.dtype:
                held[key] = value.to(held[key].device, copy=True)
    # and leaves options that are tensors (a capturable optimiser's learning rate) where the file was read to.
    for group, before in zip(optimizer.param_groups, options, strict=True):
        for key, value in before.items():
            if key not in group:  # new in this version of torch
                group[key] = value
            elif isinstance(value, Tensor) and isinstance(group[key], Tensor):
                group[key] = group[key].to(value.device)


OPTIMIZERS = per_problem("optimizers", _take_optimizer, _optimizer_differences, _put_optimizer)

# --- updates ----------------------------------------------------------------------------------------------------------


def _take_updates(problem: Problem) -> dict[str, Any]:
    return {"made": problem.num_updates, "initial": problem.initial}


def _update_differences(problem: Problem, saved: Mapping[str, Any]) -> list[str]:
    count(saved["made"])
    own, there = problem.initial, saved["initial"]
    if own is None or there is None:
        return _presence("reset='initial'", own, there)
    if not isinstance(there, tuple) or not all(isinstance(value, Tensor) for value in there):
        raise TypeError("the values to start from are none")
    return tensor_differences(dict(enumerate(own)), dict(enumerate(there)))


def _put_updates(problem: Problem, saved: Mapping[str, Any]) -> None:
    problem.num_updates = saved["made"]
    if problem.initial is not None:
        with torch.no_grad():
            for own, value in zip(problem.initial, saved["initial"], strict=True):
                own.copy_(value)


UPDATES = per_problem("updates", _take_updates, _update_differences, _put_updates)

# --- schedulers -------------------------------------------------------------------------------------------------------


def _take_scheduler(problem: Problem) -> dict[str, Any] | None:
    if problem.scheduler is None:
        return None
    return {"kinds": list(_kinds(problem.scheduler)), "state": problem.scheduler.state_dict()}


def _kinds(scheduler: Any) -> Iterator[str]:
    """Yields the classes of a scheduler and of those that it is made of."""
    yield type(scheduler).__qualname__
    for part in getattr(scheduler, "__dict__", {}).get("_schedulers", ()):
        yield from _kinds(part)


def _scheduler_differences(problem: Problem, saved: Mapping[str, Any] | None) -> list[str]:
    own = _take_scheduler(problem)
    if own is None or saved is None:
        return _presence("scheduler", own, saved)
    if saved["kinds"] != own["kinds"]:
        return [f"scheduler {'/'.join(saved['kinds'])} was saved; this engine has {'/'.join(own['kinds'])}"]
    _refuse_attributes(problem.scheduler, saved["state"], own["state"])
    return [
        f"scheduler: {key} was {saved['state'].get(key, 'missing')!r:.60}; here it is {value!r:.60}"
        for key, value in own["state"].items()
        if key not in saved["state"]
        or not compatible(value, saved["state"][key])
        or not _entries_alike(value, saved["state"][key])
    ]


def _entries_alike(own: object, saved: object) -> bool:
    """Whether records in a list (the phases of a one-cycle schedule) have the same entries."""
    if not isinstance(own, list) or not isinstance(saved, list):
        return True
    records = [(a, b) for a, b in zip(own, saved, strict=False) if isinstance(a, dict)]
    return all(isinstance(b, dict) and set(a) == set(b) for a, b in records)


def _refuse_attributes(scheduler: Any, saved: Mapping[Any, Any], own: Mapping[str, Any]) -> None:
    """Raises where a state, which schedulers take for their attributes, would replace a method or the optimiser."""
    for key in saved:
        if not isinstance(key, str) or (key not in own and (key == "optimizer" or hasattr(type(scheduler), key))):
            raise ValueError(f"the scheduler's state speaks of {key!r:.40}, which is no state")


def _put_scheduler(problem: Problem, saved: Mapping[str, Any] | None) -> None:
    if problem.scheduler is not None and saved is not None:
        problem.scheduler.load_state_dict(copied(saved["state"]))


def _attributes_kept(problem: Problem) -> Callable[[], None]:
    """A scheduler's state may bring attributes that it did not have."""
    own = getattr(problem.scheduler, "__dict__", {})
    before = set(own)

    def remove_others() -> None:
        for key in set(own) - before:
            del own[key]

    return remove_others


SCHEDULERS = per_problem("schedulers", _take_scheduler, _scheduler_differences, _put_scheduler, _attributes_kept)


def _presence(what: str, own: object, saved: object) -> list[str]:
    if (own is None) == (saved is None):
        return []
    return [f"{what} {'missing here' if own is None else 'missing in the file'}"]
