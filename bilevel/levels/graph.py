"""Levels: which problem's parameters reach which loss, and who is over whom."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.double_backward import refuse_obstacles, second_derivative_errors
from bilevel.errors import BilevelError, GraphError, LossError, ParameterError, warn
from bilevel.functional import gradients_on, leaves
from bilevel.problems.base import Problem
from bilevel.randomness import generator_devices, preserved
from bilevel.slots import ParameterSlots

__all__ = ["Dependencies", "Reading", "check_ownership", "dependencies_of", "discover", "examine"]


@dataclass(frozen=True)
class Dependencies:
    """Who depends on whom.

    Problem p is *over* c, and c *below* p, where p is listed first, p's loss reads c, and c's best response depends on
    p: directly, or through other problems below p.

    Attributes:
        reach: For every problem, top level first, the problems whose parameters reach its loss.
        starts: By inner problem, the problem from whose parameters it starts, where it starts from another's.
        lower: For every problem, those below it.
        outer: The problems that nothing is over.
        inner: All others, in the order in which cotangents are accumulated: each comes before the problems that it
            responds to, but for those that respond to each other.
        first_derivatives_only: The problems whose losses cannot be differentiated twice, with the error that says so.
    """

    reach: Mapping[str, frozenset[str]]
    starts: Mapping[str, str]
    lower: Mapping[str, frozenset[str]]
    outer: tuple[str, ...]
    inner: tuple[str, ...]
    first_derivatives_only: Mapping[str, LossError] = field(default_factory=dict)
    _orders: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _active: dict[tuple[str, frozenset[str]], tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _above: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def responds_to(self, name: str) -> tuple[str, ...]:
        """Returns the problems whose parameters move the best response of an inner problem, top level first.

        That is what its total loss depends on: its own loss, and the best responses below it.
        """
        if name not in self._above:
            below = self.lower[name]
            found = set().union(*(self.read_by(other) for other in (name, *below))) - below - {name}
            self._above[name] = tuple(other for other in self.reach if other in found)
        return self._above[name]

    def read_by(self, name: str) -> frozenset[str]:
        """Returns the problems that a problem's own loss reads, or that it starts from."""
        start = self.starts.get(name)
        return (self.reach[name] if start is None else self.reach[name] | {start}) - {name}

    def below(self, name: str) -> tuple[tuple[str, ...], ...]:
        """Returns the problems below one in the order of accumulation, those that respond to each other together."""
        if name not in self._orders:
            members = [other for other in self.inner if other in self.lower[name]]
            self._orders[name] = _accumulation_order(members, self.responds_to)
        return self._orders[name]

    def active_below(self, name: str, active: frozenset[str]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
        """Returns :meth:`below` without the problems that are not active, and all that are, in the same order."""
        known = self._active.get((name, active))
        if known is None:
            blocks = [tuple(other for other in block if other in active) for block in self.below(name)]
            known = tuple(filter(None, blocks)), tuple(other for block in blocks for other in block)
            self._active[name, active] = known
        return known

    def settled_before(self, name: str, among: Collection[str]) -> tuple[str, ...]:
        """Returns the problems below one, of those ``among``, each after those that it responds to."""
        return tuple(other for block in reversed(self.below(name)) for other in block if other in among)

    def depth(self, name: str) -> int:
        """Returns 0 for an outer problem, and one more than the deepest problem over it for an inner one."""
        return 1 + max((self.depth(over) for over, below in self.lower.items() if name in below), default=-1)

    def describe(self) -> str:
        """Returns one line a problem: ``cleaner (outer): loss depends on classifier``."""
        lines = []
        for name, reach in self.reach.items():
            role = "outer" if name in self.outer else "inner, and outer to others" if self.lower[name] else "inner"
            others = ", ".join(other for other in self.reach if other in reach and other != name)
            start = f"; starts from {self.starts[name]}" if name in self.starts else ""
            over = ", ".join(other for other in self.reach if other in self.lower[name])
            over = f"; over {over}" if over and len(self.reach) > 2 else ""
            lines.append(f"{name} ({role}): loss depends on {others or 'nothing else'}{start}{over}")
        return "\n".join(lines)


def check_ownership(problems: Sequence[Problem]) -> None:
    """Raises unless names are distinct and every parameter has one owner."""
    names = [problem.name for problem in problems]
    for name in names:
        if names.count(name) > 1:
            raise GraphError(f"two problems are named {name!r}: give one of them name=")
    owners: dict[int, tuple[str, str]] = {}
    for problem in problems:
        for key, parameter in zip(problem.parameter_names, problem.parameters, strict=True):
            if id(parameter) in owners:
                other, other_key = owners[id(parameter)]
                raise GraphError(
                    f"problems {other!r} and {problem.name!r} both own one parameter ({other_key!r}, {key!r}): every "
                    "parameter is "
                    "trained by one problem. Restrict one of them with params= or by its optimizer."
                )
            owners[id(parameter)] = (problem.name, key)


def discover(problems: Sequence[Problem], slots: ParameterSlots, batches: Mapping[str, Any]) -> Dependencies:
    """Evaluates every loss once, at copies of all owned parameters, and sees which of them reach it.

    Args:
        problems: Top level first.
        slots: Where the modules hold their parameters.
        batches: A batch for every problem.

    Raises:
        GraphError: A problem that depends on nothing above it, or that nothing above depends on.
        ParameterError: An inner problem's parameter object is read directly, where swapped values would not be seen.
    """
    read = {problem.name: examine(problem, problems, slots, batches[problem.name]) for problem in problems}
    reach = {name: reading.reach for name, reading in read.items()}
    once = {name: reading.error for name, reading in read.items() if reading.error is not None}
    starts = {problem.name: problem.start_source for problem in problems if problem.start_source is not None}
    dependencies = replace(dependencies_of([p.name for p in problems], reach, starts), first_derivatives_only=once)
    for name, reading in read.items():
        reading.check(name, dependencies)
    return dependencies


@dataclass(frozen=True)
class Reading:
    """What evaluating a loss has shown.

    Attributes:
        reach: The problems whose parameters reach it.
        bypassed: Those whose parameters do so past the modules.
        error: Why it has no second derivative, where it has none.
    """

    reach: frozenset[str]
    bypassed: frozenset[str]
    error: LossError | None

    def check(self, name: str, dependencies: Dependencies) -> None:
        """Raises where other values of an inner problem's parameters would not be seen.

        Args:
            name: The problem whose loss it is.
            dependencies: Who depends on whom.

        Raises:
            ParameterError: Its parameter objects are read directly.
        """
        wrong = self.bypassed & set(dependencies.inner)
        if wrong:
            raise ParameterError(
                f"the loss of problem {name!r} reads parameters of {sorted(wrong)} from variables instead of modules, "
                "so that they "
                "cannot be evaluated at other values. Read them as self.module.<name> or by calling the problem."
            )


def examine(problem: Problem, problems: Sequence[Problem], slots: ParameterSlots, batch: Any) -> Reading:
    """Evaluates a loss at copies of all owned parameters, and sees which of them reach it.

    Args:
        problem: Whose loss.
        problems: All of them, top level first.
        slots: Where the modules hold their parameters.
        batch: What to evaluate it on.

    Warns:
        BilevelWarning: It has another value there than at the parameters themselves.

    Cost: 2 forward passes and 1 backward pass.
    """
    with _generators_kept(p for other in problems for p in other.parameters), _noted(problem.name):
        reading, value = _read_at_copies(problem, problems, slots, batch)
    kept = _generators_kept(p for other in problems for p in other.parameters)
    with kept, slots.buffers_protected(), gradients_on():
        here = problem.evaluate_loss(batch)[0].detach()
    tolerance = min(1e3 * torch.finfo(here.dtype).eps, 0.05)
    if not torch.allclose(here, value.to(here.dtype), rtol=tolerance, atol=tolerance**2, equal_nan=True):
        warn(
            f"the loss of problem {problem.name!r} is {float(value):.6g} at copies of the parameters and "
            f"{float(here):.6g} at the parameters themselves: it asks them for more than their values (their class, "
            "identity, or an attribute of their own), which hypergradients at other values leave out; or it keeps a "
            "state of its own. Select parameters by their names or modules",
        )
    return reading


@contextmanager
def _noted(name: str) -> Iterator[None]:
    """Lets an error of the user's loss say whose loss it was, where Python has notes; ours say so themselves."""
    try:
        yield
    except BilevelError:
        raise
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"In the loss of problem {name!r}, evaluated once to see which parameters reach it.")
        raise


