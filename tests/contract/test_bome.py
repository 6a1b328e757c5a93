from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import Estimator, Hypergradient, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.bome import BOME
from tests.bilevel.strategies import logarithmic, make_quadratic, quadratics, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm, solve
from tests.contract.test_f2sa import curvature, penalty_rounding
from tests.contract.test_finite_difference import attention_losses


class TestBOME(EstimatorContract):
    # Without a barrier y tends to the place where v and ∂f/∂w are parallel, and the answer to the exact one.
    default = BOME(barrier=0.0, iterations=100, step_size=1.0)
    bfloat16_error = None  # steps of y below the spacing of bfloat16

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(barrier: float, iterations: int, share: float, auto: bool) -> Estimator:
            step_size = "auto" if auto else share / largest
            return BOME(barrier, iterations=iterations, step_size=step_size)

        barriers = st.just(0.0) | logarithmic(1e-3, 0.9)
        return st.builds(build, barriers, st.integers(1, 20), st.floats(0.05, 1.0), st.booleans())

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # H q − v is the residual for q = −γ (y − w), as these samples are quadratic in w: the answer −Bᵀq is off by
        # ‖B‖ ‖Hq − v‖ / μ, and by the curvature of ∂f/∂λ.
        (y,) = result.state["auxiliary"]
        slope = sample.hessian @ (y - sample.inner)
        multiplier, distance = gamma(estimator, sample, slope), float((y - sample.inner).norm())
        size, smallest = float(sample.cotangent.norm()), float(sample.eigenvalues[0])
        tail = operator_norm(sample.mixed) * result.info.residual * size / smallest
        return tail + multiplier * curvature(sample) * distance**2 / 2 + penalty_rounding(sample, multiplier, distance)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, BOME)
        extra = result.info.products - (estimator.iterations + 1)
        assert 3 <= extra <= 17 if estimator.step_size == "auto" else extra == 0
        return result.info.products, result.info.products

    @pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
    def test_tiny_and_huge_outer_losses_scale_the_answer(self, factor: float) -> None:
        # ξ times the cotangent is a length, and η its rate: y itself does not move where both are scaled along.
        sample = make_quadratic(4, 3, 4.0, 1.0, 5)
        inner_loss, outer_loss = sample.losses(torch.float32)
        w, lam = sample.inner.float(), sample.outer.float()

        def run(factor: float) -> Hypergradient:
            estimator = BOME(0.5 * factor, iterations=20, step_size=0.5 / factor)
            return hypergradient(inner_loss, lambda w, lam: outer_loss(w, lam) * factor, w, lam, estimator, state={})

        plain, scaled = run(1.0).grad, run(factor).grad
        torch.testing.assert_close(scaled / factor, plain, rtol=1e-3, atol=1e-3 * float(plain.norm()))


def gamma(estimator: Estimator, sample: Sample, slope: Tensor) -> float:
    assert isinstance(estimator, BOME)
    return max(estimator.barrier - float(sample.cotangent @ slope / slope.square().sum()), 0.0)


def step_size_of(estimator: BOME, result: Hypergradient) -> float:
    if isinstance(estimator.step_size, str):
        return 0.5 / float(result.state["largest_eigenvalue"][0])
    return estimator.step_size


@forall(60, sample=quadratics(max_condition=1e3), data=st.data())
def test_the_iterate_and_the_answer_follow_the_algorithm(sample: Sample, data: st.DataObject) -> None:
    # d ← d − ξ (v + γ H d) with γ = max(η − ⟨v, Hd⟩ / ‖Hd‖², 0), from d = −ξ v on; the answer is γ Bᵀ d.
    estimator = data.draw(TestBOME().estimators(sample))
    assert isinstance(estimator, BOME)
    result = solve(sample, estimator)
    step, H, v = step_size_of(estimator, result), sample.hessian, sample.cotangent
    d = -step * v
    for _ in range(estimator.iterations - 1):
        d = d - step * (v + gamma(estimator, sample, H @ d) * (H @ d))
    factor = gamma(estimator, sample, H @ d)
    size = float(d.norm())
    torch.testing.assert_close(
        result.state["auxiliary"][0] - sample.inner, d, rtol=1e-6, atol=1e-7 * size + 1e-12 * float(sample.inner.norm())
    )
    expected = sample.direct + factor * sample.mixed.T @ d
    torch.testing.assert_close(result.grad, expected, rtol=1e-5, atol=1e-6 * (1 + sample.scale()))
    residual = float((v + factor * (H @ d)).norm() / v.norm())
    assert result.info.residual == pytest.approx(residual, rel=1e-5, abs=1e-6)
    assert float(re.findall(r"multiplier ([^,]+),", result.info.message)[0]) == pytest.approx(factor, rel=0.01)


