"""A method's hypergradient beside a reference, with all that may explain a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.check.diagnosis import Diagnosis, diagnose, foreign_generators_preserved, reduced_precision
from bilevel.check.references import (
    TOLERATED_DIFFERENCE,
    DenseField,
    GradientField,
    Level,
    Nested,
    PreciseObjective,
    Precision,
    ReferenceValue,
    central_difference,
    dense_fields,
    exact,
    unrolled,
)
from bilevel.check.report import dtype_name
from bilevel.engine import Engine
from bilevel.errors import BilevelError, ConfigError
from bilevel.functional import Objective, PassCount
from bilevel.hypergrad import Estimator, InnerProblem
from bilevel.hypergrad.function import Loss, function_objective, outer_gradients, variables
from bilevel.levels.losses import NestedLosses
from bilevel.randomness import Replay, capture, generator_devices, preserved
from bilevel.result import SolveInfo
from bilevel.vector import Tensors, add, norm, subtract

__all__ = ["REFERENCES", "Comparison", "compare_engine", "compare_functions", "relative_distance"]

REFERENCES = ("exact", "unrolled", "central_difference")

_TOLERATED_NOISE = 1e-6

DENSE_DIMENSION = 1_000
"""Up to so many inner variables, the dense Jacobian is formed for the diagnosis, whatever the reference."""


@dataclass(frozen=True)
class Comparison:
    """Two hypergradients and everything that may explain their difference.

    Attributes:
        names: Of the outer parameters.
        found: The method's hypergradient.
        references: The reference for each outer problem.
        local: The exact formula at the given point, where the reference moved away from it and the Jacobian is small.
        estimators: The methods: one, or those of an engine's inner problems.
        infos: The methods' reports, by inner problem.
        diagnoses: What the probes found, by outer problem.
        precision: How the reference was computed.
        notes: What limits the reference.
        method_error: Relative distance to the same method in float64; NaN where that is not known.
        reduced: What computes in reduced precision.
    """

    names: Sequence[str]
    found: Tensors
    references: Sequence[ReferenceValue]
    local: Tensors | None
    estimators: Sequence[Estimator]
    info: SolveInfo
    diagnoses: Sequence[Diagnosis]
    precision: Precision
    notes: tuple[str, ...] = ()
    method_error: float = math.nan
    reduced: tuple[str, ...] = ()

    @property
    def expected(self) -> Tensors:
        """The reference over all outer parameters."""
        return tuple(part for reference in self.references for part in reference.value)


@dataclass(frozen=True)
class _Result:
    references: Sequence[ReferenceValue]
    local: Tensors | None
    diagnoses: Sequence[Diagnosis]
    nodes: frozenset[str]


def compare_functions(
    inner_loss: Loss, outer_loss: Loss, inner_params: Any, outer_params: Any, estimator: Estimator, reference: str
) -> Comparison:
    """Compares a method with a reference for two functions."""
    inner, inner_structure, outer, outer_structure = variables(inner_params, outer_params)
    devices = generator_devices(inner + outer)
    with preserved(devices), foreign_generators_preserved():
        states, passes = capture(devices), PassCount()
        lower, upper = (
            function_objective(loss, name, inner_structure, outer_structure, Replay(devices, states), passes)
            for loss, name in ((inner_loss, "the inner problem"), (outer_loss, "the outer problem"))
        )
        found, info, point = _total(estimator, lower, upper, inner, outer)

        def nested(precision: Precision) -> list[Nested]:
            level = Level(
                "the inner problem",
                PreciseObjective(lower, precision),
                precision.leaves(point),
                inner_structure.names,
                ("the outer problem",),
            )
            objective = PreciseObjective(upper, precision)
            return [Nested("the outer problem", objective, precision.leaves(outer), outer_structure.names, (level,))]

        precision, result, notes = _in_float64(inner[0].dtype, nested, [found], reference)
        rounding = _distance_to_double(estimator, lower, upper, inner, outer, found, precision)
    return Comparison(
        outer_structure.names,
        found,
        result.references,
        result.local,
        [estimator],
        info,
        result.diagnoses,
        precision,
        notes,
        method_error=rounding,
        reduced=reduced_precision(inner + outer, result.nodes),
    )


def compare_engine(engine: Engine, batches: Mapping[str, Any] | None, reference: str) -> Comparison:
    """Compares an engine's hypergradients with a reference at its current parameters; changes nothing of it."""
    # One batch for every pass: an iterator would give another one to each.
    given = {name: next(batch) if isinstance(batch, Iterator) else batch for name, batch in (batches or {}).items()}
    parameters = tuple(part for problem in engine.problems.values() for part in problem.parameters)
    names: list[str] = []
    found: list[Tensors] = []
    infos: list[SolveInfo] = []
    devices = generator_devices(parameters)
    with foreign_generators_preserved():
        for name in engine.dependencies.outer:
            result = engine.hypergradient(name, given)
            prefix = f"{name}." if len(engine.dependencies.outer) > 1 else ""
            names += [prefix + key for key in result.grad]
            found.append(tuple(result.grad.values()))
            infos.append(result.info)

        def nested(precision: Precision) -> list[Nested]:
            return [_nested(engine, name, given, precision) for name in engine.dependencies.outer]

        with preserved(devices):
            precision, result_, notes = _in_float64(parameters[0].dtype, nested, found, reference)
    info = next((info for info in infos if info.status.failed), infos[0])
    return Comparison(
        names,
        tuple(part for own in found for part in own),
        result_.references,
        result_.local,
        list(engine.estimators.values()),
        info,
        result_.diagnoses,
        precision,
        notes,
        reduced=reduced_precision(parameters, result_.nodes),
    )


