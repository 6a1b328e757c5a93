"""Error bounds: never below the true error where their constants are given, and labelled where they are estimated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ConjugateGradient, Exact, Neumann, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad import Certificate, Implicit
from tests.bilevel.strategies import DOUBLE, EPSILON, Sample, forall, logarithmic, make_quadratic, quadratics, ridges
from tests.contract.contract import operator_norm

solvers = st.one_of(
    st.builds(
        lambda k, d: lambda c: ConjugateGradient(max_iterations=k, damping=d, certificate=c),
        st.integers(1, 8),
        st.just(0.0) | logarithmic(1e-4, 1.0),
    ),
    st.builds(lambda k: lambda c: Neumann(terms=k, certificate=c), st.integers(0, 20)),
    st.just(lambda c: Exact(damping=0.1, certificate=c)),
)


def quadratic_constants(sample: Sample) -> dict[str, float]:
    """Of a quadratic inner and outer loss: only the cotangent changes with w."""
    return {
        "strong_convexity": float(sample.eigenvalues[0]) * (1 - 1e-9),
        "mixed_norm": operator_norm(sample.mixed) * (1 + 1e-9),
        "hessian_lipschitz": 0.0,
        "mixed_lipschitz": 0.0,
        "cotangent_lipschitz": operator_norm(sample.data["A"]) ** 2,
        "direct_lipschitz": 0.0,
    }


def ridge_constants(sample: Sample) -> dict[str, float]:
    """The mixed derivative ``diag(exp(Sλ) w) S`` is linear in w."""
    decay = (sample.data["S"] @ sample.outer).exp()
    return {**quadratic_constants(sample), "mixed_lipschitz": float(decay.max()) * operator_norm(sample.data["S"])}


def displaced(sample: Sample, distance: float, number: int) -> Tensor:
    direction = torch.randn(len(sample.inner), generator=torch.Generator().manual_seed(number), dtype=DOUBLE)
    return sample.inner + distance * direction / direction.norm()


def true_error(sample: Sample, grad: Tensor) -> float:
    return float((grad - sample.hypergradient()).norm())


def slack(sample: Sample) -> float:
    return sample.rounding() + 1e3 * EPSILON * sample.scale() * float(sample.eigenvalues[-1] / sample.eigenvalues[0])


@forall(
    150,
    sample=quadratics(max_condition=1e4) | ridges(),
    solver=solvers,
    distance=st.just(0.0) | logarithmic(1e-6, 10.0),
    number=st.integers(0, 2**31),
)
def test_given_constants_bound_the_true_error_whatever_the_solver_and_the_point(
    sample: Sample, solver: Any, distance: float, number: int
) -> None:
    constants = quadratic_constants(sample) if sample.kind == "quadratic" else ridge_constants(sample)
    method: Implicit = solver(Certificate(**constants))
    w = displaced(sample, distance, number)
    if sample.kind == "ridge":  # its constants hold along the whole way: the mixed norm at w is what counts
        decay = (sample.data["S"] @ sample.outer).exp()
        here = operator_norm((decay * w)[:, None] * sample.data["S"])
        method = solver(Certificate(**{**constants, "mixed_norm": here * (1 + 1e-9)}))
    result = hypergradient(*sample.losses(), w, sample.outer, method)
    bound = result.info.error_bound
    assert bound is not None
    assert true_error(sample, result.grad) <= bound + slack(sample)
    assert result.info.error_bound_basis.startswith("given μ")
    assert "inner solution" in result.info.error_bound_basis
    g = sample.hessian @ (w - sample.inner)
    assert result.info.inner_gradient_norm == pytest.approx(float(g.norm()), rel=1e-6, abs=1e-9)


@forall(60, sample=quadratics(max_condition=1e3), solver=solvers)
def test_estimated_constants_bound_the_true_error_and_say_that_they_are_estimated(sample: Sample, solver: Any) -> None:
    # As many Lanczos steps as variables: the smallest eigenvalue to rounding.
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, solver(Certificate()))
    bound = result.info.error_bound
    assert bound is not None
    assert true_error(sample, result.grad) <= bound + slack(sample)
    assert result.info.error_bound_basis.startswith("estimated μ")
    assert "at the given inner parameters" in result.info.error_bound_basis
    assert "error at most" in result.info.explain()


def test_the_bound_is_of_the_size_of_the_error() -> None:
    ratios = []
    for number in range(40):
        sample = make_quadratic(8, 3, 100.0, 1.0, number)
        certificate = Certificate(**quadratic_constants(sample))
        method = ConjugateGradient(max_iterations=4, certificate=certificate)
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, method)
        assert result.info.error_bound is not None
        ratios.append(result.info.error_bound / true_error(sample, result.grad))
    assert min(ratios) >= 1
    assert sorted(ratios)[20] < 30


def test_the_bound_falls_with_the_residual_and_scales_with_the_outer_loss() -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 1)
    inner_loss, outer_loss = sample.losses()
    certificate = Certificate(strong_convexity=float(sample.eigenvalues[0]))
    bounds = []
    for iterations in (1, 3, 5):
        method = ConjugateGradient(max_iterations=iterations, certificate=certificate)
        info = hypergradient(inner_loss, outer_loss, sample.inner, sample.outer, method).info
        assert info.error_bound is not None
        bounds.append(info.error_bound / info.residual)
        large = hypergradient(
            inner_loss, lambda w, lam: 1e12 * outer_loss(w, lam), sample.inner, sample.outer, method
        ).info
        assert large.error_bound == pytest.approx(1e12 * info.error_bound, rel=1e-3)
    assert max(bounds) == pytest.approx(min(bounds), rel=1e-9)  # proportional to the residual at a solved inner problem


def test_damping_and_gauss_newton_are_no_way_around_the_bound() -> None:
    # The residual of the damped system is zero; the bound is of the undamped one.
    sample = make_quadratic(5, 3, 50.0, 1.0, 3)
    certificate = Certificate(**quadratic_constants(sample))
    result = hypergradient(*sample.losses(), sample.inner, sample.outer, Exact(damping=0.5, certificate=certificate))
    assert result.info.residual < 1e-12
    assert result.info.error_bound is not None
    assert result.info.error_bound >= true_error(sample, result.grad) > 1e-3
    # A bent model: the Gauss–Newton matrix is not the Hessian.
    x = torch.tensor([0.3, 1.1], dtype=DOUBLE)
    lam = torch.tensor([0.2], dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> dict[str, Tensor]:
        z = torch.stack([w[0] * w[1], w[0].sin()])
        return {"loss": (z - 2).square().sum() / 2 + lam.exp().sum() * w.square().sum(), "outputs": z}

    losses = inner, lambda w, lam: w.square().sum()
    exact = hypergradient(*losses, x, lam, Exact())
    mu = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(lambda w: inner(w, lam)["loss"], x))[0])
    assert mu > 0
    found = hypergradient(
        *losses, x, lam, Exact(curvature="gauss_newton", certificate=Certificate(strong_convexity=mu * 0.999))
    )
    error = float((found.grad - exact.grad).norm())
    assert found.info.error_bound is not None
    assert found.info.error_bound >= error > 1e-2


def test_no_bound_is_given_where_the_inner_loss_is_not_strongly_convex() -> None:
    H = torch.diag(torch.tensor([1.0, -0.5], dtype=DOUBLE))
    zero = torch.zeros(2, dtype=DOUBLE)
    result = hypergradient(
        lambda w, lam: w @ H @ w / 2 - w @ lam,
        lambda w, lam: w.sum(),
        zero,
        zero.clone(),
        Exact(certificate=Certificate()),
    )
    assert result.info.status is Status.NEGATIVE_CURVATURE
    assert result.info.error_bound is None
    assert "no error bound: after 2 Lanczos products μ may be as low as -5.0e-01" in result.info.message


def test_products_are_counted() -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 1)
    plain = hypergradient(*sample.losses(), sample.inner, sample.outer, ConjugateGradient(max_iterations=3)).info
    certificate = Certificate(products=5, probes=4)
    method = ConjugateGradient(max_iterations=3, certificate=certificate)
    info = hypergradient(*sample.losses(), sample.inner, sample.outer, method).info
    # The residual of the undamped system is one product more.
    assert info.products == plain.products + 5 + 4 + 1


def test_is_configuration() -> None:
    method = ConjugateGradient(certificate={"strong_convexity": 0.5, "probes": 3})  # type: ignore[arg-type]
    assert method.certificate == Certificate(strong_convexity=0.5, probes=3)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"strong_convexity": 0.0}, "Certificate.strong_convexity must be a finite number above 0"),
        ({"strong_convexity": "lanczos"}, "Certificate.strong_convexity must be a finite number above 0"),
        ({"mixed_norm": math.inf}, "Certificate.mixed_norm must be a finite number"),
        ({"hessian_lipschitz": 1.0}, "mixed_lipschitz, cotangent_lipschitz, direct_lipschitz missing"),
        ({"products": 0}, "Certificate.products must be an integer of at least 1"),
        ({"probes": 0}, "Certificate.probes must be an integer of at least 1"),
    ],
)
def test_fields_are_validated(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Certificate(**fields)
    assert expected in str(caught.value)
