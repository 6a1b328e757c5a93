"""Engines of three and more levels, and of any acyclic structure, beside references that share nothing with them.

Every lower problem stands at its solution, and updates do not move it (a learning rate of zero, or a gradient step at a
stationary point), so that ``engine.hypergradient`` is to be the total derivative of the nest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import EngineConfig, hypergradcheck
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import forall, logarithmic
from tests.proofs.nest_engines import engine_of, hypergradient_of, values_of
from tests.proofs.nest_methods import METHODS, NestMethod, approximate
from tests.proofs.nest_structures import STRUCTURES, Structure, chain
from tests.proofs.nests import make_bent, make_quadratic

SIZES = {"a": 2, "b": 3, "c": 2}
EXACT = METHODS[0]
# One of each kind, in the fast runs; the others are slow variants.
FEW = ("three_levels", "only_lowest_reads_top", "two_outer_over_a_chain", "two_middles_one_lowest")
DEEP = [name for name, structure in STRUCTURES.items() if len(structure.parents) > len(structure.outer)]


def sizes(structure: Structure, largest: int = 3) -> dict[str, int]:
    return {name: 1 + place % largest for place, name in enumerate(structure.names)}


def some(names: Any, few: Any = FEW) -> list[Any]:
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert float((found - expected).norm()) <= tolerance * (1 + float(expected.norm())), f"{found} is not {expected}"


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_has_the_closed_forms_hypergradient(name: str) -> None:
    structure = STRUCTURES[name]
    nest = make_quadratic(structure, sizes(structure), number=len(name))
    z = nest.solved()
    engine = engine_of(nest, z)
    assert set(engine.dependencies.outer) == set(structure.outer)
    assert {p: set(below) for p, below in engine.dependencies.lower.items()} == {
        p: set(below) for p, below in structure.below.items()
    }
    for outer in structure.outer:
        close(hypergradient_of(engine, outer), nest.closed_form(outer, z))


@pytest.mark.parametrize("name", some(STRUCTURES))
def test_every_structure_has_the_total_derivative_where_nothing_is_quadratic(name: str) -> None:
    structure = STRUCTURES[name]
    nest = make_bent(structure, sizes(structure, 2), number=len(name))
    z = nest.solved()
    engine = engine_of(nest, z)
    for outer in structure.outer:
        close(hypergradient_of(engine, outer), nest.hypergradient(outer, z), 1e-8)


@pytest.mark.parametrize("name", some(name for name in DEEP if name != "four_levels"))  # there c takes two blocks
def test_a_middle_level_is_updated_with_its_total_gradient(name: str) -> None:
    """One update of every middle level from a point where those below it, and they only, are solved."""
    structure = STRUCTURES[name]
    nest = make_quadratic(structure, sizes(structure), number=4)
    middles = [p for p in structure.parents if p not in structure.outer]
    lowest = [p for p in structure.names if not structure.below[p]]
    z = nest.point
    for _ in structure.names:  # lowest levels at the solutions of the others' given values
        z = torch.cat([nest.part(solve(nest, p, z) if p in lowest else z, p) for p in structure.names])
    engine = engine_of(nest, z, rates=dict.fromkeys(middles, 0.1))
    engine.step()
    after = values_of(engine)
    for middle in middles:
        if all(lower in lowest for lower in structure.below[middle]):
            close(nest.part(z, middle) - nest.part(after, middle), 0.1 * nest.closed_form(middle, z), 1e-9)


def solve(nest: Any, name: str, z: Tensor) -> Tensor:
    D, d = nest.affine_response(name)
    moved = z.clone()
    moved[nest.place(name)] = D @ z + d
    return moved


@forall(
    2, levels=st.integers(3, 5), condition=logarithmic(1, 30), coupling=logarithmic(0.1, 1.5), number=st.integers(0)
)
def test_chains_of_any_length_size_coupling_and_conditioning(
    levels: int, condition: float, coupling: float, number: int
) -> None:
    structure = chain(levels)
    generator = torch.Generator().manual_seed(number % 2**31)
    longest = {3: 4, 4: 3, 5: 2}[levels]
    lengths = {name: int(torch.randint(1, longest, (1,), generator=generator)) for name in structure.names}
    nest = make_quadratic(structure, lengths, coupling=coupling, condition=condition, number=number % 2**31)
    z = nest.solved()
    close(hypergradient_of(engine_of(nest, z), "a"), nest.closed_form("a", z), 1e-8)


@forall(2, number=st.integers(0, 2**31 - 1), name=st.sampled_from(["three_levels", "lowest_reads_top", "two_outer"]))
def test_bent_nests_of_any_numbers(number: int, name: str) -> None:
    structure = STRUCTURES[name]
    nest = make_bent(structure, sizes(structure, 1 + number % 3), number=number)
    z = nest.solved()
    engine = engine_of(nest, z)
    for outer in structure.outer:
        close(hypergradient_of(engine, outer), nest.hypergradient(outer, z), 1e-8)


@forall(3, number=st.integers(0, 2**31 - 1), method=st.sampled_from(["exact", "conjugate_gradient"]))
def test_parameters_in_float32(number: int, method: str) -> None:
    nest = make_quadratic(STRUCTURES["three_levels"], SIZES, number=number)
    z = nest.solved()
    engine = engine_of(nest, z.float(), method, config=EngineConfig(progress=False))
    found = engine.hypergradient("a").grad
    assert all(part.dtype == torch.float32 for part in found.values())
    expected = nest.closed_form("a", z)
    assert float((hypergradient_of(engine, "a") - expected).norm()) <= 1e-3 * (1 + float(expected.norm()))


def test_every_registered_method_is_here() -> None:
    ours = {name for name, cls in available_methods().items() if cls.__module__.startswith("bilevel.hypergrad.")}
    assert ours - {"auto"} == {method.name for method in METHODS}  # which is identity wherever it can be


def run(method: NestMethod, level: str) -> None:
    """Compares an engine that has a method at one level, or at every one, with the method's formula."""
    lengths = dict.fromkeys("abc", 2)
    nest = make_quadratic(STRUCTURES["three_levels"], lengths, coupling=0.5, condition=1.2, number=7)
    z = nest.solved()
    methods = {name: method if level in (name, "every") else EXACT for name in "bc"}
    engine = engine_of(
        nest,
        z,
        {name: dict(one.fields) for name, one in methods.items()},
        rates={name: one.rate for name, one in methods.items()},
        steps={name: one.steps for name, one in methods.items()},
    )
    for _ in range(max(1, method.calls)):
        engine.step()
    close(values_of(engine), z, 1e-9)  # no update moves what is at its solution
    expected, exact = approximate(nest, "a", z, methods), nest.closed_form("a", z)
    close(hypergradient_of(engine, "a"), expected, method.tolerance)
    inexact = float((expected - exact).norm() / exact.norm())
    assert inexact < 1e-12 or inexact > 10 * method.tolerance  # or the test would not tell the two apart
    assert float((nest.hypergradient("a", z, "response") - exact).norm()) > 10 * method.tolerance