@contextmanager
def _generators_kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Leaves torch's, NumPy's and Python's generators as they were."""
    numpys, pythons = np.random.get_state(), random.getstate()
    with preserved(generator_devices(parameters)):
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _read_at_copies(
    problem: Problem, problems: Sequence[Problem], slots: ParameterSlots, batch: Any
) -> tuple[Reading, Tensor]:
    live = tuple(p for other in problems for p in other.parameters)
    owner = [other.name for other in problems for _ in other.parameters]
    copies = leaves(live)
    label, error = f"problem {problem.name!r}", None
    with slots.buffers_protected(), slots.swapped(live, copies), gradients_on(), second_derivative_errors(label):
        loss, _ = problem.evaluate_loss(batch)
        found: Sequence[Tensor | None] = [None] * (2 * len(live))
        if loss.requires_grad:
            try:
                refuse_obstacles(loss, copies, label)
            except LossError as refused:
                error = _apart_from_frames(refused)
            found = torch.autograd.grad(loss, copies + live, allow_unused=True)
    swapped = {name for name, grad in zip(owner, found[: len(live)], strict=True) if grad is not None}
    direct = {name for name, grad in zip(owner, found[len(live) :], strict=True) if grad is not None}
    return Reading(frozenset(swapped | direct), frozenset(direct), error), loss.detach()


