"""The one operation of every estimator: a best-response vector–Jacobian product."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.functional import Objective
from bilevel.optim import Update
from bilevel.result import SolveInfo
from bilevel.validation import NamedArguments
from bilevel.vector import Tensors
from bilevel.vector import negative as _negative

__all__ = ["Estimator", "InnerProblem", "InnerStep", "Pullback", "Response", "State", "StepGraph"]

State = Mapping[str, Tensors]
"""What an estimator keeps across outer steps: named tuples of tensors, passed in and out, never hidden."""


@dataclass
class StepGraph:
    """An inner step's gradient with the graph that it was made by.

    Attributes:
        inner: The leaves at which it was taken: the inner parameters before the step.
        gradient: ``∂f/∂w`` there, not reduced over ranks; zeros without a graph where a parameter does not reach f.
            Empty where the graph is spent.
        once: Whether a single derivative is expected, which may free the graph while it is taken. What it frees serves
            what comes after it; with all graphs held to the end, up to a quarter of the time went into fresh pages.
    """

    inner: Tensors
    gradient: Tensors
    once: bool = False

    @property
    def spent(self) -> bool:
        """Whether the graph is gone: the step is to be evaluated again."""
        return not self.gradient

    def take(self) -> Tensors:
        """Returns the gradient for a derivative, and lets go of it where that is the only one expected."""
        gradient = self.gradient
        if self.once:
            self.gradient = ()
        return gradient


@dataclass(frozen=True)
class InnerStep:
    """One update that an inner problem made: what is needed to make it again.

    Attributes:
        objective: The inner loss on the batch and with the random numbers of that step.
        inner: The inner parameters before the step (copies).
        memory: The optimiser's state tensors before the step (copies).
        update: The optimiser's update as a differentiable function.
        gradient: The inner gradient that the update consumed; kept of the last step only.
        outer_gradient: ``∂f/∂λ`` at the same point, on the same batch, where the estimator asked for it.
        graph: The gradient's graph, where the estimator keeps it and it is still valid.
    """

    objective: Objective
    inner: Tensors
    memory: Tensors
    update: Update
    gradient: Tensors | None = None
    outer_gradient: Tensors | None = None
    graph: StepGraph | None = None


@dataclass(frozen=True)
class InnerProblem:
    """An inner problem at its current point, as estimators see it.

    Attributes:
        objective: The inner loss ``f(w, λ)``.
        inner: ``w``, leaves that require gradients.
        outer: ``λ``, likewise: the parameters of all problems above that reach the loss.
        trajectory: The updates that led to ``inner``, oldest first; empty where they were not recorded.
        samples: The inner loss on separate batches, for methods that want more than one; ``objective`` alone where
            there are none.
        diagonal: What the inner optimiser takes for the diagonal of the curvature (``√v̂ + ε`` of Adam), where the
            estimator needs it; None where the optimiser keeps none.
        start: Where the trajectory starts from outer parameters: for each inner variable the place in ``outer`` of the
            one that it was copied from; None where the start is a constant.
    """

    objective: Objective
    inner: Tensors
    outer: Tensors
    trajectory: Sequence[InnerStep] = ()
    samples: Sequence[Objective] = ()
    diagonal: Tensors | None = None
    start: Sequence[int] | None = None

    def sample(self, place: int) -> Objective:
        """Returns the inner loss on one of the separate batches, counted round and round."""
        return self.samples[place % len(self.samples)] if self.samples else self.objective


@dataclass(frozen=True)
class Pullback:
    """``vᵀ dw*/dλ`` and its report.

    Attributes:
        value: One tensor for each outer parameter.
        info: Report.
        state: To be passed to the next call.
    """

    value: Tensors
    info: SolveInfo
    state: State = field(default_factory=dict)


class Response(ABC):
    """A best response ``λ ↦ w*(λ)`` at one point.

    Attributes:
        point: The inner parameters at which the outer loss, and so the cotangent, is to be taken.
    """

    point: Tensors

    @abstractmethod
    def pullback(self, cotangent: Tensors, state: State) -> Pullback:
        """Returns ``cotangentᵀ dw*/dλ``. May be called again, as autograd does with a retained graph."""


@dataclass(frozen=True)
class Estimator(NamedArguments, ABC):
    """A way to differentiate through an inner problem: an immutable, validated dataclass that is its own configuration.

    A subclass declares its fields and :meth:`respond`; it is abstract or final. To make it selectable by name,
    decorate nothing: add it to the entry-point group ``bilevel.methods`` (name → class).
    """

    name: ClassVar[str]
    """Name under which configuration selects the method."""
    summary: ClassVar[str]
    """One line: what it computes."""
    cost: ClassVar[str]
    """Passes over the inner loss for one product, beyond the outer loss's own forward and backward pass."""
    needs: ClassVar[str]
    """What must hold or exist."""
    storage: ClassVar[str] = ""
    """What is held at once, beyond the inner parameters and a plain gradient's pass."""
    purpose: ClassVar[str] = ""
    """What it is for."""
    needs_double_backward: ClassVar[bool] = True
    """Whether the inner loss must be twice differentiable by autograd."""
    needs_trajectory: ClassVar[bool] = False
    """Whether the inner problem's updates must be recorded."""
    needs_update: ClassVar[bool] = True
    """Whether recorded updates are made again or differentiated, so that the optimiser's own must be known."""
    needs_finite_cotangent: ClassVar[bool] = True
    """Whether cotangents must be known to be finite beforehand: where a pass is taken at a point that depends on one,
    and nobody looks at it first. On a GPU to know costs a wait for all that is queued."""
    follows_start: ClassVar[bool] = False
    """Whether the derivative goes through outer parameters from which the updates started."""

    @property
    def recorded_steps(self) -> int | None:
        """How many of the last inner updates must be recorded, where any must; None for all of them."""
        return None

    @property
    def needs_outer_gradient(self) -> bool:
        """Whether the last inner update's backward pass must also return ``∂f/∂λ``."""
        return False

    @property
    def keeps_graph(self) -> bool:
        """Whether recorded inner updates must be taken with the graphs of their gradients, and keep them."""
        return False

    @property
    def num_graphs(self) -> int | None:
        """Of how many of the last recorded updates graphs are kept, where any are; None for all of them."""
        return None

    @property
    def num_samples(self) -> int:
        """How many separate inner batches are wanted."""
        return 1

    @property
    def needs_diagonal(self) -> bool:
        """Whether the inner optimiser's diagonal is read: see :class:`InnerProblem`."""
        return False

    @property
    def needs_state(self) -> bool:
        """Whether the method makes no sense without the state of the call before."""
        return False

    @abstractmethod
    def respond(self, problem: InnerProblem) -> Response:
        """Returns the best response of a problem, ready for its pullback."""

    def describe(self) -> dict[str, Any]:
        """Returns the configuration: ``{"method": name, field: value, …}``, the method's own fields first."""
        return {"method": self.name, **{name: getattr(self, name) for name in self.defaults()}}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns the fields' defaults, the method's own fields before those that it shares with others."""
        own_first = sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only))
        return {field.name: field.default for field in own_first}

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Keeps the short ``repr``, which ``dataclass`` would replace by one of all fields."""
        super().__init_subclass__(**arguments)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Estimator.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Names the method and the fields that differ from their defaults."""
        values = {name: getattr(self, name) for name in self.defaults()}
        changed = [f"{name}={values[name]!r}" for name, default in self.defaults().items() if values[name] != default]
        return f"{type(self).__name__}({', '.join(changed)})"


def refuse_without_state(estimator: Estimator, remedy: str) -> None:
    """Raises :class:`~bilevel.errors.ConfigError` for a method that continues from the state of its last call."""
    if estimator.needs_state:
        raise ConfigError(f"method {estimator} continues from the state of its last call: {remedy}")


def negative(tensors: Sequence[Tensor]) -> Tensors:
    """Returns ``−x``: the sign of the implicit function theorem."""
    return _negative(tensors)
