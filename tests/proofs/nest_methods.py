"""What each method makes of a nest of quadratics: its own matrix in the place of every inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.bilevel.strategies import DOUBLE
from tests.proofs.nests import Quadratic, eliminated

__all__ = ["METHODS", "NestMethod", "approximate"]

Inverse = Callable[[Tensor], Tensor]
RATE = 0.8
"""Step sizes and learning rates; total Hessians of the nests have eigenvalues well below 2 / RATE."""


@dataclass(frozen=True)
class NestMethod:
    """A method with fields and what it is on quadratics, at a solution.

    Attributes:
        fields: Its configuration.
        inverse: What it puts in the place of ``H⁻¹``, as a function of H.
        tolerance: Relative error that rounding leaves.
        twice: Whether its response is differentiated again by itself; otherwise by the engine's ``nested_solver``.
        rate: The learning rate with which the problem's own optimiser has to make steps.
        steps: How many of them.
        calls: Outer steps until what it keeps from step to step has converged.
        levels: Where the formula holds. Between the curvature of a middle level and a method that is inexact and cannot
            be differentiated again, any mixture of both is as good.
    """

    fields: Mapping[str, Any]
    inverse: Inverse
    tolerance: float = 1e-8
    twice: bool = False
    rate: float = 0.0
    steps: int = 1
    calls: int = 0
    levels: tuple[str, ...] = ("b", "c")
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Names the method."""
        object.__setattr__(self, "name", str(self.fields["method"]))

    def __str__(self) -> str:
        """The method and its fields."""
        fields = ", ".join(f"{key}={value}" for key, value in self.fields.items() if key != "method")
        return f"{self.name}({fields})"


def _unit(H: Tensor) -> Tensor:
    return torch.eye(len(H), dtype=DOUBLE)


def _series(summands: int, rate: float = RATE) -> Inverse:
    """``α Σ (I − αH)ᵏ`` over k below ``summands``: Neumann's series, and what as many gradient steps make of λ."""

    def inverse(H: Tensor) -> Tensor:
        powers = [torch.linalg.matrix_power(_unit(H) - rate * H, k) for k in range(summands)]
        return rate * torch.stack(powers).sum(0)

    return inverse


def _damped(damping: float) -> Inverse:
    return lambda H: torch.linalg.inv(H + damping * _unit(H))


_KRYLOV = {"max_iterations": 100, "rtol": 1e-13}
_inverse = torch.linalg.inv

METHODS: tuple[NestMethod, ...] = (
    NestMethod({"method": "exact"}, _inverse, twice=True),
    NestMethod({"method": "exact", "damping": 0.3}, _damped(0.3), twice=True),
    NestMethod({"method": "conjugate_gradient", **_KRYLOV}, _inverse, twice=True),
    NestMethod({"method": "conjugate_gradient", **_KRYLOV, "damping": 0.3}, _damped(0.3), twice=True),
    NestMethod(
        {"method": "conjugate_gradient", "max_iterations": 100, "rtol": 1e-10, "products": "finite_difference"},
        _inverse,
        tolerance=1e-5,
    ),
    NestMethod({"method": "minres", **_KRYLOV}, _inverse, twice=True),
    NestMethod({"method": "gmres", **_KRYLOV}, _inverse, twice=True),
    NestMethod({"method": "neumann", "terms": 20, "step_size": RATE}, _inverse, twice=True),
    NestMethod({"method": "neumann", "terms": 2, "step_size": RATE}, _series(3), twice=True),
    NestMethod({"method": "nystrom", "rank": 12, "damping": 1e-2}, _damped(1e-2), tolerance=1e-7, twice=True),
    NestMethod({"method": "identity"}, _unit, twice=True),
    NestMethod({"method": "finite_difference"}, _unit, tolerance=1e-6, twice=True),
    NestMethod({"method": "unrolled"}, _series(4), twice=True, rate=RATE, steps=4),
    NestMethod({"method": "unrolled", "steps": 2}, _series(2), twice=True, rate=RATE, steps=4),
    NestMethod({"method": "unrolled", "mode": "forward"}, _series(3), twice=True, rate=RATE, steps=3),
    NestMethod(
        {"method": "pzobo", "directions": "orthogonal", "num_directions": "all"},
        _series(3),
        tolerance=1e-4,
        twice=True,
        rate=RATE,
        steps=3,
    ),
    NestMethod(
        {"method": "one_step", "center": "new", "difference": "exact"}, _series(1), twice=True, rate=RATE, steps=2
    ),
    NestMethod({"method": "sama", "difference": "exact"}, _series(1), twice=True, rate=RATE, steps=2),
    NestMethod({"method": "sama"}, _series(1), tolerance=1e-6, twice=True, rate=RATE, steps=2),
    NestMethod({"method": "stocbio", "terms": 3, "step_size": RATE}, _series(4), levels=("b",)),
    NestMethod({"method": "stocbio", "terms": 20, "step_size": RATE}, _inverse),
    # one summand: the only draw there is
    NestMethod({"method": "ttsa", "terms": 1, "step_size": RATE}, _series(1), calls=1, levels=("b",)),
    NestMethod({"method": "soba", "step_size": RATE}, _inverse, tolerance=1e-5, calls=12),
    NestMethod({"method": "amigo", "steps": 10, "step_size": RATE}, _inverse, calls=2),
    NestMethod({"method": "fsla", "step_size": RATE, "momentum": 1.0}, _inverse, tolerance=1e-5, calls=12),
    NestMethod({"method": "f2sa", "iterations": 20, "step_size": RATE}, _inverse, tolerance=1e-6, calls=1),
    NestMethod(
        {"method": "bome", "barrier": 0.0, "iterations": 20, "step_size": RATE}, _inverse, tolerance=1e-5, calls=6
    ),
)


def approximate(nest: Quadratic, name: str, z: Tensor, methods: Mapping[str, NestMethod]) -> Tensor:
    """The hypergradient at z of a problem where those below it are differentiated by methods.

    A middle level's curvature goes through the response of those below it: ``SᵀAS`` with the S of their methods where
    these can be differentiated again, and with the true one where another solver does that.
    """

    def response(lower: str, *, again: bool) -> Tensor:
        S, method = substitution(lower, again=True), methods[lower]
        J = S[:, nest.place(lower)].T @ nest.A[lower] @ S
        others = J.clone()
        others[:, nest.place(lower)] = 0.0
        inverse = method.inverse if method.twice or not again else _inverse
        return -inverse(J[:, nest.place(lower)]) @ others

    def substitution(over: str, *, again: bool) -> Tensor:
        below = nest.structure.below[over]
        if not below:
            return torch.eye(len(z), dtype=DOUBLE)
        D = torch.cat([response(lower, again=again) for lower in below])
        return eliminated(D, nest.indices(below), len(z))

    return substitution(name, again=False)[:, nest.place(name)].T @ (nest.A[name] @ z + nest.b[name])
