"""Any method against an exact reference, on the user's own problem."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from bilevel.comparison import Comparison, compare_engine, compare_functions, dtype_name, relative_distance
from bilevel.engine import Engine
from bilevel.errors import ConfigError, HypergradientCheckError, ParameterError, unknown_name
from bilevel.hypergrad import Estimator, as_estimator
from bilevel.hypergrad.function import Loss
from bilevel.reference import TOLERATED_DIFFERENCE
from bilevel.result import SolveInfo, Status
from bilevel.validation import check_number
from bilevel.vector import Tensors, norm

__all__ = ["HypergradientReport", "ParameterComparison", "hypergradcheck"]

_REFERENCES = ("exact",)
_LONGEST_TABLE = 20


@dataclass(frozen=True)
class ParameterComparison:
    """One outer parameter's part of a hypergradient.

    Attributes:
        relative_error: ``‖g − r‖ / ‖r‖`` for the method's g and the reference r; infinite where only r vanishes.
        cosine: Of the angle between them; NaN where one of them vanishes.
        norm: ``‖r‖``.
    """

    relative_error: float
    cosine: float
    norm: float


@dataclass(frozen=True)
class HypergradientReport:
    """How a method's hypergradient compares with the reference; ``print`` it.

    Attributes:
        passed: Whether ``relative_error <= rtol``.
        relative_error: ``‖g − r‖ / ‖r‖`` over all outer parameters.
        cosine: Of the angle between the two.
        rtol: The tolerance.
        per_parameter: The same by parameter.
        info: The method's own report.
        method: Its configuration.
        reference: Name of the reference.
        reference_dtype: Its precision: float64, or that of the parameters where the losses could not be run in float64.
        method_error: Relative distance to the same method computed in float64, which is rounding; NaN for an engine.
        inner_gradient_norm: ``‖∂f/∂w‖`` at the inner parameters.
        inner_distance: About how far the inner parameters are from a solution of the inner problem, relative to their
            size: one Newton step.
        asymmetry: Relative asymmetry of the inner gradient's Jacobian; above rounding, the field that the inner problem
            follows is no gradient: a ``detach()`` or a custom backward pass is in its loss.
        hidden: What autograd's derivative of the inner gradient misses, relatively: what a ``detach()`` hides. The
            reference is then taken by differences of the inner gradient. NaN where the reference is not float64.
        curvature: Smallest and largest eigenvalue of the inner Hessian.
        causes: What may explain an error, or weaken a success, most likely first.
    """

    passed: bool
    relative_error: float
    cosine: float
    rtol: float
    per_parameter: Mapping[str, ParameterComparison]
    info: SolveInfo
    method: str
    reference: str
    reference_dtype: torch.dtype
    method_error: float
    inner_gradient_norm: float
    inner_distance: float
    asymmetry: float
    hidden: float
    curvature: tuple[float, float]
    causes: tuple[str, ...] = ()

    def explain(self) -> str:
        """Returns the report as text: verdict, inner problem, a table by parameter (worst first) and likely causes."""
        verdict = "passed" if self.passed else "FAILED"
        distance = f"about {self.inner_distance:.1e} (relative) from a solution"
        lines = [
            f"{self.method} against {self.reference} in {dtype_name(self.reference_dtype)}: {verdict}",
            f"  relative error {self.relative_error:.2e} (tolerance {self.rtol:.0e}), cosine {self.cosine:.6f}",
            f"  inner gradient norm {self.inner_gradient_norm:.2e}, {distance}",
            f"  inner curvature between {self.curvature[0]:.2e} and {self.curvature[1]:.2e}",
            f"  {self.info.explain()}",
            *_table(self.per_parameter),
        ]
        lines += [f"  - {cause}" for cause in self.causes]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The same as :meth:`explain`."""
        return self.explain()


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
    """Compares a hypergradient with the exact one: ``hypergradcheck(f, F, w, λ, method)``, ``hypergradcheck(engine)``.

    The reference ``"exact"`` is ``∂F/∂λ − qᵀ ∂g/∂λ`` with ``g = ∂f/∂w`` and ``(∂g/∂w)ᵀ q = ∂F/∂w``, solved with the
    dense Jacobian, computed in float64: the losses run with every floating-point tensor upcast, also those that
    they close over. Where that is impossible the report says so, and the reference has the precision of the
    parameters. Random numbers are the same on both sides.

    It is taken where the method takes the outer loss: at ``inner_params``, or at the end of the steps of ``Unrolled``.
    For ``Unrolled`` the error is thus that of truncation; for ``Identity`` and ``FiniteDifference`` that of
    ``H⁻¹ ≈ I``. What a method loses by rounding is told apart as ``method_error``. An engine is checked at its current
    parameters, by each inner problem's own method, on the batches that come next; nothing of it changes.

    Args:
        inner_loss: f, or an engine.
        outer_loss: F; see :func:`~bilevel.hypergradient` for this and the next three.
        inner_params: w.
        outer_params: λ.
        method: What is checked.
        reference: ``"exact"``.
        rtol: Largest relative error that passes.
        raise_on_failure: Whether to raise where the check fails.
        batches: For an engine: batches by problem name, where problems have no data of their own.

    Returns:
        A report; ``print`` it.

    Raises:
        HypergradientCheckError: The check failed and ``raise_on_failure`` is set.
        ConfigError: More than 5,000 inner variables, or arguments that do not belong together.
        UnknownNameError: Another reference.

    Cost: the method's, and n + 3 passes in float64, O(n²) memory and O(n³) operations for n inner variables.

    Example:
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
    if reference not in _REFERENCES:
        raise unknown_name("reference", str(reference), _REFERENCES)
    check_number("hypergradcheck", "rtol", rtol, minimum=0.0)
    if isinstance(inner_loss, Engine):
        if any(part is not None for part in (outer_loss, inner_params, outer_params, method)):
            raise ConfigError(
                "hypergradcheck(engine) takes losses, parameters and methods from the engine: leave them out"
            )
        comparison = compare_engine(inner_loss, batches)
    else:
        if outer_loss is None or method is None or batches is not None or not callable(outer_loss):
            raise ParameterError(
                "hypergradcheck needs an engine, or (inner_loss, outer_loss, inner_params, outer_params, method) with "
                "losses that are functions of (inner_params, outer_params)"
            )
        comparison = compare_functions(inner_loss, outer_loss, inner_params, outer_params, as_estimator(method))
    report = _report(comparison, reference, rtol)
    if raise_on_failure and not report.passed:
        raise HypergradientCheckError(str(report))
    return report


def _report(comparison: Comparison, reference: str, rtol: float) -> HypergradientReport:
    total = _compare(comparison.found, comparison.expected)
    parts = zip(comparison.names, comparison.found, comparison.expected, strict=True)
    responses = comparison.responses
    forced = bool(comparison.precision.forced)
    report = HypergradientReport(
        passed=total.relative_error <= rtol,
        relative_error=total.relative_error,
        cosine=total.cosine,
        rtol=rtol,
        per_parameter={name: _compare((found,), (expected,)) for name, found, expected in parts},
        info=comparison.info,
        method=", ".join(dict.fromkeys(map(str, comparison.estimators))),
        reference=reference,
        reference_dtype=comparison.precision.original if forced else comparison.precision.dtype,
        method_error=comparison.method_error,
        inner_gradient_norm=max(response.gradient_norm for response in responses),
        inner_distance=max(response.distance for response in responses),
        asymmetry=max(response.asymmetry for response in responses),
        hidden=max(response.hidden for response in responses),
        curvature=(
            min(response.eigenvalues[0] for response in responses),
            max(response.eigenvalues[1] for response in responses),
        ),
    )
    return replace(report, causes=(*comparison.notes, *_causes(report, comparison)))


def _causes(report: HypergradientReport, comparison: Comparison) -> Iterator[str]:
    low, high = report.curvature
    if report.hidden > TOLERATED_DIFFERENCE:
        yield (
            f"autograd misses {report.hidden:.1%} of how the inner gradient changes: the inner loss holds a detach(), "
            ".data or no_grad() (or stands on a kink). The reference was taken by differences of the gradient; methods "
            "see what autograd sees, and 'finite_difference' differentiates the loss. Let gradients flow there"
        )
    rounding = 1e-6 if report.reference_dtype == torch.float64 else 1e-3
    if report.asymmetry > rounding:
        yield (
            f"the inner gradient's Jacobian is not symmetric (relative asymmetry {report.asymmetry:.1e}): a detach() "
            "or custom backward in the inner loss. 'conjugate_gradient' needs symmetry, 'exact' and 'neumann' do not"
        )
    if any(response.singular for response in comparison.responses):
        yield "the inner Hessian is singular: the solution is not unique, and the reference is the one of least norm"
    elif low <= 0:
        yield f"the inner parameters are no minimum: the inner Hessian has the eigenvalue {low:.2e}"
    if not report.passed:
        yield from _causes_of_failure(report, comparison, low, high)
    if report.inner_distance > max(report.rtol, 1e-3):
        yield (
            f"the inner problem is not solved: its parameters are about {report.inner_distance:.1e} (relative) from a "
            "solution, and the solution's derivative is off by about as much in all implicit methods, the reference too"
        )


def _causes_of_failure(report: HypergradientReport, comparison: Comparison, low: float, high: float) -> Iterator[str]:
    names = {estimator.name for estimator in comparison.estimators}
    own = report.method_error
    if own > report.rtol:
        yield (
            f"rounding: the same method in float64 differs by {own:.1e}; the inner Hessian's condition number is "
            f"{high / low if low > 0 else math.inf:.1e}. Hold the parameters in float64, or damp"
        )
    elif own == own:
        yield f"the method's approximation, not rounding: the same method in float64 differs by {own:.1e} only"
    if names & {"identity", "finite_difference"}:
        yield f"the method takes H⁻¹ = I, while the inner curvature lies between {low:.2e} and {high:.2e}"
    if "unrolled" in names:
        yield "the method differentiates a limited number of steps: more come closer to the solution's derivative"
    damping = max(getattr(estimator, "damping", 0.0) for estimator in comparison.estimators)
    if damping > 0:
        yield f"damping {damping:g} changes the system; the smallest eigenvalue of the inner Hessian is {low:.2e}"
    residual = report.info.residual
    if report.info.status is Status.STOPPED_AT_CAP and residual > report.rtol:
        yield f"the solve stopped at relative residual {residual:.1e}: allow more products"


def _compare(found: Tensors, expected: Tensors) -> ParameterComparison:
    size, other = (float(norm([part.detach() for part in side])) for side in (expected, found))
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(found, expected, strict=True))
    cosine = product / (size * other) if size > 0 and other > 0 else math.nan
    return ParameterComparison(relative_distance(found, expected), cosine, size)


def _table(parts: Mapping[str, ParameterComparison]) -> Iterator[str]:
    width = max(len("parameter"), *(len(name) for name in parts))
    yield f"  {'parameter':{width}}  relative error    cosine      norm"
    worst = sorted(parts.items(), key=lambda item: -item[1].relative_error)
    for name, part in worst[:_LONGEST_TABLE]:
        yield f"  {name:{width}}  {part.relative_error:14.2e}  {part.cosine:8.5f}  {part.norm:8.2e}"
    if len(parts) > _LONGEST_TABLE:
        yield f"  … and {len(parts) - _LONGEST_TABLE} more"
