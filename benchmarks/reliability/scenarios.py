"""Every fault that is tried, and what is promised of it."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.reliability.faults import Scenario
from benchmarks.reliability.nest import Fuse
from bilevel import Engine
from bilevel.callbacks import Checkpoints, JSONLinesLog
from bilevel.errors import (
    BilevelError,
    CheckpointError,
    DataError,
    LossError,
    NonFiniteError,
    OutOfMemoryError,
    SolveError,
    SolveTimeoutError,
)
from bilevel.result import Status

__all__ = ["SCENARIOS"]

TWO: dict[str, Any] = {"levels": 2}
UNDONE = "The step is undone: nothing has changed."
Arm = Callable[[Fuse], None]


class UserError(Exception):
    """What a user's own code raises."""


def at(place: str, action: Callable[[Any], Any], after: int = 0) -> Arm:
    return lambda fuse: fuse.arm(place, action, after)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def action(value: Any) -> Any:
        raise type(error)(*error.args)

    return action


def sending(*numbers: signal.Signals) -> Callable[[Any], Any]:
    def action(value: Any) -> Any:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.001)  # the handler runs here
        return value

    return action


def nan_gradient(value: Tensor) -> Tensor:
    return value + (value - value.detach()).abs().sqrt()


def in_loss(place: str, name: str, after: int, settings: dict[str, Any], *, solve: bool = False) -> list[Scenario]:
    """Returns what can go wrong in a pass of a problem's loss.

    Args:
        place: Which pass, in words.
        name: The problem.
        after: How many passes of this problem's loss in the step go before it.
        settings: Of the nest.
        solve: Whether a NaN gradient comes to a solve, which says so.
    """
    warns = "is not finite" if solve else ""

    def scenario(fault: str, action: Callable[[Any], Any], *arguments: Any, **fields: Any) -> Scenario:
        what = fields.pop("what", "loss")
        where = at(f"{what} of {name}", action, after)
        return Scenario(fault, place, where, *arguments, settings=settings, **fields)

    return [
        scenario("loss is NaN", lambda value: value * float("nan"), NonFiniteError, ("step 2",)),
        scenario("loss is infinite", lambda value: value + float("inf"), NonFiniteError, ("step 2",)),
        scenario("gradient is NaN, loss finite", nan_gradient, NonFiniteError, ("step 2",), warns=warns),
        scenario("exception in a loss", raising(UserError("oh")), UserError, ("oh", "Step 2, in ", UNDONE)),
        scenario(
            "out of memory in a module's forward pass",
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
            OutOfMemoryError,
            ("step 2, in ", "Tried to allocate 2 GiB", UNDONE, "less memory"),
            what="forward",
        ),
        scenario("Ctrl-C at once (KeyboardInterrupt)", raising(KeyboardInterrupt()), KeyboardInterrupt, (UNDONE,)),
    ]


