from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.hypergrad import State, as_estimator
from bilevel.hypergrad.soba import SOBA
from tests.bilevel.strategies import logarithmic, make_quadratic, quadratics, samples
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm
from tests.contract.repeated import Repeated, contraction, truncated_series


class TestSOBA(EstimatorContract):
    default: ClassVar[Repeated] = Repeated(SOBA(step_size=1.0), calls=6)

    def target(self, sample: Sample) -> Tensor:
        # Few calls, for speed: the series that five steps from zero make.
        return sample.hypergradient(truncated_series(sample.hessian, 1.0, 5))

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(calls: int, share: float, damping: float) -> Estimator:
            return Repeated(SOBA(step_size=share / (largest + damping), damping=damping), calls)

        return st.builds(
            build,
            calls=st.integers(1, 8),
            share=st.floats(0.05, 1.95),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # The call's own step is for the next one: one power fewer than calls.
        assert isinstance(estimator, Repeated)
        method, smallest = estimator.method, float(sample.eigenvalues[0])
        assert isinstance(method, SOBA)
        rate = contraction(sample, method.step_size, method.damping)
        tail = rate ** (estimator.calls - 1) / (smallest + method.damping)
        shift = method.damping / (smallest * (smallest + method.damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * (tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Repeated)
        assert result.info.products == 1
        return estimator.calls, 2 * estimator.calls

    def test_is_its_own_configuration(self) -> None:
        assert as_estimator(self.default.method.describe()) == self.default.method


@forall(
    40,
    sample=samples(max_condition=1e4),
    share=st.floats(0.05, 1.95),
    damping=st.just(0.0) | st.floats(0.01, 1.0),
    number=st.integers(0, 2**31),
)
def test_calls_follow_the_recursion_wherever_the_point_moves(
    sample: Sample, share: float, damping: float, number: int
) -> None:
    # qₖ₊₁ = qₖ − ρ ((Hₖ + δI) qₖ − vₖ), and the answer of call k is with qₖ: against dense matrices, (w, λ) moving.
    generator = torch.Generator().manual_seed(number)
    inner_loss, outer_loss = sample.losses()
    state: State = {}
    q = torch.zeros_like(sample.inner)
    method = SOBA(step_size=share / (float(sample.eigenvalues[-1]) + damping), damping=damping)
    for _ in range(4):
        H, v = sample.hessian + damping * torch.eye(len(q), dtype=DOUBLE), sample.cotangent
        result = hypergradient(inner_loss, outer_loss, sample.inner, sample.outer, method, state=state)
        size = float(sample.direct.norm()) + operator_norm(sample.mixed) * float(q.norm())
        torch.testing.assert_close(result.grad, sample.direct - sample.mixed.T @ q, rtol=1e-9, atol=1e-11 * size)
        assert result.info.residual == pytest.approx(float((H @ q - v).norm() / v.norm()), rel=1e-8, abs=1e-11)
        if result.info.status is Status.DIVERGED:
            return
        q = q - method.step_size * (H @ q - v)
        torch.testing.assert_close(result.state["solution"][0], q, rtol=1e-9, atol=1e-11 * float(q.norm() + 1))
        state = result.state
        sample = moved(sample, generator)


@forall(40, sample=quadratics(max_condition=100.0), share=st.floats(0.1, 1.9), calls=st.integers(1, 12))
def test_residual_is_the_power_of_the_iteration_matrix(sample: Sample, share: float, calls: int) -> None:
    step = share / float(sample.eigenvalues[-1])
    result = run(sample, SOBA(step_size=step), calls)
    iteration = torch.eye(len(sample.inner), dtype=DOUBLE) - step * sample.hessian
    power = torch.linalg.matrix_power(iteration, calls - 1) @ sample.cotangent
    assert result.info.residual == pytest.approx(float(power.norm() / sample.cotangent.norm()), rel=1e-6, abs=1e-11)


def test_the_first_call_returns_the_direct_part() -> None:
    sample = make_quadratic(4, 3, 3.0, 1.0, 2)
    result = run(sample, SOBA(), 1)
    assert torch.equal(result.grad, result.direct)
    assert result.info.residual == 1.0
    assert result.info.status is Status.STOPPED_AT_CAP


def test_statuses() -> None:
    sample = make_quadratic(6, 3, 10.0, 1.0, 2)
    assert run(sample, SOBA(step_size=1.9), 600).info.status is Status.CONVERGED
    assert run(sample, SOBA(step_size=1.0), 10).info.status is Status.STOPPED_AT_CAP
    statuses: list[Status] = []
    state: State = {}
    for _ in range(60):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, SOBA(step_size=2.5), state=state)
        state = result.state
        statuses.append(result.info.status)
        if result.info.status is Status.DIVERGED:
            assert "λmax is at least 0.8" in result.info.message
            assert "step_size" in result.info.explain()
            assert not state  # the next call starts afresh
    assert Status.DIVERGED in statuses


def moved(sample: Sample, generator: torch.Generator) -> Sample:
    """The same losses near by: not at the inner solution."""
    shifts = (
        0.01 * torch.randn(part.shape, generator=generator, dtype=DOUBLE) for part in (sample.inner, sample.outer)
    )
    w, lam = (part + shift for part, shift in zip((sample.inner, sample.outer), shifts, strict=True))
    return dataclasses.replace(sample, inner=w, outer=lam)


def run(sample: Sample, method: SOBA, calls: int) -> Hypergradient:
    return hypergradient(*sample.losses(), sample.inner, sample.outer, Repeated(method, calls))
