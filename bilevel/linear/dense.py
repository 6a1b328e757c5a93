"""The dense solve: the reference for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.linear.base import Operator, Solution, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors

__all__ = ["dense", "dense_matrix"]

LARGEST_DIMENSION = 20_000


def dense(operator: Operator, v: Tensors, *, epsilon: float | None = None, symmetric: bool = False) -> Solution:
    """Solves ``H q = v`` by forming H, one product a column; H need not be symmetric.

    Costs n products, O(n²) memory and O(n³) operations for n unknowns, in float64. A positive definite H is
    ``CONVERGED``; an invertible but indefinite one is solved and reported as ``NEGATIVE_CURVATURE``; for a singular
    one the minimum-norm least-squares solution is returned, with status ``SINGULAR``.

    Args:
        operator: The product with H.
        v: The right-hand side.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        symmetric: Whether H must be symmetric for the answer to be right; ``NOT_SYMMETRIC`` where it is not.

    Raises:
        ConfigError: n exceeds 20,000.
    """
    matrix = dense_matrix(operator, v)
    flat = torch.cat([part.reshape(-1).to(matrix) for part in v])
    solution, status, message = _solve(matrix, flat, epsilon or machine_epsilon(v))
    if symmetric and message and status is not Status.DIVERGED:
        status = Status.NOT_SYMMETRIC
    pieces = torch.split(solution, [part.numel() for part in v])
    q = tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, v, strict=True))
    return Solution(q, status, len(flat), message)


def dense_matrix(operator: Operator, like: Tensors) -> Tensor:
    """Returns the (n, n) matrix of an operator in float64, column by column."""
    size = sum(part.numel() for part in like)
    if size > LARGEST_DIMENSION:
        raise ConfigError(
            f"method 'exact' forms the dense Hessian: {size} inner variables need {size**2 * 8 / 2**30:.0f} GiB and "
            "as many "
            f"products (limit {LARGEST_DIMENSION}). Use 'conjugate_gradient' with a small rtol instead."
        )
    columns = []
    for place, part in enumerate(like):
        for entry in range(part.numel()):
            # Contiguous whatever the layout of the gradients is: those of torch.func.vmap are often transposed.
            basis = [torch.zeros_like(other, memory_format=torch.contiguous_format) for other in like]
            basis[place].view(-1)[entry] = 1
            columns.append(torch.cat([piece.reshape(-1).to(torch.float64) for piece in operator(tuple(basis))]))
    return torch.stack(columns, dim=1)


def _solve(matrix: Tensor, right: Tensor, epsilon: float) -> tuple[Tensor, Status, str]:
    """Solves in float64; ``epsilon`` is the round-off of the products that the matrix was made of."""
    size = matrix.abs().max()
    if not bool(torch.isfinite(size)):
        return torch.full_like(right, float("nan")), Status.DIVERGED, "a Hessian product is not finite"
    asymmetry = float((matrix - matrix.T).abs().max() / size.clamp_min(1e-300))
    symmetric = asymmetry < 1e3 * epsilon
    message = (
        "" if symmetric else f"the inner gradient's Jacobian is not symmetric (relative asymmetry {asymmetry:.1e})"
    )
    if symmetric:
        factor, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.T))
        diagonal = factor.diagonal()
        if int(info) == 0 and float(diagonal.min() / diagonal.max()) ** 2 > 10 * epsilon:
            return torch.cholesky_solve(right[:, None], factor)[:, 0], Status.CONVERGED, message
    singular_values = torch.linalg.svdvals(matrix)
    cutoff = len(right) * epsilon
    if float(singular_values[-1]) <= cutoff * float(singular_values[0]):
        return torch.linalg.pinv(matrix, rtol=cutoff) @ right, Status.SINGULAR, message
    positive = bool((torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)) > 0).all())
    return torch.linalg.solve(matrix, right), Status.CONVERGED if positive else Status.NEGATIVE_CURVATURE, message
