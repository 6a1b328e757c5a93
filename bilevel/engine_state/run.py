"""Parts of the state that belong to the run as a whole: counts, methods, data, generators, callbacks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.engine_state.part import Part, copied, count
from bilevel.errors import warn

if TYPE_CHECKING:
    from bilevel.callbacks import Callback
    from bilevel.engine import Engine

__all__ = ["CALLBACKS", "COUNTS", "ESTIMATORS", "METHODS", "SCALES", "STREAMS", "device_for"]

# --- counts -----------------------------------------------------------------------------------------------------------


def _take_counts(engine: Engine) -> dict[str, int]:
    return {
        "steps": engine.step_count,
        "skipped_steps": engine.skipped_steps,
        "forward_passes": engine.passes.forward,
        "backward_passes": engine.passes.backward,
    }


def _count_differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    for key in _take_counts(engine):
        count(saved[key])
    return []


def _put_counts(engine: Engine, saved: Mapping[str, int]) -> None:
    engine.step_count, engine.skipped_steps = saved["steps"], saved["skipped_steps"]
    engine.passes.forward, engine.passes.backward = saved["forward_passes"], saved["backward_passes"]


COUNTS = Part("counts", _take_counts, _count_differences, _put_counts)

# --- methods and what they remember -----------------------------------------------------------------------------------


def _take_methods(engine: Engine) -> dict[str, Any]:
    """Returns the settings of every problem's method; the first problem is below none and has no use for one."""
    below = list(engine.problems.items())[1:]
    return {name: _plain((problem.hypergradient or engine.hypergradient_method).describe()) for name, problem in below}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__qualname__, **fields}
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else type(value).__qualname__


def _method_differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, own in _take_methods(engine).items():
        there = saved[name]
        if there["method"] != own["method"]:
            lines.append(f"{name}: method {there['method']!r} was saved; this engine has {own['method']!r}")
            continue
        for key in sorted({*own, *there}):
            if own.get(key) != there.get(key):
                lines.append(
                    f"{name}: {key} of method {own['method']!r} was {there.get(key)!r:.80}; here it is "
                    f"{own.get(key)!r:.80}"
                )
    return lines


METHODS = Part("methods", _take_methods, _method_differences, lambda engine, saved: None)


def _take_estimators(engine: Engine) -> dict[str, Any]:
    return {
        outer: {
            inner: {
                "values": {key: tuple(values) for key, values in state.items()},
                "devices": {key: [str(value.device) for value in values] for key, values in state.items()},
                "parameters_on": _devices_of(engine, inner),
            }
            for inner, state in states.items()
        }
        for outer, states in engine.estimator_states.items()
    }


def _devices_of(engine: Engine, problem: str) -> list[str]:
    return list(dict.fromkeys(str(parameter.device) for parameter in engine.problems[problem].parameters))


def _estimator_differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    for outer, states in saved.items():
        for inner, state in states.items():
            if outer not in engine.problems or inner not in engine.problems:
                raise ValueError(f"a method's state between {outer!r:.40} and {inner!r:.40}, which are no problems")
            if set(state["values"]) != set(state["devices"]):
                raise ValueError("a method's state on devices that are not known")
            for key, values in state["values"].items():
                whole = isinstance(values, tuple) and all(isinstance(value, Tensor) for value in values)
                if not whole or len(values) != len(state["devices"][key]):
                    raise ValueError(f"the method's state {key!r:.40} is no tuple of tensors")
            if not isinstance(state["parameters_on"], list):
                raise TypeError("a method's state beside parameters whose devices are not known")
            for name in [*state["parameters_on"], *(name for names in state["devices"].values() for name in names)]:
                torch.device(name)  # raises where it is none
    return []


def device_for(saved: str, parameters_were_on: list[str], parameters_are_on: list[str]) -> torch.device:
    """Returns where a tensor of a method's state belongs.

    Args:
        saved: The device that it was on.
        parameters_were_on: Those of the inner problem's parameters then.
        parameters_are_on: Those of the inner problem's parameters now.

    Returns:
        The same device where the parameters still use it, else their first; one that was kept away from the parameters
        (the state of a random generator, on the CPU) stays away from them.

    Example:
        >>> device_for("cuda:0", ["cuda:0"], ["cuda:1"]), device_for("cpu", ["cuda:0"], ["cuda:1"])
        (device(type='cuda', index=1), device(type='cpu'))
    """
    if saved in parameters_are_on or saved not in parameters_were_on:
        return torch.device(saved)
    return torch.device(parameters_are_on[0])


