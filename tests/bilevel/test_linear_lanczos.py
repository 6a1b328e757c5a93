from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from bilevel.errors import ConfigError
from bilevel.linear import bound_operator_norm, estimate_spectrum
from tests.bilevel.operators import Counted, finish, indefinite_system, system, systems
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix


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


@forall(100, **systems, more=st.integers(0, 3), single=st.booleans())
def test_as_many_products_as_unknowns_are_exact(
    number: int, size: int, condition: float, more: int, single: bool
) -> None:
    dtype = torch.float32 if single else DOUBLE
    operator, v = indefinite_system(number, size, condition, dtype)
    estimate = estimate_spectrum(operator, operator.split(v), products=size + more)
    eigenvalues = torch.linalg.eigvalsh(operator.matrix.to(DOUBLE))
    rounding = 20 * torch.finfo(dtype).eps
    assert estimate.complete
    assert operator.products == estimate.products <= size
    assert abs(estimate.smallest - float(eigenvalues[0])) <= rounding
    assert abs(estimate.largest - float(eigenvalues[-1])) <= rounding
    assert float(eigenvalues[0]) - 2 * rounding <= estimate.smallest_bound <= float(eigenvalues[0]) + rounding / 10
    assert estimate.lower_bound() == estimate.smallest_bound


@forall(80, **systems, products=st.integers(1, 10), keep=st.booleans())
def test_an_eigenvalue_lies_within_the_residual_of_each_extreme_ritz_value(
    number: int, size: int, condition: float, products: int, keep: bool
) -> None:
    operator, v = indefinite_system(number, size, condition)
    estimate = estimate_spectrum(operator, operator.split(v), products=products, reorthogonalise=keep)
    eigenvalues = torch.linalg.eigvalsh(operator.matrix)
    assert float((eigenvalues - estimate.smallest).abs().min()) <= estimate.smallest_residual + 1e-14
    assert float((eigenvalues - estimate.largest).abs().min()) <= 2 * estimate.largest_residual + 1e-14
    assert estimate.smallest >= float(eigenvalues[0]) - 1e-13
    assert estimate.smallest_bound == estimate.smallest - estimate.smallest_residual
    assert estimate.dimension == size


def test_orthogonality_is_what_the_smallest_eigenvalue_needs() -> None:
    # Without it the largest eigenvalue, found first, comes back again and again in place of new ones.
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.cat([torch.tensor([1e6], dtype=DOUBLE), torch.linspace(1.0, 2.0, 39, dtype=DOUBLE)])
    operator, v = finish(spectrum_matrix(eigenvalues, generator), generator)
    errors = {
        keep: abs(estimate_spectrum(operator, operator.split(v), products=20, reorthogonalise=keep).smallest - 1.0)
        for keep in (False, True)
    }
    assert errors[True] < 1e-3
    assert errors[True] < errors[False]


@forall(
    60, number=st.integers(0, 2**31), size=st.integers(20, 80), condition=logarithmic(1.0, 1e3), k=st.integers(2, 40)
)
def test_the_lower_bound_is_below_the_smallest_eigenvalue(number: int, size: int, condition: float, k: int) -> None:
    # Fails with a probability of 10⁻³ for the worst spectrum; over the matrix' eigenvectors instead of the start.
    operator, v = system(number, size, condition)
    estimate = estimate_spectrum(operator, operator.split(v), products=k, reorthogonalise=True)
    smallest = float(torch.linalg.eigvalsh(operator.matrix)[0])
    assert estimate.lower_bound() <= smallest + 1e-13
    spread = estimate.largest - estimate.smallest  # which must stand out of the rounding for its shares to be seen
    if math.isfinite(estimate.lower_bound(0.01)) and not estimate.complete and spread > 1e-6:
        # theorem 4.2, solved for the probability: 1.648 √n exp(−(2k − 1) √ε) with θ − bound = ε (λmax − bound)
        bound = estimate.lower_bound(0.01) + estimate.rounding
        share = (estimate.smallest - bound) / (estimate.largest - bound)
        failure = 1.648 * math.sqrt(size) * math.exp(-(2 * estimate.products - 1) * math.sqrt(max(0.0, share)))
        assert failure == pytest.approx(0.01, rel=1e-3)
    assert estimate.lower_bound(1e-6) <= estimate.lower_bound(1e-3) <= estimate.smallest


