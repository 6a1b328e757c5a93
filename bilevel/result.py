"""What a computation returns beside its numbers: how it ended and how far it can be trusted."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Hypergradient", "SolveInfo", "Status", "StepResult"]


class Status(enum.Enum):
    """How a best-response product ended. ``status.remedy`` says what to do about it."""

    CONVERGED = "converged"
    STOPPED_AT_CAP = "stopped at cap"
    NEGATIVE_CURVATURE = "negative curvature"
    SINGULAR = "singular"
    DIVERGED = "diverged"
    NOT_SYMMETRIC = "not symmetric"
    INACCURATE = "inaccurate"
    NOT_APPLICABLE = "not applicable"

    @property
    def remedy(self) -> str:
        """What a user can do; empty where nothing is wrong."""
        return _REMEDIES[self]

    @property
    def shown(self) -> str:
        """The status on a display; empty where nothing was solved, since "not applicable" reads like a refusal."""
        return "" if self is Status.NOT_APPLICABLE else str(self.value)

    @property
    def failed(self) -> bool:
        """Whether the answer should not be trusted as a solution of its system.

        A truncated solve (:attr:`STOPPED_AT_CAP`) is no failure: its error is bounded by theory and told by the
        residual.
        """
        return self not in (Status.CONVERGED, Status.STOPPED_AT_CAP, Status.NOT_APPLICABLE)


_REMEDIES = {
    Status.CONVERGED: "",
    Status.STOPPED_AT_CAP: "allow more products, or accept the residual that is reported",
    Status.NEGATIVE_CURVATURE: "the inner parameters are no strict minimum of the inner loss: take more inner steps, "
    "regularise the inner loss, or set damping above the most negative eigenvalue",
    Status.SINGULAR: "the inner Hessian has a null space: regularise the inner loss or set damping > 0",
    Status.DIVERGED: "lower step_size below 2 / (largest Hessian eigenvalue) or use 'auto' (nystrom: raise rank or "
    "damping); if the inner loss is not "
    "convex here, use conjugate_gradient with damping",
    Status.NOT_SYMMETRIC: "a custom backward pass in the inner loss makes its gradient a field without a symmetric "
    "Jacobian: use 'gmres' or 'exact', which need no symmetry (with products='field' where a detach() hides it from "
    "autograd), and see hypergradcheck",
    Status.INACCURATE: "rounding swallows the displacement: raise epsilon, or hold the inner parameters in float32 or "
    "better",
    Status.NOT_APPLICABLE: "",
}


@dataclass(frozen=True)
class SolveInfo:
    """The report that comes with a best-response product.

    Attributes:
        status: How the computation ended.
        residual: ``‖Hq − v‖ / ‖v‖`` of the system that was solved (with its damping), computed from ``q`` itself and
            not from a recursion; NaN where nothing is solved (identity inverse, unrolling).
        iterations: Iterations of the solver, and one for the product with a start, or steps that were unrolled.
        products: Second-order products taken (Hessian and mixed); for finite differences, the gradient passes.
        error_bound: An upper bound of ``‖hypergradient − true hypergradient‖`` (Euclidean norm, in the hypergradient's
            units), or None where none is known.
        error_bound_basis: What the bound rests on: ``"given"`` constants, or constants that were ``"estimated"``;
            and whether it speaks of the hypergradient at the given inner parameters only, or at the inner solution.
        inner_gradient_norm: ``‖∂f/∂w‖`` where the inner loss was differentiated: how far from solved the inner problem
            is; NaN where the method does not see it.
        method: Name of the method.
        message: What else is worth knowing: the step size or ε that was chosen, a truncation.
    """

    status: Status
    residual: float = math.nan
    iterations: int = 0
    products: int = 0
    error_bound: float | None = None
    error_bound_basis: str = ""
    inner_gradient_norm: float = math.nan
    method: str = ""
    message: str = ""

    def explain(self) -> str:
        """One line for people: method, status, residual, and the remedy if there is one."""
        residual = "" if math.isnan(self.residual) else f", relative residual {self.residual:.2e}"
        remedy = f" — {self.status.remedy}" if self.status.remedy else ""
        message = f" ({self.message})" if self.message else ""
        bound = "" if self.error_bound is None else f", error at most {self.error_bound:.2e} ({self.error_bound_basis})"
        return f"{self.method}: {self._ended()}{residual}{bound}{message}{remedy}"

    def _ended(self) -> str:
        plural = "" if self.iterations == 1 else "s"
        if self.status is Status.NOT_APPLICABLE:
            return f"{self.iterations} step{plural}, no system to solve" if self.iterations else "no system to solve"
        if not self.iterations and math.isnan(self.residual):
            return str(self.status.value)
        return f"{self.status.value} after {self.iterations} iteration{plural}"


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and its report.

    Attributes:
        grad: ``dF/dλ``, with the structure of the outer parameters; None in the place of a frozen ``nn.Parameter``.
        direct: ``∂F/∂λ`` at fixed inner parameters, with the same structure.
        info: How the implicit part was computed.
        value: The outer loss ``F``.
        inner: The inner parameters at which ``F`` was taken: the ones given, or the end of the unrolled trajectory.
        state: What the method wants back at the next call (an eigenvalue estimate, say); pass it as ``state=``.
    """

    grad: Any
    direct: Any
    info: SolveInfo
    value: float = math.nan
    inner: Any = None
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """One outer step of an engine.

    Attributes:
        step: Number of the step, counted from 1.
        losses: Last loss of every problem in this step, by problem name.
        metrics: Further values that a problem's loss returned, as ``"problem/metric"``.
        gradient_norms: Norm of the (hyper)gradient with which every problem was updated last.
        solves: Report of the last best-response product through each inner problem, by its name (of one that failed
            rather than of a later one). Problems that respond to each other have one more, ``"b1 and b2"``.
        passes: Forward and backward passes of this step, Hessian and mixed products counted as backward passes.
        seconds: Wall time.
        overflows: How many updates of a problem were left out since their gradients overflowed in float16, by problem.
        skipped: Name of the problem whose loss or gradient was not finite, where such steps are skipped; else None.
    """

    step: int
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    gradient_norms: Mapping[str, float]
    solves: Mapping[str, SolveInfo]
    passes: tuple[int, int]
    seconds: float
    overflows: Mapping[str, int] = field(default_factory=dict)
    skipped: str | None = None
