"""Unrolled at every level is the derivative of the whole program of updates, to rounding, whatever the optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Engine, EngineConfig
from tests.bilevel.strategies import forall
from tests.proofs.nest_engines import engine_of, hypergradient_of, values_of
from tests.proofs.nest_programs import OPTIMIZERS, PROGRAMS, Program
from tests.proofs.nest_structures import STRUCTURES
from tests.proofs.nests import Nest, make_bent, make_quadratic

QUIET = EngineConfig(progress=False)
STEPS = {"a": 1, "b": 2, "c": 3, "d": 2, "p": 1, "q": 1}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - expected).norm()) <= tolerance * (1 + float(expected.norm())), f"{found} is not {expected}"


def nest_of(name: str, number: int = 0, *, bent: bool = True, same: int | None = None) -> Nest:
    structure = STRUCTURES[name]
    lengths = {name: same or 1 + (place + 1) % 2 for place, name in enumerate(structure.names)}
    return (make_bent if bent else make_quadratic)(structure, lengths, number=number)


def both(
    nest: Nest,
    name: str,
    optimizers: Mapping[str, str],
    reset: Mapping[str, str | None],
    *,
    methods: Mapping[str, Any] | Any = "unrolled",
    steps: Mapping[str, int] = STEPS,
    **settings: Mapping[str, Any],
) -> tuple[Engine, Program]:
    """An engine and the program of the same updates, at the nest's point."""
    rules = {problem: OPTIMIZERS[kind] for problem, kind in optimizers.items()}
    order = PROGRAMS[name]
    inner = [problem for problem in nest.structure.names if problem not in nest.structure.outer]
    more: dict[str, dict[str, Any]] = {
        problem: {"optimizer": rules[problem].torch, "reset": reset.get(problem)} for problem in inner
    }
    for problem, extra in settings.items():
        more[problem] |= extra
    engine = engine_of(nest, nest.point, methods, steps=steps, config=QUIET, **more)
    clip = {problem: extra["max_grad_norm"] for problem, extra in settings.items() if "max_grad_norm" in extra}
    return engine, Program(nest, order, rules, steps, reset, clip=clip)


def compare(nest: Nest, engine: Engine, program: Program) -> None:
    outer = nest.structure.outer
    values, grads = program.run(*outer)
    engine.step()
    close(values_of(engine), nest.join(values))
    for name in outer:
        close(hypergradient_of(engine, name), grads[name])


def everywhere(name: str, what: Any) -> dict[str, Any]:
    structure = STRUCTURES[name]
    return {problem: what for problem in structure.names if problem not in structure.outer}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith("four")])
def test_unrolling_every_level_is_differentiating_the_whole_program(name: str, optimizer: str) -> None:
    nest = nest_of(name, len(name))
    compare(nest, *both(nest, name, everywhere(name, optimizer), everywhere(name, "initial")))


@pytest.mark.parametrize("name", ["four_levels_next_only", "four_levels"])
def test_at_four_levels_too(name: str) -> None:
    nest = nest_of(name, 5, bent=False)
    optimizers = {"b": "momentum", "c": "adam", "d": "sgd"}
    steps = {"a": 1, "b": 2, "c": 2, "d": 2}
    compare(nest, *both(nest, name, optimizers, everywhere(name, "initial"), steps=steps))


@forall(
    6,
    name=st.sampled_from(["three_levels", "three_levels_next_only", "only_lowest_reads_top", "middle_beside_inner"]),
    kinds=st.tuples(*[st.sampled_from(sorted(OPTIMIZERS))] * 3),
    counts=st.tuples(*[st.integers(1, 4)] * 3),
    bent=st.booleans(),
    number=st.integers(0, 2**31 - 1),
)
def test_with_any_numbers_of_steps_and_mixed_optimizers(
    name: str, kinds: tuple[str, ...], counts: tuple[int, ...], bent: bool, number: int
) -> None:
    nest = nest_of(name, number, bent=bent)
    inner = list(everywhere(name, None))
    steps = {**STEPS, **dict(zip(inner, counts, strict=False))}
    optimizers = dict(zip(inner, kinds, strict=False))
    compare(nest, *both(nest, name, optimizers, everywhere(name, "initial"), steps=steps))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_reset_the_start_of_a_block_is_a_constant_and_the_optimizer_goes_on(optimizer: str) -> None:
    name = "three_levels"
    nest = nest_of(name, 3)
    compare(nest, *both(nest, name, everywhere(name, optimizer), {}))


def test_some_levels_reset_and_others_not() -> None:
    name = "three_levels"
    for reset in ({"b": "initial"}, {"c": "initial"}):
        nest = nest_of(name, 4)
        compare(nest, *both(nest, name, everywhere(name, "adam"), reset))


def test_truncated_unrolling_differentiates_the_last_updates_of_each_block() -> None:
    name = "three_levels"
    nest = nest_of(name, 6)
    methods = {"b": {"method": "unrolled", "steps": 1}, "c": {"method": "unrolled", "steps": 2}}
    engine, program = both(nest, name, everywhere(name, "momentum"), everywhere(name, "initial"), methods=methods)
    program.recorded = {"b": 1, "c": 2}
    compare(nest, engine, program)


@pytest.mark.parametrize("level", ["b", "c"])
def test_clipping_is_part_of_the_program(level: str) -> None:
    name = "three_levels"
    nest = nest_of(name, 7)
    settings = {level: {"max_grad_norm": 0.1}}
    engine, program = both(nest, name, everywhere(name, "sgd"), everywhere(name, "initial"), **settings)
    compare(nest, engine, program)
    _, free = both(nest, name, everywhere(name, "sgd"), everywhere(name, "initial"))
    unclipped = free.run("a")[1]["a"]
    assert float((unclipped - hypergradient_of(engine, "a")).norm()) > 1e-3  # the norm was above it


def test_the_update_of_the_outer_problem_is_made_with_this_gradient() -> None:
    name = "three_levels"
    nest = nest_of(name, 8)
    engine, program = both(nest, name, everywhere(name, "adam"), everywhere(name, "initial"))
    values, grads = program.run("a")
    for group in engine.problems["a"].optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = 0.5
    engine.step()
    close(nest.part(values_of(engine), "a"), values["a"] - 0.5 * grads["a"])
