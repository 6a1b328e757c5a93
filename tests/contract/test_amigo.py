from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad import State, as_estimator
from bilevel.hypergrad.amigo import AmIGO
from tests.bilevel.strategies import logarithmic, make_quadratic, quadratics, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm, status_of
from tests.contract.repeated import Repeated, average, contraction, finite_sum, vector


class TestAmIGO(EstimatorContract):
    default: ClassVar[Repeated] = Repeated(AmIGO(steps=45, step_size=1.14), calls=1)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(calls: int, steps: int, share: float, damping: float) -> Estimator:
            return Repeated(AmIGO(steps=steps, step_size=share / (largest + damping), damping=damping), calls)

        return st.builds(
            build,
            calls=st.integers(1, 3),
            steps=st.integers(1, 6),
            share=st.floats(0.05, 1.95),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Repeated)
        method, smallest = estimator.method, float(sample.eigenvalues[0])
        assert isinstance(method, AmIGO)
        rate = contraction(sample, method.step_size, method.damping)
        tail = rate ** (method.steps * estimator.calls) / (smallest + method.damping)
        shift = method.damping / (smallest * (smallest + method.damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * float(tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Repeated)
        assert isinstance(estimator.method, AmIGO)
        assert result.info.products == estimator.method.steps + 1
        return estimator.calls, estimator.calls * (1 + result.info.products)

    def test_is_its_own_configuration(self) -> None:
        assert as_estimator(self.default.method.describe()) == self.default.method


class TestAmIGOWithConjugateGradients(EstimatorContract):
    default: ClassVar[Repeated] = Repeated(AmIGO(steps=8, solver="conjugate_gradient"), calls=2)

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        def build(steps: int, damping: float) -> Estimator:
            return Repeated(AmIGO(steps=steps, solver="conjugate_gradient", damping=damping), 1)

        return st.builds(build, st.integers(1, 6), st.just(0.0) | logarithmic(1e-6, 10.0))

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        assert isinstance(estimator, Repeated)
        method = estimator.method
        assert isinstance(method, AmIGO)
        low, high = (float(sample.eigenvalues[place]) + method.damping for place in (0, -1))
        root = (high / low) ** 0.5
        rate = min(1.0, 2 * ((root - 1) / (root + 1)) ** method.steps)
        shift = method.damping / (float(sample.eigenvalues[0]) * low)
        tail = rate * root / low + 1e-9 * root / low
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * float(tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Repeated)
        method = estimator.method
        assert isinstance(method, AmIGO)
        assert result.info.products <= method.steps + 1
        return 1, 1 + result.info.products

    def test_is_its_own_configuration(self) -> None:
        assert as_estimator(self.default.method.describe()) == self.default.method


@forall(
    60,
    sample=quadratics(max_condition=1e3),
    calls=st.integers(1, 4),
    steps=st.integers(1, 5),
    share=st.floats(0.1, 1.9),
)
def test_residual_is_the_power_of_the_iteration_matrix(sample: Sample, calls: int, steps: int, share: float) -> None:
    # ‖Hq − v‖ = ‖(I − ρH)^(calls · steps) v‖, an equality: the warm start loses nothing.
    step = share / float(sample.eigenvalues[-1])
    method = Repeated(AmIGO(steps=steps, step_size=step), calls)
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, method)
    iteration = torch.eye(len(sample.inner), dtype=DOUBLE) - step * sample.hessian
    power = torch.linalg.matrix_power(iteration, calls * steps) @ sample.cotangent
    assert result.info.residual == pytest.approx(float(power.norm() / sample.cotangent.norm()), rel=1e-6, abs=1e-11)


@forall(12, number=st.integers(0, 2**31), steps=st.integers(1, 3), size=st.integers(1, 4))
def test_mean_over_all_batches_is_the_recursion_of_the_mean(number: int, steps: int, size: int) -> None:
    # Independent batches in every factor: the mean of the product is the product of the means.
    batches = finite_sum(2, size, 2, number)
    H, C = batches.mean()
    v, start, step = vector(size, number), vector(size, number + 1), 0.7
    method = AmIGO(steps=steps, step_size=step)
    choices = list(itertools.product(range(2), repeat=steps + 1))
    assert method.num_samples == steps + 1
    found = average(
        [method.respond(batches.problem(choice)).pullback((v,), {"solution": (start,)}) for choice in choices]
    )
    q = start
    for _ in range(steps):
        q = q - step * (H @ q - v)
    torch.testing.assert_close(found, C.T @ q, rtol=1e-11, atol=1e-11)
    assert batches.passes.forward == len(choices) * (steps + 1)
    assert batches.passes.backward == len(choices) * 2 * (steps + 1)


@forall(30, sample=quadratics(max_condition=100.0), steps=st.integers(1, 4), calls=st.integers(2, 4))
def test_conjugate_gradients_restart_from_the_last_solution(sample: Sample, steps: int, calls: int) -> None:
    # The energy norm of the error falls by 2 ((√κ − 1)/(√κ + 1))^steps a call, and never grows.
    method = AmIGO(steps=steps, solver="conjugate_gradient")
    exact = torch.linalg.solve(sample.hessian, sample.cotangent)
    root = float(sample.eigenvalues[-1] / sample.eigenvalues[0]) ** 0.5
    state: State = {}
    before = float(exact @ sample.cotangent) ** 0.5
    floor = 1e-9 * before * root
    for call in range(calls):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, method, state=state)
        state = result.state
        error = exact - state["solution"][0]
        energy = float(error @ sample.hessian @ error) ** 0.5
        assert energy <= 1.0001 * min(1.0, 2 * ((root - 1) / (root + 1)) ** steps) * before + floor
        assert result.info.products <= steps + 1 + (call > 0)  # a start's residual takes one
        before = energy


