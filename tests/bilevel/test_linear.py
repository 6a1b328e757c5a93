from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.linear import (
    Operator,
    Solution,
    conjugate_gradient,
    damped,
    dense,
    dense_matrix,
    gmres,
    minres,
    neumann,
    richardson,
)
from bilevel.result import Status
from tests.bilevel.operators import Counted, residual_of, skewed_system, system, systems
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix


@forall(150, **systems, iterations=st.integers(1, 30))
def test_conjugate_gradient_obeys_the_chebyshev_bound(
    number: int, size: int, condition: float, iterations: int
) -> None:
    operator, v = system(number, size, condition)
    solution = conjugate_gradient(operator, operator.split(v), max_iterations=iterations, rtol=0.0)
    H = operator.matrix
    exact = torch.linalg.solve(H, v)
    error = torch.cat(solution.q) - exact
    kappa = float(torch.linalg.cond(H))
    root = math.sqrt(kappa)
    bound = min(1.0, 2 * ((root - 1) / (root + 1)) ** solution.iterations) * math.sqrt(float(exact @ H @ exact))
    assert math.sqrt(max(0.0, float(error @ H @ error))) <= 1.001 * bound + 1e-13 * kappa * float(exact.norm())
    assert operator.products == solution.iterations


@forall(100, **systems, rtol=logarithmic(1e-10, 0.5))
def test_conjugate_gradient_stops_at_the_first_residual_below_its_tolerance(
    number: int, size: int, condition: float, rtol: float
) -> None:
    operator, v = system(number, size, min(condition, 1e3))
    solution = conjugate_gradient(operator, operator.split(v), max_iterations=100, rtol=rtol)
    assert solution.status is Status.CONVERGED
    residual = float((operator.matrix @ torch.cat(solution.q) - v).norm() / v.norm())
    assert residual <= 1.01 * rtol + 1e-12
    if solution.iterations > 1:
        before = conjugate_gradient(operator, operator.split(v), max_iterations=solution.iterations - 1, rtol=0.0)
        assert float((operator.matrix @ torch.cat(before.q) - v).norm() / v.norm()) > 0.99 * rtol - 1e-12


def preconditioner(number: int, operator: Counted, spread: float) -> tuple[Counted, float]:
    """The inverse of ``P = (1 − t) H + t S`` with a random positive definite S, and the condition of P⁻¹H."""
    other, _ = system(number + 1, len(operator.matrix), 10.0)
    P = (1 - spread) * operator.matrix + spread * other.matrix
    values = torch.linalg.eigvals(torch.linalg.solve(P, operator.matrix)).real
    return Counted(P, operator.sizes).inverse(), float(values.max() / values.min())


@forall(100, **systems, iterations=st.integers(1, 20), spread=st.floats(0.0, 1.0))
def test_preconditioned_conjugate_gradient_obeys_the_chebyshev_bound(
    number: int, size: int, condition: float, iterations: int, spread: float
) -> None:
    # Saad, algorithm 9.1: the bound holds with the condition number of P⁻¹H, which is 1 for P = H.
    operator, v = system(number, size, min(condition, 1e4))
    inverse, kappa = preconditioner(number, operator, spread)
    H = operator.matrix
    solution = conjugate_gradient(
        operator, operator.split(v), max_iterations=iterations, rtol=0.0, preconditioner=inverse
    )
    exact = torch.linalg.solve(H, v)
    error = torch.cat(solution.q) - exact
    root = math.sqrt(max(1.0, kappa))
    rate = min(1.0, 2 * ((root - 1) / (root + 1)) ** solution.iterations) if solution.iterations else 1.0
    bound = rate * math.sqrt(float(exact @ H @ exact))
    assert math.sqrt(max(0.0, float(error @ H @ error))) <= 1.001 * bound + 1e-12 * condition * float(exact.norm())
    assert operator.products == solution.iterations <= iterations
    assert inverse.products <= solution.iterations + 1
    assert not solution.status.failed


@forall(60, **systems, spread=st.floats(0.0, 1.0), rtol=logarithmic(1e-9, 0.5))
def test_preconditioning_does_not_change_what_is_solved(
    number: int, size: int, condition: float, spread: float, rtol: float
) -> None:
    operator, v = system(number, size, min(condition, 1e3))
    inverse, _ = preconditioner(number, operator, spread)
    solution = conjugate_gradient(operator, operator.split(v), max_iterations=200, rtol=rtol, preconditioner=inverse)
    assert solution.status is Status.CONVERGED
    assert residual_of(operator, solution.q, v) <= 1.01 * rtol + 1e-12