def in_passes() -> Iterator[Scenario]:
    yield from in_loss("inner, first pass", "classifier", 0, TWO)
    yield from in_loss("inner, in the middle of its steps", "classifier", 1, TWO)
    yield from in_loss("inner, in the solve", "classifier", 3, TWO, solve=True)
    yield from in_loss("outer, its pass", "decay", 0, TWO, solve=True)
    yield from in_loss("middle of three levels, its pass", "decay", 0, {}, solve=True)
    yield from in_loss("outer of three levels, its pass", "test", 0, {}, solve=True)
    yield from in_loss("middle of three levels, in the product through it", "decay", 1, {}, solve=True)
    place = "inner of three levels, in the product through the middle"
    nested = in_loss(place, "classifier", 8, {})
    yield from (scenario for scenario in nested if "gradient" not in scenario.fault)
    yield Scenario(
        "gradient is NaN, loss finite",
        place,
        at("loss of classifier", nan_gradient, 8),
        leaves="other",
        warns="is not finite",
    )
    for place, name, after in (
        ("inner", "classifier", 0),
        ("inner, in a product of the solve", "classifier", 4),
        ("outer", "decay", 0),
    ):
        memory = raising(torch.OutOfMemoryError("CUDA out of memory."))
        backward = f"backward of {name}"
        yield Scenario(
            "out of memory in a custom backward pass",
            place,
            at(backward, memory, after),
            OutOfMemoryError,
            (UNDONE,),
            settings=TWO,
        )
        oh = raising(UserError("oh"))
        yield Scenario(
            "exception in a custom backward pass", place, at(backward, oh, after), UserError, (UNDONE,), settings=TWO
        )
    memory = raising(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    yield Scenario(
        "out of memory on the host",
        "inner, its pass",
        at("forward of classifier", memory),
        OutOfMemoryError,
        ("the forward pass of problem 'classifier'", UNDONE),
        settings=TWO,
    )
    yield Scenario(
        "non-finite loss, with on_non_finite='skip'",
        "inner, in the middle of its steps",
        at("loss of classifier", lambda value: value * float("nan"), 1),
        settings={**TWO, "on_non_finite": "skip"},
        leaves="skipped",
    )
    yield Scenario(
        "non-finite loss, with on_non_finite='skip'",
        "outer, its pass",
        at("loss of decay", lambda value: value * float("nan")),
        settings={**TWO, "on_non_finite": "skip"},
        leaves="skipped",
    )


def in_updates() -> Iterator[Scenario]:
    oh = raising(UserError("oh"))
    for place, name, after in (("inner, second update", "classifier", 1), ("outer", "decay", 0)):
        update = f"the update of problem '{name}'"
        for what, where in (
            ("an optimiser's step, before it changes anything", f"optimiser of {name}, before"),
            ("an optimiser's step, after it changed everything", f"optimiser of {name}, after"),
            ("a scheduler's step", f"scheduler of {name}"),
        ):
            yield Scenario(
                f"exception in {what}", place, at(where, oh, after), UserError, (update, UNDONE), settings=TWO
            )
        yield Scenario(
            "Ctrl-C at once (KeyboardInterrupt)",
            f"{place}: in its optimiser",
            at(f"optimiser of {name}, after", raising(KeyboardInterrupt()), after),
            KeyboardInterrupt,
            (UNDONE,),
            settings=TWO,
        )


def in_hooks() -> Iterator[Scenario]:
    oh = raising(UserError("oh"))

    def scenario(hook: str, raises: type[BaseException], match: tuple[str, ...], leaves: str, what: str) -> Scenario:
        return Scenario(f"exception in {what}", hook, at(hook, oh), raises, match, leaves, TWO)

    hooks = ("decay", "oh")
    yield scenario("on_run_start of decay", UserError, (*hooks, "on_run_start"), "before", "a problem's hook")
    yield scenario(
        "on_step_start of decay", UserError, ("a hook of problem 'decay'", UNDONE), "before", "a problem's hook"
    )
    yield scenario("on_step_end of decay", UserError, (*hooks, "on_step_end"), "after", "a problem's hook")
    yield scenario("evaluate of decay", UserError, ("oh", "evaluat"), "after", "a problem's hook")
    yield scenario("callback's on_run_start", BilevelError, ("Counter", "on_run_start", "oh"), "before", "a callback")
    for hook in ("on_step_end", "on_evaluate", "on_step_complete", "on_run_end"):
        yield scenario(f"callback's {hook}", BilevelError, ("Counter", hook, "oh"), "after", "a callback")
    yield scenario(
        "callback's on_hypergradient", BilevelError, ("Counter", "on_hypergradient", "oh"), "before", "a callback"
    )


def in_data() -> Iterator[Scenario]:
    oh = raising(UserError("oh"))
    for place, name, after in (
        ("inner, first batch", "classifier", 0),
        ("inner, in the middle of a batch of the second update", "classifier", 11),
        ("outer", "decay", 0),
    ):
        yield Scenario(
            "exception in a data set",
            place,
            at(f"data of {name}", oh, after),
            DataError,
            (f"data of problem '{name}'", "UserError: oh", UNDONE),
            settings=TWO,
        )
    for fault, action in (
        ("batch of another dtype", lambda batch: (batch[0].double(), batch[1])),
        ("batch of another shape", lambda batch: (batch[0][:, :3], batch[1])),
        ("batch on another device", lambda batch: (batch[0].to("meta"), batch[1])),
    ):
        for place, name in (("inner", "classifier"), ("outer", "decay")):
            yield Scenario(fault, place, at(f"batch of {name}", action), RuntimeError, (UNDONE,), settings=TWO)


def in_solves() -> Iterator[Scenario]:
    ahead = 0.0

    def late(value: Any) -> Any:
        nonlocal ahead
        ahead = 3600.0
        return value

    def attempt(engine: Engine, folder: Path) -> None:
        nonlocal ahead
        ahead = 0.0
        with patch("bilevel.faults.monotonic", lambda: time.monotonic() + ahead):
            engine.run(1)

    limit: dict[str, Any] = {**TWO, "solve_timeout": 600.0}
    fallback: dict[str, Any] = {"on_solve_failure": "fallback", "fallback": "minres"}
    yield Scenario(
        "a solve takes too long",
        "inner",
        at("loss of classifier", late, 3),
        SolveTimeoutError,
        ("solve_timeout = 600 s", "'classifier'", UNDONE),
        settings=limit,
        attempt=attempt,
    )
    yield Scenario(
        "a solve takes too long, with a fallback",
        "inner",
        at("loss of classifier", late, 3),
        settings={**limit, **fallback},
        leaves="other",
        attempt=attempt,
        warns="longer than EngineConfig.solve_timeout",
    )
    for status in Status:
        if not status.failed:
            continue
        failed = at("solve", lambda solution, status=status: replace(solution, status=status))
        fault = f"a solve ends as “{status.value}”"
        yield Scenario(
            f"{fault}, with on_solve_failure='raise'",
            "inner",
            failed,
            SolveError,
            ("step 2", status.value, UNDONE),
            settings={**TWO, "on_solve_failure": "raise"},
        )
        yield Scenario(f"{fault}, with 'warn'", "inner", failed, settings=TWO, leaves="other", warns=status.value)
        yield Scenario(
            f"{fault}, with 'fallback'",
            "inner",
            failed,
            settings={**TWO, **fallback},
            leaves="other",
            warns=status.value,
        )


def by_signals() -> Iterator[Scenario]:
    five = lambda engine, folder: engine.run(5)  # noqa: E731
    for number in (signal.SIGINT, signal.SIGTERM):
        for place, where, after in (
            ("in an inner loss", "loss of classifier", 1),
            ("in the solve", "loss of classifier", 3),
            ("in the outer update", "optimiser of decay, after", 0),
            ("in a callback", "callback's on_step_end", 0),
        ):
            yield Scenario(
                f"{number.name} in the first of five steps",
                place,
                at(where, sending(number), after),
                settings=TWO,
                leaves="after",
                attempt=five,
                stops=f"interrupted by {number.name}",
            )
        twice = sending(number, signal.SIGINT)
        yield Scenario(
            f"{number.name}, then SIGINT",
            "in an inner loss",
            at("loss of classifier", twice, 1),
            KeyboardInterrupt,
            (f"SIGINT, after {number.name}", UNDONE),
            settings=TWO,
            attempt=five,
        )
        yield Scenario(
            f"{number.name}, then SIGINT",
            "in the outer update",
            at("optimiser of decay, after", twice),
            KeyboardInterrupt,
            (f"SIGINT, after {number.name}", UNDONE),
            settings=TWO,
            attempt=five,
        )


def in_modes() -> Iterator[Scenario]:
    def autocast(value: Any) -> Any:
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        return value

    def no_grad(value: Any) -> Any:
        torch.set_grad_enabled(False)
        return value

    def double(value: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        return value

    def autocast_and_raise(value: Any) -> Any:
        autocast(value)
        raise UserError("oh")

    for place, name in (("inner", "classifier"), ("outer", "decay")):
        for fault, action, match in (
            ("a loss leaves autocast on", autocast, "autocast on cpu"),
            ("a loss leaves gradients off", no_grad, "gradients"),
            ("a loss changes the default dtype", double, "the default dtype"),
        ):
            yield Scenario(fault, place, at(f"loss of {name}", action), LossError, (match, UNDONE), settings=TWO)
    yield Scenario(
        "a loss raises and leaves autocast on",
        "inner",
        at("loss of classifier", autocast_and_raise),
        UserError,
        (UNDONE,),
        settings=TWO,
    )


def in_modules() -> Iterator[Scenario]:
    def attempt(engine: Engine, folder: Path) -> None:
        module = engine.problems["classifier"].module
        handle = module.register_forward_pre_hook(lambda *_: halved(module[2].weight))
        try:
            engine.run(1)
        finally:
            handle.remove()

    def halved(weight: Tensor) -> None:
        with torch.no_grad():
            weight.mul_(0.5)

    yield Scenario(
        "a module changes its own parameters in forward",
        "inner",
        raises=LossError,
        match=("changed 1 of its 2 parameters in place", UNDONE),
        settings=TWO,
        attempt=attempt,
    )

    def grows(engine: Engine, folder: Path) -> None:
        module = engine.problems["classifier"].module

        def replaces(*_: Any) -> None:
            module[0].running_mean = module[0].running_mean + 1.0
            module.eval()
            raise UserError("oh")

        handle = module.register_forward_pre_hook(replaces)
        try:
            engine.run(1)
        finally:
            handle.remove()

    yield Scenario(
        "a module puts a new tensor in a buffer's place, calls eval() and raises",
        "inner",
        raises=UserError,
        match=(UNDONE,),
        settings=TWO,
        attempt=grows,
    )


def in_workers() -> Iterator[Scenario]:
    one = {**TWO, "workers": 1}

    def trap(what: int) -> Arm:
        def arm(fuse: Fuse) -> None:
            fuse.trap.value = what

        return arm

    yield Scenario(
        "exception in a data-loader worker",
        "inner",
        trap(1),
        DataError,
        ("data of problem 'classifier'", "ValueError", "oh", UNDONE),
        settings=one,
    )
    yield Scenario(
        "a data-loader worker is killed (SIGKILL)",
        "inner",
        trap(2),
        DataError,
        ("data of problem 'classifier'", UNDONE),
        settings=one,
    )


@contextmanager
def full_disk(room: int = 300) -> Iterator[None]:
    """Lets no file of this process grow beyond a few bytes: the operating system refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_files() -> Iterator[Scenario]:
    def save_on_full_disk(engine: Engine, folder: Path) -> None:
        engine.save(folder / "state")
        whole = (folder / "state").read_bytes()
        try:
            with full_disk():
                engine.save(folder / "state")
        finally:
            assert (folder / "state").read_bytes() == whole, "the checkpoint before is gone"
            assert list(folder.iterdir()) == [folder / "state"], "half a file is left"

    yield Scenario(
        "full disk",
        "in Engine.save",
        raises=CheckpointError,
        match=("cannot write",),
        settings=TWO,
        attempt=save_on_full_disk,
    )

    def load(change: Callable[[bytes], bytes]) -> Callable[[Engine, Path], None]:
        def attempt(engine: Engine, folder: Path) -> None:
            engine.save(folder / "state")
            (folder / "state").write_bytes(change((folder / "state").read_bytes()))
            engine.load(folder / "state")

        return attempt

    for fault, change in (
        ("checkpoint with one flipped bit", lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]),
        ("checkpoint cut off in the middle", lambda data: data[: len(data) // 2]),
        ("empty checkpoint", lambda data: b""),
    ):
        yield Scenario(fault, "in Engine.load", raises=CheckpointError, settings=TWO, attempt=load(change))

    def run_on_full_disk(engine: Engine, folder: Path) -> None:
        with full_disk():
            engine.run(1)

    yield Scenario(
        "full disk",
        "in Checkpoints",
        settings=TWO,
        leaves="after",
        attempt=run_on_full_disk,
        watchers=lambda folder: [Checkpoints(folder / "checkpoints", every=1)],
        warns="cannot write",
    )
    yield Scenario(
        "full disk",
        "in JSONLinesLog",
        settings=TWO,
        leaves="other",
        warns="JSONLinesLog",
        attempt=run_on_full_disk,
        watchers=lambda folder: [JSONLinesLog(folder / "log.jsonl")],
    )


SCENARIOS = [
    *in_passes(),
    *in_updates(),
    *in_hooks(),
    *in_data(),
    *in_workers(),
    *in_solves(),
    *in_modes(),
    *in_modules(),
    *by_signals(),
    *in_files(),
]