def _nested(engine: Engine, outer: str, batches: Mapping[str, Any], precision: Precision) -> Nested:
    losses = engine.losses(outer, batches)
    _draw_in_order(engine, outer, losses)
    levels = tuple(
        Level(
            name,
            PreciseObjective(objective, precision),
            precision.leaves(engine.problems[name].parameters),
            engine.problems[name].parameter_names,
            losses.above[name],
        )
        for name, objective in losses.inner.items()
    )
    problem = engine.problems[outer]
    objective = PreciseObjective(losses.outer, precision)
    return Nested(outer, objective, precision.leaves(problem.parameters), problem.parameter_names, levels)


def _draw_in_order(engine: Engine, outer: str, losses: NestedLosses) -> None:
    """Takes every loss once, the outer one first, as the engine does: later passes replay what they drew."""
    live = {name: engine.problems[name].parameters for name in (outer, *losses.inner)}
    below = tuple(part for name in losses.inner for part in live[name])
    with preserved(generator_devices(below + live[outer])):
        losses.outer.within(below, live[outer], lambda evaluate: evaluate())
        for name, objective in losses.inner.items():
            others = tuple(part for other in losses.above[name] for part in live[other])
            objective.within(live[name], others, lambda evaluate: evaluate())


def _total(
    estimator: Estimator, lower: Objective, upper: Objective, inner: Tensors, outer: Tensors
) -> tuple[Tensors, SolveInfo, Tensors]:
    response = estimator.respond(InnerProblem(lower, inner, outer))
    _, cotangent, direct = outer_gradients(upper, response.point, outer)
    pulled = response.pullback(cotangent, {})
    return add(direct, pulled.value), pulled.info, response.point


def _distance_to_double(
    estimator: Estimator,
    lower: Objective,
    upper: Objective,
    inner: Tensors,
    outer: Tensors,
    found: Tensors,
    precision: Precision,
) -> float:
    """Returns the relative distance to the same method in float64; NaN where it cannot be run so."""
    if not precision.double:
        return math.nan
    objectives = PreciseObjective(lower, precision), PreciseObjective(upper, precision)
    try:
        total, _, _ = _total(estimator, *objectives, precision.leaves(inner), precision.leaves(outer))
    except (BilevelError, RuntimeError):
        return math.nan
    return relative_distance(found, total)


def _in_float64(
    original: torch.dtype, nested: Callable[[Precision], list[Nested]], found: Sequence[Tensors], reference: str
) -> tuple[Precision, _Result, tuple[str, ...]]:
    """Computes the reference in float64, or in the original precision where the losses cannot be run in float64."""
    precision = Precision(original)
    try:
        problems = nested(precision)
        for plain, precise in zip(nested(Precision(original, double=False)), problems, strict=True):
            _require_same_values(plain, precise, original)
        result = _reference(problems, found, reference)
        names = ", ".join(precision.forced)
        note = f"the reference is no better than {dtype_name(original)}: {names} computed in it within the losses"
        return precision, result, (note,) if names else ()
    except BilevelError:
        raise
    except Exception as error:  # whatever user code raises at tensors of another dtype
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if original != torch.float64:
            cause = error
        else:
            raise
    if reference != "exact":
        raise ConfigError(
            f"reference {reference!r} needs losses that can be run in float64: {reason}. Make them follow the dtype of "
            f"their parameters (if they do, {dtype_name(original)} rounds too much away here: hold the parameters in "
            "float64), or take reference='exact', which can do with less"
        ) from cause
    note = f"the losses cannot be run in float64, so the reference is in {dtype_name(original)}: {reason}"
    precision = Precision(original, double=False)
    return precision, _reference(nested(precision), found, reference), (note,)


