from __future__ import annotations

import re

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Neumann, Status, hypergradient
from bilevel.errors import ConfigError
from tests.bilevel.strategies import logarithmic, make_quadratic, quadratics, samples, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Field, Sample, forall, operator_norm, solve, status_of


class TestNeumann(EstimatorContract):
    default = Neumann(terms=60)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(terms: int, share: float, auto: bool, damping: float) -> Estimator:
            step_size = "auto" if auto else share / (largest + damping)
            return Neumann(terms=terms, step_size=step_size, damping=damping)

        return st.builds(
            build,
            terms=st.integers(0, 30),
            share=st.floats(0.05, 1.95),
            auto=st.booleans(),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Neumann)
        rate = contraction(estimator, sample, result)
        smallest, damping = float(sample.eigenvalues[0]), estimator.damping
        tail = rate ** (estimator.terms + 1) / (smallest + damping)
        shift = damping / (smallest * (smallest + damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * (tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Neumann)
        extra = result.info.products - (estimator.terms + 1)
        assert 1 <= extra <= 8 if estimator.step_size == "auto" else extra == 0
        assert result.info.iterations == estimator.terms
        return 1, 1 + result.info.products


def step_size_of(estimator: Neumann, result: Hypergradient) -> float:
    if isinstance(estimator.step_size, str):
        return 1 / (float(result.state["largest_eigenvalue"][0]) + estimator.damping)
    return float(estimator.step_size)


def contraction(estimator: Neumann, sample: Sample, result: Hypergradient) -> float:
    step = step_size_of(estimator, result)
    return float((1 - step * (sample.eigenvalues + estimator.damping)).abs().max())


@forall(150, sample=samples(), data=st.data())
def test_residual_is_the_power_of_the_iteration_matrix(sample: Sample, data: st.DataObject) -> None:
    # ‖Hq − v‖ = ‖(I − αH)^(K+1) v‖, an equality: one summand more or fewer would show.
    estimator = data.draw(TestNeumann().estimators(sample))
    result = solve(sample, estimator)
    H = sample.hessian + estimator.damping * torch.eye(len(sample.inner), dtype=DOUBLE)
    step = step_size_of(estimator, result)
    iteration = torch.eye(len(H), dtype=DOUBLE) - step * H
    power = torch.linalg.matrix_power(iteration, estimator.terms + 1) @ sample.cotangent
    assert result.info.residual == pytest.approx(float(power.norm() / sample.cotangent.norm()), rel=1e-6, abs=1e-11)


@forall(60, sample=quadratics(), terms=st.integers(0, 40), share=st.floats(0.05, 1.95))
def test_equals_the_truncated_sum(sample: Sample, terms: int, share: float) -> None:
    step = share / float(sample.eigenvalues[-1])
    H = sample.hessian
    total, summand = torch.zeros_like(H), torch.eye(len(H), dtype=DOUBLE)
    for _ in range(terms + 1):
        total, summand = total + summand, summand @ (torch.eye(len(H), dtype=DOUBLE) - step * H)
    expected = sample.hypergradient(step * total)
    torch.testing.assert_close(
        solve(sample, Neumann(terms=terms, step_size=step)).grad, expected, rtol=1e-9, atol=1e-12 * (1 + sample.scale())
    )


@forall(60, sample=quadratics())
def test_automatic_step_size_is_close_to_the_largest_eigenvalue_and_converges(sample: Sample) -> None:
    result = solve(sample, Neumann(terms=5))
    estimate, largest = float(result.state["largest_eigenvalue"][0]), float(sample.eigenvalues[-1])
    assert 0.99 * largest <= estimate <= 2 * largest
    assert not result.info.status.failed
    assert result.info.residual <= 1


def test_automatic_step_size_is_learnt_once() -> None:
    sample = quadratic()
    first = solve(sample, Neumann(terms=5))
    again = hypergradient(*sample.losses(), sample.inner, sample.outer, Neumann(terms=5), state=first.state)
    assert torch.equal(again.grad, first.grad)
    assert again.info.products == 6
    damped = Neumann(terms=5, damping=0.5)
    fresh = hypergradient(*sample.losses(), sample.inner, sample.outer, damped)
    reused = hypergradient(*sample.losses(), sample.inner, sample.outer, damped, state=fresh.state)
    assert torch.equal(reused.grad, fresh.grad)
    # A stale estimate makes the series diverge; it is then taken again.
    stale = {"largest_eigenvalue": (first.state["largest_eigenvalue"][0] / 10,)}
    mended = hypergradient(*sample.losses(), sample.inner, sample.outer, Neumann(terms=5), state=stale)
    assert torch.equal(mended.grad, first.grad)
    assert mended.info.products > 6


def test_a_step_size_beyond_two_over_the_largest_eigenvalue_is_reported() -> None:
    # Betty: error 5·10⁵ without a word, with its default step size of 1 and a largest eigenvalue of 5.
    sample = quadratic(largest=5.0)
    result = solve(sample, Neumann(terms=10, step_size=1.0))
    assert result.info.status is Status.DIVERGED
    assert result.info.residual > 100
    assert "step_size" in result.info.explain()
    assert not solve(sample, Neumann(terms=10, step_size=0.39)).info.status.failed


def test_status_of_indefinite_and_singular_hessians() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, generator=generator, dtype=DOUBLE)
    for estimator in (Neumann(terms=20), Neumann(terms=20, step_size=0.5)):
        for eigenvalues in ([-1.0, 0.5, 1.0, 2.0, 3.0], [-3.0, -2.0, -1.0, -1.0, -0.5]):
            H = spectrum_matrix(torch.tensor(eigenvalues, dtype=DOUBLE), generator)
            _, result = status_of(H, estimator, v)
            assert result.info.status is Status.NEGATIVE_CURVATURE
            assert "damping" in result.info.explain()
        # Singular: a right-hand side outside of the range cannot be reached, and the residual says so. The products
        # with the null vector that remains are rounding of either sign, which once passed for negative curvature.
        H = spectrum_matrix(torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=DOUBLE), generator)
        for terms in (5, 100, 800):
            _, result = status_of(H, Neumann(terms=terms, step_size=estimator.step_size), v)
            assert result.info.status is Status.STOPPED_AT_CAP
            assert 0.01 < result.info.residual < 1
    _, result = status_of(torch.zeros(5, 5, dtype=DOUBLE), Neumann(), v)
    assert result.info.status is Status.SINGULAR


