"""Defects of other libraries and traps in numbers, as tests of this one. Where each is tested, if not below:

Betty: the optimiser rebuilt over all parameters
    tests/bilevel/test_engine.py::test_parameters_not_given_to_the_optimizer_never_change_and_groups_are_kept
Betty: conjugate gradient divides zero by zero once converged in float32
    tests/contract/test_conjugate_gradient.py::test_going_on_after_convergence_in_float32_gives_no_nan
Betty: an unused inner parameter crashes conjugate gradient and Neumann
    tests/contract/contract.py::test_unused_parameters_have_no_influence
Betty: other dropout masks in each pass of a difference
    tests/contract/contract.py::test_all_passes_see_the_same_dropout_masks
    tests/bilevel/test_engine.py::test_passes_of_one_derivative_see_the_same_dropout_masks
Betty: differences move batch-norm statistics
    tests/bilevel/test_engine.py::test_products_leave_batch_norm_statistics_to_the_training_passes
Betty: frozen parameters crash
    tests/contract/contract.py::test_frozen_parameters_are_constants
Betty: an outer loss that depends directly on its own parameters crashes
    tests/contract/contract.py::test_direct_part_value_and_point_do_not_depend_on_the_method
Betty: schedulers crash
    tests/bilevel/test_engine.py::test_clipping_and_schedules_are_the_problems_own
Betty: a missing dependency is not noticed
    tests/bilevel/test_engine.py::test_an_inner_loss_without_the_outer_parameters_is_an_error
Betty: an unknown strategy runs as the default
    tests/bilevel/test_hypergradient.py::test_methods_that_do_not_exist_are_refused
Betty: the adaptive preconditioner without bias correction
    tests/contract/test_sama.py
hypertorch, BOAT: conjugate gradient returns the iterate before the last; for H = I the implicit part is lost
    tests/contract/test_conjugate_gradient.py::test_identity_hessian_keeps_its_implicit_part
A scalar parameter that is silently zero
    tests/contract/contract.py::test_scalar_parameters
NaN through the square root of Adam at zero gradients
    tests/bilevel/test_optim.py::test_gradients_that_have_always_been_zero_have_finite_derivatives
    tests/contract/test_unrolled.py::test_parameters_whose_gradient_has_always_been_zero_spoil_nothing
Second order under activation checkpointing
    tests/bilevel/test_engine.py::test_activation_checkpointing_recomputes_with_the_swapped_parameters
Attention without double backward
    tests/contract/test_finite_difference.py::test_attention_without_double_backward_names_the_way_out
Failed solves without a status
    tests/contract/test_conjugate_gradient.py::test_indefinite_hessians_are_reported
    tests/proofs/test_families.py::test_methods_for_minima_say_so_elsewhere_or_are_right
Differences that carry the inner learning rate, at the old point: ours have none, at the point that is given
    tests/contract/test_finite_difference.py::test_error_is_the_third_derivative_term
"K terms" that are K + 1
    tests/contract/test_neumann.py::test_equals_the_truncated_sum
The norm of a head that dominates ε: it is the length of the whole displacement
    tests/contract/test_finite_difference.py::test_epsilon_is_the_length_of_the_displacement
A detach() that hides a derivative
    tests/bilevel/test_check.py::test_what_a_detach_hides_is_found_and_named
TF32
    tests/bilevel/test_check_causes.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import ConjugateGradient, Exact, FiniteDifference, Identity, Neumann, Status, hypergradient
from bilevel.errors import NonFiniteError
from tests.bilevel.strategies import DOUBLE, make_quadratic
from tests.proofs.settings import SETTINGS

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_above_exists() -> None:
    assert __doc__ is not None
    places = [line.strip() for line in __doc__.splitlines() if line.startswith("    tests/")]
    assert len(places) > 20
    for place in places:
        path, _, name = place.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {name}(" in text or not name, place


class SoftmaxRegression:
    """Weighted softmax regression at its solution: λ weighs the examples, F is the loss of other ones."""

    def __init__(self, decay: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(30, 8, generator=generator, dtype=DOUBLE)
        self.y = torch.randint(0, 3, (30,), generator=generator)
        self.decay = decay
        self.lam = torch.zeros(20, dtype=DOUBLE)
        w = torch.zeros(8, 3, dtype=DOUBLE)
        for _ in range(30):  # Newton
            g = torch.autograd.functional.jacobian(lambda w: self.inner(w, self.lam), w)
            H = torch.autograd.functional.hessian(lambda w: self.inner(w, self.lam), w).reshape(24, 24)
            w = w - torch.linalg.solve(H, g.reshape(-1)).reshape(8, 3)
        self.w = w

    def inner(self, w: Tensor, lam: Tensor) -> Tensor:
        losses = F.cross_entropy(self.x[:20] @ w, self.y[:20], reduction="none")
        return (lam.exp() * losses).mean() + self.decay * w.square().sum() / 2

    def outer(self, w: Tensor, lam: Tensor) -> Tensor:
        return F.cross_entropy(self.x[20:] @ w, self.y[20:])

    def exact(self) -> Tensor:
        """``−(∂²f/∂λ∂w) H⁻¹ v`` from dense matrices."""
        w, lam = self.w, self.lam
        H = torch.autograd.functional.hessian(lambda w: self.inner(w, lam), w).reshape(24, 24)
        v = torch.autograd.functional.jacobian(lambda w: self.outer(w, lam), w).reshape(-1)
        q = torch.linalg.solve(H, v).reshape(8, 3)
        variable = lam.clone().requires_grad_()
        point = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.inner(point, variable), point, create_graph=True)
        return -torch.autograd.grad((g * q).sum(), variable)[0]

    def ours(self, method: Any) -> Any:
        return hypergradient(self.inner, self.outer, self.w, self.lam, method)

    def bettys(self, name: str, **config: Any) -> Tensor:
        """What Betty 0.2.1's function of this name returns for this problem."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip(f"betty.hypergradient.{name}")
        w, lam = self.w.clone().requires_grad_(), self.lam.clone().requires_grad_()
        problem = SimpleNamespace(
            paths=[],
            config=SimpleNamespace(**config),
            cur_batch=None,
            training_step_exec=lambda batch: self.inner(w, lam),
            parameters=lambda: [w],
            trainable_parameters=lambda: [w],
        )
        v = torch.autograd.functional.jacobian(lambda w: self.outer(w, self.lam), self.w)
        above = SimpleNamespace(trainable_parameters=lambda: [lam])
        (found,) = getattr(module, name)([v], problem, above, False)
        return found.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_conjugate_gradient_improves_with_iterations() -> None:
    # Betty's updates its direction with the residual before the step: right after one iteration only.
    problem = SoftmaxRegression(decay=0.02)
    exact = problem.exact()
    errors = {
        count: (
            relative(problem.ours(ConjugateGradient(max_iterations=count, rtol=0.0)).grad, exact),
            relative(problem.bettys("cg", cg_iterations=count, cg_alpha=1.0), exact),
        )
        for count in (1, 10, 20, 30)
    }
    assert errors[1][0] == pytest.approx(errors[1][1], rel=1e-6)
    assert errors[10][0] < 0.05 < 0.1 < errors[10][1]
    assert errors[20][0] < 1e-3 < 0.1 < errors[20][1]
    assert errors[30][0] < 1e-6


