"""Sets off faults in a step, one by one, and looks at what is left: see :mod:`benchmarks.reliability.scenarios`."""

from __future__ import annotations

import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reliability.nest import Fuse, build
from bilevel import Engine
from bilevel.callbacks import Callback
from bilevel.engine_state import engine_state
from bilevel.errors import BilevelError

__all__ = ["Observation", "Scenario", "differences", "observe", "table"]

WARM, END = 1, 4
"""Outer steps before the fault, and in all."""


@dataclass(frozen=True)
class Scenario:
    """A fault and what is promised of it.

    Attributes:
        fault: What goes wrong.
        place: Where in a step.
        arm: Makes it go wrong at the next step.
        raises: What leaves the engine; None where nothing does.
        match: What its message, its notes included, says.
        leaves: The state that the engine is in then: ``"before"`` the step, ``"after"`` it, ``"skipped"``, or
            ``"other"`` than that of a run without the fault, where it is dealt with.
        settings: Of :func:`~benchmarks.reliability.nest.build`.
        attempt: What is done with the engine; one outer step by default.
        watchers: Makes further callbacks, which write to a folder.
        stops: What ``stop_reason`` is then.
        warns: What a warning says.
    """

    fault: str
    place: str
    arm: Callable[[Fuse], None] = lambda fuse: None
    raises: type[BaseException] | tuple[type[BaseException], ...] | None = None
    match: Sequence[str] = ()
    leaves: str = "before"
    settings: Mapping[str, Any] = field(default_factory=dict)
    attempt: Callable[[Engine, Path], Any] = lambda engine, folder: engine.run(1)
    watchers: Callable[[Path], Sequence[Callback]] | None = None
    stops: str = ""
    warns: str = ""

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.place}"


@dataclass(frozen=True)
class Observation:
    """What happened.

    Attributes:
        raised: The exception, or None.
        text: Its message and notes.
        left: How the state differs from the promised one.
        surroundings: What else is not as it was: modes of torch, signal handlers, gradients.
        saved: How the state that was saved and loaded into a new engine differs from the promised one; an error's text
            where it could not be saved.
        went_on: How the state at the end differs from that of a run without the fault.
        stopped: ``stop_reason`` after the attempt.
        warned: The warnings, to the end.
    """

    raised: BaseException | None
    text: str
    left: list[str]
    surroundings: list[str]
    saved: list[str]
    went_on: list[str]
    stopped: str
    warned: list[str]

    def broken(self, scenario: Scenario) -> list[str]:
        """Returns the promises of the scenario that were not kept."""
        found = []
        if not isinstance(self.raised, scenario.raises or type(None)):
            found.append(f"raised {self.raised!r}, not {scenario.raises}")
        found += [f"{text!r} is not in {self.text!r}" for text in scenario.match if text not in self.text]
        if self.stopped != scenario.stops:
            found.append(f"stop_reason is {self.stopped!r}, not {scenario.stops!r}")
        if bool(scenario.warns) != bool(self.warned) or not all(scenario.warns in text for text in self.warned):
            found.append(f"warned {self.warned}, not {scenario.warns!r}")
        parts = {"left": self.left, "surroundings": self.surroundings, "saved": self.saved, "went on": self.went_on}
        return found + [f"{name}: {'; '.join(lines[:5])}" for name, lines in parts.items() if lines]


_References = dict[str, dict[int, dict[str, Any]]]


