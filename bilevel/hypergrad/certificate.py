"""How far an implicit hypergradient can be from the true one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.errors import ConfigError, unknown_name
from bilevel.linear import Operator, estimate_spectrum
from bilevel.validation import NamedArguments, check_integer, check_number
from bilevel.vector import Tensors, norm, promote, subtract

__all__ = ["Bound", "Certificate", "as_certificate"]

_LIPSCHITZ = ("hessian_lipschitz", "mixed_lipschitz", "cotangent_lipschitz", "direct_lipschitz")


@dataclass(frozen=True)
class Bound:
    """An upper bound of the error of a hypergradient.

    Attributes:
        value: The bound, or None where none can be given.
        basis: What it rests on.
        note: Why there is none.
    """

    value: float | None
    basis: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Certificate(NamedArguments):
    """What is known of the losses, and asks for an error bound with every solve.

    For a μ-strongly convex inner loss let ``r = H q − v`` (of the undamped Hessian), ``B = ∂²f/∂λ∂w`` and ``e = ‖∂f/∂w‖
    / μ``, which bounds the distance of the given inner parameters from the solution w*. Then

        ‖q − q*‖ ≤ Δ = ‖r‖/μ + (L_v e + L_H e (‖q‖ + ‖r‖/μ)) / μ
        ‖hypergradient − true‖ ≤ L_d e + (‖B‖ + L_B e) Δ + L_B e ‖q‖

    from ``q − q* = H⁻¹r + H*⁻¹((v − v*) + (H* − H) H⁻¹v)``, with the Lipschitz constants in w (within distance e) of
    the Hessian (L_H), the mixed derivative (L_B), the cotangent ``∂F/∂w`` (L_v) and the direct part ``∂F/∂λ`` (L_d).
    Without these constants e counts as 0: the bound is then of the distance to the hypergradient *at the given inner
    parameters*, and its basis says so. Source: Pedregosa, ICML 2016 (arXiv 1602.02355), theorem 1; Grazzi et al., ICML
    2020 (arXiv 2006.16218), theorem 3.1.

    Attributes:
        strong_convexity: μ, or ``"estimate"``: the smallest Ritz value of ``products`` Lanczos steps less the bound of
            its residual. That is near the smallest eigenvalue (and equal to it with as many steps as variables), but no
            proof.
        mixed_norm: ‖B‖, or ``"estimate"``: ``10 √(2/π) max ‖B xᵢ‖`` over ``probes`` Gaussian vectors, an upper bound
            with probability at least ``1 − 10^(−probes)`` (Halko, Martinsson, Tropp 2011, lemma 4.1).
        hessian_lipschitz: L_H; 0 for a quadratic inner loss. All four Lipschitz constants, or none.
        mixed_lipschitz: L_B.
        cotangent_lipschitz: L_v.
        direct_lipschitz: L_d.
        products: Lanczos products for ``"estimate"``.
        probes: Gaussian vectors for ``"estimate"``.

    Cost: beside the solve, ``products`` Hessian products and ``probes`` mixed products where these are estimated.

    Raises:
        ConfigError: A value out of range, or some of the Lipschitz constants without the others.
    """

    strong_convexity: float | str = "estimate"
    mixed_norm: float | str = "estimate"
    hessian_lipschitz: float | None = None
    mixed_lipschitz: float | None = None
    cotangent_lipschitz: float | None = None
    direct_lipschitz: float | None = None
    products: int = 20
    probes: int = 6

    def __post_init__(self) -> None:
        """Validates the fields, alone and together."""
        if self.strong_convexity != "estimate":
            check_number("Certificate", "strong_convexity", self.strong_convexity, minimum=0.0, exclusive=True)
        if self.mixed_norm != "estimate":
            check_number("Certificate", "mixed_norm", self.mixed_norm, minimum=0.0)
        missing = [name for name in _LIPSCHITZ if getattr(self, name) is None]
        if 0 < len(missing) < len(_LIPSCHITZ):
            raise ConfigError(
                f"Certificate: {', '.join(missing)} missing. Give all Lipschitz constants (0 where a derivative is "
                "constant), for a bound at the inner solution, or none, for one at the given inner parameters."
            )
        for name in _LIPSCHITZ:
            if getattr(self, name) is not None:
                check_number("Certificate", name, getattr(self, name), minimum=0.0)
        check_integer("Certificate", "products", self.products, minimum=1)
        check_integer("Certificate", "probes", self.probes, minimum=1)

    def bound(self, hessian: Operator, mixed_product: Operator, slope: float, q: Tensors, v: Tensors) -> Bound:
        """Returns the bound of the error of ``Bᵀq`` for an approximate solution q of ``H q = v``.

        Args:
            hessian: The product with the undamped H.
            mixed_product: The product with ``Bᵀ``.
            slope: ``‖∂f/∂w‖``.
            q: The solution.
            v: The right-hand side.
        """
        mu, basis, note = self._strong_convexity(hessian, q)
        if not mu > 0.0:
            return Bound(None, note=note)
        residual = float(norm(subtract(promote(hessian(q)), v))) / mu
        mixed = self._mixed_norm(mixed_product, q)
        size, distance = float(norm(q)), slope / mu
        if self.hessian_lipschitz is None:
            distance, place = 0.0, "at the given inner parameters"
        else:
            place = "at the inner solution"
        second, cross, change, direct = (float(getattr(self, name) or 0.0) for name in _LIPSCHITZ)
        shift = residual + (change + second * (size + residual)) * distance / mu
        value = direct * distance + (mixed + cross * distance) * shift + cross * distance * size
        return Bound(value if math.isfinite(value) else None, f"{basis}, {place}")

    def _strong_convexity(self, hessian: Operator, like: Tensors) -> tuple[float, str, str]:
        if not isinstance(self.strong_convexity, str):
            return self.strong_convexity, f"given μ = {self.strong_convexity:.2g}", ""
        dimension = sum(part.numel() for part in like)
        estimate = estimate_spectrum(hessian, like, products=min(self.products, dimension))
        mu = estimate.smallest_bound
        note = f"no error bound: after {estimate.products} Lanczos products μ may be as low as {mu:.1e}"
        return mu, f"estimated μ = {mu:.2g}", note

    def _mixed_norm(self, mixed_product: Operator, like: Tensors) -> float:
        if not isinstance(self.mixed_norm, str):
            return self.mixed_norm
        generator = torch.Generator().manual_seed(0)
        largest = 0.0
        for _ in range(self.probes):
            draw = torch.randn(sum(part.numel() for part in like), generator=generator)
            pieces = torch.split(draw, [part.numel() for part in like])
            probe = tuple(piece.reshape(part.shape).to(part) for piece, part in zip(pieces, like, strict=True))
            largest = max(largest, float(norm(mixed_product(probe))))
        return 10 * math.sqrt(2 / math.pi) * largest


def as_certificate(owner: str, value: Certificate | Mapping[str, Any] | None) -> Certificate | None:
    """Returns a certificate from itself or a mapping of its fields.

    Raises:
        UnknownNameError: A field that does not exist.
        ConfigError: Something else than a mapping.
    """
    if value is None or isinstance(value, Certificate):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{owner}.certificate must be a Certificate, a mapping of its fields, or None, not {value!r}")
    fields = [field.name for field in dataclasses.fields(Certificate)]
    for key in value:
        if key not in fields:
            raise unknown_name(f"field of {owner}.certificate:", str(key), fields)
    return Certificate(**value)