def _apart_from_frames(error: LossError) -> LossError:
    """Returns an error that is to be kept, without the frames of its tracebacks: those hold the graph of the loss."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


def dependencies_of(
    names: Sequence[str], reach: Mapping[str, frozenset[str]], starts: Mapping[str, str]
) -> Dependencies:
    """Returns who is over whom.

    Args:
        names: All problems, top level first.
        reach: By problem, those whose parameters reach its loss.
        starts: By inner problem, the one from whose parameters it starts, where it does so.

    Raises:
        GraphError: A problem that depends on nothing above it, or that nothing above depends on.
    """
    lower: dict[str, frozenset[str]] = {}
    levels = _Levels(names, reach, starts, lower)
    for name in reversed(names):
        lower[name] = frozenset(levels.below(name))
    inner = [name for name in names if any(name in below for below in lower.values())]
    place = {name: index for index, name in enumerate(names)}
    for name in names:
        readers = [other for other in names if place[other] < place[name] and name in reach[other]]
        if readers and name not in inner and not lower[name]:
            raise GraphError(
                f"the loss of inner problem {name!r} does not depend on the parameters of any problem above it "
                f"({', '.join(names[: place[name]])}): there is nothing to differentiate. Use the outer parameters in "
                "its loss, "
                "without detach()."
            )
    for name in (*names[1:], names[0]):  # the most telling message first
        if name not in inner and not lower[name]:
            raise GraphError(_isolated(name, names, place))
    outer = tuple(name for name in names if name not in inner)
    unordered = Dependencies(dict(reach), dict(starts), lower, outer, tuple(inner))
    order = _accumulation_order(inner, unordered.responds_to)
    for name in inner:
        together = next((block for block in unordered.below(name) if len(block) > 1), ())
        if together:
            raise GraphError(
                f"problems {' and '.join(together)} respond to each other below the middle level {name!r}, whose own "
                "response would need the derivative of their equilibrium: that is not supported. Join them into one "
                f"problem, or let nothing above {name!r} depend on it."
            )
    return Dependencies(dict(reach), dict(starts), lower, outer, tuple(name for block in order for name in block))


@dataclass(frozen=True)
class _Levels:
    """Finds who is below whom, the last listed problem first."""

    names: Sequence[str]
    reach: Mapping[str, frozenset[str]]
    starts: Mapping[str, str]
    lower: Mapping[str, frozenset[str]]

    def below(self, name: str) -> set[str]:
        """Returns the problems below one; what is below those listed after it is known."""
        found: set[str] = set()
        stack = [other for other in self._later(name, self.reach[name]) if self._depends(other, name, set())]
        while stack:
            current = stack.pop()
            if current in found:
                continue
            found.add(current)
            stack.extend(self.lower[current])
            stack.extend(other for other in self._given(current, name) if self._depends(other, name, set()))
            stack.extend(self._leaders(current, name))
        return found

    def _depends(self, name: str, above: str, seen: set[str]) -> bool:
        """Whether a problem's best response depends on one that is listed before it."""
        seen.add(name)
        if above in self._reads(name) or any(True for _ in self._leaders(name, above)):
            return True
        further = {*self.lower[name], *self._given(name, above)} - seen
        return any(self._depends(other, above, seen) for other in further)

    def _leaders(self, name: str, above: str) -> Iterator[str]:
        """Yields the problems over ``name``, after ``above``, that depend on ``above`` otherwise than through it.

        Two that are over one problem and depend on each other through it alone are players of a game, not levels.
        """
        for other in self._later(above, self._reads(name)):
            if name in self.lower[other]:
                given = [third for third in self._given(other, above) if third not in self.lower[other]]
                if above in self._reads(other) or any(self._depends(third, above, {name, other}) for third in given):
                    yield other

    def _given(self, name: str, above: str) -> Iterator[str]:
        """Yields the problems after ``above`` whose values a problem takes as given: it is neither over nor below."""
        for other in self._later(above, self._reads(name)):
            if other != name and other not in self.lower[name] and name not in self.lower[other]:
                yield other

    def _reads(self, name: str) -> set[str]:
        start = self.starts.get(name)
        return set(self.reach[name]) | ({start} if start is not None else set())

    def _later(self, name: str, among: Collection[str]) -> list[str]:
        after = self.names[self.names.index(name) + 1 :]
        return [other for other in after if other in among]


