"""Runs a method for a number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.errors import NonFiniteError
from bilevel.hypergrad.stochastic import SOLUTION
from bilevel.result import Status
from bilevel.single_loop.base import Method, State
from bilevel.single_loop.problem import Counts, FiniteSum
from bilevel.structure import flatten
from bilevel.validation import check_integer
from bilevel.vector import is_finite

__all__ = ["Iterate", "Run", "single_loop"]


@dataclass(frozen=True)
class Iterate:
    """A point by the way.

    Attributes:
        step: Updates made.
        inner: w.
        outer: λ.
        counts: What they have cost.
    """

    step: int
    inner: Any
    outer: Any
    counts: Counts


@dataclass(frozen=True)
class Run:
    """What :func:`single_loop` returns.

    Attributes:
        inner: w at the end.
        outer: λ at the end.
        state: To go on from.
        iterates: Points by the way, the first and the last among them, as often as was asked.
        status: ``STOPPED_AT_CAP``: the steps were made, or the callback ended them; ``DIVERGED``: an iterate was not
            finite, and the last recorded state before is returned.
        message: What else is worth knowing.
    """

    inner: Any
    outer: Any
    state: State
    iterates: tuple[Iterate, ...]
    status: Status
    message: str = ""


def single_loop(
    problem: FiniteSum,
    inner_params: Any,
    outer_params: Any,
    method: Method,
    steps: int,
    *,
    seed: int = 0,
    state: State | None = None,
    record: int | None = None,
    callback: Callable[[State], bool | None] | None = None,
) -> Run:
    """Makes updates of a single-loop method on a finite-sum bilevel problem.

    Args:
        problem: The losses.
        inner_params: w to start from: a tensor, or a sequence or mapping of tensors. Stays as it is.
        outer_params: λ to start from, likewise.
        method: Which.
        steps: Updates to make.
        seed: Of the draws of batches.
        state: Go on from here; ``inner_params``, ``outer_params`` and ``seed`` then are not used.
        record: Record the point every so many updates, and check that it is finite; None for the last one only.
        callback: Called with the state at every recorded point but the first; the run ends where it returns True.

    Returns:
        The iterates and how it ended. A run that goes on from a state makes the same steps, to the bit, as one that
        was not interrupted.

    Raises:
        ConfigError: ``steps`` or ``record`` out of range.
        LossError: A loss that is no scalar, or does not depend on its parameters.
        NonFiniteError: A loss that is NaN or infinite at the first step; later ones end the run as ``DIVERGED``.
    """
    check_integer("single_loop", "steps", steps, minimum=0)
    if record is not None:
        check_integer("single_loop", "record", record, minimum=1)
    if state is None:
        state = method.init(problem, inner_params, outer_params, torch.Generator().manual_seed(seed))
        owned = True
    else:
        owned = False  # the caller's: its tables are not to be overwritten
    iterates, safe, last, status = [_iterate(state)], state, state.step + steps, Status.STOPPED_AT_CAP
    while state.step < last:
        try:
            state = method.update(problem, state, donate=owned)
        except NonFiniteError:
            if state.step == iterates[0].step:
                raise
            status = Status.DIVERGED
            break
        owned = True
        if state.step < last and (record is None or (state.step - iterates[0].step) % record):
            continue
        if not _is_finite(state):
            status = Status.DIVERGED
            break
        iterates.append(_iterate(state))
        safe, owned = state, False
        if callback is not None and callback(state):
            break
    return Run(safe.inner, safe.outer, safe, tuple(iterates), status, _message(safe, state, status))


def _iterate(state: State) -> Iterate:
    return Iterate(state.step, state.inner, state.outer, state.counts)


def _is_finite(state: State) -> bool:
    parts = flatten(state.inner, "inner")[0] + flatten(state.outer, "outer")[0] + state.memory.get(SOLUTION, ())
    return is_finite([part.detach() for part in parts])


def _message(safe: State, state: State, status: Status) -> str:
    parts = []
    if status is Status.DIVERGED:
        parts.append(
            f"an iterate after step {safe.step} is not finite (seen at step {state.step}): lower inner_step and "
            "linear_step below 2 / (largest Hessian eigenvalue of any batch), or outer_step"
        )
    if state.failures:
        parts.append(f"{state.failures} of {state.step} updates report a failed solve: lower linear_step")
    return "; ".join(parts)
