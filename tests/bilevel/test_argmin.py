from __future__ import annotations

import gc
import re
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import ConjugateGradient, Exact, Neumann, Unrolled, hypergradient
from bilevel.argmin import argmin
from bilevel.errors import BilevelWarning, LossError, NonFiniteError, ParameterError, UnknownNameError
from tests.bilevel.strategies import DOUBLE, Sample, forall, make_quadratic, samples

Pair = namedtuple("Pair", ["slope", "offset"])


def pull(y: Tensor, lam: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(y, lam)
    return grad


@forall(80, sample=samples(max_condition=1e4), method=st.sampled_from(["exact", ConjugateGradient(200, rtol=1e-13)]))
def test_derivative_is_that_of_the_closed_form_solution(sample: Sample, method: Any) -> None:
    inner_loss, outer_loss = sample.losses()
    fit = argmin(inner_loss, method=method)(sample.solution)
    lam = sample.outer.clone().requires_grad_()
    found = pull(outer_loss(fit(lam), lam), lam)
    expected = pull(outer_loss(sample.solution(lam), lam), lam)
    assert float((found - expected).norm()) <= 100 * sample.rounding() + 1e-9 * sample.scale()


@forall(
    40,
    sample=samples(max_condition=1e3),
    method=st.sampled_from(["fd", "identity", "neumann", "cg", "exact", Unrolled(steps=3, learning_rate=1e-3)]),
)
def test_gives_what_hypergradient_gives(sample: Sample, method: Any) -> None:
    inner_loss, outer_loss = sample.losses()
    lam = sample.outer.clone().requires_grad_()
    w = argmin(inner_loss, method)(sample.solution)(lam)
    result = hypergradient(inner_loss, outer_loss, sample.inner, sample.outer, method)
    assert torch.equal(w.detach(), result.inner)
    torch.testing.assert_close(pull(outer_loss(w, lam), lam), result.grad, rtol=1e-12, atol=1e-12)


def test_solver_may_loop_use_optimisers_and_modules() -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)
    model = nn.Linear(3, 1)

    def loss(w: Any, lam: Any) -> Tensor:
        error = torch.func.functional_call(model, w, (X,)) - y
        return error.square().mean() + lam["decay"].exp() * w["weight"].square().sum()

    @argmin(loss, method=ConjugateGradient(rtol=1e-6))
    def fit(lam: Any) -> dict[str, nn.Parameter]:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-8, tolerance_change=0)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(dict(model.named_parameters()), lam)
            value.backward()
            return value

        optimizer.step(closure)
        return dict(model.named_parameters())

    decay = torch.tensor(-1.0, requires_grad=True)
    solution = fit({"decay": decay})
    assert set(solution) == {"weight", "bias"}
    found = pull(solution["weight"].square().sum(), decay)
    ahead, behind = (
        float(fit({"decay": torch.tensor(-1.0 + shift)})["weight"].square().sum()) for shift in (1e-2, -1e-2)
    )
    assert float(found) == pytest.approx((ahead - behind) / 2e-2, rel=1e-2)
    # The derivative is taken at the call's own solution, which a later call has overwritten in the model.
    kept = fit({"decay": decay})
    fit({"decay": torch.tensor(3.0)})
    torch.testing.assert_close(pull(kept["weight"].square().sum(), decay), found, rtol=1e-3, atol=1e-6)


def test_structures_of_both_sides() -> None:
    frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)

    def loss(w: dict[str, Any], lam: Pair) -> Tensor:
        return (w["a"] - lam.slope * frozen).square().sum() + (w["rest"][0] - lam.offset[0]).square()

    @argmin(loss)
    def fit(lam: Pair) -> dict[str, Any]:
        assert isinstance(lam, Pair)
        assert not lam.slope.requires_grad
        return {"a": lam.slope * frozen, "rest": (lam.offset[0].clone(), frozen)}

    slope, offset = torch.tensor(2.0, requires_grad=True), torch.tensor([1.0, 5.0], requires_grad=True)
    solution = fit(Pair(slope, offset))
    assert isinstance(solution["rest"], tuple)
    assert solution["rest"][1] is frozen
    assert solution["rest"][0].shape == ()
    (solution["a"].sum() + 7 * solution["rest"][0]).backward()
    torch.testing.assert_close(slope.grad, torch.tensor(6.0))
    torch.testing.assert_close(offset.grad, torch.tensor([7.0, 0.0]))


def simple(method: Any = "cg") -> Any:
    @argmin(lambda w, lam: (w[0] - 2 * lam).square().sum() + (w[1] + lam).square().sum(), method=method)
    def fit(lam: Tensor) -> list[Tensor]:
        return [2 * lam, -lam]

    return fit


