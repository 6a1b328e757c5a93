"""Quadratic levels over each other, as many as there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from bilevel.errors import ParameterError
from bilevel.problems.analytic.base import Data, Variable, check_positive, normals, with_spectrum
from bilevel.problems.base import Problem
from bilevel.validation import check_integer, check_number

__all__ = ["NestedQuadratic"]


@dataclass(frozen=True)
class NestedQuadratic(Data):
    """Any number of quadratic levels, x₀ over x₁ over … over xₙ₋₁.

        fₖ = ½ xₖᵀHₖxₖ − xₖᵀ(Cₖxₖ₋₁ + bₖ) + ½ ‖Aₖxₖ₊₁ − tₖ‖²

    without the term in C for the first level, and without the last term for the last. From the last level up,
    ``xₖ₊₁* = Gₖ₊₁xₖ + gₖ₊₁`` makes the total loss of level k a quadratic with the Hessian ``Kₖ = Hₖ + GᵀAᵀAG``.

    Attributes:
        H: One for each level.
        b: Likewise.
        C: One for each level but the first.
        A: One for each level but the last.
        t: Likewise.

    Raises:
        ParameterError: Fewer than two levels, or numbers of tensors that do not go together.

    Example:
        >>> from bilevel import Engine, EngineConfig
        >>> problem = NestedQuadratic.random([2, 3, 4])
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> engine = Engine(problem.problems(x0), EngineConfig(progress=False), hypergradient="conjugate_gradient")
        >>> torch.allclose(engine.hypergradient().grad["value"], problem.hypergradient(x0))
        True
    """

    H: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    C: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    t: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Validates the number of tensors."""
        levels = len(self.H)
        counts = {"b": len(self.b), "C": len(self.C) + 1, "A": len(self.A) + 1, "t": len(self.t) + 1}
        wrong = [name for name, count in counts.items() if count != levels]
        if levels < 2 or wrong:
            raise ParameterError(
                f"NestedQuadratic has {levels} matrices H: at least 2 are needed, as many vectors b, and one less of "
                f"C, A and t each{'; wrong are ' + ', '.join(wrong) if wrong else ''}"
            )
        for place, H in enumerate(self.H):
            check_positive(f"NestedQuadratic.H[{place}]", H)

    @classmethod
    def random(
        cls, sizes: Sequence[int], *, conditioning: float = 10.0, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> NestedQuadratic:
        """Draws a problem whose levels have these sizes, the outermost first; see :meth:`Quadratic.random`."""
        for size in sizes:
            check_integer("NestedQuadratic", "sizes", size, minimum=1)
        check_number("NestedQuadratic", "conditioning", conditioning, minimum=1.0)
        normal = normals(seed)
        spectra = [conditioning ** -torch.linspace(0, 1, size, dtype=torch.float64) for size in sizes]
        H = tuple(with_spectrum(spectrum, normal(len(spectrum), len(spectrum))) for spectrum in spectra)
        pairs = list(itertools.pairwise(sizes))
        return cls(
            H,
            tuple(normal(size) for size in sizes),
            tuple(normal(below, above) / above**0.5 for above, below in pairs),
            tuple(normal(below, below) / below**0.5 for _, below in pairs),
            tuple(normal(below) for _, below in pairs),
        ).to(dtype)

    def losses(self) -> list[Callable[..., Tensor]]:
        """Returns the losses, each a function of the values of all levels."""

        def loss(place: int, *values: Tensor) -> Tensor:
            own = values[place]
            linear = self.b[place] if place == 0 else self.C[place - 1] @ values[place - 1] + self.b[place]
            value = own @ (self.H[place] @ own) / 2 - own @ linear
            if place < len(self.A):
                value = value + (self.A[place] @ values[place + 1] - self.t[place]).square().sum() / 2
            return value

        return [lambda *values, place=place: loss(place, *values) for place in range(len(self.H))]

    def solution(self, x0: Tensor) -> list[Tensor]:
        """Returns the values of all levels, ``x0`` first."""
        values = [x0]
        for G, g in self._responses()[1:]:
            values.append(G @ values[-1] + g)
        return values

    def hypergradient(self, x0: Tensor) -> Tensor:
        """Returns the derivative of the first level's loss with all others solved: ``K₀ (x₀ − optimum)``."""
        K, linear = self._totals()[0]
        return K @ x0 - linear

    def optimum(self) -> Tensor:
        """Returns the x₀ that minimises that loss."""
        return self._responses()[0][1]

    def problems(self, x0: Tensor | None = None, **settings: Any) -> list[Problem]:
        """Returns the problems ``level_0``, ``level_1``, …, at the solution for ``x0``, for an engine.

        Args:
            x0: Where the first level starts; zero by default.
            settings: Those of every :class:`~bilevel.Problem` but the first. All make gradient steps of size
                ``2 / (μ + L)`` for their total Hessian.
        """
        values = self.solution(torch.zeros_like(self.b[0]) if x0 is None else x0)
        names = [f"level_{place}" for place in range(len(values))]
        made: list[Problem] = []
        for place, ((K, _), value, loss) in enumerate(zip(self._totals(), values, self.losses(), strict=True)):
            eigenvalues = torch.linalg.eigvalsh(K)
            rate = 2 / float(eigenvalues[0] + eigenvalues[-1])
            more: Mapping[str, Any] = settings if place else {}
            optimizer = lambda parameters, rate=rate: SGD(parameters, lr=rate)  # noqa: E731
            made.append(Variable(value, loss, names, name=names[place], optimizer=optimizer, **more))
        return made

    def _totals(self) -> list[tuple[Tensor, Tensor]]:
        """Returns ``(K, l)`` of every level: its total loss is ``½xᵀKx − xᵀ(C·above + l)`` and a constant."""
        found: list[tuple[Tensor, Tensor]] = []
        for place in reversed(range(len(self.H))):
            K, linear = self.H[place], self.b[place]
            if found:
                below, more = found[0]
                G, g = torch.linalg.solve(below, self.C[place]), torch.linalg.solve(below, more)
                response = self.A[place] @ G
                K = K + response.T @ response
                linear = linear + response.T @ (self.t[place] - self.A[place] @ g)
            found.insert(0, (K, linear))
        return found

    def _responses(self) -> list[tuple[Tensor, Tensor]]:
        """Returns ``(G, g)`` of every level; the first has nothing above it."""
        totals = self._totals()
        above = [torch.zeros(len(self.b[0]), 0).to(self.b[0]), *self.C]
        return [
            (torch.linalg.solve(K, C), torch.linalg.solve(K, linear))
            for (K, linear), C in zip(totals, above, strict=True)
        ]