def test_conjugate_gradients_stay_on_one_batch() -> None:
    batches = finite_sum(2, 4, 3, 8)
    v, start = vector(4, 1), vector(4, 2)
    method = AmIGO(steps=4, solver="conjugate_gradient")
    assert method.num_samples == 2
    pulled = method.respond(batches.problem([0, 1])).pullback((v,), {"solution": (start,)})
    q = torch.linalg.solve(batches.hessians[0], v)
    torch.testing.assert_close(pulled.value[0], batches.mixed[1].T @ q, rtol=1e-9, atol=1e-10)
    expected = float((batches.hessians[1] @ q - v).norm() / v.norm())  # on the batch of the last product
    assert pulled.info.residual == pytest.approx(expected, rel=1e-8)
    assert batches.passes.forward == 2
    assert batches.passes.backward == 2 + pulled.info.products


def test_statuses() -> None:
    v = vector(5, 3)
    generator = torch.Generator().manual_seed(0)
    indefinite = spectrum_matrix(torch.tensor([-1.0, 0.5, 1.0, 2.0, 3.0], dtype=DOUBLE), generator)
    for method in (AmIGO(steps=20, step_size=0.1), AmIGO(steps=20, solver="conjugate_gradient")):
        _, result = status_of(indefinite, Repeated(method, 1), v)
        assert result.info.status is Status.NEGATIVE_CURVATURE
        assert "damping" in result.info.explain()
    q, result = status_of(indefinite, Repeated(AmIGO(steps=400, step_size=0.3, damping=2.0), 1), v)
    assert result.info.status is Status.CONVERGED
    torch.testing.assert_close(q, torch.linalg.solve(indefinite + 2 * torch.eye(5, dtype=DOUBLE), v))
    positive = make_quadratic(6, 3, 10.0, 1.0, 2).hessian
    _, result = status_of(positive, Repeated(AmIGO(steps=20, step_size=2.2), 1), vector(6, 1))
    assert result.info.status is Status.DIVERGED
    assert result.state == {}


def test_fields_are_validated() -> None:
    with pytest.raises(ConfigError, match=r"AmIGO.steps must be an integer of at least 1, not 0"):
        AmIGO(steps=0)
    with pytest.raises(ConfigError, match=r"AmIGO.solver.*'conjugate_gradient'"):
        AmIGO(solver="conjugate_gradients")