class _OtherFunctionError(Exception):
    """In float64 the loss is another function."""


def _require_same_values(plain: Nested, precise: Nested, original: torch.dtype) -> None:
    parts: Sequence[tuple[Nested | Level, Nested | Level]]
    parts = [*zip(plain.levels, precise.levels, strict=True), (plain, precise)]
    for single, double in parts:
        first, second = _value(plain, single), _value(precise, double)
        tolerance = max(1e-2, torch.finfo(original).eps ** 0.5) * max(abs(first), abs(second)) + 1e-5
        if not abs(first - second) <= tolerance:
            name = single.objective.name
            raise _OtherFunctionError(f"there the loss of {name} is {second:.6g} instead of {first:.6g}")


def _value(nested: Nested, part: Nested | Level) -> float:
    if isinstance(part, Nested):
        return part.value(part.point)
    above = nested.above(part, nested.point)
    return float(part.objective.within(part.inner, above, lambda evaluate: evaluate().detach()))


def _reference(problems: Sequence[Nested], found: Sequence[Tensors], name: str) -> _Result:
    references, local, diagnoses = [], [], []
    nodes: frozenset[str] = frozenset()
    for nested, own in zip(problems, found, strict=True):
        dense: Mapping[str, DenseField] = {}
        sizes = [sum(part.numel() for part in level.inner) for level in nested.levels]
        if name == "exact" or max(sizes) <= DENSE_DIMENSION:
            dense = dense_fields(nested)
        fields = {key: part.field for key, part in dense.items()} or {
            level.name: GradientField(level.objective, level.inner, nested.above(level, nested.point))
            for level in nested.levels
        }
        nodes = nodes.union(*(field.nodes for field in fields.values()))
        diagnoses.append(diagnose(nested, fields, dense))
        here = exact(nested, dense) if dense else None
        references.append(_computed(name, nested, own, here, _obstacle(diagnoses[-1], name)))
        local.append(here)
    moved = name != "exact" and all(part is not None for part in local)
    together = tuple(part for here in local if here is not None for part in here.value)
    return _Result(references, together if moved else None, diagnoses, nodes)


def _computed(name: str, nested: Nested, found: Tensors, here: ReferenceValue | None, obstacle: str) -> ReferenceValue:
    if name == "exact":
        assert here is not None
        return replace(here, error=math.inf, failure=obstacle) if obstacle else here
    if obstacle:
        nothing = tuple(torch.full_like(part, math.nan) for part in nested.outer)
        return ReferenceValue(nothing, math.inf, "not computed", failure=obstacle)
    return unrolled(nested) if name == "unrolled" else central_difference(nested, found)


def _obstacle(diagnosis: Diagnosis, name: str) -> str:
    """Returns why a reference rests on what a probe shows not to hold; empty where none does."""
    hidden = max(level.hidden.size for level in diagnosis.levels)
    noise = max((found.level for found in diagnosis.noise), default=0.0)
    if noise > _TOLERATED_NOISE:
        return f"two evaluations of a loss at the same point differ by {noise:.1e}"
    if name == "central_difference":
        return ""
    if diagnosis.outer_hidden > TOLERATED_DIFFERENCE:
        return "it takes the outer loss's gradient by autograd, which does not see all of it: take 'central_difference'"
    if any(level.hidden.at_a_kink for level in diagnosis.levels):
        return "the inner gradient jumps at the given point, where it has no derivative"
    if name == "unrolled" and hidden > TOLERATED_DIFFERENCE:
        return (
            "reverse mode sees what autograd sees, which is not all of how the inner gradient changes: take 'exact' or "
            "'central_difference'"
        )
    return ""


def relative_distance(found: Tensors, expected: Tensors) -> float:
    """Returns ``‖found − expected‖ / ‖expected‖`` in float64: infinite for NaN, or where only the latter vanishes."""
    found, expected = (tuple(part.detach().double() for part in side) for side in (found, expected))
    error, size = float(norm(subtract(found, expected))), float(norm(expected))
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 and not math.isnan(error) else math.inf
