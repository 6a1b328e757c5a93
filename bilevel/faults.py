"""What goes wrong in a step: where it happened, what it means for the state, and what to do."""

from __future__ import annotations

import enum
import operator
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from bilevel.errors import LossError, OutOfMemoryError, SolveTimeoutError
from bilevel.vector import Tensors

__all__ = ["Activity", "Deadline", "ModesKept", "Part", "Work", "explained", "is_out_of_memory", "release_frames"]


_version = operator.attrgetter("_version")


class Work(enum.Enum):
    """A part of a step. ``work.remedy`` says what to do where memory ends in it."""

    DATA = "the draw of a batch"
    FORWARD = "the forward pass"
    BACKWARD = "the backward pass"
    RESPONSE = "the best-response product"
    UPDATE = "the update"
    HOOK = "a hook"

    @property
    def remedy(self) -> str:
        """What a user can do about memory."""
        return _REMEDIES[self]


_PASS_REMEDY = (
    "give this problem smaller batches (with accumulate= the gradient stays that of the large one), or use "
    "torch.utils.checkpoint in its module"
)
_REMEDIES = {
    Work.DATA: "give this problem smaller batches, or its loader fewer workers",
    Work.FORWARD: _PASS_REMEDY,
    Work.BACKWARD: _PASS_REMEDY,
    Work.RESPONSE: "give this problem smaller batches, or a method that keeps less: products='finite_difference' or "
    "'finite_difference' keep no graph of the gradient; unrolled: memory='replay' in place of 'graph', or fewer steps; "
    "nystrom: a lower rank; gmres: a lower restart (`bilevel methods` lists what each keeps)",
    Work.UPDATE: "use an optimiser with less state (foreach=False needs no copies of all parameters), or own fewer "
    "parameters",
    Work.HOOK: "free what the hook holds",
}


@dataclass(frozen=True)
class Part:
    """A part of a step of one problem.

    Attributes:
        work: Which part.
        problem: Name of the problem.
        method: Name of the method, for a best-response product.
    """

    work: Work
    problem: str
    method: str = ""

    def __str__(self) -> str:
        """Names the part for messages."""
        method = f" by method {self.method!r}" if self.method else ""
        return f"{self.work.value} of problem {self.problem!r}{method}"


class Activity:
    """Knows in which part of a step an exception was raised.

    Example:
        >>> activity = Activity()
        >>> try:
        ...     with activity(Work.RESPONSE, "classifier", "neumann"), activity(Work.FORWARD, "classifier"):
        ...         raise MemoryError
        ... except MemoryError:
        ...     print(activity.failed)
        the forward pass of problem 'classifier'
    """

    def __init__(self) -> None:
        self.failed: Part | None = None
        """The innermost part that the last exception left; None where none did since a part began."""
        self._contexts: dict[tuple[str, str, str], _Entered] = {}

    def __call__(self, work: Work, problem: str, method: str = "") -> _Entered:
        """Returns a context in which this part is going on; it may be entered again while it is."""
        key = (work._name_, problem, method)  # the hash of an enum's member is computed in Python
        known = self._contexts.get(key)
        if known is None:
            known = self._contexts[key] = _Entered(self, Part(work, problem, method))
        return known


class _Entered:
    __slots__ = ("_activity", "_part")

    def __init__(self, activity: Activity, part: Part) -> None:
        self._activity = activity
        self._part = part

    def __enter__(self) -> None:
        self._activity.failed = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._activity.failed is None:
            self._activity.failed = self._part


def explained(error: BaseException, failed: Part | None, step: int, *, undone: bool) -> BaseException:
    """Returns the exception that should leave a step.

    An error of memory becomes an :class:`~bilevel.errors.OutOfMemoryError`, and loses its traceback: nothing that the
    frames held stays in memory while somebody holds the exception. The line that raised it is in the message. Every
    other exception stays itself, with a note where Python has them (3.11).

    Args:
        error: What was raised.
        failed: In which part of the step; None where it was none.
        step: Number of the step.
        undone: Whether the state is that before the step.
    """
    where = f"step {step}" if failed is None else f"step {step}, in {failed}"
    state = (
        "The step is undone: nothing has changed."
        if undone
        else "The step is not undone (EngineConfig.restore_on_error is off): load a checkpoint."
    )
    if is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
        line = _line(error)
        release_frames(error)
        what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = "" if failed is None else f" To need less memory: {failed.work.remedy}."
        return OutOfMemoryError(f"{where}: {what}{line}. {state}{remedy}")
    if sys.version_info >= (3, 11):
        error.add_note(f"{where[0].upper()}{where[1:]}. {state}")
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The host's allocator, MPS, cuBLAS and the drivers themselves raise plain RuntimeErrors.
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def release_frames(error: BaseException) -> None:
    """Drops the tracebacks of an exception and of those it came from, and the local variables of the frames in them."""
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        current = stack.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        # A frame keeps the closure of its function whatever is cleared.
        current.__traceback__ = None
        stack += [current.__cause__, current.__context__]


