"""Richardson's iteration: plain steps of fixed length."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.linear.base import Operator, Solution, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, norm, scale, subtract

__all__ = ["richardson"]


def richardson(
    operator: Operator, v: Tensors, *, iterations: int, step_size: float, start: Tensors | None = None
) -> Solution:
    """Takes steps ``q ← q − α (Hq − v)``: gradient descent on ``qᵀHq/2 − vᵀq``.

    For a symmetric H with eigenvalues in [μ, L] and 0 < α < 2/L a step multiplies the error by at most
    ``max(|1 − αμ|, |1 − αL|)``. K + 1 steps from zero are the Neumann sum of K + 1 summands. The residual is taken of
    q at every step, not carried along: an operator that differs from product to product, as on fresh samples, does no
    harm beyond its noise. One step from the solution before is what single-loop methods take (Dagréou et al. 2022,
    arXiv 2201.13409, equation 5).

    Args:
        operator: The product with H.
        v: The right-hand side.
        iterations: Steps, one product each; the first one from zero is ``α v`` and takes none.
        step_size: α.
        start: The first iterate; zero without it.

    Returns:
        The iterate. Its status is ``STOPPED_AT_CAP``; ``DIVERGED`` where the last residual that was seen is larger
        than the one before it, or is not finite.
    """
    message = f"step size {step_size:.3g}"
    if iterations < 1:
        return Solution(scale(0.0, v) if start is None else start, Status.STOPPED_AT_CAP, 0, message)
    norms: list[Tensor] = [norm(v)]
    q, products = (scale(step_size, v), iterations - 1) if start is None else (start, iterations)
    for _ in range(products):
        residual = subtract(v, operator(q))
        q = axpy(step_size, residual, q)
        norms.append(norm(residual))
    lengths = torch.stack(norms).tolist()
    finite = all(length < float("inf") for length in lengths)
    seen = lengths if start is None else lengths[1:]
    grows = len(seen) > 1 and seen[-1] > seen[-2] * (1 + 1e-6) and seen[-1] > 100 * machine_epsilon(v) * lengths[0]
    return Solution(q, Status.DIVERGED if grows or not finite else Status.STOPPED_AT_CAP, products, message)