def test_the_identity_as_preconditioner_changes_no_bit() -> None:
    operator, v = system(3, 9, 1e3)
    for iterations in (1, 4, 30):
        plain = conjugate_gradient(operator, operator.split(v), max_iterations=iterations, rtol=1e-9)
        other = conjugate_gradient(
            operator, operator.split(v), max_iterations=iterations, rtol=1e-9, preconditioner=lambda r: r
        )
        assert torch.equal(torch.cat(plain.q), torch.cat(other.q))
        assert (plain.status, plain.iterations) == (other.status, other.iterations)


def test_a_preconditioner_that_is_not_positive_is_reported() -> None:
    operator, v = system(3, 4, 10.0)
    for bad in (-1.0, 0.0, math.nan):
        solution = conjugate_gradient(
            operator,
            operator.split(v),
            max_iterations=10,
            rtol=1e-6,
            preconditioner=lambda r, bad=bad: tuple(bad * part for part in r),
        )
        assert solution.status is Status.DIVERGED
        assert "preconditioner is not positive definite" in solution.message
        assert bool(torch.isfinite(torch.cat(solution.q)).all())


@forall(60, **systems, digits=st.integers(1, 12), spread=st.none() | st.floats(0.0, 1.0))
def test_conjugate_gradient_uses_a_start_where_it_helps(
    number: int, size: int, condition: float, digits: int, spread: float | None
) -> None:
    operator, v = system(number, size, min(condition, 1e3))
    inverse = None if spread is None else preconditioner(number, operator, spread)[0]
    exact = torch.linalg.solve(operator.matrix, v)

    def solve(right: Tensor, start: Tensor | None, rtol: float = 0.0) -> Solution:
        at = None if start is None else operator.split(start)
        return conjugate_gradient(
            operator, operator.split(right), max_iterations=3, rtol=rtol, start=at, preconditioner=inverse
        )

    at_once = solve(v, exact, 1e-6)
    assert (at_once.iterations, at_once.status, operator.products) == (1, Status.CONVERGED, 1)
    assert torch.equal(torch.cat(at_once.q), exact)
    # Starting at q₀ is solving H d = v − H q₀ from zero.
    near = exact + 10.0**-digits * torch.roll(exact, 1)
    difference = v - operator.matrix @ near
    off, H = near - exact, operator.matrix
    if float(difference.norm() / v.norm()) > 1e-12 and float(off @ H @ off) < 0.99 * float(exact @ H @ exact):
        started, alone = solve(v, near), solve(difference, None)
        tolerance = 1e-9 * float(exact.norm()) + 1e-6 * 10.0**-digits
        torch.testing.assert_close(torch.cat(started.q), near + torch.cat(alone.q), rtol=0, atol=tolerance)
    # A start that is worse than zero is dropped; one that is not finite too.
    for bad in (1e3 * exact + 1e3, torch.full_like(v, math.nan)):
        dropped, cold = solve(v, bad), solve(v, None)
        assert torch.equal(torch.cat(dropped.q), torch.cat(cold.q))
        assert dropped.iterations == cold.iterations + 1


def test_a_warm_start_goes_on_although_its_residual_is_larger_than_that_of_zero() -> None:
    # Conjugate gradients lessen the error in the H-norm, not the residual: where a start was dropped for its residual,
    # every call ended where the first one had.
    H = torch.diag(torch.tensor([1.0, 0.01], dtype=DOUBLE))
    v = torch.tensor([0.1, 1.0], dtype=DOUBLE)
    operator, q = Counted(H, (1, 1)), None
    energies, residuals = [], []
    for _ in range(40):
        q = conjugate_gradient(operator, operator.split(v), max_iterations=1, rtol=0.0, start=q).q
        error = torch.cat(q) - torch.linalg.solve(H, v)
        energies.append(float(error @ H @ error))
        residuals.append(float((H @ torch.cat(q) - v).norm() / v.norm()))
    assert all(later <= before * (1 + 1e-12) for before, later in itertools.pairwise(energies))
    assert residuals[0] > 1
    assert energies[-1] < 0.5 * energies[0]


@forall(100, **systems)
def test_dense_solution_is_exact_and_costs_one_product_a_column(number: int, size: int, condition: float) -> None:
    operator, v = system(number, size, condition)
    solution = dense(operator, operator.split(v))
    assert operator.products == solution.iterations == size
    torch.testing.assert_close(operator.matrix @ torch.cat(solution.q), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_matrix(operator, operator.split(v)), operator.matrix, rtol=0, atol=0)


@forall(100, **systems, terms=st.integers(0, 30), share=st.floats(0.05, 1.95))
def test_neumann_error_is_the_tail_of_its_series(
    number: int, size: int, condition: float, terms: int, share: float
) -> None:
    operator, v = system(number, size, condition)
    H = operator.matrix
    solution = neumann(operator, operator.split(v), terms=terms, step_size=share)  # the largest eigenvalue is 1
    tail = torch.linalg.matrix_power(torch.eye(size, dtype=DOUBLE) - share * H, terms + 1)
    exact = torch.linalg.solve(H, v)
    torch.testing.assert_close(
        torch.cat(solution.q) - exact, -tail @ exact, rtol=1e-6, atol=1e-10 * float(exact.norm())
    )
    assert operator.products == solution.iterations == terms


