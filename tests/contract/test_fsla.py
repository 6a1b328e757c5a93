from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad import State, as_estimator
from bilevel.hypergrad.fsla import FSLA
from tests.bilevel.strategies import logarithmic, quadratics
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm
from tests.contract.repeated import Repeated, average, contraction, finite_sum, truncated_series, vector


class TestFSLA(EstimatorContract):
    default: ClassVar[Repeated] = Repeated(FSLA(step_size=1.0), calls=5)

    def target(self, sample: Sample) -> Tensor:
        # Few calls, for speed: the series that five steps from zero make.
        return sample.hypergradient(truncated_series(sample.hessian, 1.0, 5))

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(calls: int, share: float, damping: float, momentum: float) -> Estimator:
            method = FSLA(step_size=share / (largest + damping), momentum=momentum, damping=damping)
            return Repeated(method, calls)

        return st.builds(
            build,
            calls=st.integers(1, 5),
            share=st.floats(0.05, 1.95),
            damping=st.just(0.0) | logarithmic(1e-6, 10.0),
            momentum=st.floats(0.01, 1.0),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # On one batch the momentum corrects nothing: dₖ is pₖ.
        assert isinstance(estimator, Repeated)
        method, smallest = estimator.method, float(sample.eigenvalues[0])
        assert isinstance(method, FSLA)
        rate = contraction(sample, method.step_size, method.damping)
        tail = rate**estimator.calls / (smallest + method.damping)
        shift = method.damping / (smallest * (smallest + method.damping))
        return operator_norm(sample.mixed) * float(sample.cotangent.norm()) * (tail + shift)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, Repeated)
        assert isinstance(estimator.method, FSLA)
        again = 0 if estimator.method.momentum == 1.0 else estimator.calls - 1
        assert result.info.products == 2 + (again > 0)
        return estimator.calls + again, 3 * estimator.calls + 2 * again

    def test_is_its_own_configuration(self) -> None:
        assert as_estimator(self.default.method.describe()) == self.default.method


@forall(40, number=st.integers(0, 2**31), size=st.integers(1, 5), momentum=st.floats(0.05, 1.0))
def test_calls_follow_the_recursion_on_changing_batches_and_points(number: int, size: int, momentum: float) -> None:
    batches = finite_sum(4, size, 3, number)
    step, method = 0.8, FSLA(step_size=0.8, momentum=momentum)
    generator = torch.Generator().manual_seed(number)
    state: State = {}
    q = torch.zeros(size, dtype=DOUBLE)
    direction = None
    for call in range(4):
        first, second = (int(part) for part in torch.randint(4, (2,), generator=generator))
        v = vector(size, number + call)
        w, lam = vector(size, number + 10 + call), vector(3, number + 20 + call)
        pulled = method.respond(batches.problem([first, second], w, lam)).pullback((v,), state)
        old, q = q, q - step * (batches.hessians[first] @ q - v)
        p = batches.mixed[second].T @ q  # −∂²f/∂λ∂w is C here
        direction = p if direction is None else p + (1 - momentum) * (direction - batches.mixed[second].T @ old)
        torch.testing.assert_close(pulled.value[0], direction, rtol=1e-10, atol=1e-11)
        expected = float((batches.hessians[second] @ q - v).norm() / v.norm())
        assert pulled.info.residual == pytest.approx(expected, rel=1e-8)
        state = pulled.state


def test_the_old_product_is_taken_at_the_old_point() -> None:
    # A mixed derivative that depends on w and λ: f = w²λ²/2 has ∂²f/∂λ∂w = 2wλ and ∂²f/∂w² = λ².
    method = FSLA(step_size=0.1, momentum=0.25)
    state: State = {}
    q = torch.zeros((), dtype=DOUBLE)
    points = [(1.0, 2.0), (1.5, 1.0), (-0.5, 3.0)]
    direction, last = None, None
    for w, lam in points:
        place = (torch.tensor(w, dtype=DOUBLE), torch.tensor(lam, dtype=DOUBLE))
        result = hypergradient(lambda w, x: (w * x) ** 2 / 2, lambda w, x: 3.0 * w, *place, method, state=state)
        old, q = q, q - 0.1 * (lam**2 * q - 3.0)
        p = -2 * w * lam * q
        direction = p if direction is None or last is None else p + 0.75 * (direction + 2 * last[0] * last[1] * old)
        torch.testing.assert_close(result.grad, direction)
        state, last = result.state, (w, lam)


@forall(12, number=st.integers(0, 2**31), size=st.integers(1, 4), momentum=st.floats(0.05, 1.0))
def test_mean_over_all_batches(number: int, size: int, momentum: float) -> None:
    # E dₖ given the past: with q̄ the mean step, C̄ᵀ q̄ + (1 − η) (dₖ₋₁ − C̄ᵀ qₖ₋₁).
    batches = finite_sum(3, size, 2, number)
    H, C = batches.mean()
    v, start, past = vector(size, number), vector(size, number + 1), vector(2, number + 2)
    w, lam = torch.zeros(size, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    state = {"solution": (start,), "momentum": (past,), "inner": (w,), "outer": (lam,)}
    method = FSLA(step_size=0.8, momentum=momentum)
    assert method.num_samples == 2
    found = average(
        [
            method.respond(batches.problem(choice)).pullback((v,), state)
            for choice in itertools.product(range(3), repeat=2)
        ]
    )
    expected = C.T @ (start - 0.8 * (H @ start - v)) + (1 - momentum) * (past - C.T @ start)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@forall(20, sample=quadratics(max_condition=10.0, scale=False))
def test_without_momentum_no_old_point_is_kept(sample: Sample) -> None:
    losses = sample.losses()
    plain = hypergradient(*losses, sample.inner, sample.outer, FSLA(momentum=1.0), state={})
    assert set(plain.state) == {"solution"}
    again = hypergradient(*losses, sample.inner, sample.outer, FSLA(momentum=1.0), state=plain.state)
    assert again.info.products == 2
    heavy = hypergradient(*losses, sample.inner, sample.outer, FSLA(momentum=0.5), state={})
    assert set(heavy.state) == {"solution", "momentum", "inner", "outer"}


@pytest.mark.parametrize(("value", "expected"), [(0.0, "above 0"), (1.5, "at most 1"), ("x", "a finite number")])
def test_momentum_is_validated(value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"FSLA.momentum must be .*{expected}"):
        FSLA(momentum=value)  # type: ignore[arg-type]
