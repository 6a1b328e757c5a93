"""Sets that parameters can be kept in, each given by its faces."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.validation import check_number

__all__ = ["Ball", "Box", "Constraint", "Simplex"]


class Constraint(ABC):
    """A closed convex set C of values of one parameter tensor, given by its faces.

    :meth:`face` says on which face of C the point nearest to z lies, and :meth:`onto` is the point nearest to z on the
    surface that this face is part of: on its affine hull, or on the sphere. So the projection is

        P(z) = onto(z, face(z)).

    A set of one's own needs these two methods.
    """

    separable: ClassVar[bool] = False
    """Whether P acts on each element alone. Where it does not, a step that scales elements differently (Adam's) ends
    somewhere else than at the constrained minimum."""

    @abstractmethod
    def face(self, values: Tensor) -> Tensor:
        """Returns the face on which ``P(values)`` lies, as int8: 0 where an element, or a group, is not held.

        Where a constraint is met without being pushed against, it counts as not held.
        """

    @abstractmethod
    def onto(self, values: Tensor, face: Tensor) -> Tensor:
        """Returns the nearest point on a face's surface: twice differentiable at every point of the face."""

    def project(self, values: Tensor) -> Tensor:
        """Returns the nearest point of the set; points of the set stay as they are, but for rounding."""
        return self.onto(values, self.face(values))

    def distance(self, values: Tensor) -> float:
        """Returns how far a point is from the set; 0 within it."""
        with torch.no_grad():
            return float(torch.linalg.vector_norm(values - self.project(values)))

    def check(self, name: str, values: Tensor) -> None:
        """Raises :class:`~bilevel.errors.ConfigError` where a tensor of this shape cannot lie in the set."""
        try:
            fits = self.project(values.detach()).shape == values.shape
        except (IndexError, RuntimeError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{self} does not fit parameter {name!r} of shape {tuple(values.shape)}: check its bounds or dim"
            )


class Box(Constraint):
    """``lower ≤ w ≤ upper``, element by element.

    Args:
        lower: A number, or a tensor that broadcasts to the parameter; None for no bound.
        upper: Likewise.

    Raises:
        ConfigError: No bound at all, a NaN, a bound that requires gradients, or an empty set: ``lower > upper``
            somewhere, a lower bound of ∞ or an upper one of −∞.

    Example:
        >>> Box(0.0, 1.0).project(torch.tensor([-0.5, 0.25, 3.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """

    separable = True

    def __init__(self, lower: float | Tensor | None = None, upper: float | Tensor | None = None) -> None:
        if lower is None and upper is None:
            raise ConfigError("Box needs a bound: lower=, upper= or both")
        self.lower = _bound("lower", lower, -math.inf)
        self.upper = _bound("upper", upper, math.inf)
        try:
            crossed = self.lower > self.upper.to(self.lower.device)
        except RuntimeError as error:
            raise ConfigError(
                f"Box.lower of shape {tuple(self.lower.shape)} and Box.upper of shape {tuple(self.upper.shape)} do not "
                "broadcast to one shape"
            ) from error
        if bool(crossed.any()):
            raise ConfigError(
                f"Box is infeasible: lower is above upper in {int(crossed.sum())} of {crossed.numel()} elements"
            )

    def face(self, values: Tensor) -> Tensor:
        """Returns −1 at the lower bound, 1 at the upper one, 0 between them."""
        lower, upper = self.lower.to(values), self.upper.to(values)
        fixed = lower == upper
        return ((values > upper) & ~fixed).to(torch.int8) - ((values < lower) | fixed).to(torch.int8)

    def onto(self, values: Tensor, face: Tensor) -> Tensor:
        """See :meth:`Constraint.onto`."""
        inside = torch.where(face < 0, self.lower.to(values), values)
        return torch.where(face > 0, self.upper.to(values), inside)

    def __repr__(self) -> str:
        """Shows bounds that are one number."""
        return f"Box({_shown(self.lower)}, {_shown(self.upper)})"


class Simplex(Constraint):
    """``w ≥ 0`` with ``Σ w = total``, of all elements together or along one dimension.

    The projection is ``max(z − τ, 0)`` with the τ that makes it sum to ``total``, found by sorting (Held, Wolfe,
    Crowder, Mathematical Programming 6, 1974; Duchi et al., ICML 2008).

    Args:
        total: The sum.
        dim: Along which dimension; None for all elements together.

    Raises:
        ConfigError: ``total`` is not positive: the set is empty, or a single point; a ``dim`` that is no dimension.

    Example:
        >>> Simplex().project(torch.tensor([0.5, 0.75, -1.0]))
        tensor([0.3750, 0.6250, 0.0000])
    """

    def __init__(self, total: float = 1.0, dim: int | None = None) -> None:
        check_number("Simplex", "total", total, minimum=0.0, exclusive=True)
        if dim is not None and not _is_dimension(dim):
            raise ConfigError(f"Simplex.dim must be a dimension or None, not {dim!r}")
        self.total, self.dim = total, dim

    def face(self, values: Tensor) -> Tensor:
        """Returns 1 where an element is held at zero, 0 where it is not."""
        z = _wide(values.detach())
        rows = z.reshape(-1) if self.dim is None else z.movedim(self.dim, -1)
        rows = rows - rows.amax(-1, keepdim=True)  # the same face, where total is not lost beside large values
        ordered, _ = rows.sort(dim=-1, descending=True)
        count = torch.arange(1, rows.shape[-1] + 1, device=z.device, dtype=z.dtype)
        last = (ordered * count > ordered.cumsum(-1) - self.total).sum(-1, keepdim=True) - 1
        held = rows < ordered.gather(-1, last.clamp_min(0))  # of NaN, none: the engine finds them
        return (held.reshape(z.shape) if self.dim is None else held.movedim(-1, self.dim)).to(torch.int8)

    def onto(self, values: Tensor, face: Tensor) -> Tensor:
        """See :meth:`Constraint.onto`: ``z − (Σ z − total) / n`` over the n elements that are not held."""
        free = face == 0
        dims = tuple(range(values.dim())) if self.dim is None else self.dim
        wide = _wide(values)
        z = wide - torch.where(free, wide.detach(), -math.inf).amax(dims, keepdim=True)  # as in face()
        excess = torch.where(free, z, 0.0).sum(dims, keepdim=True) - self.total
        return torch.where(free, z - excess / free.sum(dims, keepdim=True), 0.0).to(values.dtype)

    def project(self, values: Tensor) -> Tensor:
        """See :meth:`Constraint.project`; no element is below zero, not even by rounding."""
        return super().project(values).clamp_min(0.0)

    def __repr__(self) -> str:
        """Shows the settings."""
        return f"Simplex(total={self.total:g}, dim={self.dim})"


class Ball(Constraint):
    """``‖w‖₂ ≤ radius``, of all elements together or along some dimensions.

    Args:
        radius: The radius.
        dim: Over which dimensions norms are taken (``dim=1``: every row of a matrix has its own ball); None for all.

    Raises:
        ConfigError: ``radius`` is not positive: the set is empty, or a single point; a ``dim`` that names no dimension.

    Example:
        >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self, radius: float, dim: int | Sequence[int] | None = None) -> None:
        check_number("Ball", "radius", radius, minimum=0.0, exclusive=True)
        self.radius = radius
        dims = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        if dim is not None and not (dims and all(map(_is_dimension, dims))):
            raise ConfigError(f"Ball.dim must be a dimension, several, or None for all, not {dim!r}")
        self.dim = dim if dim is None or isinstance(dim, int) else dims

    def face(self, values: Tensor) -> Tensor:
        """Returns 1 for a group on the sphere, 0 for one within."""
        unit, size = self._scaled(_wide(values.detach()))
        return (self._squares(unit).sqrt() * size > self.radius).to(torch.int8)

    def onto(self, values: Tensor, face: Tensor) -> Tensor:
        """See :meth:`Constraint.onto`: ``radius · z / ‖z‖`` on the sphere."""
        # Squares, and none of a zero: a norm has no derivative there, and torch.where would make a NaN of it.
        held = face != 0
        wide = _wide(values)
        unit, _ = self._scaled(torch.where(held, wide, 1.0))
        inverse = torch.where(held, self._squares(unit), 1.0).rsqrt()
        return torch.where(held, (self.radius * unit * inverse).to(values.dtype), values)

    def _scaled(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns values over the largest of their group, so that no square overflows, and that (a constant)."""
        size = values.detach().abs().amax(self._dims(values), keepdim=True)
        size = torch.where(size == 0, 1.0, size)
        return values / size, size

    def _squares(self, values: Tensor) -> Tensor:
        return values.square().sum(self._dims(values), keepdim=True)

    def _dims(self, values: Tensor) -> int | tuple[int, ...]:
        return tuple(range(values.dim())) if self.dim is None else self.dim

    def __repr__(self) -> str:
        """Shows the settings."""
        return f"Ball(radius={self.radius:g}, dim={self.dim})"


def _is_dimension(dim: object) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool)


def _wide(values: Tensor) -> Tensor:
    """Returns values in float32 at least: sums over many elements are none in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _bound(field: str, value: float | Tensor | None, default: float) -> Tensor:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, Tensor))):
        raise ConfigError(f"Box.{field} must be a number, a tensor or None, not {type(value).__name__}")
    if isinstance(value, Tensor) and value.requires_grad:
        raise ConfigError(f"Box.{field} requires gradients, and bounds are constants: pass {field}.detach()")
    bound = (
        value if isinstance(value, Tensor) else torch.tensor(default if value is None else value, dtype=torch.float64)
    )
    if bool(bound.isnan().any()):
        raise ConfigError(f"Box.{field} holds {int(bound.isnan().sum())} NaN")
    empty = bound == -default  # an upper bound of -inf, a lower one of inf
    if bool(empty.any()):
        raise ConfigError(f"Box is infeasible: {field} is {-default} in {int(empty.sum())} of {empty.numel()} elements")
    return bound.detach()


def _shown(bound: Tensor) -> str:
    return f"{float(bound):g}" if bound.dim() == 0 else f"tensor of shape {tuple(bound.shape)}"