@forall(80, **systems, terms=st.integers(0, 20), share=st.floats(0.05, 1.95), spread=st.none() | st.floats(0.0, 1.0))
def test_neumann_from_a_start_and_with_a_preconditioner(
    number: int, size: int, condition: float, terms: int, share: float, spread: float | None
) -> None:
    # The error is (I − αP⁻¹H)^(K+1) times the start's, an equality.
    operator, v = system(number, size, condition)
    H, inverse = operator.matrix, None
    iteration, step = torch.eye(size, dtype=DOUBLE), share
    if spread is None:
        iteration = iteration - step * H
    else:
        inverse, _ = preconditioner(number, operator, spread)
        step = share / float(torch.linalg.eigvals(inverse.matrix @ H).real.max())
        iteration = iteration - step * inverse.matrix @ H
    exact = torch.linalg.solve(H, v)
    power = torch.linalg.matrix_power(iteration, terms + 1)
    near = exact + 0.1 * torch.roll(exact, 1)
    for start in (None, near, 100 * exact):
        operator.products = 0
        at = None if start is None else operator.split(start)
        solution = neumann(operator, operator.split(v), terms=terms, step_size=step, start=at, preconditioner=inverse)
        used = start if start is not None and residual_of(operator, operator.split(start), v) <= 1 else 0 * exact
        torch.testing.assert_close(
            torch.cat(solution.q) - exact, power @ (used - exact), rtol=1e-6, atol=1e-9 * float(exact.norm())
        )
        assert operator.products == solution.iterations == terms + (start is not None)
        assert solution.status is Status.STOPPED_AT_CAP


def test_neumann_sums_that_grow_until_squares_leave_the_range_diverge() -> None:
    v = (torch.ones((), dtype=DOUBLE),)  # of a single number the norm is known up to the largest one
    assert neumann(lambda q: (1e4 * q[0],), v, terms=60, step_size=1.0).status is Status.DIVERGED
    for factor, status in ((0.5, Status.STOPPED_AT_CAP), (-0.5, Status.NEGATIVE_CURVATURE)):
        large = (1e200 * v[0],)
        assert neumann(lambda q, factor=factor: (factor * q[0],), large, terms=3, step_size=1.0).status is status


def test_neumann_status_with_a_preconditioner() -> None:
    # In the P-norm the summands of a convergent series shrink, while their Euclidean norms may grow: here by a fifth.
    H, P = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=DOUBLE), torch.diag(torch.tensor([1.0, 10.0], dtype=DOUBLE))
    inverse, v = Counted(torch.linalg.inv(P), (2,)), (torch.tensor([math.cos(1.6), math.sin(1.6)], dtype=DOUBLE),)
    growing = neumann(Counted(H, (2,)), v, terms=1, step_size=0.92, preconditioner=inverse)
    assert growing.status is Status.STOPPED_AT_CAP
    H = torch.diag(torch.tensor([1.0, 1e-4], dtype=DOUBLE))
    inverse = Counted(torch.linalg.inv(H), (2,))
    v = (torch.tensor([1.0, 1.0], dtype=DOUBLE),)
    good = neumann(Counted(H, (2,)), v, terms=3, step_size=0.5, preconditioner=inverse)
    assert good.status is Status.STOPPED_AT_CAP
    torch.testing.assert_close(good.q[0], (1 - 0.5**4) * torch.tensor([1.0, 1e4], dtype=DOUBLE))
    bad = neumann(Counted(H, (2,)), v, terms=3, step_size=2.5, preconditioner=inverse)
    assert bad.status is Status.DIVERGED
    indefinite = neumann(Counted(-H, (2,)), v, terms=3, step_size=0.5, preconditioner=inverse)
    assert indefinite.status is Status.NEGATIVE_CURVATURE


@forall(30, number=st.integers(0, 2**31), size=st.integers(2, 8), skew=logarithmic(1e-6, 0.3))
def test_neumann_tells_an_asymmetry_where_there_must_be_none(number: int, size: int, skew: float) -> None:
    operator, v = system(number, size, 10.0)
    options = {"terms": 6, "step_size": 0.5, "symmetric": True}
    assert neumann(operator, operator.split(v), **options).status is Status.STOPPED_AT_CAP
    skewed, v = skewed_system(number, size, skew / size)
    found = neumann(skewed, skewed.split(v), **options)
    assert found.status is Status.NOT_SYMMETRIC
    assert found.iterations == skewed.products == 6
    plain = neumann(skewed, skewed.split(v), terms=6, step_size=0.5)
    assert plain.status is Status.STOPPED_AT_CAP
    assert torch.equal(torch.cat(plain.q), torch.cat(found.q))


