"""The references of the proofs of levels: three ways to a nest's hypergradient that share nothing agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.bilevel.strategies import forall, logarithmic
from tests.proofs.nest_solves import by_autograd, by_differences, solve_below
from tests.proofs.nest_structures import STRUCTURES, Structure, chain
from tests.proofs.nests import Nest, Quadratic, make_bent, make_quadratic

# One of each kind, in the fast runs; the others are slow variants.
FEW = ("three_levels", "only_lowest_reads_top", "two_outer_over_a_chain")
DEEP = [name for name, structure in STRUCTURES.items() if len(structure.parents) > len(structure.outer)]


def sizes(structure: Structure, largest: int = 3) -> dict[str, int]:
    return {name: 1 + place % largest for place, name in enumerate(structure.names)}


def some(names: Any) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).norm()) <= tolerance * (1 + float(expected.norm())), f"{found} is not {expected}"


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def agree_on_quadratics(nest: Quadratic) -> None:
    for name in nest.structure.parents:
        z = nest.solved(name)
        expected = nest.closed_form(name, nest.point)
        close(nest.hypergradient(name, z), expected, 1e-9)
        # One Newton step of a quadratic is its solution for all values above: every derivative is right.
        close(by_autograd(nest, name, nest.point, graph_steps=1), expected, 1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
def test_closed_forms_formulas_and_autograd_agree_on_quadratics(name: str) -> None:
    agree_on_quadratics(make_quadratic(STRUCTURES[name], sizes(STRUCTURES[name]), number=len(name)))


@forall(3, levels=st.integers(2, 5), condition=logarithmic(1, 30), coupling=logarithmic(0.1, 2), number=st.integers(0))
def test_they_agree_on_chains_of_any_length(levels: int, condition: float, coupling: float, number: int) -> None:
    structure = chain(levels)
    lengths = sizes(structure, 3 if levels < 5 else 2)
    number %= 2**31
    agree_on_quadratics(make_quadratic(structure, lengths, coupling=coupling, condition=condition, number=number))


@pytest.mark.parametrize("name", some(["three_levels", "two_outer_over_a_chain", "two_middles_one_lowest"]))
def test_they_agree_with_central_differences_on_quadratics(name: str) -> None:
    nest = make_quadratic(STRUCTURES[name], sizes(STRUCTURES[name], 2), number=1)
    for parent in nest.structure.parents:
        close(by_differences(nest, parent, nest.point), nest.closed_form(parent, nest.point), 1e-9)


@pytest.mark.parametrize("name", some(name for name in STRUCTURES if not name.startswith("four")))
def test_formulas_agree_with_differentiating_newtons_method_where_nothing_is_quadratic(name: str) -> None:
    nest = make_bent(STRUCTURES[name], sizes(STRUCTURES[name], 2), number=len(name))
    z = nest.solved()
    for outer in nest.structure.outer:
        expected = nest.hypergradient(outer, z)
        close(by_autograd(nest, outer, z), expected, 1e-9)


@pytest.mark.parametrize(("name", "lengths"), [("three_levels", {"a": 1, "b": 2, "c": 1})])
def test_formulas_agree_with_central_differences_of_the_nested_solution(name: str, lengths: dict[str, int]) -> None:
    nest = make_bent(STRUCTURES[name], lengths, number=3)
    z = nest.solved()
    for parent in nest.structure.parents:
        close(by_differences(nest, parent, z), nest.hypergradient(parent, z), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["four_levels", "four_levels_next_only"])
def test_formulas_agree_with_both_at_four_levels(name: str) -> None:
    nest = make_bent(STRUCTURES[name], dict.fromkeys("abcd", 1), number=1)
    z = nest.solved()
    for parent in nest.structure.parents:
        expected = nest.hypergradient(parent, z)
        close(by_autograd(nest, parent, z), expected, 1e-9)
        close(by_differences(nest, parent, z), expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STRUCTURES if not name.startswith("four")])
def test_formulas_agree_with_central_differences_for_every_structure(name: str) -> None:
    nest = make_bent(STRUCTURES[name], dict.fromkeys(STRUCTURES[name].names, 2), number=5)
    z = nest.solved()
    for parent in nest.structure.parents:
        close(by_differences(nest, parent, z), nest.hypergradient(parent, z), 1e-8)


@pytest.mark.parametrize("make", [make_quadratic, make_bent])
def test_solutions_are_minima_of_the_total_losses(make: type[Nest]) -> None:
    """Function values alone: no step away from a level's solution, with those below solved anew, lowers its loss."""
    structure = STRUCTURES["three_levels"]
    nest = make(structure, {"a": 1, "b": 2, "c": 2}, number=2)  # type: ignore[call-arg]
    z = nest.solved()
    close(solve_below(nest, "a", z.clone().requires_grad_()).detach(), z, 1e-12)
    for name in ("b", "c"):
        here = float(nest.losses[name](z))
        for direction in torch.eye(len(z), dtype=z.dtype)[nest.place(name)]:
            for step in (-0.1, -0.01, 0.01, 0.1):
                moved = solve_below(nest, name, (z + step * direction).requires_grad_())
                assert float(nest.losses[name](moved).detach()) > here


def test_losses_read_what_the_structure_says_and_no_more() -> None:
    for structure in STRUCTURES.values():
        for nest in (make(structure, sizes(structure), number=1) for make in (make_quadratic, make_bent)):
            for name in structure.names:
                slope = torch.func.grad(nest.losses[name])(nest.point)
                read = {other for other in structure.names if float(nest.part(slope, other).norm()) > 0}
                assert read == {name, *structure.reads[name]}


@pytest.mark.parametrize("name", some(DEEP))
def test_wrong_formulas_are_told_from_the_right_one(name: str) -> None:
    """What is neglected matters by far more than any tolerance here: a test with these nests sees it."""
    structure = STRUCTURES[name]
    quadratic, bent = (make(structure, sizes(structure), number=2) for make in (make_quadratic, make_bent))
    top = structure.outer[0]
    z, y = quadratic.solved(), bent.solved()
    right = bent.hypergradient(top, y)
    assert apart(quadratic.hypergradient(top, z, "response"), quadratic.hypergradient(top, z)) > 1e-3
    assert apart(bent.hypergradient(top, y, "response"), right) > 1e-3
    # The second derivatives of the lower response, which a quadratic does not have.
    assert apart(bent.hypergradient(top, y, "curvature"), right) > 1e-4
    close(quadratic.hypergradient(top, z, "curvature"), quadratic.hypergradient(top, z), 1e-12)