@forall(30, size=st.integers(1, 8), number=st.integers(0, 2**31))
def test_transposed_products_are_right_for_a_jacobian_that_is_not_symmetric(size: int, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    N = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    J = torch.eye(size, dtype=DOUBLE) + 0.4 * N / operator_norm(N)
    C = torch.randn(size, 3, generator=generator, dtype=DOUBLE)
    v, lam = torch.randn(size, generator=generator, dtype=DOUBLE), torch.randn(3, generator=generator, dtype=DOUBLE)
    result = hypergradient(
        lambda w, lam: Field.apply(w, J) - w @ (C @ lam),
        lambda w, lam: w @ v,
        torch.linalg.solve(J, C @ lam),
        lam,
        Neumann(terms=40, step_size=1.0),
    )
    torch.testing.assert_close(result.grad, C.T @ torch.linalg.solve(J.T, v), rtol=1e-9, atol=1e-9)
    assert not result.info.status.failed


def test_damping_makes_any_hessian_positive() -> None:
    v = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    for eigenvalue in (0.0, -0.5, 3.0):
        H = torch.eye(2, dtype=DOUBLE) * eigenvalue
        q, result = status_of(H, Neumann(terms=60, damping=1.0), v)
        torch.testing.assert_close(q, v / (eigenvalue + 1.0))
        assert result.info.status is Status.CONVERGED


@forall(40, sample=samples(max_condition=1e3), rtol=logarithmic(1e-8, 0.5), terms=st.integers(0, 200))
def test_stops_by_the_residual_or_at_the_cap(sample: Sample, rtol: float, terms: int) -> None:
    step = 1 / float(sample.eigenvalues[-1])
    info = solve(sample, Neumann(terms=terms, step_size=step, rtol=rtol)).info
    assert info.products == info.iterations + 1 <= terms + 1
    if info.status is Status.CONVERGED:
        assert info.residual <= rtol * (1 + 1e-9)
        # It stopped no later than one term after a sum that is accurate enough.
        fewer = solve(sample, Neumann(terms=max(0, info.iterations - 2), step_size=step)).info
        assert info.iterations < 2 or fewer.residual > rtol * (1 - 1e-6)
    else:
        assert info.status is Status.STOPPED_AT_CAP
        assert info.iterations == terms
        assert info.residual > rtol * (1 - 1e-9)


def test_a_warm_start_that_is_accurate_enough_takes_no_term() -> None:
    sample = quadratic()
    method = Neumann(terms=200, rtol=1e-6, warm_start=True)
    first = hypergradient(*sample.losses(), sample.inner, sample.outer, method, state={})
    again = hypergradient(*sample.losses(), sample.inner, sample.outer, method, state=first.state)
    assert first.info.status is again.info.status is Status.CONVERGED
    assert again.info.products == 1 < first.info.products


def test_identity_hessian_is_solved_by_the_first_summand() -> None:
    q, result = status_of(torch.eye(3, dtype=DOUBLE), Neumann(terms=0, step_size=1.0), torch.ones(3, dtype=DOUBLE))
    assert torch.equal(q, torch.ones(3, dtype=DOUBLE))
    assert result.info.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("terms", -1, "an integer of at least 0, not -1"),
        ("terms", 2.5, "an integer of at least 0, not 2.5"),
        ("terms", True, "an integer"),
        ("step_size", 0.0, "a finite number above 0 or 'auto', not 0.0"),
        ("step_size", "automatic", "or 'auto', not 'automatic'"),
        ("step_size", float("nan"), "a finite number"),
        ("damping", -1e-3, "a finite number at least 0, not -0.001"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Neumann.{field} must be ") + ".*" + re.escape(expected)):
        Neumann(**{field: value})  # type: ignore[arg-type]


def quadratic(largest: float = 1.0) -> Sample:
    return make_quadratic(6, 3, 10.0, largest, 2)
