"""The truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linear.base import Operator, Solution, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors, add, axpy, dot, norm, scale

__all__ = ["SpectrumEstimate", "estimate_spectrum", "neumann"]


def neumann(operator: Operator, v: Tensors, *, terms: int, step_size: float, epsilon: float | None = None) -> Solution:
    """Solves ``H q = v`` by ``q = α Σₖ₌₀ᴷ (I − αH)ᵏ v``.

    For a symmetric H with eigenvalues in [μ, L] and 0 < α < 2/L the relative error is at most ``ρ^(K+1)`` with
    ``ρ = max(|1 − αμ|, |1 − αL|)`` (Lorraine, Vicol, Duvenaud 2020, arXiv 1911.02590).

    Args:
        operator: The product with H.
        v: The right-hand side.
        terms: K, the products taken; the sum has K + 1 summands.
        step_size: α.
        epsilon: Relative round-off of the products, where it is larger than that of v.

    Returns:
        The solution. Its status is ``STOPPED_AT_CAP``; ``DIVERGED`` where the norms of the summands grow, which for a
        symmetric H they never stop doing once they do; ``NEGATIVE_CURVATURE`` where a summand p has pᵀHp < 0
        beyond rounding.
    """
    summand, total = v, v
    norms, sizes, curvatures = [norm(v)], [], []
    for _ in range(terms):
        product = operator(summand)
        squared = norms[-1].square().clamp_min(1e-300)
        sizes.append(norm(product) / squared.sqrt())
        curvatures.append(dot(summand, product) / squared)
        summand = axpy(-step_size, product, summand)
        norms.append(norm(summand))
        total = add(total, summand)
    status = _status(norms, sizes, curvatures, epsilon or machine_epsilon(v))
    return Solution(scale(step_size, total), status, terms, f"step size {step_size:.3g}")


def _status(norms: list[Tensor], sizes: list[Tensor], curvatures: list[Tensor], epsilon: float) -> Status:
    lengths = torch.stack(norms).tolist()
    if any(not length < float("inf") for length in lengths):
        return Status.DIVERGED
    # A product with a null vector is rounding of ‖H‖, with a curvature of either sign.
    if curvatures and float(torch.stack(curvatures).min()) < -10 * epsilon * float(torch.stack(sizes).max()):
        return Status.NEGATIVE_CURVATURE
    grows = len(lengths) > 1 and lengths[-1] > lengths[-2] * (1 + 1e-6) and lengths[-1] > 100 * epsilon * lengths[0]
    return Status.DIVERGED if grows else Status.STOPPED_AT_CAP


@dataclass(frozen=True)
class SpectrumEstimate:
    """Extreme Ritz values of H.

    Attributes:
        smallest: Smallest Ritz value, an upper bound of the smallest eigenvalue.
        largest: Largest Ritz value plus its residual: close to the largest eigenvalue, rarely below it.
        products: Products taken.
    """

    smallest: float
    largest: float
    products: int


def estimate_spectrum(operator: Operator, like: Tensors, *, products: int = 10) -> SpectrumEstimate:
    """Estimates the extreme eigenvalues of a symmetric H by Lanczos from a fixed pseudo-random vector.

    The largest Ritz value θ of k steps lies below the largest eigenvalue, and some eigenvalue lies within ``β_k
    |s_k|`` of it (Golub and Van Loan, section 10.1); the sum of both is returned. Three vectors are kept.
    """
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(sum(part.numel() for part in like), generator=generator)  # one draw, however the vector is split
    pieces = torch.split(flat, [part.numel() for part in like])
    start = tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, like, strict=True))
    current = scale(1 / norm(start), start)
    previous: Tensors | None = None
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(products):
        image = operator(current)
        diagonal.append(float(dot(current, image)))
        image = axpy(-diagonal[-1], current, image)
        if previous is not None:
            image = axpy(-off[-1], previous, image)
        size = float(norm(image))
        off.append(size)
        if not size > 1e-6 * max(map(abs, diagonal)):  # an invariant subspace (or NaN): the Ritz values are exact
            break
        previous, current = current, scale(1 / size, image)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if len(diagonal) > 1:
        beta = torch.tensor(off[: len(diagonal) - 1], dtype=torch.float64)
        matrix = matrix + torch.diag(beta, 1) + torch.diag(beta, -1)
    if not bool(torch.isfinite(matrix).all()):
        return SpectrumEstimate(float("nan"), float("nan"), len(diagonal))
    values, vectors = torch.linalg.eigh(matrix)
    slack = off[-1] * abs(float(vectors[-1, -1]))
    return SpectrumEstimate(float(values[0]), float(values[-1]) + slack, len(diagonal))
