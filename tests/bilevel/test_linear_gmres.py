from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from bilevel.linear import gmres
from bilevel.result import Status
from tests.bilevel.operators import Counted, finish, indefinite_system, residual_of, skewed_system, system, systems
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix

skewed = {"number": st.integers(0, 2**31), "size": st.integers(1, 12), "skew": logarithmic(1e-3, 1.0)}


@forall(80, **skewed)
def test_full_method_terminates_within_as_many_iterations_as_unknowns(number: int, size: int, skew: float) -> None:
    operator, v = skewed_system(number, size, skew)
    solution = gmres(operator, operator.split(v), max_iterations=100, rtol=1e-11)
    assert solution.status is Status.CONVERGED
    assert solution.iterations == operator.products <= size
    torch.testing.assert_close(torch.cat(solution.q), torch.linalg.solve(operator.matrix, v), rtol=1e-8, atol=1e-8)


@forall(80, **skewed, iterations=st.integers(1, 30), restart=st.none() | st.integers(1, 6))
def test_residual_falls_as_the_symmetric_part_demands(
    number: int, size: int, skew: float, iterations: int, restart: int | None
) -> None:
    # Eisenstat, Elman, Schultz 1983, with any restart; and never grows.
    operator, v = skewed_system(number, size, skew)
    options = {"rtol": 0.0, "restart": restart}
    solution = gmres(operator, operator.split(v), max_iterations=iterations, **options)
    found = residual_of(operator, solution.q, v)
    smallest = float(torch.linalg.eigvalsh((operator.matrix + operator.matrix.T) / 2)[0])
    largest = float(torch.linalg.matrix_norm(operator.matrix, 2))
    restarts = (iterations - 1) // (restart or iterations)
    assert operator.products == solution.iterations <= iterations + restarts
    assert found <= (1 - (smallest / largest) ** 2) ** (iterations / 2) + 1e-12
    if iterations > 1:
        before = gmres(operator, operator.split(v), max_iterations=iterations - 1, **options)
        assert found <= residual_of(operator, before.q, v) + 1e-12


@forall(60, **systems, iterations=st.integers(1, 14))
def test_iterates_minimise_the_residual_over_the_krylov_space(
    number: int, size: int, condition: float, iterations: int
) -> None:
    operator, v = indefinite_system(number, size, min(condition, 1e3))
    solution = gmres(operator, operator.split(v), max_iterations=iterations, rtol=0.0)
    H, basis = operator.matrix, v[:, None] / v.norm()
    while basis.shape[1] < min(iterations, size):
        image = H @ basis[:, -1]
        for _ in range(3):
            image = image - basis @ (basis.T @ image)
        if float(image.norm()) < 1e-11:
            break
        basis = torch.cat([basis, (image / image.norm())[:, None]], dim=1)
    y = torch.linalg.lstsq(H @ basis, v[:, None]).solution[:, 0]
    least = float((H @ (basis @ y) - v).norm() / v.norm())
    assert least - 1e-12 <= residual_of(operator, solution.q, v) <= least + 1e-9


@forall(60, **skewed, rtol=logarithmic(1e-10, 0.5), restart=st.none() | st.integers(2, 6))
def test_stops_at_the_first_residual_below_its_tolerance(
    number: int, size: int, skew: float, rtol: float, restart: int | None
) -> None:
    operator, v = skewed_system(number, size, skew)
    solution = gmres(operator, operator.split(v), max_iterations=2000, rtol=rtol, restart=restart)
    assert solution.status is Status.CONVERGED
    assert residual_of(operator, solution.q, v) <= 1.01 * rtol + 1e-13
    if restart is None and solution.iterations > 1:
        before = gmres(operator, operator.split(v), max_iterations=solution.iterations - 1, rtol=0.0)
        assert residual_of(operator, before.q, v) > 0.99 * rtol


