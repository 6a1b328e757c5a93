"""What a workload gives to a library's side, and what a side must offer. Needs torch only.

A workload is a module ``workloads/NAME.py`` with

    TITLE, ABOUT              text for the page
    SIZES                     {"small": …, "full": …}, whatever the functions below read
    METHODS                   {key: Method}: the rows of its table
    ROWS                      optional: {size: keys of METHODS} where a size has not all of them
    data(size, folder)        (arrays by name, what they are): called once, in the parent; NumPy only
    task(arrays, size, device, dtype)        what every side gets, a :class:`Task` or a class of the workload's own
    reference(arrays, size, method)          a :class:`Reference`, in float64, by plain torch; called in the parent

and a side is a module ``sides/LIBRARY/NAME.py`` with ``build(task, method) -> Side``, which raises
:class:`NotOffered` where the library has no such method. It may import its library at the top: only the worker process
in that library's environment imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arrays", "KeepingSGD", "KeepingSide", "Method", "NotOffered", "Passes", "Reference", "Side", "Task"]

Arrays = dict[str, np.ndarray]
Losses = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class NotOffered(Exception):  # noqa: N818  (no error of the program)
    """The library has no such method; the text says so in the table."""


@dataclass(frozen=True)
class Method:
    """What a row computes, in mathematics, so that every library can be set to the same.

    Attributes:
        kind: ``"identity"``, ``"finite_difference"``, ``"neumann"``, ``"conjugate_gradient"``, ``"unrolled"``, or a
            name that only this workload knows.
        products: Hessian products (Neumann: of K + 1 summands K; conjugate gradients: iterations), or unrolled steps.
        step_size: α of a Neumann series.
        options: Whatever else the kind needs.
        tolerance: A side is right where its relative distance from the method's own float64 value is below this.
    """

    kind: str
    products: int = 0
    step_size: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3

    @property
    def label(self) -> str:
        """The method as the table names it."""
        names = {"finite_difference": "central differences, H⁻¹ ≈ I", "identity": "exact product, H⁻¹ ≈ I"}
        names |= {"neumann": "Neumann", "conjugate_gradient": "conjugate gradients", "unrolled": "unrolled"}
        text = names.get(self.kind, self.kind.replace("_", " "))
        if not self.products:
            return text
        unit = "steps" if self.kind == "unrolled" else "products"
        alpha = f", α = {self.step_size:g}" if self.kind == "neumann" else ""
        return f"{text}, {self.products} {unit}{alpha}"


@dataclass(frozen=True)
class Reference:
    """Float64 hypergradients of the first outer step, flattened and joined in the order of the outer parameters.

    Attributes:
        own: What the method computes in exact arithmetic.
        exact: The implicit (or, for unrolled methods, unrolled) hypergradient that it approximates; None where there is
            none.
        others: Other values, by what a library that returns them has done, for the reason beside a wrong row.
        factors: Likewise factors that a library may have left in.
    """

    own: np.ndarray
    exact: np.ndarray | None = None
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Passes:
    """Evaluations of the two losses (forward) and runs of autograd's engine (backward) since the last reset."""

    forward: int = 0
    backward: int = 0


@dataclass
class Task:
    """A bilevel problem in the functional form.

    An outer step is ``steps`` updates ``w ← w − rate · ∂f/∂w`` of the inner parameters, then the hypergradient at the
    new ones, then ``λ ← λ − outer_rate · hypergradient``. The losses are pure functions of two sequences of tensors.

    Attributes:
        inner: Where the inner parameters start.
        outer: Where the outer parameters start.
        inner_loss: ``f(w, λ)``.
        outer_loss: ``F(w, λ)``.
        rate: Of the inner steps of plain gradient descent.
        steps: Inner steps an outer step.
        outer_rate: Of the outer steps of plain gradient descent.
        direct: Whether F depends on λ directly.
        extra: Anything else that a side of this workload needs (arrays for JAX, a module, …).
    """

    inner: list[Tensor]
    outer: list[Tensor]
    inner_loss: Losses
    outer_loss: Losses
    rate: float
    steps: int = 1
    outer_rate: float = 1e-3
    direct: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        self.inner_loss, self.outer_loss = self.counted(self.inner_loss), self.counted(self.outer_loss)

    def counted(self, loss: Losses) -> Losses:
        """Returns the loss, whose evaluations are counted."""

        def evaluate(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
            if not torch.compiler.is_compiling():  # a number that changes is a reason to compile anew
                self.passes.forward += 1
            return loss(inner, outer)

        return evaluate


class Side(ABC):
    """One library at work on one task with one method."""

    note: str = ""
    """What a reader should know of how the library does it; shown below the table."""

    found: Sequence[Any]
    """The hypergradient of the last step, one array or tensor for each outer parameter."""

    countable: bool = True
    """Whether calls of the losses and runs of autograd are all that is evaluated; a compiled step is not."""

    @abstractmethod
    def step(self) -> None:
        """Takes one outer step: inner updates, hypergradient, outer update. This is what is timed."""

    def hypergradient(self) -> Sequence[Any]:
        """Returns the hypergradient that the last step used, one array or tensor for each outer parameter."""
        return self.found

    def place(self, inner: Sequence[np.ndarray], outer: Sequence[np.ndarray]) -> None:
        """Puts values into the parameters, in place, so that the next step starts from them.

        Needed for workloads in the functional form only: it is called before every round of timings and for the runs of
        ``precision``. Without it a round goes on from where the last one ended.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drops what is kept from earlier steps (a warm start), so that the next step is a first one."""
        return

    def planned_bytes(self) -> int | None:
        """Returns what a compiler plans for a step beyond its inputs; None where torch's allocator can be asked."""
        return None

    def wait(self) -> None:
        """Returns when everything that was started has been computed."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()


class KeepingSGD(torch.optim.SGD):
    """Plain gradient descent for the outer parameters that keeps the last gradient it was given.

    For libraries that clear ``grad`` after a step, or make the optimiser again from its class and its defaults.
    """

    kept: list[Tensor]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Takes a copy of the gradients, then the step."""
        self.kept = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for group in self.param_groups
            for p in group["params"]
        ]
        return super().step(closure)


class KeepingSide(Side):
    """A side whose outer optimiser keeps the hypergradient."""

    outer: torch.optim.Optimizer
    """A :class:`KeepingSGD`, wherever the library has it in the end."""

    def hypergradient(self) -> Sequence[Tensor]:
        assert isinstance(self.outer, KeepingSGD)
        return self.outer.kept
