"""What every single-loop method is: a pure update of an explicit state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError, ParameterError
from bilevel.functional import leaves
from bilevel.hypergrad.base import InnerProblem
from bilevel.hypergrad.function import outer_gradients
from bilevel.hypergrad.soba import SOBA
from bilevel.hypergrad.stochastic import Answer, Batches
from bilevel.single_loop.problem import Counts, FiniteSum, Oracles
from bilevel.structure import Structure, flatten
from bilevel.validation import NamedArguments, check_integer, check_number
from bilevel.vector import Tensors, axpy

__all__ = ["Method", "Point", "State", "Update"]


@dataclass(frozen=True)
class State:
    """Everything that a run goes on from. Nothing else is kept anywhere.

    Attributes:
        step: Updates made.
        inner: w, in the structure in which it was given.
        outer: λ, likewise.
        memory: What the method keeps: the solution q of the linear system, tables, old points, momenta.
        generator: State of the random generator that draws batches.
        counts: What the updates have cost, the initialisation included.
        failures: Updates whose step on the linear system reported a failure.
    """

    step: int
    inner: Any
    outer: Any
    memory: Mapping[str, Tensors]
    generator: Tensor
    counts: Counts = field(default_factory=Counts)
    failures: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Returns tensors and numbers in plain containers: what ``torch.save`` writes and loads without code."""
        return {
            "step": self.step,
            "inner": self.inner,
            "outer": self.outer,
            "memory": dict(self.memory),
            "generator": self.generator,
            "counts": asdict(self.counts),
            "failures": self.failures,
        }

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> State:
        """Returns the state that :meth:`as_dict` described.

        Raises:
            ConfigError: Something is missing, or unknown.
        """
        try:
            return State(**{**saved, "counts": Counts(**saved["counts"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a state of a single-loop method, as State.as_dict() writes it: {error}") from error


@dataclass(frozen=True)
class Point:
    """A state with its parameters as flat tuples, for the length of one update.

    Attributes:
        inner: w.
        outer: λ.
        oracles: Access to the losses.
    """

    inner: Tensors
    outer: Tensors
    oracles: Oracles

    @property
    def structures(self) -> tuple[Structure, Structure]:
        """How w and λ are held."""
        return self.oracles.structures

    def problem(self, blocks: list[int | None]) -> InnerProblem:
        """Returns the inner problem here, its separate batches these; the one batch of them all where they are one."""
        samples = [self.oracles.inner(block) for block in blocks]
        return InnerProblem(samples[0], leaves(self.inner), leaves(self.outer), samples=samples)

    def measure(self, block: int | None, q: Tensors, v: Tensors) -> Answer:
        """Returns ``∂f/∂w``, ``Hq − v`` and ``(∂²f/∂λ∂w) q`` on an inner block: 1 forward and 2 backward passes."""
        return Batches(SOBA(), self.problem([block])).answer(0, q, v)

    def outer_gradients(self, block: int | None) -> tuple[Tensors, Tensors]:
        """Returns ``∂F/∂w`` and ``∂F/∂λ`` on an outer block: 1 forward and 1 backward pass."""
        _, v, direct = outer_gradients(self.oracles.outer(block), leaves(self.inner), leaves(self.outer))
        return v, direct


@dataclass(frozen=True)
class Update:
    """What one update makes of a point: new flat parameters and memory."""

    inner: Tensors
    outer: Tensors
    memory: Mapping[str, Tensors]
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(NamedArguments, ABC):
    """Base of the single-loop methods: an immutable, validated dataclass with two pure functions.

    Step t (from 0) has the lengths ``inner_step (t + 1)^(−inner_decay)`` for w, likewise for q and λ.

    Attributes:
        inner_step: Length of a step on w.
        linear_step: ρ, length of a step on q; None for the inner step and its decay.
        outer_step: Length of a step on λ.
        inner_decay: Exponent; 0 for a constant step.
        linear_decay: Exponent for q, where it has a step of its own.
        outer_decay: Exponent for λ.
        inner_batch: Samples in an inner batch; None for all.
        outer_batch: Samples in an outer batch; None for all.
    """

    inner_step: float = 0.1
    linear_step: float | None = None
    outer_step: float = 0.01
    inner_decay: float = 0.0
    linear_decay: float = 0.0
    outer_decay: float = 0.0
    inner_batch: int | None = 1
    outer_batch: int | None = 1

    name: ClassVar[str]
    """For tables and plots."""

    def __post_init__(self) -> None:
        """Validates the shared fields; a subclass calls it."""
        owner = type(self).__name__
        for name in ("inner_step", "linear_step", "outer_step"):
            if name != "linear_step" or self.linear_step is not None:
                check_number(owner, name, getattr(self, name), minimum=0.0, exclusive=True)
        for name in ("inner_decay", "linear_decay", "outer_decay"):
            check_number(owner, name, getattr(self, name), minimum=0.0)
        for name in ("inner_batch", "outer_batch"):
            if getattr(self, name) is not None:
                check_integer(owner, name, getattr(self, name), minimum=1)
        if self.linear_step is None and self.linear_decay:
            raise ConfigError(f"{owner}.linear_decay belongs to linear_step, which is None: q then has w's steps")

    def lengths(self, step: int) -> tuple[float, float, float]:
        """Returns the lengths of this step on w, q and λ."""
        inner = self.inner_step * (step + 1.0) ** -self.inner_decay
        linear = inner if self.linear_step is None else self.linear_step * (step + 1.0) ** -self.linear_decay
        return inner, linear, self.outer_step * (step + 1.0) ** -self.outer_decay

    def init(self, problem: FiniteSum, inner_params: Any, outer_params: Any, generator: torch.Generator) -> State:
        """Returns the state to start from.

        Args:
            problem: The losses.
            inner_params: w: a tensor, or a sequence or mapping of tensors; copied.
            outer_params: λ, likewise.
            generator: A CPU generator, whose state is copied; it is not advanced.

        Raises:
            ParameterError: Parameters that are no real floating-point tensors.
        """
        state = State(0, inner_params, outer_params, {}, generator.get_state())
        point = self._point(problem, state)
        inner, outer = (tuple(part.clone() for part in parts) for parts in (point.inner, point.outer))
        point = replace(point, inner=inner, outer=outer)
        first = self.start(point)
        return self._packed(point, state, Update(point.inner, point.outer, first), step=0)

    def update(self, problem: FiniteSum, state: State, *, donate: bool = False) -> State:
        """Returns the state after one update.

        Args:
            problem: The losses.
            state: The state before, which stays as it is.
            donate: Whether the method may overwrite the tables of ``state``, which then is not to be used again: saves
                copying them.
        """
        point = self._point(problem, state)
        return self._packed(point, state, self.advance(point, state, donate), step=state.step + 1)

    def start(self, point: Point) -> Mapping[str, Tensors]:
        """Returns the memory to start from."""
        return {}

    @abstractmethod
    def advance(self, point: Point, state: State, donate: bool) -> Update:
        """Makes one update."""

    def _point(self, problem: FiniteSum, state: State) -> Point:
        inner, inner_structure = flatten(state.inner, "inner")
        outer, outer_structure = flatten(state.outer, "outer")
        shared = {id(part) for part in inner} & {id(part) for part in outer}
        if shared:
            raise ParameterError("a tensor is an inner and an outer parameter at once. Clone one of them.")
        generator = torch.Generator()
        generator.set_state(state.generator.cpu())
        inner, outer = (tuple(part.detach() for part in parts) for parts in (inner, outer))
        batches = (self.inner_batch, self.outer_batch)
        return Point(inner, outer, Oracles(problem, (inner_structure, outer_structure), batches, generator, inner))

    def _packed(self, point: Point, state: State, made: Update, step: int) -> State:
        inner, outer = point.structures
        return replace(
            state,
            step=step,
            inner=inner.rebuild(made.inner),
            outer=outer.rebuild(made.outer),
            memory=made.memory,
            generator=point.oracles.generator.get_state(),
            counts=point.oracles.counted(state.counts),
            failures=state.failures + made.failed,
        )


def descended(length: float, direction: Tensors, x: Tensors) -> Tensors:
    """Returns ``x − length · direction`` in the dtypes of x."""
    return tuple(new.to(old.dtype) for new, old in zip(axpy(-length, direction, x), x, strict=True))