def test_the_lower_bound_is_of_use_after_enough_products() -> None:
    eigenvalues = torch.linspace(0.1, 1.0, 1000, dtype=DOUBLE)
    like = (torch.zeros(1000, dtype=DOUBLE),)
    bounds = []
    for products in (5, 30, 60):
        estimate = estimate_spectrum(lambda q: (eigenvalues * q[0],), like, products=products, reorthogonalise=True)
        bounds.append(estimate.lower_bound())
    assert bounds[0] < 0  # five products say nothing
    assert 0.05 < bounds[1] < bounds[2] <= 0.1
    # and the residual of the Ritz value alone is no bound: its eigenvalue need not be the smallest
    hidden = torch.cat([torch.tensor([0.01], dtype=DOUBLE), torch.linspace(0.1, 1.0, 20000, dtype=DOUBLE)])
    estimate = estimate_spectrum(lambda q: (hidden * q[0],), (torch.zeros(20001, dtype=DOUBLE),), products=3)
    assert estimate.smallest_bound > -0.5
    assert estimate.lower_bound() == -math.inf


def test_shapes_with_a_hidden_eigenvalue_fail_less_often_than_stated() -> None:
    # One small eigenvalue among many: how often the start misses it. The theorem allows 20 % here.
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(200):
        scale = 1 + torch.randn(60, generator=generator, dtype=DOUBLE).abs()
        Q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=DOUBLE)).Q
        eigenvalues = torch.cat([torch.zeros(1, dtype=DOUBLE), scale[1:] / scale.max()])
        operator = Counted((Q * eigenvalues) @ Q.T, (60,))
        estimate = estimate_spectrum(operator, (torch.zeros(60, dtype=DOUBLE),), products=6, reorthogonalise=True)
        failures += estimate.lower_bound(0.2) > 1e-12
    assert failures <= 40


@forall(60, number=st.integers(0, 2**31), rows=st.integers(1, 12), columns=st.integers(1, 12), r=st.integers(1, 5))
def test_operator_norm_is_bounded(number: int, rows: int, columns: int, r: int) -> None:
    generator = torch.Generator().manual_seed(number)
    B = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    products = 0

    def operator(x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal products
        products += 1
        return (B @ torch.cat(x),)

    like = torch.split(torch.zeros(columns, dtype=DOUBLE), [columns // 2, columns - columns // 2])
    bound = bound_operator_norm(operator, like, vectors=r, failure=1e-4)
    assert products == r
    size = float(torch.linalg.matrix_norm(B, 2))
    assert size <= bound  # fails with a probability of 10⁻⁴
    alpha = 1e-4 ** (-1 / r) * math.sqrt(2 / math.pi)
    assert bound <= alpha * size * (math.sqrt(columns) + 6)
    assert bound_operator_norm(operator, (torch.cat(like),), vectors=r, failure=1e-4) == pytest.approx(bound, rel=1e-12)


def test_operator_norm_fails_as_often_as_stated_at_most() -> None:
    # A rank-one B is the worst case: P(|x| ≤ √(π/2)/α) ≈ 1/α for r = 1.
    B = torch.zeros(1, 5)
    B[0, 2] = 1.0
    failures = sum(
        bound_operator_norm(lambda x: (B @ x[0],), (torch.zeros(5),), vectors=1, failure=0.25, seed=seed) < 1.0
        for seed in range(400)
    )
    assert 60 <= failures <= 120  # about 24 % expected, by the normal distribution


def test_operator_norm_of_zero_and_of_bad_input() -> None:
    like = (torch.zeros(3),)
    assert bound_operator_norm(lambda x: (0 * x[0],), like) == 0.0
    assert math.isnan(bound_operator_norm(lambda x: (x[0] * math.nan,), like))
    for vectors, failure in ((0, 0.1), (3, 0.0), (3, 1.0)):
        with pytest.raises(ConfigError, match="vectors of at least 1 and failure between 0 and 1"):
            bound_operator_norm(lambda x: x, like, vectors=vectors, failure=failure)
