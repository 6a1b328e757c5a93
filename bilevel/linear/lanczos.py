"""Extreme eigenvalues of a symmetric operator from products alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear.base import Operator, gaussian, machine_epsilon
from bilevel.vector import Tensors, axpy, dot, norm, scale

__all__ = ["SpectrumEstimate", "estimate_spectrum", "tridiagonal"]

# In units of the round-off: what rounding does to a Ritz value, relative to the largest.
ROUNDING = 10.0


@dataclass(frozen=True)
class SpectrumEstimate:
    """Extreme Ritz values of H, with what can be said of their errors.

    Attributes:
        smallest: Smallest Ritz value, an upper bound of the smallest eigenvalue.
        largest: Largest Ritz value plus its residual: close to the largest eigenvalue, rarely below it.
        products: Products taken.
        smallest_residual: ``‖Hy − θy‖`` of the smallest Ritz pair, with rounding: some eigenvalue lies within it of θ.
        largest_residual: The same for the largest Ritz pair.
        rounding: What rounding of the products may do to a Ritz value.
        dimension: n, the number of unknowns.
        complete: Whether the Krylov space was exhausted, so that no eigenvalue is missing.
    """

    smallest: float
    largest: float
    products: int
    smallest_residual: float = 0.0
    largest_residual: float = 0.0
    rounding: float = 0.0
    dimension: int = 0
    complete: bool = False

    @property
    def smallest_bound(self) -> float:
        """``θ − ‖Hy − θy‖``: a lower bound of the eigenvalue next to the smallest Ritz value.

        It is a bound of the smallest eigenvalue itself only once that Ritz value has settled at it, which no number of
        products below n can prove; :meth:`lower_bound` gives one that holds with a stated probability.
        """
        return self.smallest - self.smallest_residual

    def lower_bound(self, failure: float = 1e-3) -> float:
        """Returns a lower bound of the smallest eigenvalue that fails with at most this probability over the start.

        k Lanczos products from a random start leave ``θ − λ_min ≤ ε (λ_max − λ_min)`` except with probability
        ``1.648 √n exp(−(2k − 1) √ε)``, for any spectrum (Kuczyński and Woźniakowski 1992, theorem 4.2, for
        ``λ_max I − H``), with :attr:`largest` for λ_max. To be positive it takes more than
        ``√κ ln(1.648 √n / failure) / 2`` products, κ the condition number.
        """
        if self.complete:
            return self.smallest_bound
        root = math.log(1.648 * math.sqrt(self.dimension) / failure) / (2 * self.products - 1)
        if not root < 1.0:
            return -math.inf
        share = root**2
        return (self.smallest - share * self.largest) / (1 - share) - self.rounding


def estimate_spectrum(
    operator: Operator, like: Tensors, *, products: int = 10, reorthogonalise: bool = False
) -> SpectrumEstimate:
    """Estimates the extreme eigenvalues of a symmetric H by Lanczos from a fixed pseudo-random vector.

    The largest Ritz value θ of k steps lies below the largest eigenvalue, and some eigenvalue lies within ``β_k
    |s_k|`` of it (Golub and Van Loan, section 10.1); the sum of both is returned as the largest. With as many products
    as unknowns the eigenvalues are exact but for rounding.

    Args:
        operator: The product with H.
        like: A vector of the shapes and dtypes that the operator takes.
        products: Cap on products; fewer are taken where the Krylov space ends.
        reorthogonalise: Keeps all vectors and makes each orthogonal to them twice, which the smallest eigenvalue needs
            once the largest has converged; otherwise three vectors are kept. Always on from n products on.
    """
    size = sum(part.numel() for part in like)
    start = gaussian(like, torch.Generator().manual_seed(0))
    current = scale(1 / norm(start), start)
    basis: list[Tensors] = []
    keep_all = reorthogonalise or products >= size
    epsilon = machine_epsilon(like)
    diagonal: list[float] = []
    off: list[float] = []
    complete = False
    for _ in range(min(products, size)):
        image = operator(current)
        basis = [*basis, current] if keep_all else [*basis[-1:], current]
        diagonal.append(float(dot(current, image)))
        image = axpy(-diagonal[-1], current, image)
        if len(basis) > 1:
            image = axpy(-off[-1], basis[-2], image)
        if keep_all:
            image = _orthogonal(image, basis)
        off.append(float(norm(image)))
        if not off[-1] > ROUNDING * epsilon * max(map(abs, diagonal + off)):  # an invariant subspace, or NaN
            complete = True
            break
        current = scale(1 / off[-1], image)
    return _estimate(diagonal, off, size, complete or len(diagonal) == size, epsilon)


def _orthogonal(vector: Tensors, basis: list[Tensors]) -> Tensors:
    """Takes the components in an orthonormal basis out, twice: that is enough (Parlett 1980, section 6.9)."""
    for _ in range(2):
        for other in basis:
            vector = axpy(-dot(other, vector), other, vector)
    return vector


def _estimate(diagonal: list[float], off: list[float], size: int, complete: bool, epsilon: float) -> SpectrumEstimate:
    """Makes the estimate from the entries of the Lanczos matrix; the last of ``off`` leads out of the Krylov space."""
    products = len(diagonal)
    if not all(map(math.isfinite, diagonal + off)):
        nan = float("nan")
        return SpectrumEstimate(nan, nan, products, nan, nan, nan, size)
    values, vectors = tridiagonal(diagonal, off)
    low, high = (off[-1] * abs(float(vectors[-1, place])) for place in (0, -1))
    rounding = ROUNDING * epsilon * float(values.abs().max())
    return SpectrumEstimate(
        smallest=float(values[0]),
        largest=float(values[-1]) + high,
        products=products,
        smallest_residual=low + rounding,
        largest_residual=high + rounding,
        rounding=rounding,
        dimension=size,
        complete=complete,
    )


def tridiagonal(diagonal: list[float], off: list[float]) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (ascending) and eigenvectors of a symmetric tridiagonal matrix, in float64.

    Args:
        diagonal: Its diagonal, of length k.
        off: The entries beside it; those from place k on are ignored.
    """
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if len(diagonal) > 1:
        beside = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
        matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