def test_neumann_at_the_solution_returns_it() -> None:
    operator = Counted(torch.eye(3, dtype=DOUBLE), (3,))
    v = (torch.ones(3, dtype=DOUBLE),)
    solution = neumann(operator, v, terms=5, step_size=0.5, start=v)
    assert (solution.status, solution.iterations, operator.products) == (Status.CONVERGED, 1, 1)
    assert torch.equal(solution.q[0], v[0])


@forall(80, **systems, iterations=st.integers(1, 20), share=st.floats(0.05, 1.95))
def test_richardson_contracts_the_error_of_its_start(
    number: int, size: int, condition: float, iterations: int, share: float
) -> None:
    operator, v = system(number, size, condition)
    exact = torch.linalg.solve(operator.matrix, v)
    power = torch.linalg.matrix_power(torch.eye(size, dtype=DOUBLE) - share * operator.matrix, iterations)
    for start in (None, 0 * v, 3 * v):
        operator.products = 0
        at = None if start is None else operator.split(start)
        solution = richardson(operator, operator.split(v), iterations=iterations, step_size=share, start=at)
        used = torch.zeros_like(v) if start is None else start
        torch.testing.assert_close(
            torch.cat(solution.q) - exact, power @ (used - exact), rtol=1e-6, atol=1e-10 * float(exact.norm())
        )
        assert operator.products == solution.iterations == iterations - (start is None)
        assert solution.status is Status.STOPPED_AT_CAP
    series = neumann(operator, operator.split(v), terms=iterations - 1, step_size=share)
    steps = richardson(operator, operator.split(v), iterations=iterations, step_size=share)
    torch.testing.assert_close(torch.cat(steps.q), torch.cat(series.q), rtol=1e-9, atol=1e-9 * float(exact.norm()))


def test_richardson_reports_divergence_and_takes_a_changing_operator() -> None:
    operator, v = system(2, 5, 10.0)
    parts = operator.split(v)
    assert richardson(operator, parts, iterations=5, step_size=2.5).status is Status.DIVERGED
    nan = richardson(lambda q: tuple(part * math.nan for part in q), parts, iterations=2, step_size=0.5)
    assert nan.status is Status.DIVERGED
    nothing = richardson(operator, parts, iterations=0, step_size=0.5, start=parts)
    assert torch.equal(torch.cat(nothing.q), v)
    # Each product from another matrix, equal to H on average: the mean of many runs is that of H itself.
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(v)
    for _ in range(400):
        noisy = lambda q: operator.split(  # noqa: E731
            (operator.matrix + 0.1 * torch.randn(5, 5, generator=generator, dtype=DOUBLE)) @ torch.cat(q)
        )
        total += torch.cat(richardson(noisy, parts, iterations=6, step_size=0.5).q) / 400
    plain = torch.cat(richardson(operator, parts, iterations=6, step_size=0.5).q)
    torch.testing.assert_close(total, plain, rtol=0, atol=0.03 * float(plain.norm()))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_damping_shifts_the_operator(damping: float) -> None:
    base: Operator = lambda q: (3.0 * q[0],)  # noqa: E731
    torch.testing.assert_close(damped(base, damping)((torch.ones(2),))[0], torch.full((2,), 3.0 + damping))
    assert (damped(base, damping) is base) == (damping == 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_solvers_keep_the_dtype(dtype: torch.dtype) -> None:
    operator, v = system(1, 5, 10.0, dtype)
    parts = operator.split(v)
    for solution in (
        conjugate_gradient(operator, parts, max_iterations=3, rtol=0.0),
        minres(operator, parts, max_iterations=3, rtol=0.0),
        gmres(operator, parts, max_iterations=3, rtol=0.0, restart=2),
        neumann(operator, parts, terms=3, step_size=1.0),
        richardson(operator, parts, iterations=3, step_size=1.0, start=parts),
        dense(operator, parts),
    ):
        assert [part.dtype for part in solution.q] == [dtype, dtype]


def test_dense_works_on_tensors_of_any_shape() -> None:
    H = spectrum_matrix(torch.linspace(1, 2, 7, dtype=DOUBLE), torch.Generator().manual_seed(0))

    def operator(q: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image = H @ torch.cat([part.reshape(-1) for part in q])
        return image[:6].reshape(2, 3), image[6]

    v = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    solution = dense(operator, (v[:6].reshape(2, 3), v[6]))
    assert [part.shape for part in solution.q] == [(2, 3), ()]
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in solution.q]), torch.linalg.solve(H, v))


def test_cotangents_need_not_be_contiguous() -> None:
    v = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(dense(lambda x: (2 * x[0],), (v,)).q[0], v / 2)
