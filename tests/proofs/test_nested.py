"""Three nested levels: a decorated solver inside an inner loss, against nested closed forms and brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel import ConjugateGradient, Exact, Neumann, Status, Unrolled, argmin, hypergradient
from bilevel.errors import LossError
from tests.bilevel.strategies import DOUBLE, forall, logarithmic
from tests.proofs.families import Nest, make_nest, nests

PRECISE: list[Any] = [Exact(), ConjugateGradient(max_iterations=200, rtol=1e-14)]


def responding(nest: Nest, method: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """w*(λ, y) by a decorated solver: what autograd knows of it comes from the implicit function theorem."""
    fit = argmin(lambda w, above: nest.lowest(w, *above), method)(lambda above: nest.lowest_solution(*above))
    return lambda y, lam: fit((y, lam))


@forall(12, nest=nests(), lowest=st.sampled_from(PRECISE), middle=st.sampled_from(PRECISE))
def test_an_inner_loss_that_calls_a_decorated_solver_has_the_nested_closed_forms_hypergradient(
    nest: Nest, lowest: Any, middle: Any
) -> None:
    respond = responding(nest, lowest)
    y = nest.middle_solution(nest.outer)
    result = hypergradient(
        lambda y, lam: nest.middle(y, lam, respond), lambda y, lam: nest.top(y, lam, respond), y, nest.outer, middle
    )
    expected = nest.hypergradient()
    torch.testing.assert_close(result.grad, expected, rtol=1e-6, atol=1e-7 * (1 + float(expected.norm())))
    assert result.info.status in (Status.CONVERGED, Status.STOPPED_AT_CAP)  # the tolerance is below rounding


@forall(4, nest=nests(), lowest=st.sampled_from(PRECISE), middle=st.sampled_from(PRECISE))
def test_decorated_solvers_nest(nest: Nest, lowest: Any, middle: Any) -> None:
    respond = responding(nest, lowest)
    choose = argmin(lambda y, lam: nest.middle(y, lam, respond), middle)(nest.middle_solution)
    gradients = []
    for solve in (choose, nest.middle_solution):
        lam = nest.outer.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nest.top(solve(lam), lam, respond), lam, create_graph=True)
        # and the second derivative through all levels at once
        curvature = torch.stack([torch.autograd.grad(part, lam, retain_graph=True)[0] for part in grad])
        gradients.append((grad.detach(), curvature))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * (1 + float(expected.norm())))


@forall(6, nest=nests(), method=st.sampled_from(PRECISE))
def test_the_middle_hessian_includes_the_curvature_of_the_response(nest: Nest, method: Any) -> None:
    respond = responding(nest, method)
    y = nest.middle_solution(nest.outer)
    unit = torch.eye(len(y), dtype=DOUBLE)
    # With f = middle and F linear, the response to a tilt is the inverse Hessian that the method sees.
    inverse = torch.stack(
        [
            hypergradient(
                lambda y, tilt: nest.middle(y, nest.outer, respond) - y @ tilt,
                lambda y, tilt, direction=direction: y @ direction,
                y,
                torch.zeros_like(y),
                Exact(),
            ).grad
            for direction in unit
        ]
    )
    torch.testing.assert_close(inverse, torch.linalg.inv(nest.middle_hessian(with_response=True)), rtol=1e-7, atol=1e-7)
    without = torch.linalg.inv(nest.middle_hessian(with_response=False))
    lost = nest.data["T"] @ torch.linalg.solve(nest.data["H"], nest.data["P"])
    if float(lost.norm()) > 0.1:
        assert float((inverse - without).norm()) > 1e-4 * float(without.norm())

    # By differences of the middle level's gradient, in which w* is solved again at every point.
    def at(place: Tensor) -> Tensor:
        return slope(nest.middle, place, nest.outer, nest.lowest_solution)

    step = 1e-5
    differences = torch.stack([(at(y + step * d) - at(y - step * d)) / (2 * step) for d in unit])
    torch.testing.assert_close(
        torch.linalg.inv(inverse), differences, rtol=1e-4, atol=1e-5 * float(differences.abs().max())
    )


@forall(6, scale=logarithmic(0.1, 3.0), number=st.integers(0, 2**31))
def test_a_nest_that_is_quadratic_nowhere_agrees_with_differentiating_every_solve(scale: float, number: int) -> None:
    # Newton steps of both levels as one autograd graph: shares nothing with the implicit function theorem.
    generator = torch.Generator().manual_seed(number)
    p, q, r, s = (scale * torch.randn(2, 2, generator=generator, dtype=DOUBLE) for _ in range(4))
    y, lam = (torch.randn(2, generator=generator, dtype=DOUBLE) for _ in range(2))

    def lowest(w: Tensor, above: tuple[Tensor, Tensor]) -> Tensor:
        y, lam = above
        return torch.cosh(w - torch.tanh(p @ y)).sum() + w.square().sum() * lam[0].exp() / 2 - w @ torch.sin(q @ lam)

    def bent(y: Tensor, lam: Tensor, respond: Any) -> Tensor:
        w = respond((y, lam))
        return y.square().sum() + (y**4).sum() / 4 + (w - r @ lam).tanh().square().sum() / 4 - y @ torch.cos(lam)

    def top(y: Tensor, lam: Tensor, respond: Any) -> Tensor:
        return (y * respond((y, lam))).sum().square() + torch.sin(s @ y).sum() + lam.square().sum() / 2

    brute = newton(lowest, 9, torch.zeros(2, dtype=DOUBLE))
    fit = argmin(lowest, Exact())(brute)
    tilt = slope(bent, y, lam, brute).detach()

    def middle(y: Tensor, lam: Tensor, respond: Any) -> Tensor:
        return bent(y, lam, respond) - y @ tilt  # y is stationary at this λ

    result = hypergradient(
        lambda y, lam: middle(y, lam, fit), lambda y, lam: top(y, lam, fit), y, lam, ConjugateGradient(rtol=1e-13)
    )
    variable = lam.clone().requires_grad_()
    # One Newton step from the solution: w* of the variable λ to first order, which is all that a derivative needs.
    solved = newton(lambda y, lam: middle(y, lam, brute), 1, y)(variable)
    torch.testing.assert_close(solved.detach(), y, rtol=1e-9, atol=1e-9)
    (expected,) = torch.autograd.grad(top(solved, variable, brute), variable)
    tolerance = 1e-7 * (1 + float(expected.norm()))
    assert result.info.status.failed or float((result.grad - expected).norm()) <= tolerance
    exact = hypergradient(lambda y, lam: middle(y, lam, fit), lambda y, lam: top(y, lam, fit), y, lam, Exact())
    assert float((exact.grad - expected).norm()) <= tolerance


def newton(loss: Any, steps: int, start: Tensor) -> Callable[[Any], Tensor]:
    """Newton's method as one graph."""

    def solve(above: Any) -> Tensor:
        x = start
        for _ in range(steps):
            x = x if x.requires_grad else x.clone().requires_grad_()
            (g,) = torch.autograd.grad(loss(x, above), x, create_graph=True)
            H = torch.stack([torch.autograd.grad(part, x, create_graph=True)[0] for part in g])
            x = x - torch.linalg.solve(H, g)
        return x

    return solve