def test_the_worst_case_needs_all_its_iterations_and_stagnation_is_told() -> None:
    # The cyclic shift: the residual stays at 1 until the n-th product solves the system.
    size = 6
    shift = torch.roll(torch.eye(size, dtype=DOUBLE), 1, dims=0)
    operator = Counted(shift, (2, 4))
    v = torch.eye(size, dtype=DOUBLE)[0]
    solution = gmres(operator, operator.split(v), max_iterations=size, rtol=1e-12)
    assert (solution.status, solution.iterations) == (Status.CONVERGED, size)
    torch.testing.assert_close(torch.cat(solution.q), shift.T @ v)
    stuck = gmres(operator, operator.split(v), max_iterations=size - 1, rtol=1e-12)
    assert stuck.status is Status.STOPPED_AT_CAP
    assert residual_of(operator, stuck.q, v) == pytest.approx(1.0)
    restarted = gmres(operator, operator.split(v), max_iterations=1000, rtol=1e-12, restart=3)
    assert restarted.status is Status.STOPPED_AT_CAP
    assert restarted.iterations == 4  # the first cycle and the look at its residual
    assert "a cycle of 3 products left the residual as it was: raise restart" in restarted.message


@forall(60, number=st.integers(0, 2**31), size=st.integers(2, 12), single=st.booleans())
def test_singular_systems(number: int, size: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    dtype = torch.float32 if single else DOUBLE
    operator, v = finish(H, generator, dtype)
    null = torch.linalg.eigh(H)[1][:, 0].to(dtype)
    inconsistent = v + (v.norm() - v @ null) * null
    outside = gmres(operator, operator.split(inconsistent), max_iterations=100, rtol=1e-5)
    assert outside.status is Status.SINGULAR
    assert residual_of(operator, outside.q, inconsistent) <= 1.001  # the least-squares residual or a step before it
    inside = operator.matrix @ v
    solution = gmres(operator, operator.split(inside), max_iterations=100, rtol=1e-5)
    assert solution.status is Status.CONVERGED
    assert residual_of(operator, solution.q, inside) <= 2e-5


def test_nilpotent_and_zero_operators_are_singular() -> None:
    v = torch.eye(4, dtype=DOUBLE)[0]
    nilpotent = torch.diag(torch.ones(3, dtype=DOUBLE), 1)
    for matrix in (nilpotent, torch.zeros(4, 4, dtype=DOUBLE), nilpotent.T):
        operator = Counted(matrix, (4,))
        solution = gmres(operator, (v,), max_iterations=20, rtol=1e-8)
        assert solution.status is Status.SINGULAR
        assert residual_of(operator, solution.q, v) <= 1.0
        assert solution.iterations == operator.products <= 4


@forall(60, **skewed, restart=st.none() | st.integers(1, 4))
def test_a_start_is_used_where_it_helps(number: int, size: int, skew: float, restart: int | None) -> None:
    operator, v = skewed_system(number, size, skew)
    exact = torch.linalg.solve(operator.matrix, v)
    options = {"max_iterations": 3, "rtol": 1e-6, "restart": restart}
    at_once = gmres(operator, operator.split(v), start=operator.split(exact), **options)
    assert (at_once.iterations, at_once.status, operator.products) == (1, Status.CONVERGED, 1)
    # Starting at q₀ is solving H d = v − H q₀ from zero.
    near = exact + 0.1 * exact.norm() * torch.ones_like(exact) / size
    difference = v - operator.matrix @ near
    if float(difference.norm()) < float(v.norm()):
        started = gmres(operator, operator.split(v), start=operator.split(near), **{**options, "rtol": 0.0})
        alone = gmres(operator, operator.split(difference), **{**options, "rtol": 0.0})
        torch.testing.assert_close(torch.cat(started.q), near + torch.cat(alone.q), rtol=1e-6, atol=1e-8)
    for bad in (1e3 * exact + 1e3, torch.full_like(v, math.nan)):
        dropped = gmres(operator, operator.split(v), start=operator.split(bad), **options)
        cold = gmres(operator, operator.split(v), **options)
        torch.testing.assert_close(torch.cat(dropped.q), torch.cat(cold.q), rtol=0, atol=0)
        assert dropped.iterations == cold.iterations + 1


@forall(40, **skewed, power=st.integers(-40, 40), restart=st.none() | st.integers(1, 4))
def test_scaling_and_splitting_change_nothing(
    number: int, size: int, skew: float, power: int, restart: int | None
) -> None:
    operator, v = skewed_system(number, size, skew)
    factor, options = 2.0**power, {"max_iterations": 7, "rtol": 1e-8, "restart": restart}
    plain = gmres(operator, operator.split(v), **options)
    scaled = gmres(Counted(operator.matrix * factor, (size,)), (v,), **options)
    longer = gmres(operator, operator.split(v * factor), **options)
    for other, unit in ((scaled, factor), (longer, 1 / factor)):
        assert (other.status, other.iterations) == (plain.status, plain.iterations)
        torch.testing.assert_close(torch.cat(other.q) * unit, torch.cat(plain.q), rtol=1e-9, atol=1e-9)


@forall(40, number=st.integers(0, 2**31), size=st.integers(1, 30), condition=logarithmic(1.0, 1e3))
def test_going_on_after_convergence_gives_no_nan(number: int, size: int, condition: float) -> None:
    for dtype, tolerance in ((torch.float32, 1e-3), (DOUBLE, 1e-11)):
        operator, v = indefinite_system(number, size, condition, dtype)
        solution = gmres(operator, operator.split(v), max_iterations=1000, rtol=0.0)
        assert solution.status is Status.CONVERGED
        assert solution.iterations <= size
        assert residual_of(operator, solution.q, v) <= tolerance


def test_restarts_refine_what_rounding_left() -> None:
    # A second cycle starts from the true residual: float32 reaches a residual that one cycle cannot.
    operator, v = system(3, 30, 1e4, torch.float32)
    solution = gmres(operator, operator.split(v), max_iterations=200, rtol=0.0, restart=40)
    assert bool(torch.isfinite(torch.cat(solution.q)).all())
    assert residual_of(operator, solution.q, v) < 1e-3


@forall(40, number=st.integers(0, 2**31), size=st.integers(2, 12), skew=logarithmic(1e-6, 1.0), single=st.booleans())
def test_an_asymmetry_is_told_where_there_must_be_none(number: int, size: int, skew: float, single: bool) -> None:
    dtype = torch.float32 if single else DOUBLE
    operator, v = system(number, size, 10.0, dtype)
    options = {"max_iterations": 2 * size, "rtol": 1e-5, "symmetric": True}
    assert gmres(operator, operator.split(v), **options).status is Status.CONVERGED
    skewed, v = skewed_system(number, size, 100 * skew if single else skew)
    skewed.matrix, v = skewed.matrix.to(dtype), v.to(dtype)
    found = gmres(skewed, skewed.split(v), **options)
    assert found.status is Status.NOT_SYMMETRIC
    assert "relative asymmetry" in found.message
    plain = gmres(skewed, skewed.split(v), **{**options, "symmetric": False})
    assert (plain.status, plain.iterations) == (Status.CONVERGED, found.iterations)
    assert torch.equal(torch.cat(plain.q), torch.cat(found.q))


def test_products_that_are_not_finite_are_reported() -> None:
    for bad in (math.nan, math.inf):
        for good in (0, 1, 2):
            calls = 0

            def operator(q: tuple[torch.Tensor, ...], bad: float = bad, good: int = good) -> tuple[torch.Tensor, ...]:
                nonlocal calls
                calls += 1
                return (torch.roll(q[0], 1) * (1.0 if calls <= good else bad),)

            solution = gmres(operator, (torch.arange(4.0),), max_iterations=8, rtol=1e-6, restart=2)
            assert solution.status is Status.DIVERGED
            assert "not finite" in solution.message
            assert bool(torch.isfinite(solution.q[0]).all())


def test_a_right_hand_side_of_zero_needs_no_product() -> None:
    operator, v = system(1, 4, 10.0)
    solution = gmres(operator, operator.split(0 * v), max_iterations=5, rtol=1e-6)
    assert (solution.status, solution.iterations, operator.products) == (Status.CONVERGED, 0, 0)
