"""The randomised Nyström approximation of a positive semi-definite operator."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.linear.base import Operator, Preconditioner, gaussian, machine_epsilon
from bilevel.result import Status
from bilevel.vector import Tensors, zeros_like

__all__ = ["NystromApproximation", "nystrom"]

# In units of the round-off, relative to ‖H Ω‖: what rounding does to the core matrix Ωᵀ H Ω.
FLAT = 10.0
ASYMMETRY_TOLERANCE = 1e3


@dataclass(frozen=True)
class NystromApproximation:
    """``Ĥ = U Λ Uᵀ`` with orthonormal U and Λ ≥ 0, for which ``0 ⪯ Ĥ ⪯ H`` where H is positive semi-definite.

    Attributes:
        vectors: U by the parts of a vector: for each, a matrix of its number of entries and the rank.
        eigenvalues: Λ, descending, in float64.
        dimension: n, the number of unknowns.
        status: ``CONVERGED``; ``NEGATIVE_CURVATURE`` or ``NOT_SYMMETRIC`` where H showed not to be what it must be, and
            ``DIVERGED`` where a product was not finite (Ĥ is then zero).
        products: Products taken.
        message: What was found.
    """

    vectors: Tensors
    eigenvalues: Tensor
    dimension: int
    status: Status
    products: int
    message: str = ""

    def product(self, v: Tensors) -> Tensors:
        """Returns ``Ĥ v``."""
        return self._combine(self.eigenvalues * self._components(v), zeros_like(v))

    def solve(self, v: Tensors, damping: float) -> Tensors:
        """Returns ``(Ĥ + δI)⁻¹ v = U (Λ + δI)⁻¹ Uᵀ v + (v − U Uᵀ v) / δ`` for δ > 0 (Woodbury).

        Raises:
            ConfigError: δ is not positive, and Ĥ alone not invertible.
        """
        complete = len(self.eigenvalues) == self.dimension
        if damping <= 0.0 and not (complete and float(self.eigenvalues.min()) + damping > 0.0):
            raise ConfigError(
                f"a Nyström approximation of rank {len(self.eigenvalues)} in {self.dimension} unknowns has no inverse: "
                f"damping must be above 0, not {damping}"
            )
        components = self._components(v)
        inside = self._combine(components / (self.eigenvalues + damping), zeros_like(v))
        if complete:
            return inside
        outside = self._combine(-components, v)
        return tuple(a + b / damping for a, b in zip(inside, outside, strict=True))

    def preconditioner(self, damping: float, power: float = 1.0) -> Preconditioner:
        """Returns ``v ↦ P^(−power) v`` with a preconditioner P of ``H + δI``.

        ``P⁻¹ = (λ + δ) U (Λ + δI)⁻¹ Uᵀ + I − U Uᵀ`` with the smallest λ of Λ. The condition number of
        ``P^(−1/2) (H + δI) P^(−1/2)`` is at most ``(λ + δ + ‖H − Ĥ‖) / δ`` (Frangella, Tropp, Udell 2021, proposition
        5.3). Where λ + δ is zero the smallest positive eigenvalue takes its place.
        """
        shifted = self.eigenvalues + damping
        positive = shifted[shifted > 0.0]
        smallest = positive.min() if len(positive) else shifted.new_ones(())
        gains = torch.where(shifted > 0.0, smallest / shifted.clamp_min(1e-300), 1.0).pow(power) - 1.0

        def apply(v: Tensors) -> Tensors:
            return self._combine(gains * self._components(v), v)

        return apply

    def _components(self, v: Tensors) -> Tensor:
        with _full_precision(v):
            parts = [U.T @ part.reshape(-1).to(U) for U, part in zip(self.vectors, v, strict=True)]
        return torch.stack([part.to(self.eigenvalues) for part in parts]).sum(0)

    def _combine(self, components: Tensor, onto: Tensors) -> Tensors:
        """Returns ``onto + U components``."""
        with _full_precision(onto):
            return tuple(
                part + (U @ components.to(U)).reshape(part.shape).to(part)
                for U, part in zip(self.vectors, onto, strict=True)
            )


def nystrom(
    operator: Operator, like: Tensors, *, rank: int, seed: int = 0, epsilon: float | None = None
) -> NystromApproximation:
    """Approximates a symmetric positive semi-definite H by ``Ĥ = (HΩ)(ΩᵀHΩ)⁺(HΩ)ᵀ``, Ω random.

    With rank r and any ``2 ≤ p ≤ r − 2`` the expected error ``E‖H − Ĥ‖`` is at most ``(1 + 2(r − p)/(p − 1)) λ_(r−p+1)
    + (2e²r/(p² − 1)) Σ_(j > r−p) λ_j`` over the eigenvalues of H, and zero for a rank of at least H's (Frangella,
    Tropp, Udell 2021, arXiv 2110.02820, algorithm 2.1 and proposition 2.2). For hypergradients: Hataya and Yamada,
    AISTATS 2023 (arXiv 2302.09726), there with unit vectors for Ω. Costs ``min(rank, n)`` products, as many vectors
    kept, and ``O(n rank²)`` operations.

    Args:
        operator: The product with H.
        like: A vector of the shapes and dtypes that it takes.
        rank: Products to take.
        seed: Of Ω, which is the same however the vector is split.
        epsilon: Relative round-off of the products, where it is larger than that of the dtypes.

    Returns:
        The approximation. An indefinite H shows in a negative eigenvalue of ``ΩᵀHΩ`` (if it shows at all: with few
        products it need not), a field that is no gradient in its asymmetry; the status says so, and Ĥ is made of the
        positive part.
    """
    epsilon = epsilon or machine_epsilon(like)
    sizes = [part.numel() for part in like]
    rank = min(rank, sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    test = torch.linalg.qr(torch.stack([_flat(gaussian(like, generator)) for _ in range(rank)], dim=1)).Q
    images = torch.stack([_flat(operator(_parts(column, like))) for column in test.unbind(1)], dim=1)
    with _full_precision(like):
        status, message = _judge(test, images, epsilon)
        if status is Status.DIVERGED:
            images = torch.zeros_like(images)
        basis, eigenvalues = _decompose(test, images, epsilon)
    vectors = tuple(
        rows.to(device=part.device, dtype=torch.promote_types(part.dtype, torch.float32))
        for rows, part in zip(torch.split(basis, sizes), like, strict=True)
    )
    return NystromApproximation(vectors, eigenvalues, sum(sizes), status, rank, message)


def _full_precision(vector: Tensors) -> torch.autocast:
    """Keeps autocast, which may be on around a solve, away from its matrix products."""
    return torch.autocast(vector[0].device.type, enabled=False)


def _flat(vector: Tensors) -> Tensor:
    """Returns the vector as one tensor, in the widest of its dtypes and float32."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in vector), torch.float32)
    return torch.cat([part.reshape(-1).to(device=vector[0].device, dtype=dtype) for part in vector])


