"""Problems that start anew at every block, from fixed values or from a problem above: MAML and its kin."""

from __future__ import annotations

import pytest
import torch

from bilevel.errors import ConfigError, ParameterError
from tests.proofs.nest_engines import hypergradient_of, values_of
from tests.proofs.nest_programs import OPTIMIZERS
from tests.proofs.nest_structures import STRUCTURES
from tests.proofs.nests import make_quadratic
from tests.proofs.test_nest_brute_force import both, close, compare, everywhere, nest_of


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_levels_from_the_outer_parameters_are_maml(optimizer: str) -> None:
    """b starts from a: dw₀/dλ = I goes through the updates, beside what the loss itself depends on."""
    nest = nest_of("two_levels", 1, same=3)
    compare(nest, *both(nest, "two_levels", {"b": optimizer}, {"b": "a"}))


def test_maml_written_out_for_one_gradient_step_on_a_quadratic() -> None:
    """w = a − η (H a − c): dF/da = (I − ηH)ᵀ ∂F/∂w, with no dependence of the inner loss on a at all."""
    structure = STRUCTURES["two_levels"]
    blind = type(structure)({"a": ("b",), "b": ()}, structure.below)
    nest = make_quadratic(blind, {"a": 3, "b": 3}, number=2)
    engine, _ = both(nest, "two_levels", {"b": "sgd"}, {"b": "a"}, steps={"b": 1})
    engine.step()
    a, A, b = nest.part(nest.point, "a"), nest.A["b"][3:, 3:], nest.b["b"][3:]
    w = a - 0.2 * (A @ a + b)
    close(values_of(engine)[3:], w, 1e-12)
    z = torch.cat([a, w])
    slope = nest.A["a"] @ z + nest.b["a"]
    close(hypergradient_of(engine, "a"), slope[:3] + (torch.eye(3) - 0.2 * A).T @ slope[3:], 1e-12)


@pytest.mark.parametrize(
    "reset", [{"c": "b"}, {"c": "a"}, {"b": "a"}, {"b": "a", "c": "b"}, {"b": "initial", "c": "b"}]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_three_levels_that_start_from_those_above(reset: dict[str, str | None], optimizer: str) -> None:
    nest = nest_of("three_levels", len(reset), same=2)
    compare(nest, *both(nest, "three_levels", everywhere("three_levels", optimizer), reset))


@pytest.mark.parametrize("name", ["three_levels_next_only", "top_reads_lowest", "only_lowest_reads_top"])
def test_a_middle_that_starts_from_the_top_whether_or_not_losses_read_it(name: str) -> None:
    nest = nest_of(name, 3, same=2)
    compare(nest, *both(nest, name, everywhere(name, "momentum"), {"b": "a", "c": "initial"}))


def test_implicit_methods_do_not_see_the_start() -> None:
    """With a method that solves at the solution, the start changes where the updates end and nothing else."""
    nest = make_quadratic(STRUCTURES["three_levels"], dict.fromkeys("abc", 2), coupling=0.2, condition=1.1, number=3)
    steps = {"b": 40, "c": 12}
    found = []
    for reset in ({}, {"b": "initial", "c": "initial"}, {"b": "a", "c": "b"}):
        engine, _ = both(nest, "three_levels", {"b": "sgd", "c": "sgd"}, reset, methods="exact", steps=steps)
        for problem in "bc":
            engine.problems[problem].optimizer.param_groups[0]["lr"] = 0.9  # type: ignore[union-attr]
        engine.step()
        found.append(hypergradient_of(engine, "a"))
        close(values_of(engine), nest.solved(), 1e-6)
    for one in found:
        close(one, nest.closed_form("a", nest.point), 1e-6)


def test_blocks_start_anew_at_every_step_of_the_engine() -> None:
    """The second outer step repeats the first where nothing above has moved: parameters and optimiser's state."""
    nest = nest_of("three_levels", 5, same=2)
    kinds = everywhere("three_levels", "adam")
    for reset in ({"b": "initial", "c": "initial"}, {"b": "a", "c": "b"}):
        engine, _ = both(nest, "three_levels", kinds, reset)
        engine.step()
        first = values_of(engine)
        engine.step()
        close(values_of(engine), first, 1e-14)
    engine, _ = both(nest, "three_levels", kinds, {})
    engine.step()
    first = values_of(engine)
    engine.step()
    assert float((values_of(engine) - first).norm()) > 1e-3


def test_a_start_needs_parameters_of_the_same_names_and_shapes() -> None:
    nest = nest_of("three_levels", 1)  # vectors of different lengths
    with pytest.raises(ParameterError, match=r"'c' is to start from problem 'b'"):
        both(nest, "three_levels", everywhere("three_levels", "sgd"), {"c": "b"})[0].step()


@pytest.mark.parametrize("source", ["c", "b", "nobody"])
def test_a_problem_starts_from_one_above_and_from_no_other(source: str) -> None:
    nest = nest_of("three_levels", 1, same=2)
    with pytest.raises((ConfigError, LookupError, ValueError), match=source):
        both(nest, "three_levels", everywhere("three_levels", "sgd"), {"b": source})


def test_a_start_alone_is_no_dependence_for_implicit_methods() -> None:
    structure = STRUCTURES["two_levels"]
    nest = make_quadratic(type(structure)({"a": ("b",), "b": ()}, structure.below), {"a": 2, "b": 2}, number=2)
    with pytest.raises(ConfigError, match="depends on 'a' by its start alone"):
        both(nest, "two_levels", {"b": "sgd"}, {"b": "a"}, methods="exact")
