"""What the products of a Krylov solver tell about its operator, free of further products."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linear.base import Solution
from bilevel.result import Status
from bilevel.vector import Tensors, dot, norm

__all__ = ["LOST", "Probe"]

# In units of the round-off, relative to the largest product seen.
ASYMMETRY_TOLERANCE = 1e3
# Share of the right-hand side that rounding may take before H counts as singular.
LOST = 0.1


class Probe:
    """Keeps the size of H and its asymmetry on successive directions, and makes the result in their light.

    Args:
        epsilon: Relative round-off of the products.
        lost: Share of the right-hand side that rounding may take before H counts as singular.

    Attributes:
        largest: The largest ``‖Hp‖ / ‖p‖`` seen.
    """

    def __init__(self, epsilon: float, lost: float = LOST) -> None:
        self.epsilon = epsilon
        self.lost = lost
        self.largest = 0.0
        self._asymmetry = 0.0
        self._before: tuple[Tensors, Tensors, float] | None = None

    def crossed(self, direction: Tensors, product: Tensors) -> list[Tensor]:
        """Returns ``p'ᵀ(Hp) − pᵀ(Hp')`` with the direction p' before, if there was one, still on the device."""
        if self._before is None:
            return []
        return [dot(self._before[0], product) - dot(direction, self._before[1])]

    def record(
        self, direction: Tensors, product: Tensors, length: float, size: float, crossed: list[float] | None = None
    ) -> None:
        """Takes a direction and its product in, with their norms and what :meth:`crossed` returned."""
        self.largest = max(self.largest, size / length)
        both = 0.0 if self._before is None else length * self._before[2]
        if crossed and both > 0.0:
            self._asymmetry = max(self._asymmetry, abs(crossed[0]) / both)
        self._before = direction, product, length

    def look(self, direction: Tensors, product: Tensors, *norms: Tensor) -> None:
        """Takes a direction and its product in, of which both norms may be known."""
        numbers = [*(norms or (norm(direction), norm(product))), *self.crossed(direction, product)]
        length, size, *crossed = torch.stack(numbers).tolist()
        if length > 0.0:
            self.record(direction, product, length, size, crossed)

    @property
    def asymmetry(self) -> float:
        """The largest ``|p'ᵀHp − pᵀHp'| / ‖H‖`` of successive directions, normalised."""
        return self._asymmetry / self.largest if self.largest > 0.0 else 0.0

    @property
    def asymmetric(self) -> bool:
        """Whether H shows not to be symmetric."""
        return self._asymmetry > ASYMMETRY_TOLERANCE * self.epsilon * self.largest

    def solution(self, q: Tensors, status: Status, iterations: int, size: float, message: str = "") -> Solution:
        """Makes the result for a right-hand side of norm ``size``.

        Asymmetry explains other failures, but not a singular H, whose products are noise.
        """
        if status is Status.DIVERGED:
            return Solution(q, status, iterations, message or "a Hessian product is not finite")
        # Rounding of ‖H‖‖q‖ is what the recursion's residual does not see.
        unseen = self.epsilon * self.largest * float(norm(q))
        if status is Status.SINGULAR or (status is not Status.NEGATIVE_CURVATURE and unseen > self.lost * size):
            return Solution(q, Status.SINGULAR, iterations, message)
        if self.asymmetric:
            return Solution(q, Status.NOT_SYMMETRIC, iterations, f"relative asymmetry {self.asymmetry:.1e}")
        return Solution(q, status, iterations, message)