@forall(40, sample=quadratics(max_condition=1e3), barrier=st.just(0.0) | logarithmic(1e-3, 1.0), data=st.data())
def test_the_gap_falls_at_the_rate_of_the_barrier(sample: Sample, barrier: float, data: st.DataObject) -> None:
    # Where γ > 0, ⟨g, v + γ g⟩ = φ: q falls by ξ η ‖g‖² to first order, and by Taylor's theorem at least by that less
    # ξ² L ‖v + γ g‖² / 2. Where γ = 0 it falls faster: ⟨g, v⟩ ≥ φ.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    H, v, largest = sample.hessian, sample.cotangent, float(sample.eigenvalues[-1])
    y = sample.inner + float(v.norm()) * torch.randn(len(v), generator=generator, dtype=DOUBLE)
    step = data.draw(st.floats(0.01, 1.0)) / largest
    estimator = BOME(barrier, iterations=1, step_size=step)
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state={"auxiliary": (y,)})

    def gap(y: Tensor) -> float:
        d = y - sample.inner
        return float(d @ (H @ d)) / 2

    g = H @ (y - sample.inner)
    move = v + gamma(estimator, sample, g) * g
    after = gap(result.state["auxiliary"][0])
    allowed = gap(y) - step * barrier * float(g.square().sum()) + step**2 * largest * float(move.square().sum()) / 2
    assert after <= allowed + 1e-9 * (gap(y) + abs(allowed))
    assert result.info.products == 3  # w, y, and y after its step


@forall(
    40, sample=quadratics(max_condition=100.0), share=logarithmic(1e-3, 1.0), barrier=st.just(0.0) | st.floats(0, 2)
)
def test_where_cotangent_and_gradient_are_parallel_the_answer_is_off_by_the_barriers_factor(
    sample: Sample, share: float, barrier: float
) -> None:
    # ∂f/∂w(y) = −s v: γ = η + 1/s, and the answer is (1 + η s) times the exact one. A step keeps them parallel.
    direction = torch.linalg.solve(sample.hessian, sample.cotangent)
    y = sample.inner - share * direction
    tiny = BOME(barrier, iterations=1, step_size=1e-9 * share / float(sample.eigenvalues[-1]))
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, tiny, state={"auxiliary": (y,)})
    expected = sample.direct + (1 + barrier * share) * (sample.hypergradient() - sample.direct)
    tolerance = 1e-7 * (1 + sample.scale() * (1 + barrier) * (1 + float(sample.inner.norm()) / share))
    torch.testing.assert_close(result.grad, expected, rtol=1e-6, atol=tolerance)
    assert result.info.residual == pytest.approx(barrier * share, rel=1e-3, abs=1e-6 / share)


@forall(8, sample=quadratics(max_condition=10.0), share=st.floats(0.2, 1.0))
def test_without_a_barrier_the_answer_tends_to_the_exact_one(sample: Sample, share: float) -> None:
    errors = []
    for iterations in (30, 250):
        estimator = BOME(0.0, iterations=iterations, step_size=share / float(sample.eigenvalues[-1]))
        result = solve(sample, estimator)
        errors.append(float((result.grad - sample.hypergradient()).norm()) / (1 + sample.scale()))
    assert errors[1] <= 1e-6
    assert errors[1] <= errors[0] + 1e-9


