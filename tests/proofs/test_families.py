"""The problem families are what they say, and the methods that solve are right, or say that they are not, on all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ConjugateGradient, Estimator, Exact, Hypergradient, Neumann, Status, hypergradient
from bilevel.hypergrad import available_methods
from bilevel.hypergrad.certificate import Certificate
from tests.bilevel.strategies import DOUBLE, EPSILON, Sample, forall, logarithmic, quadratics
from tests.proofs.families import (
    Indefinite,
    certificate_constants,
    convex,
    make_network,
    make_stationary,
    networks,
    stationary_points,
)

# Methods that solve with any invertible symmetric Hessian, as far as they are registered.
INDEFINITE = [name for name in ("exact", "minres", "gmres", "bicgstab") if name in available_methods()]


def solve(sample: Sample, method: Any) -> Hypergradient:
    return hypergradient(*sample.losses(), sample.inner, sample.outer, method)


def precise(name: str) -> Estimator:
    """A method as it should be set where it has to solve to rounding."""
    if name == "exact":
        return Exact()
    return available_methods()[name](max_iterations=400, rtol=1e-13)  # type: ignore[call-arg]


def derivative(function: Any, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x)


any_sample = st.one_of(convex(max_condition=1e6), networks(), stationary_points())


@forall(40, sample=any_sample)
def test_closed_forms_are_those_of_the_losses(sample: Sample) -> None:
    inner, outer = sample.losses()
    w, lam = sample.inner, sample.outer
    size = 1 + float(sample.hessian.abs().max())
    close = {"rtol": 1e-9, "atol": 1e-11 * size}
    first = derivative(lambda w: inner(w, lam), w)
    assert float(first.norm()) <= 1e-10 * size * (1 + float(w.norm()))
    torch.testing.assert_close(derivative(lambda w: derivative_of(inner, w, lam), w), sample.hessian, **close)
    torch.testing.assert_close(derivative(lambda lam: derivative_of(inner, w, lam), lam), sample.mixed, **close)
    torch.testing.assert_close(derivative(lambda w: outer(w, lam), w), sample.cotangent, **close)
    torch.testing.assert_close(derivative(lambda lam: outer(w, lam), lam), sample.direct, **close)


def derivative_of(loss: Any, w: Tensor, lam: Tensor) -> Tensor:
    w = w if w.requires_grad else w.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(w, lam), w, create_graph=True)
    return g


@forall(40, sample=any_sample)
def test_the_solution_moves_as_the_implicit_function_theorem_says(sample: Sample) -> None:
    # The two formulas share nothing: one differentiates the closed form of w*, the other never sees it.
    _, outer = sample.losses()
    lam = sample.outer.clone().requires_grad_()
    (found,) = torch.autograd.grad(outer(sample.solution(lam), lam), lam)
    assert float((found - sample.hypergradient()).norm()) <= 10 * sample.rounding() + 1e-9 * sample.scale()


# Convex problems of any conditioning


@forall(80, sample=convex(max_condition=1e10), method=st.sampled_from(["exact", "conjugate_gradient"]))
def test_solving_methods_are_exact_up_to_rounding_at_any_conditioning(sample: Sample, method: str) -> None:
    result = solve(sample, precise(method))
    error = float((result.grad - sample.hypergradient()).norm())
    assert error <= 100 * sample.rounding() + 10 * result.info.residual * sample.scale()
    # Beyond a condition number of about 1/(100 u) a method may call the Hessian singular; it may never call it solved
    # and be wrong, which the bound above states.
    condition = float(sample.eigenvalues[-1] / sample.eigenvalues[0])
    if method == "exact" and condition < 1e10:
        assert result.info.status is Status.CONVERGED


@forall(60, sample=convex(max_condition=1e4), data=st.data())
def test_the_certificate_is_never_below_the_true_error(sample: Sample, data: st.DataObject) -> None:
    # Also where the inner problem is not solved: the distance that is left enters by its gradient.
    size = data.draw(st.just(0.0) | logarithmic(1e-8, 1.0))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    w = sample.inner + size * torch.randn(len(sample.inner), generator=generator, dtype=DOUBLE)
    certificate = Certificate(**certificate_constants(sample), mixed_norm="estimate")
    estimator = data.draw(
        st.builds(
            ConjugateGradient, max_iterations=st.integers(1, 8), rtol=st.just(0.0), certificate=st.just(certificate)
        )
        | st.builds(
            Neumann,
            terms=st.integers(0, 20),
            step_size=st.just(1 / float(sample.eigenvalues[-1])),
            certificate=st.just(certificate),
        )
        | st.builds(Exact, certificate=st.just(certificate))
    )
    result = hypergradient(*sample.losses(), w, sample.outer, estimator)
    error = float((result.grad - sample.hypergradient()).norm())
    assert result.info.error_bound is not None
    assert "at the inner solution" in result.info.error_bound_basis
    assert error <= result.info.error_bound * (1 + 1e-6) + 100 * sample.rounding()


@forall(40, sample=quadratics(max_condition=1e3), size=logarithmic(1e-6, 1.0), number=st.integers(0, 2**31))
def test_the_certificate_of_an_unsolved_quadratic_is_tight_within_its_condition(
    sample: Sample, size: float, number: int
) -> None:
    # A bound of infinity is never below the error: this one is of its order.
    w = sample.inner + size * torch.randn(
        len(sample.inner), generator=torch.Generator().manual_seed(number), dtype=DOUBLE
    )
    certificate = Certificate(
        **certificate_constants(sample), mixed_norm=float(torch.linalg.matrix_norm(sample.mixed, 2))
    )
    result = hypergradient(*sample.losses(), w, sample.outer, Exact(certificate=certificate))
    smallest = float(sample.eigenvalues[0])
    distance = float(sample.hessian.mul(1).matmul(w - sample.inner).norm()) / smallest
    mixed, slope = (float(torch.linalg.matrix_norm(sample.data[name], 2)) for name in "CA")
    expected = mixed * slope**2 * distance / smallest
    assert result.info.error_bound == pytest.approx(expected, rel=1e-3, abs=100 * sample.rounding())


# Stationary points of every kind


@forall(80, sample=st.one_of(stationary_points(), networks()), method=st.sampled_from(INDEFINITE))
def test_indefinite_solvers_solve_at_every_kind_of_stationary_point(sample: Indefinite, method: str) -> None:
    result = solve(sample, precise(method))
    error = float((result.grad - sample.hypergradient()).norm())
    assert error <= 1e3 * sample.rounding() + 10 * result.info.residual * sample.scale()
    assert result.info.residual <= 1e-8 or result.info.status.failed
    if method == "exact":  # sees all eigenvalues, and says so
        minimum = sample.kind_of_point == "minimum"
        assert result.info.status is (Status.CONVERGED if minimum else Status.NEGATIVE_CURVATURE)


@forall(60, sample=st.one_of(stationary_points(), networks()), data=st.data())
def test_methods_for_minima_say_so_elsewhere_or_are_right(sample: Indefinite, data: st.DataObject) -> None:
    method = data.draw(
        st.sampled_from([ConjugateGradient(max_iterations=100, rtol=1e-12), Neumann(terms=20), Neumann(terms=200)])
    )
    result = solve(sample, method)
    error = float((result.grad - sample.hypergradient()).norm())
    right = error <= 1e3 * sample.rounding() + 10 * result.info.residual * sample.scale()
    assert right or result.info.status.failed
    if sample.kind_of_point == "maximum" and float(sample.cotangent.norm()) > 1e-9:
        assert result.info.status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize(
    ("assignment", "kind"),
    [((0,), "minimum"), ((1,), "saddle"), ((2,), "saddle"), ((-1,), "saddle")],
)
def test_stationary_points_of_a_linear_network_are_known(assignment: tuple[int, ...], kind: str) -> None:
    # The best rank-one map is the minimum; other singular triples and zero are saddle points (Baldi and Hornik 1989).
    sample = make_network(3, 4, assignment, 5)
    assert sample.kind_of_point == kind
    for name in INDEFINITE:
        result = solve(sample, precise(name))
        torch.testing.assert_close(result.grad, sample.hypergradient(), rtol=1e-8, atol=1e-8)
    assert (solve(sample, "cg").info.status is Status.CONVERGED) == (kind == "minimum")


def test_strong_penalties_make_zero_the_minimum_of_a_linear_network() -> None:
    # √(ab) above the largest singular value, 2: no unit is worth its penalty.
    sample = make_network(2, 3, (-1, -1), 5, decay=20.0)
    assert sample.kind_of_point == "minimum"
    torch.testing.assert_close(solve(sample, "cg").grad, sample.direct, rtol=1e-12, atol=1e-12)  # B = 0: no response


@pytest.mark.parametrize(
    ("eigenvalues", "kind"), [((1.0, 2.0), "minimum"), ((-1.0, 2.0), "saddle"), ((-1.0, -2.0), "maximum")]
)
def test_what_each_method_says_at_each_kind_of_point(eigenvalues: tuple[float, ...], kind: str) -> None:
    sample = make_stationary(eigenvalues, 2, 3)
    assert sample.kind_of_point == kind
    for method in ("exact", "cg", Neumann(terms=200)):
        info = solve(sample, method).info
        assert (info.status is Status.NEGATIVE_CURVATURE) == (kind != "minimum"), info.explain()
        assert ("no strict minimum" in info.explain()) == (kind != "minimum")
    damped = solve(sample, ConjugateGradient(damping=10.0))  # above the most negative eigenvalue: says what it solved
    assert damped.info.status is Status.CONVERGED
    torch.testing.assert_close(damped.grad, sample.hypergradient(damping=10.0), rtol=1e-5, atol=1e-5)


def test_a_solution_that_is_unique_up_to_rotation_has_a_hypergradient_of_what_is_invariant() -> None:
    # Equal penalties: (QA, BQᵀ) is a solution with (A, B), the Hessian has a null space, and F(BA) does not see it.
    sample = make_network(3, 3, (0, 1), 7)
    lam = torch.full((4,), math.log(0.2), dtype=DOUBLE)
    w = sample.solution(lam)
    inner, _ = sample.losses()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (w[6:].reshape(3, 2) @ w[:6].reshape(2, 3) - sample.data["T"]).square().sum() / 2 + lam.sum()

    variable = lam.clone().requires_grad_()
    (expected,) = torch.autograd.grad(outer(sample.solution(variable), variable), variable)
    H = derivative(lambda w: derivative_of(inner, w, lam), w)
    assert float(torch.linalg.eigvalsh(H)[0].abs()) < 1e-12
    result = hypergradient(inner, outer, w, lam, "exact")
    assert result.info.status is Status.SINGULAR
    # d(BA)/dλ through unequal penalties is no function of the equal ones: only their sum is compared.
    assert float(result.grad[:2].sum()) == pytest.approx(float(expected[:2].sum()), rel=1e-7)
    result = hypergradient(inner, outer, w, lam, ConjugateGradient(rtol=1e-10))
    assert result.info.status is Status.CONVERGED
    assert float(result.grad[:2].sum()) == pytest.approx(float(expected[:2].sum()), rel=1e-7)


def test_rounding_bounds_are_no_licence() -> None:
    # The tolerances above are a small part of the answer wherever the condition number is moderate.
    sample = make_stationary((0.5, -2.0, 3.0), 2, 1)
    assert sample.rounding() < 1e-9 * float(sample.hypergradient().norm())
    assert EPSILON < 1e-15