def _put_estimators(engine: Engine, saved: Mapping[str, Any]) -> None:
    def placed(inner: str, state: Mapping[str, Any]) -> dict[str, Any]:
        homes = _devices_of(engine, inner)
        return {
            key: tuple(
                value.to(device_for(device, state["parameters_on"], homes), copy=True)
                for value, device in zip(values, state["devices"][key], strict=True)
            )
            for key, values in state["values"].items()
        }

    engine.estimator_states = {
        outer: {inner: placed(inner, state) for inner, state in states.items()} for outer, states in saved.items()
    }


ESTIMATORS = Part("estimators", _take_estimators, _estimator_differences, _put_estimators)

# --- loss scales ------------------------------------------------------------------------------------------------------


def _take_scales(engine: Engine) -> dict[str, Any]:
    return {name: scale.state_dict() for name, scale in engine.scales.items()}


def _scale_differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    if set(saved) != set(engine.scales):
        return [f"loss scales {'missing in the file' if engine.scales else 'missing here'}: another precision"]
    for name, scale in engine.scales.items():
        if set(saved[name]) != set(scale.state_dict()):
            raise ValueError("the state of a loss scale is none")
    return []


def _put_scales(engine: Engine, saved: Mapping[str, Any]) -> None:
    for name, scale in engine.scales.items():
        scale.load_state_dict(saved[name])


SCALES = Part("loss_scales", _take_scales, _scale_differences, _put_scales)

# --- data -------------------------------------------------------------------------------------------------------------


def _take_streams(engine: Engine) -> dict[str, Any]:
    return {
        name: {"has_data": stream.has_data, "position": stream.state_dict()} for name, stream in engine.streams.items()
    }


def _stream_differences(engine: Engine, saved: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, stream in engine.streams.items():
        if not isinstance(saved[name]["position"], Mapping):
            raise TypeError("a position in the data that is none")
        if saved[name]["has_data"] != stream.has_data:
            lines.append(f"{name}: data missing {'here' if saved[name]['has_data'] else 'in the file'}")
    return lines


def _put_streams(engine: Engine, saved: Mapping[str, Any]) -> None:
    for name, stream in engine.streams.items():
        stream.load_state_dict(copied(saved[name]["position"]))


STREAMS = Part("data", _take_streams, _stream_differences, _put_streams)

# --- callbacks --------------------------------------------------------------------------------------------------------


def _take_callbacks(engine: Engine) -> list[Any]:
    """Returns the states of the callbacks that have one, in their order."""
    named = [(type(callback).__qualname__, callback.state_dict()) for callback in engine.callbacks]
    return [{"kind": kind, "state": state} for kind, state in named if state]


def _matched(engine: Engine, saved: list[Any]) -> list[tuple[Callback, Any]]:
    rest = [(entry["kind"], entry["state"]) for entry in saved]
    pairs = []
    for callback in engine.callbacks:
        place = next((n for n, (kind, _) in enumerate(rest) if kind == type(callback).__qualname__), None)
        if place is not None:
            pairs.append((callback, rest.pop(place)[1]))
    return pairs


def _callback_differences(engine: Engine, saved: Any) -> list[str]:
    """Two of a kind cannot be told apart if one is missing; a kind that is all new or all gone is a decision."""
    if not isinstance(saved, list) or not all(isinstance(entry["state"], Mapping) for entry in saved):
        raise TypeError("the callbacks' states are none")
    there = Counter(entry["kind"] for entry in saved)
    here = Counter(type(callback).__qualname__ for callback in engine.callbacks)
    return [
        f"{number} callbacks {kind} were saved; this engine has {here[kind]}"
        for kind, number in there.items()
        if here[kind] not in (0, number)
    ]


def _put_callbacks(engine: Engine, saved: list[Any]) -> None:
    pairs = _matched(engine, saved)
    known = {id(callback) for callback, _ in pairs}
    fresh = [type(c).__qualname__ for c in engine.callbacks if id(c) not in known and c.state_dict()]
    gone = {entry["kind"] for entry in saved} - {type(callback).__qualname__ for callback in engine.callbacks}
    if fresh or gone:
        parts = [f"{', '.join(sorted(gone))}: saved and not used"] if gone else []
        parts += [f"{', '.join(fresh)}: not in the checkpoint, starting afresh"] if fresh else []
        warn(f"callbacks differ from those of the checkpoint: {'; '.join(parts)}")
    for callback, state in pairs:
        callback.load_state_dict(copied(state))


CALLBACKS = Part("callbacks", _take_callbacks, _callback_differences, _put_callbacks)