def test_some_outputs_or_none_may_be_used() -> None:
    fit = simple()
    lam = torch.ones(3, requires_grad=True)
    first, second = fit(lam)
    torch.testing.assert_close(pull(first.sum(), lam), torch.full((3,), 2.0))
    first, second = fit(lam)
    torch.testing.assert_close(pull(second.sum(), lam), torch.full((3,), -1.0))
    first, second = fit(lam)
    torch.testing.assert_close(pull((first * second).sum(), lam), torch.full((3,), -4.0))
    fit(lam)  # and no derivative at all
    torch.testing.assert_close(pull(lam.sum(), lam), torch.ones(3))


def test_is_part_of_a_larger_graph() -> None:
    fit = simple()
    x = torch.randn(3, requires_grad=True)
    lam = x.sin()
    first, second = fit(lam)
    value = (first.exp() * lam).sum() + second.square().sum()
    expected = ((2 * x.sin()).exp() * x.sin()).sum() + x.sin().square().sum()
    torch.testing.assert_close(pull(value, x), pull(expected, x))


def test_two_calls_accumulate() -> None:
    fit = simple()
    lam = torch.ones(2, requires_grad=True)
    (fit(lam)[0].sum() + fit(2 * lam)[1].sum()).backward()
    torch.testing.assert_close(lam.grad, torch.zeros(2))


def test_gradients_are_required_as_autograd_would() -> None:
    fit = simple()
    assert not fit(torch.ones(2))[0].requires_grad
    with torch.no_grad():
        assert not fit(torch.ones(2, requires_grad=True))[0].requires_grad
    solution = fit(torch.ones(2, requires_grad=True))
    assert solution[0].requires_grad
    assert not solution[0].is_leaf


def test_only_parameters_that_require_gradients_are_differentiated() -> None:
    evaluated: list[bool] = []

    def loss(w: Tensor, lam: list[Tensor]) -> Tensor:
        evaluated.append(lam[1].requires_grad)
        return (w - lam[0] * lam[1]).square().sum()

    fit = argmin(loss)(lambda lam: lam[0] * lam[1])
    one, other = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    fit([one, other]).sum().backward()
    torch.testing.assert_close(one.grad, other)
    assert other.grad is None
    assert not any(evaluated)


def test_a_parameter_that_the_inner_loss_ignores_has_no_influence() -> None:
    fit = argmin(lambda w, lam: (w - lam["used"]).square().sum())(lambda lam: lam["used"].clone())
    used, ignored = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    fit({"used": used, "ignored": ignored}).sum().backward()
    torch.testing.assert_close(used.grad, torch.ones(2))
    assert torch.equal(ignored.grad, torch.zeros(2))


def test_solver_may_return_its_argument() -> None:
    fit = argmin(lambda w, lam: (w - lam).square().sum())(lambda lam: lam)
    lam = torch.ones(2, requires_grad=True)
    solution = fit(lam)
    assert solution.data_ptr() != lam.data_ptr()
    torch.testing.assert_close(pull(solution.sum(), lam), torch.ones(2))


def test_graph_may_be_retained() -> None:
    for method in ("cg", "exact", "fd", Unrolled(steps=2, learning_rate=0.1)):
        lam = torch.ones(2, requires_grad=True)
        first = simple(method)(lam)[0]
        one = torch.autograd.grad(first.sum(), lam, retain_graph=True)[0]
        two = torch.autograd.grad(first.sum(), lam)[0]
        assert torch.equal(one, two)
    lam = torch.ones(3, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: simple()(x)[0], lam)
    torch.testing.assert_close(jacobian, 2 * torch.eye(3))


def test_second_derivatives_are_refused() -> None:
    lam = torch.ones(2, requires_grad=True)
    first = simple()(lam)[0]
    (grad,) = torch.autograd.grad(first.square().sum(), lam, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_as_an_inner_loss_only_first_differences_work() -> None:
    # Nested: the outer problem's inner loss contains a solution of its own. Its second derivative would be left out.
    fit = simple()

    def nested(w: Tensor, lam: Tensor) -> Tensor:
        return (w - 1).square().sum() + fit(w * lam)[0].sum()

    with pytest.raises(LossError, match="custom function _Solution is marked once_differentiable.*'finite_difference'"):
        hypergradient(nested, lambda w, lam: w.sum(), torch.ones(2), torch.ones(2), "cg")
    result = hypergradient(nested, lambda w, lam: w.sum(), torch.ones(2), torch.ones(2), "fd")
    torch.testing.assert_close(result.grad, torch.full((2,), -2.0), rtol=1e-3, atol=1e-3)


def test_values_changed_in_place_before_the_backward_pass_are_noticed() -> None:
    fit = simple()
    lam = torch.ones(2, requires_grad=True)
    solution = fit(lam)
    with torch.no_grad():
        lam.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution[0].sum().backward()
    solution = fit(lam)
    solution[0].detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution[0].sum().backward()


def test_a_solve_that_fails_warns() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0]))

    @argmin(lambda w, lam: w @ H @ w / 2 - w @ lam)
    def saddle(lam: Tensor) -> Tensor:
        return torch.linalg.solve(H, lam)

    lam = torch.ones(2, requires_grad=True)
    solution = saddle(lam)
    with pytest.warns(
        BilevelWarning, match=r"solver 'saddle': conjugate_gradient: negative curvature.*no strict minimum"
    ):
        solution.sum().backward()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            None,
            ParameterError,
            "solver 'fit' returned no inner parameters: inner parameters must be a tensor, or a sequence",
        ),
        ([torch.ones(1), 3], ParameterError, "[1] is a int"),
        ({"w": torch.ones(1), "steps": torch.tensor(3)}, ParameterError, "'steps' has dtype torch.int64"),
        (torch.tensor([1.0, float("nan")]), NonFiniteError, "solver 'fit' returned NaN or infinity"),
        ([], ParameterError, "hold no tensor"),
    ],
)
def test_results_of_solvers_are_checked(result: Any, error: type[Exception], message: str) -> None:
    @argmin(lambda w, lam: lam.sum())
    def fit(lam: Tensor) -> Any:
        return result

    with pytest.raises(error, match=re.escape(message)):
        fit(torch.ones(1, requires_grad=True))