def _line(error: BaseException) -> str:
    """Names the line of the user's code that raised an exception, if one did."""
    own = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if not entry.filename.startswith(own)]
    if not lines:
        return ""
    last = lines[-1]
    return f" ({last.filename}, line {last.lineno}, in {last.name})"


class Deadline:
    """A ``reduce`` that raises when a time is over: see :class:`~bilevel.functional.Objective`.

    It is called after every gradient and product, so that a solve ends within one pass of its limit. The host's clock
    counts: a device that still works on queued passes is not waited for.

    Args:
        reduce: What does the reduction.
        seconds: From now.
        what: What takes so long, for the message.
        shared: Let all data-parallel ranks end together, once the time of one is over. Costs one number in every
            reduction, and a wait for it.
        clock: Tells the time in seconds; the system's by default.

    Raises:
        SolveTimeoutError: When called after the time is over.
    """

    def __init__(
        self,
        reduce: Callable[[Tensors], Tensors],
        seconds: float,
        what: str,
        *,
        shared: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._reduce = reduce
        self._seconds = seconds
        self._what = what
        self._shared = shared
        self._clock = clock or monotonic
        self._end = self._clock() + seconds

    def __call__(self, tensors: Tensors) -> Tensors:
        """Returns the reduced tensors."""
        late = self._clock() > self._end
        if self._shared and tensors:
            *parts, vote = self._reduce((*tensors, tensors[0].new_full((), float(late))))
            late, reduced = float(vote) > 0, tuple(parts)
        else:
            reduced = self._reduce(tensors)
        if late:
            raise SolveTimeoutError(
                f"{self._what} took longer than EngineConfig.solve_timeout = {self._seconds:g} s: allow fewer products "
                "(max_iterations, terms), more time, or another method by on_solve_failure='fallback'"
            )
        return reduced


class ModesKept:
    """Refuses a loss that leaves torch in another mode than it was called in, or changes parameters; modes go back.

    Autocast that stays on would change the precision of all that follows, gradients that stay off its derivatives, and
    parameters that change with every pass are other ones in each pass of a derivative.

    Args:
        name: Whose loss it is, for the message.
        devices: Types of the devices whose autocast is looked at.
        parameters: Tensors that must not be changed in place.

    Raises:
        LossError: On leaving, where gradients, autocast, the default dtype or the parameters are not as they were.
    """

    __slots__ = ("_before", "_devices", "_name", "_parameters", "_versions")

    def __init__(self, name: str, devices: tuple[str, ...] = ("cpu",), parameters: Tensors = ()) -> None:
        self._name = name
        self._devices = devices
        self._parameters = parameters

    def __enter__(self) -> None:
        self._before = self._modes()
        self._versions = list(map(_version, self._parameters))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        after = self._modes()
        changed = [] if after == self._before else self._put_back(after)
        if error is not None:
            return
        if changed:
            raise LossError(
                f"the loss of {self._name} returned with another mode than it was called in: {', '.join(changed)}. "
                "Use torch.no_grad(), torch.autocast(…) and the like as `with` blocks."
            )
        versions = list(map(_version, self._parameters))
        if versions != self._versions:
            moved = sum(new != old for new, old in zip(versions, self._versions, strict=True))
            raise LossError(
                f"the loss of {self._name} changed {moved} of its {len(self._parameters)} parameters in place, as its "
                "every pass would, those of a derivative among them. Compute the changed value without writing it "
                "back (torch.nn.utils.parametrize does so), or change parameters in on_step_start."
            )

    def _modes(self) -> tuple[Any, ...]:
        casts = map(torch.is_autocast_enabled, self._devices)
        deeper = torch.autocast_increment_nesting()  # which returns what it has become
        torch.autocast_decrement_nesting()
        return (deeper, torch.is_grad_enabled(), torch.get_default_dtype(), *casts)

    def _put_back(self, after: tuple[Any, ...]) -> list[str]:
        """Restores the modes and returns which had changed."""
        deep, grad, dtype, *casts = self._before
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        for device, cast in zip(self._devices, casts, strict=True):
            torch.set_autocast_enabled(device, cast)
        # In a context that is never left, torch would keep cast weights for ever, through all their updates.
        for _ in range(after[0] - deep):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        names = ("gradients", "the default dtype", *(f"autocast on {device}" for device in self._devices))
        pairs = zip(names, self._before[1:], after[1:], strict=True)
        return [name for name, old, new in pairs if old != new] or ["an autocast context that was not left"]
