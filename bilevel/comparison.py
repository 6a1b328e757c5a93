"""A method's hypergradient beside the exact one, with all that may explain a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import reference as exact
from bilevel.engine import Engine
from bilevel.errors import BilevelError
from bilevel.feed import Feed
from bilevel.functional import ModuleObjective, Objective, PassCount, buffers_protected, leaves
from bilevel.hypergrad import Estimator, InnerProblem
from bilevel.hypergrad.function import Loss, function_objective, outer_gradients, variables
from bilevel.problems.differentiate import InnerRecord
from bilevel.randomness import Replay, capture, generator_devices, preserved
from bilevel.reference import ExactResponse, PreciseObjective, Precision
from bilevel.result import SolveInfo
from bilevel.vector import Tensors, add, norm, subtract

__all__ = ["Comparison", "compare_engine", "compare_functions", "dtype_name", "relative_distance"]


@dataclass(frozen=True)
class Comparison:
    """Two hypergradients and everything that may explain their difference.

    Attributes:
        names: Of the outer parameters.
        found: The method's hypergradient.
        expected: The exact one.
        estimators: The methods: one, or those of an engine's inner problems.
        info: The method's report.
        responses: The exact best-response products.
        precision: How the exact one was computed.
        notes: What limits the exact one.
        method_error: Relative distance to the same method in float64; NaN where that is not known.
    """

    names: Sequence[str]
    found: Tensors
    expected: Tensors
    estimators: Sequence[Estimator]
    info: SolveInfo
    responses: Sequence[ExactResponse]
    precision: Precision
    notes: tuple[str, ...] = ()
    method_error: float = math.nan


def compare_functions(
    inner_loss: Loss, outer_loss: Loss, inner_params: Any, outer_params: Any, estimator: Estimator
) -> Comparison:
    """Compares a method with the exact hypergradient of two functions."""
    inner, inner_structure, outer, outer_structure = variables(inner_params, outer_params)
    devices = generator_devices(inner + outer)
    with preserved(devices):
        states, passes = capture(devices), PassCount()
        lower, upper = (
            function_objective(loss, name, inner_structure, outer_structure, Replay(devices, states), passes)
            for loss, name in ((inner_loss, "the inner problem"), (outer_loss, "the outer problem"))
        )
        found, info, point = _total(estimator, lower, upper, inner, outer)

        def expected(precision: Precision) -> tuple[Tensors, list[ExactResponse]]:
            w, lam = precision.leaves(point), precision.leaves(outer)
            cotangent, direct = exact.outer_gradients(PreciseObjective(upper, precision), w, lam)
            response = exact.best_response(PreciseObjective(lower, precision), w, lam, cotangent)
            return add(direct, response.value), [response]

        precision, (total, responses), notes = _in_float64(
            inner[0].dtype, expected, [(lower, leaves(point), outer), (upper, leaves(point), outer)]
        )
        rounding = _distance_to_double(estimator, lower, upper, inner, outer, found, precision)
    return Comparison(
        outer_structure.names, found, total, [estimator], info, responses, precision, notes, method_error=rounding
    )


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
    original: torch.dtype,
    expected: Callable[[Precision], tuple[Tensors, list[ExactResponse]]],
    points: Sequence[tuple[Objective, Tensors, Tensors]],
) -> tuple[Precision, tuple[Tensors, list[ExactResponse]], tuple[str, ...]]:
    """Computes the reference in float64, or in the original precision where the losses cannot be run in float64."""
    precision = Precision(original)
    try:
        for objective, inner, outer in points:
            _require_same_value(objective, inner, outer, precision)
        result = expected(precision)
        names = ", ".join(precision.forced)
        note = f"the reference is no better than {dtype_name(original)}: {names} computed in it within the losses"
        return precision, result, (note,) if names else ()
    except BilevelError:
        raise
    except Exception as error:  # whatever user code raises at tensors of another dtype
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    note = f"the losses cannot be run in float64, so the reference is in {dtype_name(original)}: {reason}"
    precision = Precision(original, double=False)
    return precision, expected(precision), (note,)


class _OtherFunctionError(Exception):
    """In float64 the loss is another function."""


def _require_same_value(objective: Objective, inner: Tensors, outer: Tensors, precision: Precision) -> None:
    plain = float(objective.within(inner, outer, lambda evaluate: evaluate().detach()))
    w, lam = precision.leaves(inner), precision.leaves(outer)
    precise = float(PreciseObjective(objective, precision).within(w, lam, lambda evaluate: evaluate().detach()))
    tolerance = max(1e-2, torch.finfo(precision.original).eps ** 0.5) * max(abs(plain), abs(precise)) + 1e-5
    if not abs(plain - precise) <= tolerance:
        raise _OtherFunctionError(f"there the loss of {objective.name} is {precise:.6g} instead of {plain:.6g}")


def compare_engine(engine: Engine, batches: Mapping[str, Any] | None) -> Comparison:
    """Compares an engine's hypergradients with the exact ones at its current parameters; changes nothing of it."""
    # One batch for every pass: an iterator would give another one to each.
    given = {name: next(batch) if isinstance(batch, Iterator) else batch for name, batch in (batches or {}).items()}
    original = next(iter(engine.problems.values())).parameters[0].dtype
    names: list[str] = []
    found: list[Tensor] = []
    infos: list[SolveInfo] = []
    for name in engine.dependencies.outer:
        result = engine.hypergradient(name, given)
        prefix = f"{name}." if len(engine.dependencies.outer) > 1 else ""
        names += [prefix + key for key in result.grad]
        found += list(result.grad.values())
        infos.append(result.info)

    def expected(precision: Precision) -> tuple[Tensors, list[ExactResponse]]:
        parts = [_engine_reference(engine, name, given, precision) for name in engine.dependencies.outer]
        responses = [response for _, more in parts for response in more]
        return tuple(tensor for total, _ in parts for tensor in total), responses

    precision, (total, responses), notes = _in_float64(original, expected, [])
    info = next((info for info in infos if info.status.failed), infos[0])
    return Comparison(names, tuple(found), total, list(engine.estimators.values()), info, responses, precision, notes)


