from __future__ import annotations

import gc
import re
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import ConjugateGradient, Exact, Neumann, Unrolled, hypergradient
from bilevel.argmin import argmin
from bilevel.errors import BilevelWarning, ConfigError, LossError, NonFiniteError, ParameterError, UnknownNameError
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


def newton(loss: Callable[[Tensor, Any], Tensor], start: Tensor, steps: int = 30) -> Callable[[Any], Tensor]:
    """Newton's method on a loss, for solvers whose result must be exact; differentiable if its argument is."""

    def fit(lam: Any) -> Tensor:
        w = start.clone().requires_grad_()
        for _ in range(steps):
            (g,) = torch.autograd.grad(loss(w, lam), w, create_graph=True)
            H = torch.stack([torch.autograd.grad(part, w, create_graph=True)[0] for part in g])
            w = w - torch.linalg.solve(H, g)
        return w

    return fit


SOLVING: list[Any] = ["exact", ConjugateGradient(rtol=1e-14), Neumann(terms=400)]


@pytest.mark.parametrize("method", SOLVING, ids=lambda method: getattr(method, "name", method))
def test_derivatives_of_all_orders_are_those_of_brute_force(method: Any) -> None:
    # The second derivative holds that of the Hessian: it does not vanish for a loss that is no quadratic.
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)

    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return w @ H @ w / 2 + lam[2].exp() * (w**4).sum() / 4 - w @ lam[:2]

    solver = newton(loss, torch.zeros(2, dtype=DOUBLE), 12)
    fit = argmin(loss, method)(solver)

    def derivatives(solve: Any) -> list[Tensor]:
        lam = torch.tensor([1.0, -2.0, 0.3], dtype=DOUBLE, requires_grad=True)
        w = solve(lam)
        value = (w**3).sum() + w.prod() * lam.sum()
        found = []
        for order in range(4):
            (grad,) = torch.autograd.grad(value, lam, create_graph=True)
            found.append(grad.detach())
            value = (grad * torch.arange(1.0, 4.0, dtype=DOUBLE)).sum() * (1 + order)
        return found

    for found, expected in zip(derivatives(fit), derivatives(solver), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@forall(30, sample=samples(max_condition=1e3), method=st.sampled_from(["exact", ConjugateGradient(200, rtol=1e-14)]))
def test_second_derivative_is_that_of_the_closed_form_solution(sample: Sample, method: Any) -> None:
    inner_loss, outer_loss = sample.losses()
    hessians = []
    for solve in (argmin(inner_loss, method=method)(sample.solution), sample.solution):
        lam = sample.outer.clone().requires_grad_()
        (grad,) = torch.autograd.grad(outer_loss(solve(lam), lam), lam, create_graph=True)
        hessians.append(torch.stack([torch.autograd.grad(part, lam, retain_graph=True)[0] for part in grad]))
    size = float(hessians[1].norm()) + sample.scale() * float(sample.eigenvalues[-1] / sample.eigenvalues[0])
    assert float((hessians[0] - hessians[1]).norm()) <= 1e-9 * size


def test_inner_and_outer_parameters_of_second_derivatives_may_have_any_structure() -> None:
    # Also: an inner variable that the loss ignores, a constant, an outer variable that needs no gradient, a used part.
    frozen = nn.Parameter(torch.full((2,), 3.0, dtype=DOUBLE), requires_grad=False)

    def loss(w: dict[str, Any], lam: Pair) -> Tensor:
        a, b = w["a"], w["rest"][0]
        return (a - lam.slope * frozen).cosh().sum() + b.square() / 2 * lam.offset[0].exp() - b * a.sum() / 20

    def solver(lam: Pair) -> dict[str, Any]:
        flat = newton(lambda w, x: loss({"a": w[:2], "rest": (w[2], frozen)}, x), torch.zeros(3, dtype=DOUBLE), 12)(lam)
        return {"a": flat[:2], "rest": (flat[2], frozen), "ignored": torch.ones(2, dtype=DOUBLE) * lam.slope.detach()}

    results = []
    for solve in (argmin(loss, "exact")(solver), solver):
        slope = torch.tensor(0.4, dtype=DOUBLE, requires_grad=True)
        offset = torch.tensor([0.3, 5.0], dtype=DOUBLE, requires_grad=True)
        w = solve(Pair(slope, (offset[0], torch.ones(2, dtype=DOUBLE))))
        value = w["a"].prod() + w["rest"][0] ** 3 + (w["ignored"] * slope).sum()
        grads = torch.autograd.grad(value, (slope, offset), create_graph=True)
        results.append(
            torch.cat([torch.autograd.grad(g.sum(), (slope, offset), retain_graph=True)[0].reshape(-1) for g in grads])
        )
        results[-1] = torch.cat([results[-1], torch.autograd.grad(sum(g.sum() for g in grads), offset)[0]])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert float(results[0].abs().min()) < 1e-12 < 1e-3 < float(results[0].abs().max())


@pytest.mark.parametrize("method", ["fd", "identity", Unrolled(steps=2, learning_rate=0.1)])
def test_second_derivatives_of_other_methods_are_refused(method: Any) -> None:
    lam = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(simple(method)(lam)[0].square().sum(), lam, create_graph=True)
    with pytest.raises(LossError, match=r"solver 'fit' cannot be differentiated: method '\w+' solves no.*'exact'"):
        torch.autograd.grad(grad.sum(), lam)
    (first,) = torch.autograd.grad(simple(method)(lam)[0].square().sum(), lam)
    assert torch.equal(grad, first)


def test_second_derivatives_need_the_hessian_by_autodiff() -> None:
    lam = torch.ones(2, requires_grad=True)
    fit = simple(ConjugateGradient(products="finite_difference"))
    (grad,) = torch.autograd.grad(fit(lam)[0].square().sum(), lam, create_graph=True)
    with pytest.raises(LossError, match=r"has products='finite_difference', and its derivative needs .*'autodiff'"):
        torch.autograd.grad(grad.sum(), lam)


def test_first_derivatives_cost_what_they_did_and_second_ones_what_is_documented() -> None:
    calls = 0

    def loss(w: Tensor, lam: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (w - lam).square().sum() + (w**4).sum() / 10

    fit = argmin(loss, ConjugateGradient(max_iterations=5))(newton(loss, torch.zeros(2)))
    for create_graph, forward in ((False, 1), (True, 2)):
        lam = torch.ones(2, requires_grad=True)
        solution = fit(lam)
        calls = 0
        (grad,) = torch.autograd.grad(solution.sum(), lam, create_graph=create_graph)
        assert calls == forward
        assert grad.requires_grad is create_graph
    calls = 0
    # q and w* each depend on λ: the derivative of q takes 2 passes; that of w* is a pullback of its own
    torch.autograd.grad(grad.sum(), lam)
    assert calls == 3


def test_a_tensor_that_the_inner_loss_closes_over_is_no_constant_in_a_second_derivative() -> None:
    hidden = torch.ones(2, requires_grad=True)

    @argmin(lambda w, lam: (w - lam).square().sum() + (w * hidden.exp()).square().sum())
    def fit(lam: Tensor) -> Tensor:
        return lam / (1 + hidden.exp() ** 2)

    lam = torch.ones(2, requires_grad=True)
    torch.autograd.grad(fit(lam).sum(), lam)
    with pytest.raises(LossError, match=r"reads a tensor of shape \(2,\) that requires gradients.*detach\(\)"):
        torch.autograd.grad(fit(lam).sum(), lam, create_graph=True)


def test_second_derivatives_of_a_field_that_is_no_gradient_warn() -> None:
    N = torch.tensor([[0.0, 0.6], [-0.2, 0.0]], dtype=DOUBLE)

    class Field(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w.new_zeros(())

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * (N @ ctx.saved_tensors[0])

    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return w.square().sum() / 2 + Field.apply(w) - w @ lam

    J = torch.eye(2, dtype=DOUBLE) + N
    for method in ("exact", Neumann(terms=100, step_size=1.0)):
        fit = argmin(loss, method)(lambda lam: torch.linalg.solve(J, lam))
        lam = torch.ones(2, dtype=DOUBLE, requires_grad=True)
        v = torch.tensor([1.0, 3.0], dtype=DOUBLE)
        (grad,) = torch.autograd.grad((fit(lam) @ v).square(), lam, create_graph=True)
        torch.testing.assert_close(grad, 2 * (torch.linalg.solve(J, lam) @ v) * torch.linalg.solve(J.T, v))
        with pytest.warns(BilevelWarning, match=r"not symmetric.*second derivatives.*wrong here"):
            torch.autograd.grad(grad[0], lam)


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
    with pytest.raises(ConfigError, match=r"warm_start=True\) continues from the state.*argmin .*keeps nothing"):
        argmin(lambda w, lam: w, ConjugateGradient(warm_start=True))
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