def observe(scenario: Scenario, folder: Path, references: _References) -> Observation:
    """Sets a fault off and looks at what is left.

    Args:
        scenario: Which.
        folder: An empty one, to write to.
        references: States of runs without faults, which are kept here for the next call.
    """
    states = _reference(scenario, folder / "reference", references)
    fuse = Fuse()
    engine = _build(fuse, scenario, folder / "run")
    before = _surroundings(engine)
    engine.run(WARM)
    scenario.arm(fuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised = _attempt(scenario, engine, folder / "run")
        fuse.place = ""
        stopped, surroundings = engine.stop_reason, differences(before, _surroundings(engine))
        state = engine_state(engine)
        if scenario.leaves == "skipped":  # the data move on: there is no run to compare the end with
            left = differences(_parameters(states[WARM]), _parameters(state))
        elif scenario.leaves == "other":
            left = differences(states[WARM + 1]["data"], state["data"])
        else:
            state = states[WARM + (scenario.leaves == "after")]
            left = differences(state, engine_state(engine))
        saved = _saved(engine, scenario, folder, state)
        engine.run(END - engine.step_count)
        compared = scenario.leaves in ("before", "after")
        went_on = differences(states[END], engine_state(engine)) if compared else []
    warned = [str(warning.message) for warning in caught]
    return Observation(raised, _text(raised), left, surroundings, saved, went_on, stopped, warned)


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Returns the places where two nested states differ by a bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if list(left) != list(right):
            return [f"{where}: keys {list(left)} and {list(right)}"]
        return [line for key in left for line in differences(left[key], right[key], f"{where}.{key}".lstrip("."))]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{where}: {len(left)} and {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [line for place, (a, b) in pairs for line in differences(a, b, f"{where}[{place}]")]
    return [] if left == right else [f"{where}: {left!r} and {right!r}"]


def table(scenarios: Iterable[Scenario]) -> list[str]:
    """Sets every fault off, and returns the lines of a Markdown table of what happened."""
    lines = [
        "| fault | where | what leaves the engine | state then | saves, and loads the same | goes on bit for bit |",
        "|---|---|---|---|---|---|",
    ]
    references: _References = {}
    states = {
        "before": "as before the step",
        "after": "as after the step",
        "skipped": "as before the step",
        "other": "after the step",
    }
    ends = {"skipped": "the data move on", "other": "the fault leaves its mark: not compared"}
    for scenario in scenarios:
        with tempfile.TemporaryDirectory() as folder:
            seen = observe(scenario, Path(folder), references)
        broken = seen.broken(scenario)
        raised = "nothing" if seen.raised is None else f"`{type(seen.raised).__name__}`"
        raised += f"; `stop_reason` is “{seen.stopped}”" if seen.stopped else ""
        raised += "; a warning" if seen.warned else ""
        left = states[scenario.leaves] if not seen.left + seen.surroundings else "**" + "; ".join(seen.left[:2]) + "**"
        end = ends.get(scenario.leaves, _yes(seen.went_on))
        row = f"| {scenario.fault} | {scenario.place} | {raised} | {left} | {_yes(seen.saved)} | {end} |"
        lines.append(row + (f" **{broken}**" if broken else ""))
    return lines


def _yes(found: list[str]) -> str:
    return "yes" if not found else f"**no: {found[0]}**"


def _attempt(scenario: Scenario, engine: Engine, folder: Path) -> BaseException | None:
    try:
        scenario.attempt(engine, folder)
    except BaseException as error:
        return error
    return None


def _build(fuse: Fuse, scenario: Scenario, folder: Path) -> Engine:
    folder.mkdir(exist_ok=True)
    watchers = () if scenario.watchers is None else scenario.watchers(folder)
    return build(fuse, callbacks=watchers, **scenario.settings)


def _reference(scenario: Scenario, folder: Path, references: _References) -> dict[int, dict[str, Any]]:
    """Returns the state after every step of a run without faults."""
    key = repr(sorted(scenario.settings.items(), key=lambda item: item[0]))
    if key in references and scenario.watchers is None:
        return references[key]
    engine, states = _build(Fuse(), scenario, folder), {}
    for step in range(1, END + 1):
        engine.run(1)
        states[step] = _copied(engine_state(engine))
    if scenario.watchers is None:
        references[key] = states
    return states


def _saved(engine: Engine, scenario: Scenario, folder: Path, promised: Mapping[str, Any]) -> list[str]:
    try:
        engine.save(folder / "saved")
    except BilevelError as error:
        return [f"{error!r}"]
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    second = _build(Fuse(), scenario, folder / "second")
    second.load(folder / "saved")
    found = differences(promised, engine_state(second))
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    random.setstate(generators[2])
    return found


def _parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("parameters", "buffers", "optimizers", "schedulers", "estimators")}


def _surroundings(engine: Engine) -> dict[str, Any]:
    every = [p for problem in engine.problems.values() for p in problem.module.parameters()]
    return {
        "gradients on": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "gradients held": [p.grad is not None for p in every],
        "trainable": [p.requires_grad for p in every],
        "training": [m.training for problem in engine.problems.values() for m in problem.module.modules()],
    }


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


def _text(error: BaseException | None) -> str:
    return "" if error is None else "\n".join([str(error), *getattr(error, "__notes__", ())])
