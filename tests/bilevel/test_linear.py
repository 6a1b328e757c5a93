from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.linear import Operator, conjugate_gradient, damped, dense, dense_matrix, estimate_spectrum, neumann
from bilevel.result import Status
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix


class Counted:
    """A matrix as an operator on split vectors that counts its products."""

    def __init__(self, matrix: Tensor, sizes: tuple[int, ...]) -> None:
        self.matrix = matrix
        self.sizes = sizes
        self.products = 0

    def __call__(self, q: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.products += 1
        return self.split(self.matrix @ torch.cat(q))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.sizes))


def system(number: int, size: int, condition: float, dtype: torch.dtype = DOUBLE) -> tuple[Counted, Tensor]:
    generator = torch.Generator().manual_seed(number)
    exponents = torch.rand(size, generator=generator, dtype=DOUBLE)
    exponents[0], exponents[-1] = 0.0, 1.0
    H = spectrum_matrix(condition ** (exponents - 1), generator)
    cut = int(torch.randint(0, size + 1, (), generator=generator))
    return Counted(H.to(dtype), (cut, size - cut)), torch.randn(size, generator=generator, dtype=DOUBLE).to(dtype)


systems = {
    "number": st.integers(0, 2**31),
    "size": st.integers(1, 12),
    "condition": logarithmic(1.0, 1e6),
}


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


@forall(100, **systems)
def test_spectrum_estimate_encloses_the_largest_eigenvalue(number: int, size: int, condition: float) -> None:
    operator, v = system(number, size, condition)
    estimate = estimate_spectrum(operator, operator.split(v), products=8)
    eigenvalues = torch.linalg.eigvalsh(operator.matrix)
    assert operator.products == estimate.products <= 8
    assert estimate.smallest >= float(eigenvalues[0]) - 1e-9
    assert float(eigenvalues[-1]) * 0.8 <= estimate.largest <= 2 * float(eigenvalues[-1])


def test_spectrum_of_a_large_operator_is_not_underestimated_much() -> None:
    eigenvalues = torch.linspace(0.0, 1.0, 2000, dtype=DOUBLE)
    like = (torch.zeros(2000, dtype=DOUBLE),)
    for power in (1, 4, 16):
        spectrum = eigenvalues**power
        estimate = estimate_spectrum(lambda q, s=spectrum: (s * q[0],), like, products=8)
        assert 0.95 <= estimate.largest <= 1.5


def test_spectrum_estimate_does_not_depend_on_how_the_vector_is_split() -> None:
    # Each part drew its own random numbers: the step size, and with it the answer, changed with the split.
    operator, v = system(3, 40, 100.0)
    results = set()
    for sizes in ((40,), (17, 23), (1, 2, 37)):
        split = Counted(operator.matrix, sizes)
        results.add(round(estimate_spectrum(split, split.split(v), products=4).largest, 12))
    assert len(results) == 1


def test_spectrum_estimate_passes_nan_on() -> None:
    estimate = estimate_spectrum(lambda q: (q[0] * float("nan"),), (torch.ones(3),))
    assert math.isnan(estimate.largest)


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
        neumann(operator, parts, terms=3, step_size=1.0),
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
