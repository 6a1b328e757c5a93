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
from bilevel.hypergrad.f2sa import F2SA
from tests.bilevel.strategies import EPSILON, logarithmic, make_quadratic, quadratics, spectrum_matrix
from tests.contract.contract import DOUBLE, EstimatorContract, Sample, forall, operator_norm, solve
from tests.contract.test_finite_difference import attention_losses


class TestF2SA(EstimatorContract):
    # The multiplier 1 leaves no bias where f is quadratic and ∂f/∂λ linear in w, and the least rounding.
    default = F2SA(multiplier=1.0, iterations=80, step_size=1.14)
    bfloat16_error = None  # steps of y below the spacing of bfloat16

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest = float(sample.eigenvalues[-1])

        def build(multiplier: float, iterations: int, share: float, auto: bool) -> Estimator:
            step_size = "auto" if auto else share / largest
            return F2SA(multiplier * float(sample.cotangent.norm()), iterations=iterations, step_size=step_size)

        return st.builds(build, logarithmic(0.1, 1e3), st.integers(1, 20), st.floats(0.05, 1.95), st.booleans())

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # y − w = −(I − (I − ηH)ᴷ) H⁻¹ v/σ for these samples, which are quadratic in w, and the bias of ∂f/∂λ.
        assert isinstance(estimator, F2SA)
        size, smallest, sigma = float(sample.cotangent.norm()), float(sample.eigenvalues[0]), estimator.multiplier
        rate = contraction(estimator, sample, result)
        distance = (1 + rate**estimator.iterations) * size / (smallest * sigma)
        tail = operator_norm(sample.mixed) * size * rate**estimator.iterations / smallest
        return tail + sigma * curvature(sample) * distance**2 / 2 + penalty_rounding(sample, sigma, distance)

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, F2SA)
        extra = result.info.products - (estimator.iterations + 1)
        assert 3 <= extra <= 17 if estimator.step_size == "auto" else extra == 0
        return result.info.products, result.info.products

    @pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
    def test_tiny_and_huge_outer_losses_scale_the_answer(self, factor: float) -> None:
        # The multiplier has the units of the outer loss: y itself does not move where both are scaled.
        sample = make_quadratic(4, 3, 4.0, 1.0, 5)
        inner_loss, outer_loss = sample.losses(torch.float32)
        w, lam = sample.inner.float(), sample.outer.float()

        def run(factor: float) -> Hypergradient:
            estimator = F2SA(multiplier=factor, iterations=40, step_size=1.0)
            return hypergradient(inner_loss, lambda w, lam: outer_loss(w, lam) * factor, w, lam, estimator, state={})

        plain, scaled = run(1.0).grad, run(factor).grad
        torch.testing.assert_close(scaled / factor, plain, rtol=1e-3, atol=1e-3 * float(plain.norm()))


def curvature(sample: Sample) -> float:
    """The Lipschitz constant of ``∂²f/∂w∂λ`` in w: ``‖S‖ max exp(Sλ)`` of the ridge problems, whose λ-derivative is
    ``½ Sᵀ (exp(Sλ) ∘ w²)``."""
    if sample.kind == "quadratic":
        return 0.0
    return operator_norm(sample.data["S"]) * float((sample.data["S"] @ sample.outer).exp().max())


def penalty_rounding(sample: Sample, sigma: float, distance: float) -> float:
    """What rounding of the two values of ``∂f/∂λ`` and of y does to their difference, σ times enlarged."""
    reach = float(sample.inner.norm()) + distance
    data = operator_norm(sample.data["C"]) if sample.kind == "quadratic" else curvature(sample) * reach
    slope = data + float(sample.eigenvalues[-1])
    solve = operator_norm(sample.mixed) * slope / float(sample.eigenvalues[0])
    return 1e3 * EPSILON * sigma * (1 + reach) * (data + solve)


def step_size_of(estimator: F2SA, result: Hypergradient) -> float:
    if isinstance(estimator.step_size, str):
        return 1 / float(result.state["largest_eigenvalue"][0])
    return estimator.step_size


def contraction(estimator: F2SA, sample: Sample, result: Hypergradient) -> float:
    return float((1 - step_size_of(estimator, result) * sample.eigenvalues).abs().max())