def _parts(flat: Tensor, like: Tensors) -> Tensors:
    pieces = torch.split(flat, [part.numel() for part in like])
    return tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, like, strict=True))


def _judge(test: Tensor, images: Tensor, epsilon: float) -> tuple[Status, str]:
    """Returns what ``ΩᵀHΩ`` tells about H, which costs no product."""
    if not bool(torch.isfinite(images).all()):
        return Status.DIVERGED, "a Hessian product is not finite"
    core = test.double().T @ images.double()
    size = float(torch.linalg.matrix_norm(images.double()))
    asymmetry = float((core - core.T).abs().max())
    if asymmetry > ASYMMETRY_TOLERANCE * epsilon * size:
        return Status.NOT_SYMMETRIC, f"relative asymmetry {asymmetry / size:.1e}"
    smallest = float(torch.linalg.eigvalsh(0.5 * (core + core.T))[0])
    if smallest < -FLAT * epsilon * size:
        return Status.NEGATIVE_CURVATURE, f"the Hessian has an eigenvalue of {smallest:.3g} or below"
    return Status.CONVERGED, ""


def _decompose(test: Tensor, images: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns U and Λ: algorithm 2.1, with the eigenvalues of the core for its Cholesky factor.

    The shift ν keeps the core of a semi-definite H positive in spite of rounding; what is not positive even so belongs
    to negative curvature, or to nothing, and is left out of ``B = (H + νI) Ω C^(−1/2)``, whose ``B Bᵀ`` is ``Ĥ + νI``
    on the range.
    """
    shift = epsilon * float(torch.linalg.matrix_norm(images.double()))
    shifted = images + shift * test
    core = test.double().T @ shifted.double()
    values, rotation = torch.linalg.eigh(0.5 * (core + core.T))
    inverse_roots = torch.where(values > 0.5 * shift, values.clamp_min(1e-300).rsqrt(), 0.0)
    factor = shifted @ (rotation * inverse_roots).to(shifted)
    basis, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    return basis, (singular.double().square() - shift).clamp_min(0.0)
