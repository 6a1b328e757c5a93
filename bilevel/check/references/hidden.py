"""Whether autograd sees how the inner gradient changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.check.references.field import GradientField, Pull, normal
from bilevel.errors import LossError

__all__ = ["TOLERATED_DIFFERENCE", "Hidden", "hidden"]

TOLERATED_DIFFERENCE = 1e-3

_NUM_PROBES = 4
_STEPS = (1e-5, 1e-7)


@dataclass(frozen=True)
class Hidden:
    """What autograd's derivative of the inner gradient misses, along random directions.

    Attributes:
        along_inner: Of its change with the inner variables, relatively; NaN where it is not known.
        along_outer: Of its change with the outer variables, likewise.
        at_a_kink: Whether the gradient jumps right at the point.
        asymmetry: Relative asymmetry of J by differences: ``|⟨u, Jv⟩ − ⟨v, Ju⟩|`` against ``|⟨u, Jv⟩|``, over random
            u and v.
        seen_asymmetry: The same of autograd's J.
    """

    along_inner: float = math.nan
    along_outer: float = math.nan
    at_a_kink: bool = False
    asymmetry: float = math.nan
    seen_asymmetry: float = math.nan

    @property
    def size(self) -> float:
        """The larger of the two; NaN where they are not known."""
        return max(self.along_inner, self.along_outer)


def hidden(field: GradientField, *, second_derivatives: bool = True) -> Hidden:
    """Compares central differences of g with autograd's derivatives, along random directions of w and λ.

    With a small step and a hundredth of it. Differences of a smooth g agree with autograd at both; what a ``detach()``
    hides is the same at both; where g jumps close to the point, only the first may differ; and where it jumps at the
    point, differences are a hundred times larger at the second.

    Costs 16 gradients and 4 products. Nothing is known in less than float64, as the steps are below its rounding.
    """
    if field.dtype != torch.float64:
        return Hidden()
    generator = torch.Generator().manual_seed(0)
    device, size = field.value.device, len(field.value)
    probes = torch.stack([normal(size, generator, device) for _ in range(_NUM_PROBES)])
    outer_move = normal(len(field.parameters), generator, device)
    coarse, fine = (torch.stack([field.along(probe, size=step) for probe in probes]) for step in _STEPS)
    outer_coarse, outer_fine = (field.along(outer_move, outer=True, size=step) for step in _STEPS)
    # In units of g: what rounding of g alone could make of a difference is far below a millionth of this.
    extent = 1 + float(field.point.norm())
    unit = float(coarse.norm()) * extent + float(field.value.norm())
    kink = _jumps(coarse, fine, unit / extent)
    kink |= _jumps(outer_coarse, outer_fine, unit / (1 + float(field.parameters.norm())))
    asymmetry = min(_asymmetry(probes @ change.T, change) for change in (coarse, fine))
    if not second_derivatives:
        return Hidden(at_a_kink=kink, asymmetry=asymmetry)

    def products(pull: Pull) -> tuple[Tensor, Tensor]:
        pulled = [pull(probe) for probe in probes]
        return torch.stack([image for image, _ in pulled]), torch.stack([mixed for _, mixed in pulled])

    try:
        images, mixed = field.with_products(products)
    except LossError:
        return Hidden(at_a_kink=kink, asymmetry=asymmetry)
    seen, seen_outer = probes @ images.T, mixed @ outer_move  # entry (i, j): ⟨J pᵢ, pⱼ⟩
    outer_unit = unit / (1 + float(field.parameters.norm()))
    return Hidden(
        along_inner=min(_missed(change @ probes.T, seen, unit / extent) for change in (coarse, fine)),
        along_outer=min(_missed(probes @ change, seen_outer, outer_unit) for change in (outer_coarse, outer_fine)),
        at_a_kink=kink,
        asymmetry=asymmetry,
        seen_asymmetry=_asymmetry(seen, images),
    )


def _jumps(coarse: Tensor, fine: Tensor, unit: float) -> bool:
    return float(fine.norm()) > 10 * float(coarse.norm()) and float((fine - coarse).norm()) > 1e-6 * unit


def _missed(found: Tensor, seen: Tensor, unit: float) -> float:
    error, scale = float((found - seen).norm()), max(float(seen.norm()), float(found.norm()))
    return error / scale if scale > 1e-6 * unit else 0.0


def _asymmetry(pairs: Tensor, images: Tensor) -> float:
    """``‖J − Jᵀ‖ / ‖J‖`` in Frobenius norms, each estimated from products with normal vectors.

    ``pᵢᵀ(J − Jᵀ)pⱼ`` has the variance ``‖J − Jᵀ‖²`` for i ≠ j, and ``‖J pᵢ‖²`` the mean ``‖J‖²``.
    """
    count = len(pairs)
    difference = float((pairs - pairs.T).square().sum()) / (count * (count - 1))
    scale = float(images.square().sum()) / count
    return math.sqrt(difference / scale) if scale > 0 else 0.0
