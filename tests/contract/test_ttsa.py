from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Neumann, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad import InnerProblem, Pullback, Response, State, as_estimator
from bilevel.hypergrad.ttsa import TTSA
from tests.bilevel.strategies import logarithmic, make_quadratic, samples
from tests.contract.contract import EstimatorContract, Sample, forall, operator_norm, solve
from tests.contract.repeated import average, contraction, finite_sum, truncated_series, vector


def states_of_all_powers(terms: int) -> list[State]:
    """Generator states from which the powers 0, 1, …, terms − 1 are drawn, in this order."""
    found: dict[int, State] = {}
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        state = generator.get_state()
        found.setdefault(int(torch.randint(terms, (), generator=generator)), {"generator": (state,)})
        if len(found) == terms:
            return [found[power] for power in range(terms)]
    raise AssertionError


@dataclass(frozen=True)
class Expected(Estimator):
    """The exact mean of a method over the power that it draws."""

    method: TTSA

    name: ClassVar[str] = "expected"
    summary: ClassVar[str] = "the mean over all powers"
    cost: ClassVar[str] = "the method's for every power"
    needs: ClassVar[str] = "what the method needs"

    def respond(self, problem: InnerProblem) -> Response:
        return _Response(self.method, self.method.respond(problem))


@dataclass(frozen=True)
class _Response(Response):
    method: TTSA
    response: Response

    @property
    def point(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.response.point

    def pullback(self, cotangent: tuple[Tensor, ...], state: State) -> Pullback:
        runs = [self.response.pullback(cotangent, state) for state in states_of_all_powers(self.method.terms)]
        assert [run.info.iterations for run in runs] == list(range(self.method.terms))
        means = tuple(torch.stack(parts).mean(0) for parts in zip(*(run.value for run in runs), strict=True))
        return Pullback(means, runs[0].info)


class TestTTSA(EstimatorContract):
    """The mean over the power is the truncated Neumann series: everything that the contract says holds of the mean."""

    default = Expected(TTSA(terms=5, step_size=1.0))

    def target(self, sample: Sample) -> Tensor:
        # Few calls, for speed: the series is the promise, not its limit.
        return sample.hypergradient(truncated_series(sample.hessian, 1.0, 5))

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(terms: int, share: float, damping: float, seed: int) -> Estimator:
            return Expected(TTSA(terms=terms, step_size=share / (largest + damping), damping=damping, seed=seed))

        return st.builds(
            build, st.integers(1, 6), st.floats(0.05, 1.95), st.just(0.0) | logarithmic(1e-6, 10.0), st.integers(0, 9)
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Expected)
        smallest, damping = float(sample.eigenvalues[0]), estimator.method.damping
        rate = contraction(sample, estimator.method.step_size, damping)
        tail = rate**estimator.method.terms / (smallest + damping)
        shift = damping / (smallest * (smallest + damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * (tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Expected)
        terms = estimator.method.terms
        return terms, 2 * terms + terms * (terms - 1) // 2

    def test_is_its_own_configuration(self) -> None:
        assert as_estimator(self.default.method.describe()) == self.default.method


@forall(30, sample=samples(max_condition=1e3), terms=st.integers(1, 8), share=st.floats(0.05, 1.95))
def test_mean_over_the_power_is_the_neumann_sum(sample: Sample, terms: int, share: float) -> None:
    step = share / float(sample.eigenvalues[-1])
    expected = solve(sample, Neumann(terms=terms - 1, step_size=step))
    found = solve(sample, Expected(TTSA(terms=terms, step_size=step)))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12 * (1 + terms * sample.scale()))


@forall(12, number=st.integers(0, 2**31), terms=st.integers(1, 3), size=st.integers(1, 4))
def test_mean_over_power_and_batches_is_the_series_of_the_mean_hessian(number: int, terms: int, size: int) -> None:
    batches = finite_sum(2, size, 2, number)
    H, C = batches.mean()
    v, step = vector(size, number), 0.7
    method = TTSA(terms=terms, step_size=step)
    assert method.num_samples == terms
    choices = itertools.product(itertools.product(range(2), repeat=terms), states_of_all_powers(terms))
    found = average([method.respond(batches.problem(choice)).pullback((v,), state) for choice, state in choices])
    torch.testing.assert_close(found, C.T @ truncated_series(H, step, terms) @ v, rtol=1e-10, atol=1e-10)


def test_powers_are_uniform_and_the_generator_goes_on_from_call_to_call() -> None:
    sample = make_quadratic(3, 2, 2.0, 1.0, 4)
    method = TTSA(terms=4, step_size=0.5, seed=3)
    state: State = {}
    powers: list[int] = []
    for _ in range(400):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, method, state=state)
        state = result.state
        powers.append(result.info.iterations)
        assert result.info.products == powers[-1] + 1
        assert f"power {powers[-1]} of 0 to 3" in result.info.message
    counts = torch.bincount(torch.tensor(powers), minlength=4)
    assert len(counts) == 4
    assert float(((counts - 100.0) ** 2 / 100).sum()) < 16.3  # χ² with 3 degrees of freedom at 0.001
    generator = torch.Generator().manual_seed(3)
    assert powers == [int(torch.randint(4, (), generator=generator)) for _ in range(400)]


def test_a_draw_that_is_far_off_is_no_divergence_but_too_long_a_step_is() -> None:
    sample = make_quadratic(6, 3, 10.0, 1.0, 2)
    fine = [draw(sample, TTSA(terms=30, step_size=1.0), state) for state in states_of_all_powers(30)]
    assert max(result.info.residual for result in fine) > 1  # N ρ v at power 0, say
    assert not any(result.info.status.failed for result in fine)
    bad = [draw(sample, TTSA(terms=30, step_size=3.0), state) for state in states_of_all_powers(30)]
    assert bad[-1].info.status is Status.DIVERGED
    assert set(bad[-1].state) == {"generator"}  # or the next call would draw the same power again
    assert "step_size must be below" in bad[-1].info.message


def test_fields_are_validated() -> None:
    with pytest.raises(ConfigError, match=r"TTSA.terms must be an integer of at least 1, not 0"):
        TTSA(terms=0)
    with pytest.raises(ConfigError, match=r"TTSA.seed must be an integer of at least 0, not -1"):
        TTSA(seed=-1)


def draw(sample: Sample, method: TTSA, state: State) -> Hypergradient:
    return hypergradient(*sample.losses(), sample.inner, sample.outer, method, state=state)
