from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.linear import minres
from bilevel.result import Status
from tests.bilevel.operators import Counted, finish, indefinite_system, residual_of, system, systems
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix


def krylov_residual(H: Tensor, v: Tensor, iterations: int) -> float:
    """The least ``‖Hq − v‖ / ‖v‖`` over the Krylov space of a dimension, from an orthonormal basis of it."""
    basis = v[:, None] / v.norm()
    for _ in range(min(iterations, len(v)) - 1):
        image = H @ basis[:, -1]
        for _ in range(3):
            image = image - basis @ (basis.T @ image)
        if float(image.norm()) < 1e-12:
            break
        basis = torch.cat([basis, (image / image.norm())[:, None]], dim=1)
    y = torch.linalg.lstsq(H @ basis, v[:, None]).solution[:, 0]
    return float((H @ (basis @ y) - v).norm() / v.norm())


@forall(100, **systems, iterations=st.integers(1, 6))
def test_iterates_minimise_the_residual_over_the_krylov_space(
    number: int, size: int, condition: float, iterations: int
) -> None:
    # Up to half of the dimension: later the Lanczos vectors are no longer orthogonal, and convergence is delayed.
    iterations = min(iterations, max(1, size // 2))
    operator, v = indefinite_system(number, size, min(condition, 1e3))
    solution = minres(operator, operator.split(v), max_iterations=iterations, rtol=0.0)
    least = krylov_residual(operator.matrix, v, iterations)
    found = residual_of(operator, solution.q, v)
    assert least - 1e-12 <= found <= 1.0001 * least + 1e-6
    # One product an iteration, and one more where the residual had to be looked at.
    assert operator.products == solution.iterations <= iterations + 2
    before = minres(operator, operator.split(v), max_iterations=max(1, iterations - 1), rtol=0.0)
    assert found <= residual_of(operator, before.q, v) + 1e-6  # never grows


@forall(
    80, number=st.integers(0, 2**31), half=st.integers(1, 10), gap=logarithmic(1e-3, 1.0), iterations=st.integers(1, 25)
)
def test_residual_obeys_the_bound_for_two_intervals(number: int, half: int, gap: float, iterations: int) -> None:
    # Greenbaum 1997, equation 3.16: eigenvalues in [−a, −b] ∪ [c, d] of equal lengths.
    generator = torch.Generator().manual_seed(number)
    b, length = gap, float(torch.rand((), generator=generator))
    c = gap * (1 + float(torch.rand((), generator=generator)))
    a, d = b + length, c + length
    inside = torch.rand(2, half, generator=generator, dtype=DOUBLE) * length
    inside[:, 0] = 0.0
    inside[:, -1] = length
    eigenvalues = torch.cat([-b - inside[0], c + inside[1]])
    operator, v = finish(spectrum_matrix(eigenvalues, generator), generator)
    solution = minres(operator, operator.split(v), max_iterations=iterations, rtol=0.0)
    far, near = math.sqrt(a * d), math.sqrt(b * c)
    bound = min(1.0, 2 * ((far - near) / (far + near)) ** (iterations // 2))
    assert residual_of(operator, solution.q, v) <= 1.000001 * bound + 1e-9


@forall(80, **systems, iterations=st.integers(1, 30))
def test_residual_obeys_the_chebyshev_bound_for_definite_systems(
    number: int, size: int, condition: float, iterations: int
) -> None:
    operator, v = system(number, size, condition)
    solution = minres(operator, operator.split(v), max_iterations=iterations, rtol=0.0)
    root = math.sqrt(float(torch.linalg.cond(operator.matrix)))
    bound = min(1.0, 2 * ((root - 1) / (root + 1)) ** iterations)
    assert residual_of(operator, solution.q, v) <= 1.000001 * bound + 1e-14 * root**4


@forall(80, **systems, rtol=logarithmic(1e-9, 0.5))
def test_stops_at_the_first_residual_below_its_tolerance(number: int, size: int, condition: float, rtol: float) -> None:
    operator, v = indefinite_system(number, size, min(condition, 1e3))
    solution = minres(operator, operator.split(v), max_iterations=300, rtol=rtol)
    assert solution.status is Status.CONVERGED
    assert residual_of(operator, solution.q, v) <= 2.01 * rtol
    if solution.iterations > 3:  # of which one or two may have gone into looks at the residual
        before = minres(operator, operator.split(v), max_iterations=solution.iterations - 3, rtol=0.0)
        assert residual_of(operator, before.q, v) > 0.99 * rtol
    assert ("eigenvalue" in solution.message) <= bool((torch.linalg.eigvalsh(operator.matrix) < 0).any())


@forall(60, number=st.integers(0, 2**31), distinct=st.integers(1, 5), copies=st.integers(1, 3))
def test_terminates_after_as_many_iterations_as_there_are_distinct_eigenvalues(
    number: int, distinct: int, copies: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    values = torch.arange(1, distinct + 1, dtype=DOUBLE) * (-1.0) ** torch.arange(distinct)
    operator, v = finish(spectrum_matrix(values.repeat(copies), generator), generator)
    solution = minres(operator, operator.split(v), max_iterations=distinct, rtol=1e-9)
    assert solution.status is Status.CONVERGED
    assert solution.iterations <= distinct
    torch.testing.assert_close(torch.cat(solution.q), torch.linalg.solve(operator.matrix, v), rtol=1e-7, atol=1e-7)


def test_an_indefinite_system_is_solved_and_its_curvature_told() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=DOUBLE))  # vᵀHv = 0: conjugate gradients stop here
    solution = minres(Counted(H, (1, 1)), (torch.ones(1, dtype=DOUBLE),) * 2, max_iterations=5, rtol=1e-10)
    assert solution.status is Status.CONVERGED
    torch.testing.assert_close(torch.cat(solution.q), torch.tensor([1.0, -1.0], dtype=DOUBLE))
    assert "eigenvalue of -1 or below" in solution.message


@forall(60, number=st.integers(0, 2**31), size=st.integers(2, 30), single=st.booleans())
def test_singular_systems(number: int, size: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[size // 2 :] *= -1
    eigenvalues[0] = 0.0
    H = spectrum_matrix(eigenvalues, generator)
    dtype = torch.float32 if single else DOUBLE
    operator, v = finish(H, generator, dtype)
    operator.matrix = H.to(dtype)
    null = torch.linalg.eigh(H)[1][:, eigenvalues.argsort().argsort()[0]].to(dtype)
    options = {"max_iterations": 200, "rtol": 1e-5}
    inconsistent = v + (v.norm() - v @ null) * null
    outside = minres(operator, operator.split(inconsistent), **options)
    assert outside.status is Status.SINGULAR
    assert single or outside.iterations <= 2 * size + 10  # and not only when rounding has filled q with the null vector
    inside = operator.matrix @ v
    solution = minres(operator, operator.split(inside), **options)
    assert solution.status is Status.CONVERGED
    tolerance = 1e-3
    expected = torch.linalg.pinv(H, rtol=1e-10) @ inside.to(DOUBLE)
    torch.testing.assert_close(torch.cat(solution.q).to(DOUBLE), expected, rtol=tolerance, atol=tolerance)
    zero = minres(lambda q: tuple(0 * part for part in q), operator.split(v), **options)
    assert zero.status is Status.SINGULAR
    assert all(bool((part == 0).all()) for part in zero.q)


@forall(60, **systems, digits=st.integers(1, 12))
def test_a_start_is_used_where_it_helps(number: int, size: int, condition: float, digits: int) -> None:
    operator, v = indefinite_system(number, size, min(condition, 1e3))
    exact = torch.linalg.solve(operator.matrix, v)
    at_once = minres(operator, operator.split(v), max_iterations=50, rtol=1e-6, start=operator.split(exact))
    assert (at_once.iterations, at_once.status, operator.products) == (1, Status.CONVERGED, 1)
    torch.testing.assert_close(torch.cat(at_once.q), exact, rtol=0, atol=0)
    # Starting at q₀ is solving H d = v − H q₀ from zero.
    near = exact + 10.0**-digits * torch.roll(exact, 1)
    started = minres(operator, operator.split(v), max_iterations=3, rtol=0.0, start=operator.split(near))
    least = krylov_residual(operator.matrix, v - operator.matrix @ near, 3)
    size_of_start = residual_of(operator, operator.split(near), v)
    if size_of_start <= 1.0:
        assert residual_of(operator, started.q, v) <= 1.0001 * least * size_of_start + 1e-9
    # A start that is worse than zero is dropped; one that is not finite too.
    for bad in (1e3 * torch.linalg.solve(operator.matrix, v + 1), torch.full_like(v, math.nan)):
        dropped = minres(operator, operator.split(v), max_iterations=3, rtol=0.0, start=operator.split(bad))
        cold = minres(operator, operator.split(v), max_iterations=3, rtol=0.0)
        torch.testing.assert_close(torch.cat(dropped.q), torch.cat(cold.q), rtol=0, atol=0)
        assert dropped.iterations == cold.iterations + 1


@forall(40, **systems, power=st.integers(-40, 40))
def test_scaling_and_splitting_change_nothing(number: int, size: int, condition: float, power: int) -> None:
    operator, v = indefinite_system(number, size, min(condition, 1e3))
    factor = 2.0**power
    plain = minres(operator, operator.split(v), max_iterations=4, rtol=1e-8)
    scaled = minres(Counted(operator.matrix * factor, (size,)), (v,), max_iterations=4, rtol=1e-8)
    assert (scaled.status, scaled.iterations) == (plain.status, plain.iterations)
    expected = torch.cat(plain.q)
    tolerance = 1e-8 * float(expected.norm())
    torch.testing.assert_close(scaled.q[0] * factor, expected, rtol=0, atol=tolerance)
    longer = minres(operator, operator.split(v * factor), max_iterations=4, rtol=1e-8)
    torch.testing.assert_close(torch.cat(longer.q) / factor, expected, rtol=0, atol=tolerance)


@forall(40, number=st.integers(0, 2**31), size=st.integers(1, 30), condition=logarithmic(1.0, 1e3))
def test_going_on_after_convergence_gives_no_nan(number: int, size: int, condition: float) -> None:
    for dtype, tolerance in ((torch.float32, 2e-2), (DOUBLE, 1e-9)):
        operator, v = indefinite_system(number, size, condition, dtype)
        solution = minres(operator, operator.split(v), max_iterations=1000, rtol=0.0)
        assert solution.status is Status.CONVERGED
        assert solution.iterations < 600
        assert residual_of(operator, solution.q, v) <= tolerance


def test_the_residual_is_refined_where_rounding_spoils_it() -> None:
    # Short recurrences leave a residual of u κ² (2·10⁻⁴ here) that their own recursion does not see: 1·10⁻⁷ was
    # reported as converged to 10⁻¹⁸.
    worst = 0.0
    for number in range(20):
        operator, v = indefinite_system(number, 12, 1e6)
        solution = minres(operator, operator.split(v), max_iterations=300, rtol=0.0)
        assert solution.status is Status.CONVERGED
        worst = max(worst, residual_of(operator, solution.q, v))
    assert worst < 3e-9


def test_float32_that_cannot_solve_a_system_says_so() -> None:
    for number in range(10):
        operator, v = indefinite_system(number, 12, 1e6, torch.float32)
        solution = minres(operator, operator.split(v), max_iterations=300, rtol=1e-6)
        assert solution.status is Status.SINGULAR


@forall(40, number=st.integers(0, 2**31), size=st.integers(2, 8))
def test_a_field_that_is_no_gradient_is_named(number: int, size: int) -> None:
    operator, v = indefinite_system(number, size, 4.0)
    generator = torch.Generator().manual_seed(number + 1)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    skewed = Counted(operator.matrix + 0.3 * (N - N.T), operator.sizes)
    solution = minres(skewed, operator.split(v), max_iterations=3 * size, rtol=1e-10)
    assert solution.status is Status.NOT_SYMMETRIC or residual_of(skewed, solution.q, v) < 1e-8
    assert skewed.products == solution.iterations


def test_products_that_are_not_finite_are_reported() -> None:
    v = (torch.ones(3),)
    for bad in (math.nan, math.inf):
        solution = minres(lambda q, bad=bad: (q[0] * bad,), v, max_iterations=5, rtol=1e-6)
        assert solution.status is Status.DIVERGED
        assert bool(torch.isfinite(solution.q[0]).all())


def test_a_right_hand_side_of_zero_needs_no_product() -> None:
    operator, v = system(1, 4, 10.0)
    solution = minres(operator, operator.split(0 * v), max_iterations=5, rtol=1e-6)
    assert (solution.status, solution.iterations, operator.products) == (Status.CONVERGED, 0, 0)
