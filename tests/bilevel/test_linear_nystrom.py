from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.errors import ConfigError
from bilevel.linear import NystromApproximation, conjugate_gradient, damped, dense_matrix, nystrom
from bilevel.result import Status
from tests.bilevel.operators import Counted, finish, system, systems
from tests.bilevel.strategies import DOUBLE, forall, logarithmic, spectrum_matrix


def approximate(operator: Counted, rank: int, seed: int = 0) -> tuple[NystromApproximation, Tensor]:
    like = operator.split(torch.zeros(len(operator.matrix), dtype=operator.matrix.dtype))
    approximation = nystrom(operator, like, rank=rank, seed=seed)
    return approximation, dense_matrix(approximation.product, like)


@forall(100, **systems, rank=st.integers(1, 14), seed=st.integers(0, 5))
def test_lies_between_zero_and_the_operator(number: int, size: int, condition: float, rank: int, seed: int) -> None:
    operator, _ = system(number, size, condition)
    approximation, matrix = approximate(operator, rank, seed)
    assert operator.products == approximation.products == min(rank, size)
    assert approximation.status is Status.CONVERGED
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-14
    assert float(torch.linalg.eigvalsh(operator.matrix - matrix)[0]) >= -1e-14 * size
    U = torch.cat(approximation.vectors)
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=DOUBLE), rtol=0, atol=1e-13)
    assert approximation.eigenvalues.tolist() == sorted(approximation.eigenvalues.tolist(), reverse=True)


@forall(80, number=st.integers(0, 2**31), rank=st.integers(1, 6), more=st.integers(0, 6))
def test_is_exact_for_a_rank_of_at_least_the_operators(number: int, rank: int, more: int) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = torch.cat([0.5 + torch.rand(rank, generator=generator, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE)])
    operator, _ = finish(spectrum_matrix(eigenvalues, generator), generator)
    approximation, matrix = approximate(operator, rank + more)
    torch.testing.assert_close(matrix, operator.matrix, rtol=0, atol=1e-8)
    assert approximation.status is Status.CONVERGED


def test_the_shift_keeps_rounding_of_null_directions_small() -> None:
    # More random vectors than the operator has rank: without the shift of algorithm 2.1 the worst error is 6·10⁻¹³.
    worst = 0.0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        eigenvalues = torch.cat([0.5 + torch.rand(2, generator=generator, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE)])
        operator, _ = finish(spectrum_matrix(eigenvalues, generator), generator)
        _, matrix = approximate(operator, 8, seed)
        worst = max(worst, float(torch.linalg.matrix_norm(matrix - operator.matrix, 2)))
    assert worst < 5e-14


def test_expected_error_is_within_the_bound() -> None:
    # Frangella, Tropp, Udell 2021, proposition 2.2; the mean over 60 draws for the expectation.
    generator = torch.Generator().manual_seed(0)
    for decay in (0.5, 0.8, 0.95):
        eigenvalues = decay ** torch.arange(40, dtype=DOUBLE)
        H = spectrum_matrix(eigenvalues, generator)
        for rank in (6, 12):
            errors = [
                float(torch.linalg.matrix_norm(H - approximate(Counted(H, (40,)), rank, seed)[1], 2))
                for seed in range(60)
            ]
            bound = min(
                (1 + 2 * (rank - p) / (p - 1)) * float(eigenvalues[rank - p])
                + 2 * math.e**2 * rank / (p**2 - 1) * float(eigenvalues[rank - p :].sum())
                for p in range(2, rank - 1)
            )
            best = float(eigenvalues[rank])  # of any matrix of this rank
            assert best * (1 - 1e-9) <= sum(errors) / len(errors) <= bound
            assert sum(errors) / len(errors) <= 25 * best  # seen: 3 to 15


@forall(80, **systems, rank=st.integers(1, 14), damping=logarithmic(1e-4, 10.0))
def test_solve_inverts_the_damped_approximation(
    number: int, size: int, condition: float, rank: int, damping: float
) -> None:
    operator, v = system(number, size, condition)
    approximation, matrix = approximate(operator, rank)
    found = torch.cat(approximation.solve(operator.split(v), damping))
    shifted = matrix + damping * torch.eye(size, dtype=DOUBLE)
    torch.testing.assert_close(found, torch.linalg.solve(shifted, v), rtol=1e-8, atol=1e-10 / damping)
    assert operator.products == approximation.products  # solving takes no product
    # (Ĥ + δ)⁻¹ − (H + δ)⁻¹ = (Ĥ + δ)⁻¹ (H − Ĥ) (H + δ)⁻¹ is positive semi-definite and below ‖H − Ĥ‖ / δ (…)
    exact = torch.linalg.solve(operator.matrix + damping * torch.eye(size, dtype=DOUBLE), v)
    error = float(torch.linalg.matrix_norm(operator.matrix - matrix, 2))
    assert float((found - exact).norm()) <= error / damping * float(exact.norm()) * 1.000001 + 1e-9 / damping


@forall(60, **systems)
def test_full_rank_needs_no_damping(number: int, size: int, condition: float) -> None:
    operator, v = system(number, size, min(condition, 1e4))
    approximation, _ = approximate(operator, size)
    found = torch.cat(approximation.solve(operator.split(v), 0.0))
    torch.testing.assert_close(found, torch.linalg.solve(operator.matrix, v), rtol=1e-6, atol=1e-6)
    if size > 1:
        lower, _ = approximate(operator, size - 1)
        with pytest.raises(ConfigError, match=rf"rank {size - 1} in {size} unknowns has no inverse: damping must be"):
            lower.solve(operator.split(v), 0.0)