@pytest.mark.parametrize("product", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_with_a_barrier_the_residual_settles_where_the_step_size_says(product: float, number: int) -> None:
    # sqrt(ξηL / (2 − ξηL)): the two-cycle of y along the largest eigenvector. A smaller step is more accurate.
    sample = make_quadratic(6, 3, 8.0, 2.0, number)
    estimator, state, seen = BOME(0.5, iterations=20, step_size=product), {}, []
    for call in range(30):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state=state)
        state = result.state
        if call >= 20:
            seen.append(result.info.residual)
    predicted = math.sqrt(product / (2 - product))  # η L = 1
    assert max(seen) == pytest.approx(predicted, rel=0.3)


def test_a_warm_start_pays() -> None:
    sample = make_quadratic(8, 3, 20.0, 1.0, 4)
    lam, estimator, state = sample.outer.clone(), BOME(0.05, iterations=5, step_size=0.2), {}
    for _ in range(60):
        w = sample.solution(lam)
        warm = hypergradient(*sample.losses(), w, lam, estimator, state=state)
        state = warm.state
        lam = lam - 1e-4 * warm.grad
    cold = hypergradient(*sample.losses(), w, lam, estimator, state={})
    assert warm.info.residual < 0.5 * cold.info.residual


def test_a_step_size_that_is_too_large_is_reported_and_forgotten() -> None:
    # y is 10 from w, and ξη λmax = 2.5: it flees by half its distance a step.
    sample = make_quadratic(6, 3, 2.0, 5.0, 2)
    state: Any = {"auxiliary": (sample.inner + 1e4,)}
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, BOME(1.0, step_size=0.5), state=state)
    assert result.info.status is Status.DIVERGED
    assert "step_size" in result.info.explain()
    assert result.state == {}
    good = hypergradient(*sample.losses(), sample.inner, sample.outer, BOME(1.0, step_size=0.3), state=state)
    assert not good.info.status.failed


@forall(30, sample=quadratics(max_condition=1e3), share=st.floats(0.05, 2.0), number=st.integers(0, 2**31))
def test_an_admissible_step_size_never_counts_as_divergence(sample: Sample, share: float, number: int) -> None:
    # On a convex loss, wherever y and w are.
    generator = torch.Generator().manual_seed(number)

    def moved(size: float) -> Tensor:
        return sample.inner + size * torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)

    barrier, w = 0.7, moved(1.0)
    estimator = BOME(barrier, iterations=7, step_size=share / barrier / float(sample.eigenvalues[-1]))
    state: Any = {"auxiliary": (moved(10.0),)}
    for _ in range(3):
        result = hypergradient(*sample.losses(), w, sample.outer, estimator, state=state)
        assert not result.info.status.failed
        state = result.state


def test_status_of_indefinite_and_singular_hessians() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, generator=generator, dtype=DOUBLE)

    def run(H: Tensor) -> Hypergradient:
        zero = torch.zeros_like(v)
        losses = (lambda w, lam: w @ (H @ w) / 2 - w @ lam, lambda w, lam: w @ v)
        return hypergradient(*losses, zero, zero.clone(), BOME(), state={})

    H = spectrum_matrix(torch.tensor([-1.0, 0.5, 1.0, 2.0, 3.0], dtype=DOUBLE), generator)
    assert run(H).info.status is Status.NEGATIVE_CURVATURE
    assert run(torch.zeros(5, 5, dtype=DOUBLE)).info.status is Status.SINGULAR


def test_needs_first_derivatives_only() -> None:
    inner, outer, w, lam = attention_losses()
    found = hypergradient(inner, outer, w, lam, BOME(iterations=3), state={})  # type: ignore[arg-type]
    assert math.isfinite(found.info.residual)
    assert float((found.grad - found.direct).norm()) > 0
    assert not BOME().needs_double_backward


def test_refuses_to_be_called_without_state() -> None:
    sample = make_quadratic(4, 3, 4.0, 1.0, 5)
    with pytest.raises(ConfigError, match=r"BOME\(\) continues from the state of its last call: pass state=\{\}"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, BOME())


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("barrier", -0.1, "a finite number at least 0, not -0.1"),
        ("iterations", 0, "an integer of at least 1, not 0"),
        ("step_size", 0.0, "a finite number above 0 or 'auto', not 0.0"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"BOME.{field} must be {expected}")):
        BOME(**{field: value})  # type: ignore[arg-type]