def test_conjugate_gradient_has_no_step_size_to_get_wrong() -> None:
    # Betty's cg_alpha scales the step and not the residual: wrong the more, the longer it runs.
    problem = SoftmaxRegression(decay=0.02)
    exact = problem.exact()
    theirs = [relative(problem.bettys("cg", cg_iterations=count, cg_alpha=0.1), exact) for count in (2, 30)]
    assert min(theirs) > 0.3
    # Scaling the losses is what such a factor would be for; ours needs none.
    scaled = hypergradient(
        lambda w, lam: 0.1 * problem.inner(w, lam),
        problem.outer,
        problem.w,
        problem.lam,
        ConjugateGradient(max_iterations=60, rtol=1e-12),
    )
    assert relative(scaled.grad, exact) < 1e-8


def test_a_neumann_series_that_diverges_says_so() -> None:
    # With its default step size of 1 Betty's is off by 5·10⁵ after 10 terms where the largest eigenvalue is 5.
    problem = SoftmaxRegression(decay=5.0)
    exact = problem.exact()
    theirs = problem.bettys("neumann", neumann_iterations=10, neumann_alpha=1.0)
    assert relative(theirs, exact) > 1e5
    info = problem.ours(Neumann(terms=10, step_size=1.0)).info
    assert info.status is Status.DIVERGED
    assert "'auto'" in info.explain()
    assert relative(problem.ours(Neumann(terms=10)).grad, exact) < 0.1