def slope(loss: Any, y: Tensor, lam: Tensor, respond: Any) -> Tensor:
    y = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(y, lam, respond), y)
    return g


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(Neumann(terms=100), 1e-6), ("identity", None), (Unrolled(steps=5, learning_rate=0.3), None)],
    ids=["neumann", "identity", "unrolled"],
)
def test_every_outer_method_with_autodiff_products_takes_a_nested_loss(method: Any, tolerance: float | None) -> None:
    nest = make_nest(3, 3, 2, 3.0, 1.0, 4)
    # a gentle response, so that the middle Hessian stays below 2 / 0.3
    nest.data["T"].mul_(0.3)
    y = nest.middle_solution(nest.outer)
    results = []
    for respond in (responding(nest, "exact"), nest.lowest_solution):
        losses = [lambda y, lam, r=respond: nest.middle(y, lam, r), lambda y, lam, r=respond: nest.top(y, lam, r)]
        results.append(hypergradient(*losses, y, nest.outer, method).grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)
    if tolerance is not None:
        torch.testing.assert_close(results[0], nest.hypergradient(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lowest", ["identity", "finite_difference", Unrolled(steps=3, learning_rate=0.1)])
def test_a_lowest_level_without_second_derivatives_is_refused_by_name(lowest: Any) -> None:
    nest = make_nest(2, 2, 2, 2.0, 0.0, 1)
    respond = responding(nest, lowest)
    for middle in ("exact", "cg", "neumann", "identity", Unrolled(steps=2, learning_rate=0.1)):
        with pytest.raises(LossError, match=r"solver '<lambda>' cannot be differentiated: method '\w+' solves no"):
            hypergradient(
                lambda y, lam: nest.middle(y, lam, respond),
                lambda y, lam: y.sum(),
                nest.middle_solution(nest.outer),
                nest.outer,
                middle,
            )
    # Differences of first derivatives need no more than the lowest level has.
    result = hypergradient(
        lambda y, lam: nest.middle(y, lam, respond), lambda y, lam: y.sum(), nest.outer, nest.outer.clone(), "fd"
    )
    assert torch.isfinite(result.grad).all()