def test_other_bad_arguments() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'neumann'"):
        argmin(lambda w, lam: w, method="neuman")
    with pytest.raises(ParameterError, match=r"argmin needs the inner loss as its first argument.*Write @argmin"):
        argmin("cg")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="outer parameters must be a tensor"):
        simple()(3.0)
    fit = argmin(lambda w, lam: lam.sum())(lambda lam: lam.clone())
    with pytest.raises(LossError, match="inner problem of '<lambda>' does not depend on its inner parameters"):
        fit(torch.ones(2, requires_grad=True)).sum().backward()
    fit = argmin(lambda w, lam: (w - lam) ** 2)(lambda lam: lam.clone())
    with pytest.raises(LossError, match=r"must be a scalar; it has shape \(2,\)"):
        fit(torch.ones(2, requires_grad=True)).sum().backward()

    def broken(lam: Tensor) -> Tensor:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        argmin(lambda w, lam: (w - lam).sum())(broken)(torch.ones(1))


def test_decoration_keeps_name_and_documentation() -> None:
    @argmin(lambda w, lam: (w - lam).square().sum())
    def fit(lam: Tensor) -> Tensor:
        """Fits."""
        return lam.clone()

    assert fit.__name__ == "fit"
    assert fit.__doc__ == "Fits."


def test_random_numbers_are_replayed_as_by_hypergradient() -> None:
    sample = make_quadratic(6, 3, 3.0, 1.0, 7)
    inner_loss, outer_loss = sample.losses()

    def dropped(w: Tensor, lam: Tensor) -> Tensor:
        return inner_loss(F.dropout(w, 0.5), lam) + w.square().sum()

    for method in ("exact", "cg", "fd", Neumann(terms=3)):
        torch.manual_seed(3)
        expected = hypergradient(dropped, outer_loss, sample.inner, sample.outer, method)
        after = torch.rand(1)
        torch.manual_seed(3)
        lam = sample.outer.clone().requires_grad_()
        fit = argmin(dropped, method)(lambda lam: sample.inner)
        torch.testing.assert_close(pull(outer_loss(fit(lam), lam), lam), expected.grad, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.rand(1), after)


def test_no_graph_of_the_solver_is_kept() -> None:
    born: list[weakref.ref[Tensor]] = []

    @argmin(lambda w, lam: (w - lam).square().sum())
    def fit(lam: Tensor) -> Tensor:
        w = torch.zeros(3, requires_grad=True)
        for _ in range(5):
            (grad,) = torch.autograd.grad((w - lam).square().sum(), w, create_graph=True)
            w = w - 0.5 * grad
            born.append(weakref.ref(w))
        return w

    gc.collect()
    gc.disable()
    try:
        lam = torch.ones(3, requires_grad=True)
        solution = fit(lam)
        assert all(reference() is None for reference in born)
        kept = weakref.ref(solution.grad_fn)
        solution.sum().backward()
        del solution
        assert kept() is None
    finally:
        gc.enable()


def test_float64_gradcheck() -> None:
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)

    @argmin(lambda w, lam: w @ H @ w / 2 + (w**4).sum() - w @ lam, method=Exact())
    def fit(lam: Tensor) -> Tensor:
        w = torch.zeros(2, dtype=DOUBLE)
        for _ in range(50):  # Newton
            g = H @ w + 4 * w**3 - lam
            w = w - torch.linalg.solve(H + torch.diag(12 * w**2), g)
        return w

    assert torch.autograd.gradcheck(fit, (torch.tensor([1.0, -2.0], dtype=DOUBLE, requires_grad=True),))