@forall(80, **systems, rank=st.integers(1, 14), damping=st.just(0.0) | logarithmic(1e-6, 1.0))
def test_preconditioned_condition_number(number: int, size: int, condition: float, rank: int, damping: float) -> None:
    operator, v = system(number, size, condition)
    approximation, matrix = approximate(operator, rank)
    like = operator.split(v)
    inverse = dense_matrix(approximation.preconditioner(damping), like)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-9, atol=1e-12)
    H = operator.matrix + damping * torch.eye(size, dtype=DOUBLE)
    values, vectors = torch.linalg.eigh(inverse)
    assert float(values[0]) > 0  # positive definite
    root = vectors * values.sqrt() @ vectors.T
    spectrum = torch.linalg.eigvalsh(root @ H @ root)
    found = float(spectrum[-1] / spectrum[0])
    smallest, error = float(approximation.eigenvalues[-1]), float(torch.linalg.matrix_norm(operator.matrix - matrix, 2))
    floor = float(torch.linalg.eigvalsh(H)[0])
    # As proposition 5.3, with the smallest eigenvalue of H + δI for δ, which is sharper.
    assert found <= (smallest + damping + error) / min(floor, smallest + damping) * 1.0001 + 1e-6
    if rank >= size:
        assert found <= 1.001


def test_preconditioned_conjugate_gradients_need_fewer_products() -> None:
    generator = torch.Generator().manual_seed(0)
    eigenvalues = 10.0 ** -torch.linspace(0, 6, 30, dtype=DOUBLE)
    operator, v = finish(spectrum_matrix(eigenvalues, generator), generator)
    shifted, options = damped(operator, 1e-3), {"max_iterations": 200, "rtol": 1e-8}
    plain = conjugate_gradient(shifted, operator.split(v), **options)
    approximation, _ = approximate(operator, 15)
    better = conjugate_gradient(
        shifted, operator.split(v), preconditioner=approximation.preconditioner(1e-3), **options
    )
    assert plain.status is better.status is Status.CONVERGED
    assert better.iterations <= plain.iterations / 3
    torch.testing.assert_close(torch.cat(better.q), torch.cat(plain.q), rtol=1e-3, atol=1e-4)


@forall(60, number=st.integers(0, 2**31), size=st.integers(2, 20), single=st.booleans())
def test_indefinite_operators_are_noticed_and_stay_positive(number: int, size: int, single: bool) -> None:
    generator = torch.Generator().manual_seed(number)
    eigenvalues = 0.1 + torch.rand(size, generator=generator, dtype=DOUBLE)
    eigenvalues[: size // 2 + 1] *= -1
    operator, v = finish(spectrum_matrix(eigenvalues, generator), generator, torch.float32 if single else DOUBLE)
    approximation, matrix = approximate(operator, size)  # a full set of directions sees every curvature
    assert approximation.status is Status.NEGATIVE_CURVATURE
    assert "eigenvalue of -" in approximation.message
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-5
    assert bool(torch.isfinite(torch.cat(approximation.solve(operator.split(v), 0.1))).all())


def test_operators_that_are_not_symmetric_or_not_finite_or_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    N = torch.randn(6, 6, generator=generator, dtype=DOUBLE)
    v = torch.randn(6, generator=generator, dtype=DOUBLE)
    approximation, _ = approximate(Counted(torch.eye(6, dtype=DOUBLE) + 0.1 * (N - N.T), (2, 4)), 3)
    assert approximation.status is Status.NOT_SYMMETRIC
    for bad in (math.nan, math.inf):
        approximation, matrix = approximate(Counted(torch.eye(6, dtype=DOUBLE) * bad, (6,)), 3)
        assert approximation.status is Status.DIVERGED
        assert bool((matrix == 0).all())
    approximation, matrix = approximate(Counted(torch.zeros(6, 6, dtype=DOUBLE), (6,)), 3)
    assert approximation.status is Status.CONVERGED
    assert bool((matrix == 0).all())
    torch.testing.assert_close(approximation.solve((v,), 0.5)[0], 2 * v)
    torch.testing.assert_close(approximation.preconditioner(0.0)((v,))[0], v)


@forall(40, **systems, rank=st.integers(1, 8), power=st.integers(-40, 40))
def test_scaling_and_splitting_change_nothing(number: int, size: int, condition: float, rank: int, power: int) -> None:
    operator, _ = system(number, size, min(condition, 1e3))
    _, matrix = approximate(operator, rank)
    factor = 2.0**power
    _, scaled = approximate(Counted(operator.matrix * factor, (size,)), rank)
    torch.testing.assert_close(scaled / factor, matrix, rtol=0, atol=1e-10)
    _, other = approximate(operator, rank, seed=1)
    if rank < size and condition > 1.5:
        assert not torch.equal(other, matrix)


def test_float32_and_mixed_dtypes() -> None:
    operator, v = system(5, 12, 100.0)
    exact, _ = approximate(operator, 6)
    like = (torch.zeros(5), torch.zeros(7, dtype=DOUBLE))

    def mixed(q: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image = operator.matrix @ torch.cat([q[0].to(DOUBLE), q[1]])
        return image[:5].float(), image[5:]

    approximation = nystrom(mixed, like, rank=6)
    assert [part.dtype for part in approximation.vectors] == [torch.float32, DOUBLE]
    found = approximation.solve((v[:5].float(), v[5:]), 0.1)
    assert [part.dtype for part in found] == [torch.float32, DOUBLE]
    expected = torch.cat(exact.solve(operator.split(v), 0.1))
    torch.testing.assert_close(torch.cat([found[0].double(), found[1]]), expected, rtol=1e-3, atol=1e-3)
