"""A bound of the norm of a rectangular operator from products alone."""

from __future__ import annotations

import math

import torch

from bilevel.errors import ConfigError
from bilevel.linear.base import Operator, gaussian
from bilevel.vector import Tensors, norm

__all__ = ["bound_operator_norm"]


def bound_operator_norm(
    operator: Operator, like: Tensors, *, vectors: int = 3, failure: float = 1e-3, seed: int = 0
) -> float:
    """Returns a number that ``‖B‖`` exceeds with at most a stated probability over the random vectors.

    For r independent standard normal x, ``‖B‖ ≤ α √(2/π) maxᵢ ‖B xᵢ‖`` except with probability ``α⁻ʳ`` (Halko,
    Martinsson, Tropp 2011, arXiv 0909.4061, lemma 4.1); here ``α = failure^(−1/r)``: 10 as given. It holds for any B,
    square or not, with one product a vector. The bound exceeds ``‖B‖`` by about α times the square root of B's stable
    rank ``‖B‖_F² / ‖B‖²``.

    Args:
        operator: ``x ↦ B x``, linear.
        like: A vector of the shapes and dtypes that it takes.
        vectors: r ≥ 1, the products taken.
        failure: The probability, above 0 and below 1.
        seed: Of the random vectors.

    Returns:
        The bound; NaN where a product is not finite.

    Raises:
        ConfigError: ``vectors`` or ``failure`` is out of range.
    """
    if vectors < 1 or not 0.0 < failure < 1.0:
        raise ConfigError(
            f"a bound of an operator's norm needs vectors of at least 1 and failure between 0 and 1, not {vectors} and "
            f"{failure}"
        )
    generator = torch.Generator().manual_seed(seed)
    sizes = [float(norm(operator(gaussian(like, generator)))) for _ in range(vectors)]
    if not all(map(math.isfinite, sizes)):
        return math.nan
    return math.exp(-math.log(failure) / vectors) * math.sqrt(2 / math.pi) * max(sizes)