@forall(60, sample=quadratics(max_condition=1e4), data=st.data())
def test_the_iterate_and_the_answer_have_their_closed_form(sample: Sample, data: st.DataObject) -> None:
    # y_K − w = −(I − (I − ηH)ᴷ) H⁻¹ v/σ, the answer −Bᵀ (I − (I − ηH)ᴷ) H⁻¹ v, the residual ‖(I − ηH)ᴷ v‖/‖v‖: one
    # step more or fewer would show. The answer does not depend on σ.
    estimator = data.draw(TestF2SA().estimators(sample))
    assert isinstance(estimator, F2SA)
    result = solve(sample, estimator)
    identity, H = torch.eye(len(sample.inner), dtype=DOUBLE), sample.hessian
    left = torch.linalg.matrix_power(identity - step_size_of(estimator, result) * H, estimator.iterations)
    inverse = torch.linalg.solve(H, identity - left)
    v, sigma = sample.cotangent, estimator.multiplier
    rounding = 1e-9 * (1 + float(sample.inner.norm())) * (1 + sigma / float(v.norm()))
    moved = result.state["auxiliary"][0] - sample.inner
    reach = float(v.norm()) / sigma / float(sample.eigenvalues[0])
    torch.testing.assert_close(moved, -(inverse @ v) / sigma, rtol=1e-9, atol=1e-9 * reach + 1e-13 * (1 + reach))
    expected = sample.hypergradient(inverse)
    torch.testing.assert_close(result.grad, expected, rtol=1e-9, atol=rounding * (1 + sample.scale()))
    residual = float((left @ v).norm() / v.norm())
    assert result.info.residual == pytest.approx(residual, rel=1e-6, abs=rounding * (1 + float(sample.eigenvalues[-1])))


@forall(40, sample=quadratics(max_condition=100.0), share=st.floats(0.1, 1.9), number=st.integers(0, 2**31))
def test_the_iterate_contracts_from_call_to_call(sample: Sample, share: float, number: int) -> None:
    # ‖y − y*‖ falls by max |1 − ηλ| a step, wherever y was: the state carries it.
    rate = float((1 - share / sample.eigenvalues[-1] * sample.eigenvalues).abs().max())
    estimator = F2SA(2.0, iterations=3, step_size=share / float(sample.eigenvalues[-1]))
    limit = sample.inner - torch.linalg.solve(sample.hessian, sample.cotangent) / 2.0
    generator = torch.Generator().manual_seed(number)
    y = sample.inner + torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    state: Any = {"auxiliary": (y,)}
    for _ in range(4):
        before = float((state["auxiliary"][0] - limit).norm())
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state=state)
        assert result.info.products == estimator.iterations + 2  # one pass more than from w
        state = result.state
        after = float((state["auxiliary"][0] - limit).norm())
        assert after <= rate**3 * before * (1 + 1e-9) + 1e-12 * (1 + float(limit.norm()))


def test_a_warm_start_pays() -> None:
    # λ moves a little at each call, and the inner solution with it: going on from y is far closer than from w.
    sample = make_quadratic(8, 3, 50.0, 1.0, 4)
    lam, estimator, state = sample.outer.clone(), F2SA(5.0, iterations=10, step_size=1.0), {}
    for _ in range(30):
        w = sample.solution(lam)
        warm = hypergradient(*sample.losses(), w, lam, estimator, state=state)
        state = warm.state
        lam = lam - 1e-4 * warm.grad
    cold = hypergradient(*sample.losses(), w, lam, estimator, state={})
    assert warm.info.residual < 0.1 * cold.info.residual


def smooth(number: int, size: int) -> tuple[dict[str, Tensor], Any, Any]:
    """``f = wᵀDw/2 + Σ log cosh(wᵢ + (Cλ)ᵢ)``, ``F = Aw·w/2``-like: third derivatives are those of log cosh.

    With ``s = tanh²`` its derivatives are tanh, 1 − s, and −2 tanh (1 − s), the last at most 4/(3√3) < 0.77 in size.
    So μ ≥ min D, L_H ≤ 0.77 and L_B ≤ 0.77 ‖C‖.
    """
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    d = {"D": 0.5 + torch.rand(size, generator=generator, dtype=DOUBLE), "C": normal(size, 3), "v": normal(size)}
    d["lam"], d["w"] = normal(3), normal(size)
    # Shifted, so that w is the solution exactly.
    d["b"] = d["D"] * d["w"] + (d["w"] + d["C"] @ d["lam"]).tanh()

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        z = w + d["C"] @ lam
        return (d["D"] * w.square()).sum() / 2 + (z.abs() + torch.log1p((-2 * z.abs()).exp())).sum() - d["b"] @ w

    return d, inner, lambda w, lam: d["v"] @ w