def _isolated(name: str, names: Sequence[str], place: Mapping[str, int]) -> str:
    if place[name] == 0:
        return (
            f"the loss of outer problem {name!r} does not depend on the parameters of a problem below it that depends "
            f"on {name!r} "
            f"(below: {', '.join(names[1:]) or 'none'}). List problems top level first, and call the inner problem in "
            "the outer loss."
        )
    return (
        f"no problem above {name!r} depends on its parameters (above: {', '.join(names[: place[name]])}): nothing is "
        "learnt "
        "through it. Call it in the loss of the problem above, without detach(), or leave it out."
    )


def _accumulation_order(inner: Sequence[str], responds_to: Any) -> tuple[tuple[str, ...], ...]:
    """Orders inner problems so that each comes before those it responds to; a cycle makes one block."""
    reached = {name: _closure(name, inner, responds_to) for name in inner}
    rest, order = list(inner), []
    while rest:
        # A block that no other one responds to: what responds to a member is in the block itself.
        block = next(
            names
            for names in (tuple(o for o in rest if o == n or (o in reached[n] and n in reached[o])) for n in rest)
            if not any(reached[other] & set(names) for other in rest if other not in names)
        )
        order.append(block)
        rest = [name for name in rest if name not in block]
    return tuple(order)


def _closure(name: str, inner: Sequence[str], responds_to: Any) -> set[str]:
    found: set[str] = set()
    stack = [name]
    while stack:
        for other in responds_to(stack.pop()):
            if other in inner and other not in found:
                found.add(other)
                stack.append(other)
    return found
