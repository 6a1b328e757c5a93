"""The dense hypergradient.

It shares no code with the estimators beyond the losses: the Jacobian of the inner gradient is formed row by row with
plain autograd, or column by column by differences, so that neither its symmetry nor a solver is taken for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from bilevel.check.references.base import Level, Nested, ReferenceValue, accumulate
from bilevel.check.references.field import GradientField, flat, like
from bilevel.check.references.hidden import TOLERATED_DIFFERENCE, Hidden, hidden
from bilevel.errors import ConfigError
from bilevel.vector import Tensors

__all__ = ["DenseField", "dense_fields", "exact"]

LARGEST_DIMENSION = 5_000


class DenseField:
    """The gradient field of an inner problem with its dense Jacobian at one point.

    Autograd's J differs from the derivative of g where the loss holds a ``detach()``. Pairs of gradients along random
    directions tell, in float64, and J and ``qᵀ ∂g/∂λ`` are then taken by central differences of g; so they are where an
    operation has no second derivative.

    Costs n backward passes (2 n gradients by differences, and 2 m more for m outer variables), O(n²) memory and O(n³)
    operations for n inner variables.

    Args:
        field: The field.
        by_differences: Whether to take J by differences; None to find out.

    Attributes:
        hidden: What autograd misses; None where that was not to be found out.
        by_differences: Whether J is taken by differences.
        jacobian: J, of shape (n, n).
    """

    def __init__(self, field: GradientField, by_differences: bool | None = None) -> None:
        self.field = field
        J = None if by_differences else field.jacobian()
        self.hidden: Hidden | None = None
        if by_differences is None:
            self.hidden = hidden(field, second_derivatives=J is not None)
            by_differences = self.hidden.size > TOLERATED_DIFFERENCE and not self.hidden.at_a_kink
        self.by_differences = J is None or by_differences
        self.jacobian = field.jacobian_by_differences() if J is None or self.by_differences else J

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Of the symmetric part of J, ascending."""
        found: Tensor = torch.linalg.eigvalsh(0.5 * (self.jacobian + self.jacobian.T))
        return found

    @property
    def asymmetry(self) -> float:
        """``‖J − Jᵀ‖ / ‖J‖``."""
        return float((self.jacobian - self.jacobian.T).norm() / self.jacobian.norm().clamp_min(1e-300))

    @cached_property
    def _inverse(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The singular value decomposition, where a definite symmetric part does not show that J is regular."""
        sizes = self.eigenvalues.abs()
        if bool((self.eigenvalues > 0).all()) and float(sizes.min()) > self._cutoff * float(sizes.max()):
            return None
        return torch.linalg.svd(self.jacobian)  # type: ignore[no-any-return]

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.lu_factor(self.jacobian)  # type: ignore[no-any-return]

    @property
    def _cutoff(self) -> float:
        return len(self.jacobian) * self.field.epsilon

    @property
    def singular(self) -> bool:
        """Whether J is singular to working precision."""
        return self._inverse is not None and not bool(self._kept.all())

    @property
    def _kept(self) -> Tensor:
        assert self._inverse is not None
        values = self._inverse[1]
        return values > self._cutoff * values[0]

    @property
    def condition(self) -> float:
        """The condition number of J, on its range."""
        if self._inverse is not None:
            kept = self._inverse[1][self._kept]
            return float(kept[0] / kept[-1]) if len(kept) else 1.0
        return float(torch.linalg.matrix_norm(self.jacobian, 2)) / float(self.eigenvalues[0])

    def solve(self, right: Tensor, *, adjoint: bool = False) -> Tensor:
        """Returns ``J⁻¹ right`` or ``J⁻ᵀ right``, of least norm where J is singular."""
        if self._inverse is None:
            found: Tensor = torch.linalg.lu_solve(*self._factor, right[:, None], adjoint=adjoint)[:, 0]
            return found
        U, S, Vh = self._inverse
        inverse = torch.where(self._kept, 1 / torch.where(self._kept, S, torch.ones_like(S)), torch.zeros_like(S))
        return U @ (inverse * (Vh @ right)) if adjoint else Vh.T @ (inverse * (U.T @ right))

    def mixed(self, q: Tensor) -> Tensor:
        """Returns ``(∂g/∂λ)ᵀ q``."""
        if self.by_differences:
            return self.field.mixed_by_differences(q)
        return self.field.with_products(lambda pull: pull(q)[1])

    @property
    def distance(self) -> float:
        """``‖J⁻¹ g‖ / ‖w‖``, a Newton step: about how far the solution is, relative to its size."""
        step, w = self.solve(self.field.value), self.field.point
        extent = max(float(w.norm()), float((w - step).norm()))
        return float(step.norm()) / extent if extent else 0.0


def dense_fields(nested: Nested, limit: int | None = None) -> dict[str, DenseField]:
    """Returns the fields of all inner problems at the given point.

    Raises:
        ConfigError: More inner variables than the limit.
    """
    limit = LARGEST_DIMENSION if limit is None else limit
    for level in nested.levels:
        size = sum(part.numel() for part in level.inner)
        if size > limit:
            raise ConfigError(
                f"reference 'exact' forms the dense Jacobian of the gradient of {level.objective.name}: {size} inner "
                f"variables are more than its limit of {limit}. Take reference='unrolled' or 'central_difference', "
                "which form none, or check the same losses on a smaller model, or with fewer inner parameters."
            )
    return {level.name: DenseField(field_of(nested, level)) for level in nested.levels}


def field_of(nested: Nested, level: Level, point: Mapping[str, Tensors] | None = None) -> GradientField:
    """Returns the gradient field of an inner problem at a point, by default the given one."""
    place = nested.point if point is None else point
    return GradientField(level.objective, place[level.name], nested.above(level, place))


def exact(nested: Nested, fields: Mapping[str, DenseField]) -> ReferenceValue:
    """Returns ``∂F/∂λ − qᵀ ∂g/∂λ`` with ``Jᵀ q = ∂F/∂w`` at the given point.

    Its error is that of rounding in the solve: ``n ε κ(J)`` of the implicit part.

    Args:
        nested: The problems.
        fields: The inner problems' fields by name.
    """

    def pull(level: Level, above: Tensors, cotangent: Tensors) -> Tensors:
        dense = fields[level.name]
        v = flat([cotangent[place] for place in dense.field.active]).to(torch.float64)
        return like(above, -dense.mixed(dense.solve(v, adjoint=True)))

    value, implicit = accumulate(nested, nested.point, pull)
    size = max(float(flat(implicit).norm()), 1e-300)
    rounding = max(len(dense.jacobian) * dense.field.epsilon * dense.condition for dense in fields.values())
    by_differences = [dense for dense in fields.values() if dense.by_differences]
    if by_differences:
        rounding = max(rounding, *(dense.field.epsilon ** (2 / 3) * dense.condition for dense in by_differences))
    ways = {"differences" if dense.by_differences else "autograd" for dense in fields.values()}
    sizes = " + ".join(str(len(dense.jacobian)) for dense in fields.values())
    details = f"dense Jacobian of the inner gradient by {' and '.join(sorted(ways))}, {sizes} inner variables"
    return ReferenceValue(value, rounding * size, details)
