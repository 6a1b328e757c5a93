"""Matrices as operators on split vectors, for the tests of linear solvers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.bilevel.strategies import DOUBLE, logarithmic, spectrum_matrix


class Counted:
    """A matrix as an operator on split vectors that counts its products."""

    def __init__(self, matrix: Tensor, sizes: tuple[int, ...]) -> None:
        self.matrix = matrix
        self.sizes = sizes
        self.products = 0

    def __call__(self, q: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.products += 1
        return self.split(self.matrix @ torch.cat(q))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.sizes))

    def inverse(self) -> Counted:
        """The operator of the inverse matrix."""
        return Counted(torch.linalg.inv(self.matrix), self.sizes)


def spectrum(number: int, size: int, condition: float) -> tuple[Tensor, torch.Generator]:
    """Eigenvalues in [1 / condition, 1], both ends among them where there are two, and a generator to go on with."""
    generator = torch.Generator().manual_seed(number)
    exponents = torch.rand(size, generator=generator, dtype=DOUBLE)
    exponents[0], exponents[-1] = 0.0, 1.0
    return condition ** (exponents - 1), generator


def finish(H: Tensor, generator: torch.Generator, dtype: torch.dtype = DOUBLE) -> tuple[Counted, Tensor]:
    """A matrix as an operator, split at random, and a right-hand side."""
    cut = int(torch.randint(0, len(H) + 1, (), generator=generator))
    v = torch.randn(len(H), generator=generator, dtype=DOUBLE)
    return Counted(H.to(dtype), (cut, len(H) - cut)), v.to(dtype)


def system(number: int, size: int, condition: float, dtype: torch.dtype = DOUBLE) -> tuple[Counted, Tensor]:
    """A positive definite system."""
    eigenvalues, generator = spectrum(number, size, condition)
    return finish(spectrum_matrix(eigenvalues, generator), generator, dtype)


def indefinite_system(number: int, size: int, condition: float, dtype: torch.dtype = DOUBLE) -> tuple[Counted, Tensor]:
    """A symmetric system with eigenvalues of both signs (of one sign at size 1)."""
    eigenvalues, generator = spectrum(number, size, condition)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0).to(DOUBLE)
    signs[0], signs[-1] = -1.0, 1.0
    return finish(spectrum_matrix(eigenvalues * signs, generator), generator, dtype)


def skewed_system(number: int, size: int, skew: float) -> tuple[Counted, Tensor]:
    """A non-symmetric system with a positive definite symmetric part of eigenvalues in [0.5, 1]."""
    eigenvalues, generator = spectrum(number, size, 2.0)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    return finish(spectrum_matrix(eigenvalues, generator) + skew * (N - N.T), generator)


def residual_of(operator: Counted, q: tuple[Tensor, ...], v: Tensor) -> float:
    """``‖Hq − v‖ / ‖v‖`` in float64."""
    difference = operator.matrix.to(DOUBLE) @ torch.cat(q).to(DOUBLE) - v.to(DOUBLE)
    return float(difference.norm() / v.to(DOUBLE).norm())


systems = {
    "number": st.integers(0, 2**31),
    "size": st.integers(1, 12),
    "condition": logarithmic(1.0, 1e6),
}
