"""Every method, set so that what is promised of it can be asked of all of them in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import Estimator, Hypergradient, hypergradient
from bilevel.hypergrad import available_methods

__all__ = ["METHODS_WITHOUT_FUNCTION", "SETTINGS", "Setting", "run"]


@dataclass(frozen=True)
class Setting:
    """A method with its fields, and which invariances hold of it.

    Attributes:
        method: Its registered name.
        fields: Its fields for an inner loss that is c times as large: step sizes, damping and multipliers have units.
        power: The implicit part of c f with ``fields(c)`` is ``cᵖᵒʷᵉʳ`` times that of f. 0 for whatever approximates
            the inverse Hessian, 1 for the identity in its place.
        solves: The answer is that of the exact inverse, so that any invertible change of variables leaves it alone.
        orthogonal: Rotations of the inner variables leave it alone.
        permutes: Their permutations do.
        linear: It is linear in the outer loss, as the exact one is; a truncated Krylov method is not.
        blocks: It treats separate problems in one sum as it treats each alone.
        calls: Calls whose state each next one continues.
        tolerance: Relative difference that rounding leaves.
    """

    method: str
    fields: Callable[[float], dict[str, Any]]
    power: int = 0
    solves: bool = False
    orthogonal: bool = True
    permutes: bool = True
    linear: bool = True
    blocks: bool = True
    calls: int = 1
    tolerance: float = 1e-8

    def estimator(self, c: float = 1.0) -> Estimator:
        """The method for an inner loss that is c times as large."""
        return available_methods()[self.method](**self.fields(c))

    def __str__(self) -> str:
        """The method and its fields."""
        return f"{self.method} {self.fields(1.0)}"


KRYLOV = {"max_iterations": 200, "rtol": 1e-14}
ROUNDED: dict[str, Any] = {"tolerance": 1e-6}  # a finite difference, or a difference that is multiplied

_ALL = (
    Setting("exact", lambda c: {}, solves=True),
    Setting("exact", lambda c: {"damping": 0.3 * c}),
    Setting("conjugate_gradient", lambda c: KRYLOV, solves=True),
    Setting("conjugate_gradient", lambda c: {**KRYLOV, "damping": 0.3 * c}),
    Setting("conjugate_gradient", lambda c: {"max_iterations": 2, "rtol": 0.0}, linear=False, blocks=False),
    Setting(
        "conjugate_gradient",
        lambda c: {**KRYLOV, "rtol": 1e-10, "products": "finite_difference"},
        solves=True,
        tolerance=1e-4,
    ),
    Setting("minres", lambda c: KRYLOV, solves=True),
    Setting("minres", lambda c: {"max_iterations": 2, "rtol": 0.0}, linear=False, blocks=False),
    Setting("gmres", lambda c: KRYLOV, solves=True),
    Setting("gmres", lambda c: {"max_iterations": 2, "rtol": 0.0}, linear=False, blocks=False),
    Setting("bicgstab", lambda c: KRYLOV, solves=True),
    Setting("neumann", lambda c: {"terms": 5, "step_size": 0.3 / c}),
    # "auto" takes the largest eigenvalue, of the sum where there are several problems
    Setting("neumann", lambda c: {"terms": 3}, blocks=False, tolerance=1e-6),
    Setting("neumann", lambda c: {"terms": 400}, solves=True, tolerance=1e-6),
    Setting("nystrom", lambda c: {"rank": 24, "damping": 1e-9 * c}, solves=True, tolerance=1e-5),
    Setting("identity", lambda c: {}, power=1),
    Setting("auto", lambda c: {}, power=1),
    Setting("finite_difference", lambda c: {}, power=1, **ROUNDED),
    Setting("unrolled", lambda c: {"steps": 4, "learning_rate": 0.2 / c}),
    Setting("unrolled", lambda c: {"steps": 4, "learning_rate": 0.2 / c, "memory": "graph"}),
    Setting("unrolled", lambda c: {"steps": 4, "learning_rate": 0.2 / c, "mode": "forward"}),
    Setting("one_step", lambda c: {"learning_rate": 0.2 / c, "center": "new", "difference": "exact"}),
    Setting("one_step", lambda c: {"learning_rate": 0.2 / c, "center": "new", "difference": "central"}, **ROUNDED),
    Setting("sama", lambda c: {"optimizer": "sgd", "learning_rate": 0.2 / c}, **ROUNDED),
    Setting(
        "f2sa",
        lambda c: {"multiplier": 10.0 / c, "step_size": 0.3 / c, "iterations": 4},
        calls=2,
        linear=False,
        **ROUNDED,
    ),
    Setting(
        "bome",
        lambda c: {"barrier": 0.5 / c, "step_size": 0.3, "iterations": 4},
        calls=2,
        linear=False,
        blocks=False,
        **ROUNDED,
    ),
    Setting("soba", lambda c: {"step_size": 0.3 / c}, calls=3),
    Setting("amigo", lambda c: {"step_size": 0.3 / c, "steps": 3}, calls=3),
    Setting("stocbio", lambda c: {"step_size": 0.3 / c, "terms": 3}),
    Setting("ttsa", lambda c: {"step_size": 0.3 / c, "terms": 3}, calls=2),
    Setting("fsla", lambda c: {"step_size": 0.3 / c}, calls=3),
    # its directions are drawn: what is rotated or reordered meets other ones
    Setting(
        "pzobo",
        lambda c: {"learning_rate": 0.2 / c, "steps": 3},
        orthogonal=False,
        permutes=False,
        blocks=False,
        **ROUNDED,
    ),
)

SETTINGS = tuple(setting for setting in _ALL if setting.method in available_methods())

METHODS_WITHOUT_FUNCTION: frozenset[str] = frozenset()
"""Registered methods that only an engine can run, with the reason beside each."""


def run(
    setting: Setting, inner: Callable[..., Tensor], outer: Callable[..., Tensor], w: Any, lam: Any, c: float = 1.0
) -> tuple[Any, Any]:
    """Returns the implicit part and the whole, after as many calls as the setting makes."""
    estimator, state = setting.estimator(c), {}
    for _ in range(setting.calls):
        result: Hypergradient = hypergradient(inner, outer, w, lam, estimator, state=state)
        state = dict(result.state)
    if isinstance(result.grad, Tensor):
        return result.grad - result.direct, result.grad
    whole = torch.cat([part.reshape(-1) for part in result.grad])
    return whole - torch.cat([part.reshape(-1) for part in result.direct]), whole
