"""Is a hypergradient right, and if not, what is it?"""

from __future__ import annotations

import math

import numpy as np

from benchmarks.peers.side import Reference

__all__ = ["cosine", "error", "reason"]

PARALLEL = 2e-2  # relative distance from a multiple of something, up to which it is called that
COMMON = {"the sign is flipped": -1.0}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns ``‖a − b‖ / ‖b‖``; NaN where a is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.nan
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else math.inf


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the cosine of the angle between the two; NaN where one is zero or not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.nan
    size = float(np.linalg.norm(found) * np.linalg.norm(expected))
    return float(found @ expected) / size if size else math.nan


def reason(found: np.ndarray, reference: Reference, tolerance: float) -> str:
    """Returns why a hypergradient is wrong, or an empty text where it is right.

    It is right within ``tolerance`` of the method's own value in float64. If not it is compared with that value, with
    the exact one and with the reference's other values, each up to a factor; the closest is named.
    """
    own = reference.own
    if found.shape != own.shape:
        return f"{found.size} numbers instead of {own.size}"
    if not np.isfinite(found).all():
        return f"{int((~np.isfinite(found)).sum())} of {found.size} numbers are not finite"
    if error(found, own) <= tolerance:
        return ""
    if not found.any():
        return "zero"
    candidates = {"": own, **reference.others}
    if reference.exact is not None:
        candidates["the exact hypergradient"] = reference.exact
    distances = {name: error(found, value) for name, value in candidates.items() if name}
    name = min(distances, key=lambda key: distances[key], default="")
    if name and distances[name] <= max(tolerance, PARALLEL / 10):
        return f"it is {name}"
    near = {}
    for name, value in candidates.items():
        factor = float(found @ value) / float(value @ value) if value.any() else 0.0
        if factor:
            near[name] = (error(found, factor * value), factor)
    if near:
        name = min(near, key=lambda key: near[key][0])
        distance, factor = near[name]
        if distance <= PARALLEL:
            causes = {**COMMON, **reference.factors}
            cause = next((text for text, x in causes.items() if abs(factor / x - 1) < PARALLEL), "")
            # A factor without a cause tells something of the right value only, and 1 is none.
            if cause or (not name and abs(factor - 1) > PARALLEL):
                return f"{factor:.3g} × {name or 'the right value'}" + (f": {cause}" if cause else "")
    return f"{error(found, own):.2g} away from the method's value, cosine {cosine(found, own):.3f}"