@pytest.mark.parametrize(
    ("method", "level"), [(method, level) for method in METHODS for level in method.levels], ids=str
)
def test_any_method_at_any_level_is_what_its_formula_says(method: NestMethod, level: str) -> None:
    run(method, level)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method.name in ("identity", "nystrom", "gmres") else pytest.mark.slow)
        for method in METHODS
        if method.twice and not method.rate
    ],
    ids=str,
)
def test_any_method_that_differentiates_its_solves_at_every_level(method: NestMethod) -> None:
    run(method, "every")


@pytest.mark.parametrize(
    "name", some(["three_levels", "lowest_reads_top", "two_middles_one_lowest", "two_outer_over_a_chain"], FEW[:1])
)
def test_training_ends_where_every_problem_has_solved_its_own(name: str) -> None:
    """Few updates a level from anywhere: the fixed point is the closed form's, and no other formula's."""
    structure = STRUCTURES[name]
    lengths = {problem: 1 if problem in structure.outer else 2 for problem in structure.names}
    nest = make_quadratic(structure, lengths, coupling=0.5, condition=1.5, number=3)
    rates = dict.fromkeys(structure.names, 0.7)
    steps = {problem: 1 if problem in structure.outer else 2 for problem in structure.names}
    engine = engine_of(nest, nest.point, rates=rates, steps=steps)
    for _ in range(25):
        engine.step()
    close(values_of(engine), nest.optimum(), 1e-6)
    # There, the outer gradients vanish; with the lower vectors held in the middle's curvature they would not.
    top = structure.outer[0]
    assert float(nest.hypergradient(top, nest.optimum(), "response").norm()) > 1e-4


@pytest.mark.parametrize("reference", some(["exact", "central_difference"], ["exact"]))
def test_the_check_passes_three_levels_and_fails_a_method_that_is_wrong(reference: str) -> None:
    nest = make_quadratic(STRUCTURES["three_levels"], dict.fromkeys("abc", 2), number=7)
    z = nest.solved()
    report = hypergradcheck(engine_of(nest, z), reference=reference, rtol=1e-5)
    assert report.passed, str(report)
    for level in "bc":
        wrong = hypergradcheck(engine_of(nest, z, {level: "identity"}), reference=reference, rtol=1e-3)
        assert not wrong.passed
