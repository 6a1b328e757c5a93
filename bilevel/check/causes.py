"""What may explain a hypergradient's error, in words; each from what a probe found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from bilevel.check.comparison import Comparison
from bilevel.check.diagnosis import LevelDiagnosis, Noise
from bilevel.check.references import TOLERATED_DIFFERENCE
from bilevel.check.report import HypergradientReport
from bilevel.result import Status

__all__ = ["likely_causes"]

_ROUNDING = {torch.float64: 1e-6}
_HIDDEN_ASYMMETRY = 1e-5
_MOST_NAMES = 5


def likely_causes(report: HypergradientReport, comparison: Comparison) -> tuple[str, ...]:
    """Returns what may explain an error, or weaken a success, most likely first."""
    levels = [level for diagnosis in comparison.diagnoses for level in diagnosis.levels]
    noise = [_noise(noise) for diagnosis in comparison.diagnoses for noise in diagnosis.noise]
    if noise:  # what the other probes found rests on differences of a function, which these losses are not
        return (*comparison.notes, *noise)
    found = (
        *comparison.notes,
        *_jumps(report, comparison, levels),
        *_stop_gradients(report, comparison, levels),
        *_local(report),
        *(() if report.passed else _of_the_method(report, comparison)),
        *_unsolved(report),
        *_minimum(report, levels),
        *_dependencies(comparison, levels),
    )
    return tuple(dict.fromkeys(found))


def _noise(noise: Noise) -> str:
    source = (
        noise.source or "a generator of its own (torch.Generator, numpy.random.default_rng) or state that it changes"
    )
    return (
        f"randomness between passes: two evaluations of the loss of {noise.loss} at the same point differ by "
        f"{noise.level:.1e} (relative), drawn from {source}. Passes of one derivative must see one function: draw from "
        "torch's default generator, which is replayed, or outside the loss"
    )


def _jumps(report: HypergradientReport, comparison: Comparison, levels: Iterable[LevelDiagnosis]) -> Iterator[str]:
    for level in levels:
        names = f" ({', '.join(level.operations)} in its loss)" if level.operations else ""
        if level.hidden.at_a_kink:
            yield (
                f"not smooth: the inner gradient of {level.name} jumps at the given point{names}: its one-sided "
                "derivatives differ. No formula with second derivatives holds there: smooth the operation, or keep the "
                "variables that stand on the kink fixed"
            )
        elif level.near_kink and (not report.passed or report.reference == "central_difference"):
            yield (
                f"not smooth: differences of the inner gradient of {level.name} over a thousandth of its parameters' "
                f"size are not its derivative{names}: kinks lie close to the point. Autograd's derivative holds "
                "between two kinks only; a smooth operation (softplus, gelu, tanh) tells whether this is the cause"
            )
    if any(diagnosis.outer_kink for diagnosis in comparison.diagnoses):
        yield "not smooth: the outer loss has a kink at the given point, and its one-sided derivatives differ there"


def _stop_gradients(
    report: HypergradientReport, comparison: Comparison, levels: Iterable[LevelDiagnosis]
) -> Iterator[str]:
    for level in levels:
        if level.hidden.size > TOLERATED_DIFFERENCE and not level.hidden.at_a_kink:
            yield _hidden(level)
        elif level.asymmetry > _ROUNDING.get(report.reference_dtype, 1e-3):
            yield (
                f"the inner gradient's Jacobian is not symmetric (relative asymmetry {level.asymmetry:.1e}): a custom "
                f"backward pass in the loss of {level.name}, or a game. Autograd sees it: 'gmres', 'exact' and "
                "'neumann' solve with its transpose and are right, 'conjugate_gradient' and 'minres' need symmetry"
            )
    hidden = max((diagnosis.outer_hidden for diagnosis in comparison.diagnoses), default=math.nan)
    if hidden > TOLERATED_DIFFERENCE and not any(diagnosis.outer_kink for diagnosis in comparison.diagnoses):
        yield (
            f"a stop-gradient in the outer loss: its gradient by autograd misses {hidden:.1%} of its differences. No "
            "method can know what a detach(), .data or no_grad() hides there"
        )


def _hidden(level: LevelDiagnosis) -> str:
    missed = level.hidden
    sides = (("its own parameters", missed.along_inner), ("the outer ones", missed.along_outer))
    where = " and ".join(name for name, size in sides if size > TOLERATED_DIFFERENCE)
    text = (
        f"a stop-gradient: autograd misses {missed.size:.1%} of how the inner gradient of {level.name} changes with "
        f"{where}; its loss holds a detach(), .data or no_grad(). "
    )
    if missed.asymmetry > _HIDDEN_ASYMMETRY:
        text += (
            f"The field that the inner steps follow is no gradient: its Jacobian is not symmetric (relative asymmetry "
            f"{missed.asymmetry:.1e} by differences, {missed.seen_asymmetry:.1e} as autograd has it), so that "
            "'conjugate_gradient' and 'minres' do not apply to it. "
        )
    if missed.along_outer > TOLERATED_DIFFERENCE:
        return text + "No method sees what is hidden on the way from the outer parameters: let gradients flow there"
    return text + (
        "Method 'exact' or 'gmres' with products='field' takes the field's own Jacobian, by differences, and gives the "
        "derivative of where the inner steps end. Or let gradients flow there"
    )


def _local(report: HypergradientReport) -> Iterator[str]:
    """The method is right where it stands, which is not where the solution is."""
    if _only_unsolved(report):
        yield (
            f"the inner problem is not solved: its parameters are {report.inner_distance:.1e} (relative) from the "
            "solution, where the reference is taken. Where they are, the method is right to "
            f"{report.local_error:.1e}: take more inner steps, or judge the method alone with reference='exact'"
        )


def _only_unsolved(report: HypergradientReport) -> bool:
    far = report.inner_distance > report.rtol / 10
    return report.verdict == "FAILED" and far and report.local_error <= report.rtol


def _of_the_method(report: HypergradientReport, comparison: Comparison) -> Iterator[str]:
    low, high = report.curvature
    info, own = report.info, report.method_error
    if info.status.failed:
        yield f"the method says so itself: {info.method} ended as '{info.status.value}': {info.status.remedy}"
    if comparison.reduced:
        yield (
            f"reduced precision: {', '.join(comparison.reduced)}. Hold parameters in float32 or better, and switch "
            "TF32 off, where hypergradients are taken"
        )
    if own > report.rtol:
        yield (
            f"rounding: the same method in float64 differs by {own:.1e}; the inner Hessian's condition number is "
            f"{high / low if low > 0 else math.inf:.1e}. Hold the parameters in float64, or damp"
        )
    elif own == own and report.verdict == "FAILED" and not _only_unsolved(report):
        yield f"the method's approximation, not rounding: the same method in float64 differs by {own:.1e} only"
    names = {estimator.name for estimator in comparison.estimators}
    if names & {"identity", "finite_difference"}:
        yield f"the method takes H⁻¹ = I, while the inner curvature lies between {low:.2e} and {high:.2e}"
    if "unrolled" in names:
        yield "the method differentiates a limited number of steps: more come closer to the solution's derivative"
    if any(estimator.needs_state for estimator in comparison.estimators):
        yield "the method continues from its last call, and comes closer from one call to the next"
    damping = max(getattr(estimator, "damping", 0.0) for estimator in comparison.estimators)
    if damping > 0:
        yield f"damping {damping:g} changes the system; the smallest eigenvalue of the inner Hessian is {low:.2e}"
    if info.status is Status.STOPPED_AT_CAP and info.residual > report.rtol:
        yield f"the solve stopped at relative residual {info.residual:.1e}: allow more products"


def _unsolved(report: HypergradientReport) -> Iterator[str]:
    if not report.inner_distance > max(report.rtol, 1e-3) or _only_unsolved(report):
        return
    text = f"the inner problem is not solved: its parameters are about {report.inner_distance:.1e} (relative) from a "
    if report.reference == "exact":
        text += (
            "solution, and the solution's derivative is off by about as much in all implicit methods, the reference "
            "too (reference='central_difference' solves it first)"
        )
    else:
        text += "solution, where the reference is taken: take more inner steps"
    yield text


def _minimum(report: HypergradientReport, levels: Iterable[LevelDiagnosis]) -> Iterator[str]:
    low, high = report.curvature
    if any(level.singular for level in levels):
        yield "the inner Hessian is singular: the solution is not unique, and the reference is the one of least norm"
    elif low <= -1e-12 * abs(high) or (low <= 0 and not any(level.estimated for level in levels)):
        yield f"the inner parameters are no minimum: the inner Hessian has the eigenvalue {low:.2e}"


def _dependencies(comparison: Comparison, levels: Iterable[LevelDiagnosis]) -> Iterator[str]:
    gathered = {
        key: [name for diagnosis in comparison.diagnoses for name in getattr(diagnosis, key)]
        for key in ("unseen", "disconnected", "unused")
    }
    if gathered["unseen"]:
        yield (
            f"wrong dependency: {_names(gathered['unseen'])} changes a loss, but autograd has no path from it: a "
            "detach(), .item(), .data or NumPy on the way. Its gradient is zero for every method"
        )
    if gathered["disconnected"]:
        yield (
            f"wrong dependency: the outer parameter {_names(gathered['disconnected'])} reaches neither the inner "
            "gradient nor the outer loss: its hypergradient is zero"
        )
    if gathered["unused"]:
        yield (
            f"the outer loss does not depend on the inner parameter {_names(gathered['unused'])}: its response counts "
            "for nothing"
        )
    ignored = [name for level in levels for name in level.ignored]
    if ignored:
        yield f"the inner loss does not depend on the inner parameter {_names(ignored)}: it responds to nothing"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMES]) + more
