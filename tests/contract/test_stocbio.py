from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Neumann, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.stocbio import StocBiO
from tests.bilevel.strategies import logarithmic, quadratics, samples
from tests.contract.contract import EstimatorContract, Sample, forall, operator_norm, solve
from tests.contract.repeated import average, contraction, finite_sum, truncated_series, vector


class TestStocBiO(EstimatorContract):
    default = StocBiO(terms=45, step_size=1.14)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(terms: int, share: float, damping: float) -> Estimator:
            return StocBiO(terms=terms, step_size=share / (largest + damping), damping=damping)

        return st.builds(build, st.integers(0, 20), st.floats(0.05, 1.95), st.just(0.0) | logarithmic(1e-6, 10.0))

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, StocBiO)
        smallest, damping = float(sample.eigenvalues[0]), estimator.damping
        rate = contraction(sample, estimator.step_size, damping)
        tail = rate ** (estimator.terms + 1) / (smallest + damping)
        return (
            operator_norm(sample.mixed)
            * float(sample.cotangent.norm())
            * (tail + damping / (smallest * (smallest + damping)))
        )

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, StocBiO)
        assert result.info.products == estimator.terms + 1
        return 1, 2 + estimator.terms


@forall(
    40,
    sample=samples(),
    terms=st.integers(0, 20),
    share=st.floats(0.05, 1.95),
    damping=st.just(0.0) | st.floats(0.01, 1.0),
)
def test_is_neumann_on_one_batch(sample: Sample, terms: int, share: float, damping: float) -> None:
    step = share / (float(sample.eigenvalues[-1]) + damping)
    found = solve(sample, StocBiO(terms=terms, step_size=step, damping=damping))
    expected = solve(sample, Neumann(terms=terms, step_size=step, damping=damping))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-11, atol=1e-12 * (1 + sample.scale()))
    assert found.info.residual == pytest.approx(expected.info.residual, rel=1e-6, abs=1e-12)
    assert (found.info.products, found.info.iterations) == (expected.info.products, expected.info.iterations)


@forall(12, number=st.integers(0, 2**31), terms=st.integers(0, 3), size=st.integers(1, 4))
def test_mean_over_all_batches_is_the_series_of_the_mean_hessian(number: int, terms: int, size: int) -> None:
    batches = finite_sum(2, size, 2, number)
    H, C = batches.mean()
    v, step = vector(size, number), 0.7
    method = StocBiO(terms=terms, step_size=step)
    assert method.num_samples == terms + 1
    choices = list(itertools.product(range(2), repeat=terms + 1))
    responses = [method.respond(batches.problem(choice)) for choice in choices]
    found = average([response.pullback((v,), {}) for response in responses])
    torch.testing.assert_close(found, C.T @ truncated_series(H, step, terms + 1) @ v, rtol=1e-11, atol=1e-11)
    assert batches.passes.forward == len(choices) * (1 if terms == 0 else terms + 1)


def test_each_product_is_on_its_own_batch() -> None:
    # Algorithm 3 of the paper, by hand for two terms.
    batches = finite_sum(3, 3, 2, 5)
    v, step = vector(3, 5), 0.4
    pulled = StocBiO(terms=2, step_size=step).respond(batches.problem([0, 1, 2])).pullback((v,), {})
    first = v - step * batches.hessians[0] @ v
    second = first - step * batches.hessians[1] @ first
    q = step * (v + first + second)
    torch.testing.assert_close(pulled.value[0], batches.mixed[2].T @ q, rtol=1e-12, atol=1e-12)
    assert pulled.info.residual == pytest.approx(float((batches.hessians[2] @ q - v).norm() / v.norm()), rel=1e-9)
    assert pulled.info.status is Status.STOPPED_AT_CAP


@forall(30, sample=quadratics(max_condition=10.0), excess=st.floats(1.5, 3.0))
def test_a_step_size_beyond_two_over_the_largest_eigenvalue_is_reported(sample: Sample, excess: float) -> None:
    result = solve(sample, StocBiO(terms=60, step_size=2 * excess / float(sample.eigenvalues[-1])))
    assert result.info.status is Status.DIVERGED
    assert result.info.residual > 1
    assert "step_size must be below" in result.info.message


def test_needs_no_state() -> None:
    assert not StocBiO().needs_state
    result = hypergradient(
        lambda w, x: (w - x) ** 2, lambda w, x: w**2, torch.tensor(1.0), torch.tensor(1.0), StocBiO()
    )
    assert not result.state


def test_fields_are_validated() -> None:
    with pytest.raises(ConfigError, match=r"StocBiO.terms must be an integer of at least 0, not -1"):
        StocBiO(terms=-1)
