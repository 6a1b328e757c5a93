"""The truncated Neumann series."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.linear.base import (
    CompileIteration,
    Operator,
    Preconditioner,
    Solution,
    first_residual,
    inner_product,
    machine_epsilon,
)
from bilevel.linear.joined import Joined
from bilevel.linear.probe import Probe
from bilevel.result import Status
from bilevel.vector import Tensors, axpy, axpy_, dot, norm, scale

__all__ = ["neumann"]


def neumann(
    operator: Operator,
    v: Tensors,
    *,
    terms: int,
    step_size: float,
    epsilon: float | None = None,
    start: Tensors | None = None,
    preconditioner: Preconditioner | None = None,
    symmetric: bool = False,
    rtol: float = 0.0,
    compiled: CompileIteration | None = None,
) -> Solution:
    """Solves ``H q = v`` by ``q = q₀ + α Σₖ₌₀ᴷ (I − αP⁻¹H)ᵏ P⁻¹(v − Hq₀)``.

    For a symmetric ``P⁻¹H`` with eigenvalues in [μ, L] and 0 < α < 2/L the error is at most ``ρ^(K+1)`` of the start's
    with ``ρ = max(|1 − αμ|, |1 − αL|)`` (Lorraine, Vicol, Duvenaud 2020, arXiv 1911.02590), in the P-norm where there
    is a preconditioner.

    Args:
        operator: The product with H.
        v: The right-hand side.
        terms: K, the products taken; the sum has K + 1 summands. A start takes one product more, for its residual.
        step_size: α.
        epsilon: Relative round-off of the products, where it is larger than that of v.
        start: q₀; zero without it, or where its residual is larger than that of zero.
        preconditioner: ``r ↦ P⁻¹ r`` with P symmetric positive definite; the identity without it.
        symmetric: Whether H must be symmetric for the answer to be right; ``NOT_SYMMETRIC`` where it shows not to be,
            which takes two terms and costs no product.
        rtol: Stops before ``terms`` once ``‖H q − v‖ ≤ rtol ‖v‖``. That residual is the next summand (times P), and so
            costs no product.
        compiled: Compiles a term, where there is no preconditioner and H need not be symmetric.

    Returns:
        The solution. Its status is ``STOPPED_AT_CAP``; ``CONVERGED`` where the start's residual is zero or the
        tolerance was reached; ``DIVERGED`` where the norms of the summands grow, which for a symmetric H they never
        stop doing once they do; ``NEGATIVE_CURVATURE`` where a summand p has pᵀHp < 0 beyond rounding.
    """
    joined = Joined.of(v) if compiled is None else None
    if joined is not None:
        settings = {"terms": terms, "step_size": step_size, "epsilon": epsilon, "symmetric": symmetric, "rtol": rtol}
        return joined.solved(neumann, operator, v, start, preconditioner, **settings)
    q, residual, products = first_residual(operator, v, start)
    message = f"step size {step_size:.3g}"
    target = rtol * float(norm(v)) if rtol > 0.0 else 0.0
    if products and float(norm(residual)) <= target:
        return Solution(q, Status.CONVERGED, products, message)
    summand = residual if preconditioner is None else preconditioner(residual)
    q = axpy(step_size, summand, q) if products else scale(step_size, summand)
    # The norm in which the summands of a symmetric H shrink or grow monotonously is ‖p‖_P, and Pp is the residual.
    norms, sizes, curvatures = [_length(summand, residual, preconditioner)], [], []
    probe = Probe(epsilon or machine_epsilon(v))
    reached = False
    # The product with P⁻¹ and the look at symmetry are no part of a compiled term.
    step = None if compiled is None or preconditioner is not None or symmetric else compiled("neumann", _term)
    alpha = None if step is None else torch.tensor(step_size, dtype=torch.float64, device=v[0].device)
    for _ in range(terms):
        if step is not None:
            *found, numbers = step(alpha, *q, *summand)
            q, summand = tuple(found[: len(v)]), tuple(found[len(v) :])
            norms.append(numbers[0])
            sizes.append(numbers[1])
            curvatures.append(numbers[2])
            if rtol > 0.0 and float(norms[-1]) <= target:
                reached = True
                break
            continue
        product = operator(summand)
        scaled = product if preconditioner is None else preconditioner(product)
        size = _length(scaled, product, preconditioner)
        if symmetric:
            probe.look(summand, product, *((norms[-1], size) if preconditioner is None else ()))
        sizes.append(size)
        curvatures.append(dot(summand, product))
        residual = residual if preconditioner is None else axpy(-step_size, product, residual)
        summand = axpy(-step_size, scaled, summand)
        norms.append(_length(summand, residual, preconditioner))
        axpy_(step_size, summand, q)
        if rtol > 0.0 and float(norms[-1] if preconditioner is None else norm(residual)) <= target:
            reached = True  # already without the summand that was just added
            break
    status = _status(norms, sizes, curvatures, probe.epsilon)
    if reached and status is Status.STOPPED_AT_CAP:
        status = Status.CONVERGED
    if status is not Status.DIVERGED and probe.asymmetric:
        status, message = Status.NOT_SYMMETRIC, f"relative asymmetry {probe.asymmetry:.1e}"
    return Solution(q, status, len(curvatures) + products, message)


def _term(operator: Operator, step_size: Tensor, *tensors: Tensor) -> Tensors:
    """A term in tensors alone: the new q and summand, its norm, and ``‖Hp‖`` and ``pᵀHp`` of the one before."""
    count = len(tensors) // 2
    q, summand = tensors[:count], tensors[count:]
    product = operator(summand)
    after = axpy(-step_size, product, summand)
    size, curvature = inner_product(product, product).sqrt(), inner_product(summand, product)
    numbers = torch.stack([inner_product(after, after).sqrt(), size, curvature])
    return (*axpy(step_size, after, q), *after, numbers)


def _length(summand: Tensors, residual: Tensors, preconditioner: Preconditioner | None) -> Tensor:
    """Returns ``√(pᵀPp)`` for a summand p and ``Pp``."""
    return norm(summand) if preconditioner is None else dot(summand, residual).clamp_min(0.0).sqrt()


def _status(norms: list[Tensor], sizes: list[Tensor], curvatures: list[Tensor], epsilon: float) -> Status:
    """Judges by the norms of all summands p, and ``‖Hp‖`` and ``pᵀHp`` of all but the last one."""
    found = torch.stack([*norms, *sizes, *curvatures]).tolist()
    count = len(norms)
    lengths, rest = found[:count], found[count:]
    if any(not length < math.inf for length in lengths):
        return Status.DIVERGED
    # A product with a null vector is rounding of ‖H‖, with a curvature of either sign.
    relative = [max(length, 1e-150) for length in lengths[:-1]]
    if relative:
        largest = max(size / length for size, length in zip(rest, relative, strict=False))
        lowest = min(curved / length / length for curved, length in zip(rest[count - 1 :], relative, strict=True))
        if lowest < -10 * epsilon * largest:
            return Status.NEGATIVE_CURVATURE
    grows = count > 1 and lengths[-1] > lengths[-2] * (1 + 1e-6) and lengths[-1] > 100 * epsilon * lengths[0]
    return Status.DIVERGED if grows else Status.STOPPED_AT_CAP