def smooth_answer(d: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The exact hypergradient, q = H⁻¹v, and the diagonal of the third derivative."""
    t = (d["w"] + d["C"] @ d["lam"]).tanh()
    second = 1 - t.square()
    q = d["v"] / (d["D"] + second)
    return -d["C"].T @ (second * q), q, -2 * t * second


@forall(30, number=st.integers(0, 2**31), size=st.integers(1, 8), sigma=logarithmic(0.3, 3e3))
def test_the_bias_is_within_its_constant_over_the_multiplier(number: int, size: int, sigma: float) -> None:
    # ‖v‖² (‖B‖ L_H/μ + L_B) / (2 μ² σ)
    d, inner, outer = smooth(number, size)
    estimator = F2SA(sigma, iterations=90, step_size=2 / 3)  # L ≤ 2.5, μ ≥ 0.5: y is at its limit
    result = hypergradient(inner, outer, d["w"], d["lam"], estimator, state={})
    exact, _, _ = smooth_answer(d)
    t = (d["w"] + d["C"] @ d["lam"]).tanh()
    mixed, cross, mu = operator_norm((1 - t.square())[:, None] * d["C"]), operator_norm(d["C"]), float(d["D"].min())
    bound = float(d["v"].norm()) ** 2 * (mixed * 0.77 / mu + 0.77 * cross) / (2 * mu**2 * sigma)
    assert float((result.grad - exact).norm()) <= bound + 1e-12 * sigma * (1 + cross) * (1 + float(d["w"].norm()))


def test_the_bias_falls_as_one_over_the_multiplier_with_the_predicted_coefficient() -> None:
    # With d = y − w = −q/σ − H⁻¹T[q, q]/(2σ²) + …, the answer is −Bᵀq + (T_λ[q, q] − Bᵀ H⁻¹ T[q, q]) / (2σ) + O(1/σ²),
    # with the third derivatives T = ∂³f/∂w³ and T_λ = ∂³f/∂w²∂λ.
    d, inner, outer = smooth(3, 6)
    exact, q, third = smooth_answer(d)
    t = (d["w"] + d["C"] @ d["lam"]).tanh()
    H = d["D"] + 1 - t.square()
    T = third * q.square()
    coefficient = d["C"].T @ (T - (1 - t.square()) * T / H) / 2
    errors = []
    for sigma in (100.0, 200.0, 400.0):
        estimator = F2SA(sigma, iterations=200, step_size=0.7)
        found = hypergradient(inner, outer, d["w"], d["lam"], estimator, state={}).grad
        torch.testing.assert_close(
            (found - exact) * sigma, coefficient, rtol=0.1, atol=0.03 * float(coefficient.norm())
        )
        errors.append(float((found - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1.0, abs=0.05)


@forall(25, sample=quadratics(max_condition=5.0), sigma=logarithmic(0.1, 100.0), number=st.integers(0, 2**31))
def test_an_unsolved_inner_problem_enters_enlarged_and_shows_in_the_residual(
    sample: Sample, sigma: float, number: int
) -> None:
    # y solves ∂f/∂w(y) = −v/σ: the answer is −Bᵀ H⁻¹ (v + σ ∂f/∂w(w)), its residual σ ‖∂f/∂w(w)‖ / ‖v‖.
    generator = torch.Generator().manual_seed(number)
    w = sample.inner + 0.1 * torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    gradient = sample.hessian @ (w - sample.inner)
    v = sample.data["A"].T @ (sample.data["A"] @ w - sample.data["t"])
    step_size = 1 / float(sample.eigenvalues[-1])
    estimator = F2SA(sigma, iterations=120, step_size=step_size)
    result = hypergradient(*sample.losses(), w, sample.outer, estimator, state={})
    pulled = sample.mixed.T @ torch.linalg.solve(sample.hessian, v + sigma * gradient)
    size = 1 + float(pulled.norm()) + sample.scale()
    assert float((result.grad - (sample.direct - pulled)).norm()) <= 1e-6 * size * (1 + sigma)
    share = sigma * float(gradient.norm() / v.norm())
    assert result.info.residual == pytest.approx(share, rel=1e-4, abs=1e-6)
    assert result.info.inner_gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert ("take more inner steps" in result.info.message) == (share > 1)


def test_a_step_size_that_is_too_large_is_reported_and_forgotten() -> None:
    sample = make_quadratic(6, 3, 10.0, 5.0, 2)
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, F2SA(step_size=0.5), state={})
    assert result.info.status is Status.DIVERGED
    assert "step_size" in result.info.explain()
    assert result.state == {}  # the next call starts from w
    good = hypergradient(*sample.losses(), sample.inner, sample.outer, F2SA(step_size=0.39), state={})
    assert not good.info.status.failed


def test_the_automatic_step_size_is_learnt_once_and_again_where_it_is_out_of_date() -> None:
    sample = make_quadratic(6, 3, 10.0, 5.0, 2)

    def run(state: Any) -> Hypergradient:
        return hypergradient(*sample.losses(), sample.inner, sample.outer, F2SA(), state=state)

    first = run({})
    assert float(first.state["largest_eigenvalue"][0]) == pytest.approx(5.0, rel=1e-4)
    again = run(first.state)
    assert again.info.products == 12
    stale = {**first.state, "largest_eigenvalue": (first.state["largest_eigenvalue"][0] / 10,)}
    mended = run(stale)
    assert mended.info.products > 12
    torch.testing.assert_close(mended.grad, first.grad, rtol=1e-12, atol=0)
    assert float(mended.state["largest_eigenvalue"][0]) == pytest.approx(5.0, rel=1e-4)


def test_status_of_indefinite_and_singular_hessians() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(5, generator=generator, dtype=DOUBLE)

    def run(H: Tensor, estimator: Estimator) -> Hypergradient:
        zero = torch.zeros_like(v)
        losses = (lambda w, lam: w @ (H @ w) / 2 - w @ lam, lambda w, lam: w @ v)
        return hypergradient(*losses, zero, zero.clone(), estimator, state={})

    for eigenvalues in ([-1.0, 0.5, 1.0, 2.0, 3.0], [-3.0, -2.0, -1.0, -1.0, -0.5]):
        H = spectrum_matrix(torch.tensor(eigenvalues, dtype=DOUBLE), generator)
        assert run(H, F2SA()).info.status is Status.NEGATIVE_CURVATURE
    # Seen on the way by a given step size too, where y goes along it.
    assert run(H, F2SA(step_size=0.1)).info.status is Status.NEGATIVE_CURVATURE
    assert run(torch.zeros(5, 5, dtype=DOUBLE), F2SA()).info.status is Status.SINGULAR
    assert torch.equal(run(torch.zeros(5, 5, dtype=DOUBLE), F2SA()).grad, torch.zeros(5, dtype=DOUBLE))


def test_a_multiplier_that_rounding_swallows_is_reported() -> None:
    sample = make_quadratic(6, 3, 4.0, 1.0, 2)
    w, lam = sample.inner.float(), sample.outer.float()
    for multiplier, failed in ((1e9, True), (10.0, False)):
        info = hypergradient(*sample.losses(torch.float32), w, lam, F2SA(multiplier, step_size=1.0), state={}).info
        assert (info.status is Status.INACCURATE) == failed
        assert ("lower the multiplier" in info.message) == failed


def test_needs_first_derivatives_only() -> None:
    inner, outer, w, lam = attention_losses()
    found = hypergradient(inner, outer, w, lam, F2SA(0.1), state={})  # type: ignore[arg-type]
    assert math.isfinite(found.info.residual)
    assert float((found.grad - found.direct).norm()) > 0
    assert not F2SA().needs_double_backward


def test_refuses_to_be_called_without_state_or_with_that_of_another_problem() -> None:
    sample = make_quadratic(4, 3, 4.0, 1.0, 5)
    with pytest.raises(ConfigError, match=r"F2SA\(\) continues from the state of its last call: pass state=\{\}"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, F2SA())
    other = {"auxiliary": (torch.zeros(7, dtype=DOUBLE),)}
    with pytest.raises(ConfigError, match=r"'f2sa' belongs to another problem.*\(7,\).*\(4,\).*state=\{\}"):
        hypergradient(*sample.losses(), sample.inner, sample.outer, F2SA(), state=other)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("multiplier", 0.0, "a finite number above 0, not 0.0"),
        ("multiplier", math.inf, "a finite number above 0, not inf"),
        ("iterations", 0, "an integer of at least 1, not 0"),
        ("step_size", -1.0, "a finite number above 0 or 'auto', not -1.0"),
    ],
)
def test_fields_are_validated(field: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"F2SA.{field} must be {expected}")):
        F2SA(**{field: value})  # type: ignore[arg-type]
