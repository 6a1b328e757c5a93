"""Any method against a reference, on the user's own problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, overload

from bilevel.check.causes import likely_causes
from bilevel.check.comparison import REFERENCES, Comparison, compare_engine, compare_functions, relative_distance
from bilevel.check.report import HypergradientReport, ParameterComparison
from bilevel.engine import Engine
from bilevel.errors import ConfigError, HypergradientCheckError, ParameterError, unknown_name
from bilevel.hypergrad import Estimator, as_estimator
from bilevel.hypergrad.function import Loss
from bilevel.validation import check_number
from bilevel.vector import Tensors, norm

__all__ = ["HypergradientReport", "ParameterComparison", "hypergradcheck"]


@overload
def hypergradcheck(
    inner_loss: Engine,
    *,
    reference: str = "exact",
    rtol: float = 1e-3,
    raise_on_failure: bool = False,
    batches: Mapping[str, Any] | None = None,
) -> HypergradientReport: ...


@overload
def hypergradcheck(
    inner_loss: Loss,
    outer_loss: Loss,
    inner_params: Any,
    outer_params: Any,
    method: Estimator | str | Mapping[str, Any],
    *,
    reference: str = "exact",
    rtol: float = 1e-3,
    raise_on_failure: bool = False,
) -> HypergradientReport: ...


def hypergradcheck(
    inner_loss: Loss | Engine,
    outer_loss: Loss | None = None,
    inner_params: Any = None,
    outer_params: Any = None,
    method: Estimator | str | Mapping[str, Any] | None = None,
    *,
    reference: str = "exact",
    rtol: float = 1e-3,
    raise_on_failure: bool = False,
    batches: Mapping[str, Any] | None = None,
) -> HypergradientReport:
    """Compares a hypergradient with a reference: ``hypergradcheck(f, F, w, λ, method)``, ``hypergradcheck(engine)``.

    References are computed in float64, whatever the losses close over, and say how far they are to be trusted:

    - ``"exact"``: ``∂F/∂λ − qᵀ ∂g/∂λ`` with ``g = ∂f/∂w`` and ``(∂g/∂w)ᵀ q = ∂F/∂w``, solved with the dense Jacobian
      where the method takes the outer loss: at ``inner_params``, or at the end of the steps of ``Unrolled``. It judges
      the method alone, wherever the inner parameters are.
    - ``"unrolled"``: reverse mode through as many gradient steps on f as it takes to solve the inner problem.
    - ``"central_difference"``: central differences of ``F(w*(λ), λ)``, with the inner problem solved again for every λ.
      No second derivative and no formula enters.

    The last two start at ``inner_params`` and end at the solution, so that they also judge how well the inner problem
    is solved. They differ where a ``detach()`` hides a derivative: reverse mode does not see it, solving again does,
    and so does ``"exact"``, which then takes differences of g. A check whose reference is less certain than ``rtol``
    does not pass: its verdict is *undecided*.

    For ``Unrolled`` the error is that of truncation; for ``Identity`` and ``FiniteDifference`` that of ``H⁻¹ ≈ I``.
    What a method loses by rounding is told apart as ``method_error``. Random numbers are the same on all sides. An
    engine is checked at its current parameters, by each inner problem's own method, on the batches that come next;
    nothing of it changes. Python's and NumPy's global generators are left as they were.

    Args:
        inner_loss: f, or an engine.
        outer_loss: F; see :func:`~bilevel.hypergradient` for this and the next three.
        inner_params: w.
        outer_params: λ.
        method: What is checked.
        reference: ``"exact"``, ``"unrolled"`` or ``"central_difference"``.
        rtol: Largest relative error that passes.
        raise_on_failure: Whether to raise where the check fails.
        batches: For an engine: batches by problem name, where problems have no data of their own.

    Returns:
        A report; ``print`` it.

    Raises:
        HypergradientCheckError: The check failed and ``raise_on_failure`` is set.
        ConfigError: More than 5,000 inner variables for ``"exact"``; losses that cannot be run in float64, for the
            other references; arguments that do not belong together.
        UnknownNameError: Another reference.

    Cost, in passes of f in float64 for n inner variables, beside the method's: some 30 for the probes; with up to 1,000
    (``"exact"``: 5,000) variables n more, O(n²) memory and O(n³) operations. ``"unrolled"``: about ``30 √κ`` steps and
    products for the condition number κ. ``"central_difference"``: 4 to 20 solves a direction of λ (at most 64 of them,
    or two for every parameter tensor), of some 10 passes each.

    Example:
        >>> import torch
        >>> H = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
        >>> def inner(w, lam):
        ...     return w @ H @ w / 2 - w @ lam
        >>> def outer(w, lam):
        ...     return w.square().sum() / 2
        >>> lam = torch.tensor([1.0, -1.0])
        >>> report = hypergradcheck(inner, outer, torch.linalg.solve(H, lam), lam, "conjugate_gradient")
        >>> report.passed
        True
        >>> hypergradcheck(inner, outer, torch.linalg.solve(H, lam), lam, "identity").passed      # H is not I
        False
    """
    if reference not in REFERENCES:
        raise unknown_name("reference", str(reference), REFERENCES)
    check_number("hypergradcheck", "rtol", rtol, minimum=0.0)
    if isinstance(inner_loss, Engine):
        if any(part is not None for part in (outer_loss, inner_params, outer_params, method)):
            raise ConfigError(
                "hypergradcheck(engine) takes losses, parameters and methods from the engine: leave them out"
            )
        comparison = compare_engine(inner_loss, batches, reference)
    else:
        if outer_loss is None or method is None or batches is not None or not callable(outer_loss):
            raise ParameterError(
                "hypergradcheck needs an engine, or (inner_loss, outer_loss, inner_params, outer_params, method) with "
                "losses that are functions of (inner_params, outer_params)"
            )
        comparison = compare_functions(
            inner_loss, outer_loss, inner_params, outer_params, as_estimator(method), reference
        )
    report = _report(comparison, reference, rtol)
    if raise_on_failure and not report.passed:
        raise HypergradientCheckError(str(report))
    return report


def _report(comparison: Comparison, reference: str, rtol: float) -> HypergradientReport:
    total = _compare(comparison.found, comparison.expected)
    parts = zip(comparison.names, comparison.found, comparison.expected, strict=True)
    levels = [level for diagnosis in comparison.diagnoses for level in diagnosis.levels]
    uncertainty = _uncertainty(comparison)
    local = comparison.local
    report = HypergradientReport(
        passed=total.relative_error <= rtol and uncertainty <= rtol,
        relative_error=total.relative_error,
        cosine=total.cosine,
        rtol=rtol,
        per_parameter={name: _compare((found,), (expected,)) for name, found, expected in parts},
        info=comparison.info,
        method=", ".join(dict.fromkeys(map(str, comparison.estimators))),
        reference=reference,
        reference_dtype=comparison.precision.effective,
        method_error=comparison.method_error,
        inner_gradient_norm=max(level.gradient_norm for level in levels),
        inner_distance=_distance(comparison),
        asymmetry=max(level.asymmetry for level in levels),
        hidden=max(level.hidden.size for level in levels),
        curvature=(min(level.eigenvalues[0] for level in levels), max(level.eigenvalues[1] for level in levels)),
        reference_error=uncertainty,
        reference_details="; ".join(dict.fromkeys(part.details for part in comparison.references)),
        reference_failure="; ".join(dict.fromkeys(part.failure for part in comparison.references if part.failure)),
        local_error=math.nan if local is None else relative_distance(comparison.found, local),
    )
    return replace(report, causes=likely_causes(report, comparison))


def _uncertainty(comparison: Comparison) -> float:
    """The reference's error, relative to its norm."""
    error = math.hypot(*(part.error for part in comparison.references))
    size = float(norm([part.detach() for part in comparison.expected]))
    if error == 0.0 or (size == 0.0 and not any(bool(part.any()) for part in comparison.found)):
        return 0.0 if math.isfinite(error) else math.inf
    return error / size if size > 0 else math.inf


def _distance(comparison: Comparison) -> float:
    """How far the inner problems are from solved: measured where the reference solved them, else one Newton step."""
    known = [
        max(level.distance for level in diagnosis.levels) if reference.solved is None else reference.solved
        for reference, diagnosis in zip(comparison.references, comparison.diagnoses, strict=True)
    ]
    return max(known)


def _compare(found: Tensors, expected: Tensors) -> ParameterComparison:
    size, other = (float(norm([part.detach() for part in side])) for side in (expected, found))
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(found, expected, strict=True))
    cosine = product / (size * other) if size > 0 and other > 0 else math.nan
    return ParameterComparison(relative_distance(found, expected), cosine, size)