def _engine_reference(
    engine: Engine, outer: str, batches: Mapping[str, Any], precision: Precision
) -> tuple[Tensors, list[ExactResponse]]:
    """Accumulates cotangents as the engine does, with an exact product for every inner problem."""
    differentiator, problems = engine._differentiator, engine.problems
    feed = Feed(engine.streams, batches)
    with preserved(differentiator.devices), buffers_protected(engine._modules):
        inner = [
            name for name in engine.dependencies.inner if differentiator._affects(name, outer, engine.dependencies)
        ]
        live = {name: problems[name].parameters for name in (outer, *inner)}
        batch = feed.peek(outer)
        upper = ModuleObjective(
            lambda: problems[outer].evaluate_loss(batch)[0],
            engine._slots,
            tuple(part for name in inner for part in live[name]),
            live[outer],
            f"problem {outer!r}",
            Replay(differentiator.devices),
            PassCount(),
        )
        point = {name: precision.leaves(parameters) for name, parameters in live.items()}
        together = tuple(part for name in inner for part in point[name])
        below, direct = exact.outer_gradients(PreciseObjective(upper, precision), together, point[outer])
        cotangents = {outer: direct, **_split(below, inner, live)}
        responses = []
        for name in inner:
            others = [other for other in engine.dependencies.responds_to(name) if other in cotangents]
            record = engine._records.get(name) or InnerRecord([feed.peek(name)])
            lower = differentiator.inner_problem(name, others, record).objective
            above = tuple(part for other in others for part in point[other])
            response = exact.best_response(PreciseObjective(lower, precision), point[name], above, cotangents[name])
            responses.append(response)
            for other, part in _split(response.value, others, live).items():
                cotangents[other] = add(cotangents[other], part)
    return cotangents[outer], responses


def _split(flat: Tensors, names: Sequence[str], like: Mapping[str, Tensors]) -> dict[str, Tensors]:
    parts, start = {}, 0
    for name in names:
        parts[name] = flat[start : start + len(like[name])]
        start += len(like[name])
    return parts


def relative_distance(found: Tensors, expected: Tensors) -> float:
    """Returns ``‖found − expected‖ / ‖expected‖`` in float64: infinite for NaN, or where only the latter vanishes."""
    found, expected = (tuple(part.detach().double() for part in side) for side in (found, expected))
    error, size = float(norm(subtract(found, expected))), float(norm(expected))
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 and not math.isnan(error) else math.inf


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