class Network:
    """A tanh network of float parameters in one vector: λ weighs the examples."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(24, 5, generator=generator, dtype=DOUBLE).to(dtype)
        self.y = torch.randint(0, 3, (24,), generator=generator)
        self.w = (0.5 * torch.randn(5 * 8 + 8 * 3, generator=generator, dtype=DOUBLE)).to(dtype)
        self.lam = torch.zeros(16, dtype=dtype)

    def losses(self, w: Tensor, rows: slice) -> Tensor:
        hidden = torch.tanh(self.x[rows] @ w[:40].reshape(5, 8))
        return F.cross_entropy(hidden @ w[40:].reshape(8, 3), self.y[rows], reduction="none")

    def inner(self, w: Tensor, lam: Tensor) -> Tensor:
        return (lam.sigmoid() * self.losses(w, slice(0, 16))).mean()

    def outer(self, w: Tensor, lam: Tensor) -> Tensor:
        return self.losses(w, slice(16, 24)).mean()

    def grad(self, method: Any) -> Any:
        return hypergradient(self.inner, self.outer, self.w, self.lam, method)


def test_differences_in_float32_lose_what_a_small_displacement_rounds_away() -> None:
    # Measured on such a network: 0.1 % off at 0.01, 1 % at 0.001, 10 % at 0.0001 in float32; 1e-9 at 0.0001 in float64.
    double, single = Network(DOUBLE), Network(torch.float32)
    exact = double.grad(Identity()).grad
    errors = [relative(single.grad(FiniteDifference(epsilon=e)).grad.double(), exact) for e in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 1e-4 < 10 * errors[0] < errors[2]
    assert relative(double.grad(FiniteDifference(epsilon=1e-4)).grad, exact) < 1e-7
    assert relative(single.grad(FiniteDifference()).grad.double(), exact) < 2 * min(errors) + 1e-3  # "auto"


def test_differences_in_bfloat16_are_called_inaccurate() -> None:
    # 72 % off at 0.01 and 6 % at 0.1 in a peer, without a word.
    half = Network(torch.bfloat16)
    result = half.grad(FiniteDifference(epsilon=1e-3))
    assert result.info.status is Status.INACCURATE
    assert "float32" in result.info.explain()
    exact = Network(DOUBLE).grad(Identity()).grad
    assert relative(half.grad(FiniteDifference()).grad.double(), exact) < 0.3  # "auto" takes a large step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [None, 1, 2])
def test_differences_move_no_parameter_also_when_a_pass_fails(dtype: torch.dtype, broken: int | None) -> None:
    # In a peer ±ε in place drifts bfloat16 weights, and an exception between the passes leaves them perturbed.
    network = Network(dtype)
    before, passes = network.w.clone(), 0

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == broken:
            raise KeyError("data")
        return network.inner(w, lam)

    for _ in range(5):
        try:
            hypergradient(inner, network.outer, network.w, network.lam, FiniteDifference())
        except KeyError:
            assert passes == broken
    assert torch.equal(network.w, before)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_gradient_that_holds_a_nan_is_no_zero(where: str) -> None:
    # A peer replaces any gradient that holds a NaN by zeros: the run goes on, and learns nothing.
    sample = make_quadratic(4, 3, 5.0, 1.0, 1)
    inner, outer = sample.losses()

    def spoilt(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # finite, with an infinite slope times zero: the square root at zero
        return lambda w, lam: loss(w, lam) + (0 * (w - w.detach()).abs().sqrt()).sum()

    losses = (spoilt(inner), outer) if where == "inner" else (inner, spoilt(outer))
    for setting in SETTINGS:
        try:
            result = hypergradient(*losses, sample.inner, sample.outer, setting.estimator(), state={})
        except NonFiniteError:
            continue
        if result.info.status is not Status.DIVERGED:
            # The inner gradient's value, unlike its derivatives, is nothing that the identity for the inverse sees.
            clean = hypergradient(inner, outer, sample.inner, sample.outer, setting.estimator(), state={})
            torch.testing.assert_close(result.grad, clean.grad, rtol=1e-5, atol=1e-5, msg=str(setting))
        assert where == "inner" or result.info.status.failed, f"{setting}: {result.info}"


def test_a_solve_that_ends_early_says_how_far_it_came() -> None:
    # TorchOpt's and JAXopt's return zeros or the last iterate with no status.
    sample = make_quadratic(8, 3, 1e4, 1.0, 3)
    for method in (ConjugateGradient(max_iterations=2), Neumann(terms=2)):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, method)
        assert result.info.status is Status.STOPPED_AT_CAP
        assert result.info.residual > 1e-3
        assert "relative residual" in result.info.explain()
        assert relative(result.grad, sample.hypergradient()) > 1e-3


def test_a_detached_weight_makes_differences_and_products_two_things() -> None:
    # Meta-Weight-Net's usual code: the weight of an example is a function of its detached loss. The inner update
    # follows the field g(w, λ) = mean ω(ℓ(w), λ) ∂ℓ/∂w, whose derivative reverse mode has; ∂f/∂λ differentiated along
    # w also holds how the loss inside ω moves.
    network = Network(DOUBLE)
    lam = torch.tensor([0.7, -0.4], dtype=DOUBLE)

    def loss(w: Tensor, lam: Tensor, *, detach: bool = True) -> Tensor:
        losses = network.losses(w, slice(0, 16))
        seen = losses.detach() if detach else losses
        return (torch.sigmoid(lam[0] * seen + lam[1]) * losses).mean()

    def field(w: Tensor, lam: Tensor) -> Tensor:
        """g by its definition."""
        losses = network.losses(w, slice(0, 16))
        J = torch.stack([torch.autograd.grad(part, w, create_graph=True)[0] for part in losses])
        return torch.sigmoid(lam[0] * losses.detach() + lam[1]) @ J / 16

    point, variable = network.w.clone().requires_grad_(), lam.clone().requires_grad_()
    (v,) = torch.autograd.grad(network.outer(point, lam), point)
    (expected,) = torch.autograd.grad(-(field(point, variable) @ v), variable)
    products = hypergradient(loss, network.outer, network.w, lam, Identity()).grad
    assert relative(products, expected) < 1e-12
    for epsilon in (1e-2, 1e-4):
        differences = hypergradient(loss, network.outer, network.w, lam, FiniteDifference(epsilon)).grad
        assert relative(differences, expected) > 0.3
    # Without the detach they are one thing.
    whole = [
        hypergradient(lambda w, lam: loss(w, lam, detach=False), network.outer, network.w, lam, method).grad
        for method in (Identity(), FiniteDifference(1e-4))
    ]
    assert relative(whole[1], whole[0]) < 1e-6


def test_kinks_ask_for_small_displacements() -> None:
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(40, 6, generator=generator, dtype=DOUBLE)
    w, lam = torch.randn(6, generator=generator, dtype=DOUBLE), torch.zeros(40, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (lam.exp() * torch.relu(A @ w)).mean()

    exact = hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, Identity()).grad
    errors = [
        relative(hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, FiniteDifference(e)).grad, exact)
        for e in (1e-6, 1.0)
    ]
    assert errors[0] < 1e-8 < 1e-2 < errors[1]


def test_two_ways_to_the_same_answer_are_not_compared_where_only_one_is_right() -> None:
    # The numbers above come from dense matrices: here they agree with this library's own.
    problem = SoftmaxRegression(decay=0.02)
    assert relative(problem.ours(Exact()).grad, problem.exact()) < 1e-10
