from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel import ConjugateGradient, Engine, EngineConfig, Exact, Neumann, Problem, Unrolled, hypergradient
from bilevel.check import HypergradientReport, hypergradcheck
from bilevel.errors import ConfigError, HypergradientCheckError, ParameterError, UnknownNameError
from bilevel.hypergrad import as_estimator
from bilevel.precision import DoublePrecision
from tests.bilevel.strategies import DOUBLE, Sample, forall, logarithmic, make_quadratic, samples
from tests.contract.contract import Field


@forall(30, sample=samples(), damping=st.just(0.0) | logarithmic(1e-4, 10.0))
def test_reports_the_distance_to_the_closed_form(sample: Sample, damping: float) -> None:
    report = hypergradcheck(*sample.losses(), sample.inner, sample.outer, Exact(damping=damping), rtol=1e-3)
    exact, found = sample.hypergradient(), sample.hypergradient(damping=damping)
    expected = float((found - exact).norm() / exact.norm())
    slack = 10 * (sample.rounding() + sample.rounding(damping)) / float(exact.norm())
    assert report.relative_error == pytest.approx(expected, rel=1e-3, abs=slack)
    assert report.passed == (report.relative_error <= 1e-3)
    assert report.curvature[0] == pytest.approx(float(sample.eigenvalues[0]), rel=1e-3, abs=1e-10 * report.curvature[1])
    assert report.reference_dtype == DOUBLE
    assert report.asymmetry < 1e-9
    assert report.hidden < 1e-3


@functools.cache
def classification(dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Any, Any]:
    """Softmax regression with a decay for each feature; losses that close over data, and its solution."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 5, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    V, u = torch.randn(20, 5, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    X, V = X.to(dtype), V.to(dtype)

    def inner(w: Any, lam: Any) -> Tensor:
        out = F.linear(X, w["weight"], w["bias"])
        return F.cross_entropy(out, y) + (lam["decay"].exp() * w["weight"].square()).sum() + w["bias"].square().sum()

    def outer(w: Any, lam: Any) -> Tensor:
        return F.cross_entropy(F.linear(V, w["weight"], w["bias"]), u)

    w = {"weight": torch.zeros(3, 5, dtype=dtype), "bias": torch.zeros(3, dtype=dtype)}
    lam = {"decay": torch.full((5,), -2.0, dtype=dtype)}
    parameters = [part.requires_grad_() for part in w.values()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-9, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = inner(w, lam)
        value.backward()
        return value

    optimizer.step(closure)
    return inner, outer, {key: part.detach() for key, part in w.items()}, lam


def test_float32_losses_get_a_float64_reference() -> None:
    inner, outer, w, lam = classification()
    report = hypergradcheck(inner, outer, w, lam, "cg")
    assert report.passed
    assert 1e-9 < report.relative_error < 1e-5  # float32's rounding: the reference is not the method's own arithmetic
    assert report.reference_dtype == DOUBLE
    exact = hypergradient(*classification(DOUBLE)[:2], *(to_double(part) for part in (w, lam)), "exact").grad["decay"]
    assert report.per_parameter["decay"].norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert report.inner_distance < 1e-4
    assert "passed" in str(report)


def to_double(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: part.double() for key, part in params.items()}


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ("identity", r"takes H⁻¹ = I"),
        ("fd", r"takes H⁻¹ = I"),
        (ConjugateGradient(max_iterations=1), r"stopped at relative residual"),
        (Neumann(terms=1), r"stopped at relative residual"),
        (Exact(damping=0.1), r"damping 0\.1 changes the system; the smallest eigenvalue"),
        (Unrolled(steps=3, learning_rate=0.1), r"limited number of steps"),
        (Neumann(terms=20, step_size=10.0), r"diverged.*lower step_size"),
    ],
)
def test_failures_name_their_cause(method: Any, cause: str) -> None:
    report = hypergradcheck(*classification(), method)
    assert not report.passed
    assert report.relative_error > 1e-3
    assert "FAILED" in str(report)
    assert re.search(cause, str(report), re.DOTALL)
    if method != Neumann(terms=20, step_size=10.0):
        assert "approximation, not rounding" in str(report)
        assert report.method_error < 1e-2 * report.relative_error
    with pytest.raises(HypergradientCheckError, match="FAILED"):
        hypergradcheck(*classification(), method, raise_on_failure=True)


def test_tolerance_decides() -> None:
    error = hypergradcheck(*classification(), "identity").relative_error
    assert hypergradcheck(*classification(), "identity", rtol=1.01 * error).passed
    assert not hypergradcheck(*classification(), "identity", rtol=0.99 * error).passed
    assert hypergradcheck(*classification(), "cg", raise_on_failure=True).passed


def test_rounding_is_told_from_approximation() -> None:
    sample = make_quadratic(8, 3, 1e6, 1.0, 5)
    inner, outer = sample.losses(torch.float32)
    method = ConjugateGradient(max_iterations=100, rtol=0.0)
    report = hypergradcheck(inner, outer, sample.inner.float(), sample.outer.float(), method, rtol=1e-6)
    assert report.method_error > 1e-6
    assert any(cause.startswith("rounding") for cause in report.causes)


def test_unrolled_is_compared_at_the_end_of_its_steps() -> None:
    inner, outer, w, lam = classification()
    start = {key: part + 0.5 for key, part in w.items()}
    report = hypergradcheck(inner, outer, start, lam, Unrolled(steps=150, learning_rate=0.5))
    assert report.passed
    assert report.inner_distance < 1e-4  # of the end; the start is far away
    assert hypergradcheck(inner, outer, start, lam, "exact").inner_distance > 0.1


def test_an_unsolved_inner_problem_is_said() -> None:
    inner, outer, w, lam = classification()
    report = hypergradcheck(inner, outer, {key: part + 0.5 for key, part in w.items()}, lam, "cg")
    assert report.passed  # the formula is right where it is taken
    assert any("the inner problem is not solved" in cause for cause in report.causes)
    assert report.inner_gradient_norm > 0.01


def test_a_saddle_and_a_null_space_are_said() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0]))
    saddle = hypergradcheck(lambda w, lam: w @ H @ w / 2 - w @ lam, lambda w, lam: w.sum(), *zeros(2), "exact")
    assert any("eigenvalue -1.00e+00" in cause for cause in saddle.causes)
    H = torch.diag(torch.tensor([1.0, 0.0]))
    singular = hypergradcheck(lambda w, lam: w @ H @ w / 2 - w @ lam, lambda w, lam: w.sum(), *zeros(2), "exact")
    assert any("singular" in cause for cause in singular.causes)


def zeros(size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(size), torch.zeros(size)


def reweighting(detached: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor, Tensor]:
    """Meta-Weight-Net's problem: weights that are a function of the losses, which its usual code detaches."""
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 4, generator=generator, dtype=DOUBLE), torch.randn(30, generator=generator, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        losses = (X @ w - y).square() / 2
        weights = (lam[0] * (losses.detach() if detached else losses) + lam[1]).sigmoid()
        return (weights * losses).mean() + 0.05 * w.square().sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return (X[:10] @ w + y[:10]).square().mean()

    return inner, outer, X, torch.tensor([-0.5, 0.3], dtype=DOUBLE)


def descend(inner: Callable[..., Tensor], size: int, lam: Tensor) -> Tensor:
    w = torch.zeros(size, dtype=DOUBLE, requires_grad=True)
    for _ in range(400):
        (grad,) = torch.autograd.grad(inner(w, lam), w)
        w = (w - 1.0 * grad).detach().requires_grad_()
    return w.detach()


def test_what_a_detach_hides_is_found_and_named() -> None:
    # Gradient descent on the detached loss ends where its gradient vanishes. How that point moves with λ is the truth,
    # which differences of whole descents measure; autograd's second derivatives miss the detached path.
    for detached in (False, True):
        inner, outer, _, lam = reweighting(detached)
        w = descend(inner, 4, lam)
        truth = []
        for i in range(2):
            shift = torch.zeros(2, dtype=DOUBLE)
            shift[i] = 1e-4
            ahead, behind = (float(outer(descend(inner, 4, point), point)) for point in (lam + shift, lam - shift))
            truth.append((ahead - behind) / 2e-4)
        expected = torch.tensor(truth, dtype=DOUBLE)
        report = hypergradcheck(inner, outer, w, lam, "exact")
        assert report.per_parameter["outer"].norm == pytest.approx(float(expected.norm()), rel=1e-5)
        found = hypergradient(inner, outer, w, lam, "exact").grad
        error = float((found - expected).norm() / expected.norm())
        assert report.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert report.passed is not detached
        assert (report.hidden > 0.05) is detached
        assert any("autograd misses" in cause and "detach()" in cause for cause in report.causes) is detached


class Reversal(torch.autograd.Function):
    """The identity forward, the negative backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -cotangent


def test_gradient_reversal_is_another_way_to_hide_a_derivative() -> None:
    # A game: one player minimises, the other one, behind a gradient reversal, maximises. Autograd reverses the
    # derivative of the inner gradient once more, and every method with it.
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        x, y = w[0], Reversal.apply(w[1])
        return x.square() - y.square() + 3 * x * y - lam @ torch.stack([x, -y])

    v = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    J = torch.tensor([[2.0, 3.0], [-3.0, 2.0]], dtype=DOUBLE)
    lam = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    report = hypergradcheck(inner, lambda w, lam: w @ v, torch.linalg.solve(J, lam), lam, "exact")
    assert report.inner_gradient_norm < 1e-12
    assert report.asymmetry == pytest.approx(float((J - J.T).norm() / J.norm()))
    assert report.per_parameter["outer"].norm == pytest.approx(float(torch.linalg.solve(J.T, v).norm()))
    assert report.hidden > 0.1
    assert not report.passed


def test_an_asymmetric_jacobian_is_named() -> None:
    J = torch.tensor([[2.0, 3.0], [-3.0, 2.0]], dtype=DOUBLE)
    v, lam = torch.tensor([1.0, 2.0], dtype=DOUBLE), torch.tensor([1.0, 1.0], dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return Field.apply(w, J) - w @ lam

    w = torch.linalg.solve(J, lam)
    report = hypergradcheck(inner, lambda w, lam: w @ v, w, lam, "exact", rtol=1e-8)
    assert report.passed
    assert report.asymmetry == pytest.approx(float((J - J.T).norm() / J.norm()))
    assert any("not symmetric" in cause for cause in report.causes)
    assert not hypergradcheck(inner, lambda w, lam: w @ v, w, lam, ConjugateGradient(max_iterations=1)).passed


def test_losses_without_second_derivatives_have_a_reference_by_differences() -> None:
    P = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return 0.1 * torch.cdist(P, w).sum() + ((w - lam).square()).sum()

    def stable(w: Tensor, lam: Tensor) -> Tensor:
        distances = (P[:, None] - w[None]).square().sum(-1).sqrt()
        return 0.1 * distances.sum() + ((w - lam).square()).sum()

    w, lam = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 3)
    outer = lambda w, lam: w.square().sum()  # noqa: E731
    report = hypergradcheck(inner, outer, w, lam, "fd")
    expected = hypergradcheck(stable, outer, w, lam, "fd")
    assert report.relative_error == pytest.approx(expected.relative_error, rel=1e-3)
    assert math.isnan(report.hidden)


def test_attention_gets_a_back_end_with_second_derivatives() -> None:
    x = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))

    def attend(w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ w, x, x)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (attend(w) - lam).square().mean() + w.square().mean() / 2

    report = hypergradcheck(inner, lambda w, lam: attend(w).mean(), torch.eye(4), torch.zeros(8, 4), "fd", rtol=10)
    assert report.reference_dtype == DOUBLE
    assert report.hidden < 1e-3
    assert report.method_error < 1e-2


def test_dropout_is_the_same_on_both_sides() -> None:
    inner, outer, w, lam = classification()

    def dropped(w: Any, lam: Any) -> Tensor:
        return inner({"weight": F.dropout(w["weight"], 0.5), "bias": w["bias"]}, lam) + w["weight"].square().sum()

    before = torch.get_rng_state()
    report = hypergradcheck(dropped, outer, w, lam, "cg")
    assert report.passed
    assert report.relative_error < 1e-5
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_has_its_line() -> None:
    def inner(w: Any, lam: Any) -> Tensor:
        return ((w - lam["good"]).square() / 2).sum() + (w * lam["nested"][0]).sum() + 0 * lam["unused"].sum()

    outer_params = {"good": torch.ones(3), "nested": [torch.ones(3)], "unused": torch.ones(2)}
    report = hypergradcheck(inner, lambda w, lam: w.square().sum(), torch.zeros(3), outer_params, "cg")
    assert list(report.per_parameter) == ["good", "nested[0]", "unused"]
    assert report.per_parameter["unused"].relative_error == 0.0
    assert report.per_parameter["unused"].norm == 0.0
    text = str(report)
    for name in report.per_parameter:
        assert re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE)
    many = {str(i): torch.ones(1) for i in range(50)}
    report = hypergradcheck(
        lambda w, lam: sum(((w - part) ** 2).sum() for part in lam.values()),
        lambda w, lam: w.sum(),
        torch.zeros(1),
        many,
        "cg",
    )
    assert "… and 30 more" in str(report)
    assert str(report) == report.explain()


def test_nothing_that_is_passed_in_changes() -> None:
    inner, outer, w, lam = classification()
    copies = [part.clone() for part in (*w.values(), *lam.values())]
    hypergradcheck(inner, outer, w, lam, "neumann")
    for part, copy in zip((*w.values(), *lam.values()), copies, strict=True):
        assert torch.equal(part, copy)
        assert part.dtype == torch.float32
        assert part.grad is None
        assert not part.requires_grad


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (
            ("cg",),
            {"reference": "central_diference"},
            UnknownNameError,
            "unknown reference 'central_diference': did you mean 'central_difference'? Choices: 'central_difference'",
        ),
        (("cg",), {"rtol": -1.0}, ConfigError, "hypergradcheck.rtol must be a finite number at least 0"),
        (("neuman",), {}, UnknownNameError, "did you mean 'neumann'"),
        ((None,), {}, ParameterError, "hypergradcheck needs an engine, or (inner_loss, outer_loss"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        hypergradcheck(*classification(), *arguments, **keywords)


def test_too_many_inner_variables_are_refused() -> None:
    with mock.patch("bilevel.check.references.exact.LARGEST_DIMENSION", 10), pytest.raises(ConfigError) as caught:
        hypergradcheck(*classification(), "cg")
    assert re.search(r"18 inner variables are more than its limit of 10.*smaller model", str(caught.value))


# Running a user's function in float64


def operations() -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm, linear, convolution = nn.BatchNorm1d(3), nn.Linear(4, 3), nn.Conv1d(1, 2, 3)
        recurrent, encoder = nn.LSTM(4, 3, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    frozen_statistics = nn.BatchNorm1d(3).eval()

    def in_place(w: Tensor) -> Tensor:
        out = torch.zeros(6, 3)
        out[:] = F.linear(X, w)
        out += X[:, :3]
        return out.mul_(0.5).add_(X[:, 1:])

    def penalty(w: Tensor) -> Tensor:
        x = X.clone().requires_grad_()
        return torch.autograd.grad(F.linear(x, w).square().sum(), x, create_graph=True)[0]

    return {
        "F.linear": lambda w: F.linear(X, w),
        "matmul": lambda w: X @ w.T,
        "einsum": lambda w: torch.einsum("ij,kj->ik", X, w),
        "cat": lambda w: torch.cat([X @ w.T, X[:, :1]], 1),
        "cross_entropy": lambda w: F.cross_entropy(X @ w.T, y, weight=torch.tensor([1.0, 2.0, 0.5])),
        "batch norm": lambda w: norm(X @ w.T),
        "batch norm with statistics": lambda w: frozen_statistics(X @ w.T),
        "layer": lambda w: linear(X) + X @ w.T,
        "convolution": lambda w: convolution((X @ w.T)[:, None]),
        "LSTM": lambda w: recurrent((X @ w.T)[:, None] @ W)[0],
        "transformer layer": lambda w: encoder(X[None]) @ w.T,
        "in place": in_place,
        "constant": lambda w: (X @ w.T) * torch.tensor([0.1, 0.2, 0.3]),
        ".float()": lambda w: (X.float() @ w.float().T).float(),
        ".to(float32)": lambda w: (X @ w.T).to(torch.float32).softmax(-1, dtype=torch.float32),
        ".to(X)": lambda w: (X @ w.T).to(X).type_as(X),
        ".half()": lambda w: (X @ w.T).bfloat16().half() * torch.ones(3, dtype=torch.bfloat16),
        "functional_call": lambda w: torch.func.functional_call(linear, {"weight": w}, (X,)),
        "gradient penalty": penalty,
        "vmap": lambda w: torch.func.vmap(lambda x: w @ x)(X),
        "dtype comparison": lambda w: X @ w.T if (X @ w.T).dtype == w.dtype == X.dtype or True else w,
        "named tuple": lambda w: (X @ w.T).max(1).values,
        "dropout": lambda w: F.dropout(X @ w.T, 0.5),
        "rand": lambda w: X @ w.T + torch.rand(6, 3),
        "randn_like": lambda w: X @ w.T + torch.randn_like(X @ w.T),
        "bernoulli": lambda w: (X @ w.T) * torch.bernoulli((X @ w.T).sigmoid()),
        "uniform_": lambda w: X @ w.T + torch.empty_like(X @ w.T).uniform_(),
        "gumbel": lambda w: F.gumbel_softmax(X @ w.T),
        "distribution": lambda w: torch.distributions.Normal(X @ w.T, torch.ones(3)).rsample(),
        "sparse": lambda w: torch.sparse.mm(X.to_sparse(), w.T),
    }


@pytest.mark.parametrize("name", operations())
def test_functions_run_in_float64_whatever_they_close_over(name: str) -> None:
    W = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    reference, function = operations()[name], operations()[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = reference(W)
        torch.manual_seed(1)
        precise = W.double().requires_grad_()
        with DoublePrecision(torch.float32) as mode:
            found = function(precise)
    assert found.dtype == DOUBLE
    tolerance = 1e-2 if name == ".half()" else 1e-5
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance)
    assert not mode.forced
    (first,) = torch.autograd.grad(found.square().sum(), precise, create_graph=True)
    assert first.dtype == DOUBLE
    assert first.any()


def test_finer_than_float32_everywhere() -> None:
    # A difference that float32 cannot hold survives every operation on the way.
    w = torch.tensor([1.0 + 1e-12], dtype=DOUBLE)
    constant = torch.ones(1)
    with DoublePrecision(torch.float32):
        out = F.linear((w * constant).float()[None], torch.ones(1, 1)).to(torch.float32) - torch.ones(1)
    assert float(out) == pytest.approx(1e-12, rel=1e-3)


def test_buffers_of_modules_are_left_alone() -> None:
    module = nn.BatchNorm1d(3)
    with DoublePrecision(torch.float32):
        module(torch.randn(5, 3, dtype=DOUBLE))
    assert torch.equal(module.running_mean, torch.zeros(3))


def test_a_function_that_forces_float32_limits_the_reference() -> None:
    average = torch.zeros(3)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        average.copy_(w.detach())  # a float32 tensor of the caller's, changed in place
        return (w - lam).square().sum() + (0.0 * average * w).sum()

    report = hypergradcheck(inner, lambda w, lam: w.sum(), *zeros(3), "cg")
    assert report.reference_dtype == torch.float32
    assert any("no better than float32: copy_" in cause for cause in report.causes)


def test_a_function_that_refuses_float64_is_checked_in_its_own_precision() -> None:
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        if w.dtype != torch.float32:
            raise TypeError("only float32")
        return (w - lam).square().sum()

    report = hypergradcheck(inner, lambda w, lam: w.sum(), *zeros(3), "cg")
    assert report.passed
    assert report.reference_dtype == torch.float32
    assert any("cannot be run in float64" in cause and "only float32" in cause for cause in report.causes)
    assert math.isnan(report.hidden)
    assert math.isnan(report.method_error)


def test_a_function_that_is_another_one_in_float64_is_checked_in_its_own_precision() -> None:
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        scale = 1.0 if w.dtype == torch.float32 else 2.0
        return scale * ((w - lam).square().sum() + 1.0)

    report = hypergradcheck(inner, lambda w, lam: w.sum(), *zeros(3), "cg")
    assert report.passed
    assert report.reference_dtype == torch.float32
    assert any("loss of the inner problem is 6 instead of 3" in c or "is 2 instead of 1" in c for c in report.causes)


def test_numpy_constants_are_allowed() -> None:
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        weights = torch.from_numpy(np.linspace(1, 2, 3, dtype=np.float32) + w.detach().numpy().astype(np.float32) * 0)
        return (weights * (w - lam).square()).sum()

    report = hypergradcheck(inner, lambda w, lam: w.square().sum() + w.sum(), *zeros(3), "cg")
    assert report.passed
    assert report.reference_dtype == DOUBLE


def test_checkpointing_falls_back_where_it_recomputes_in_float32() -> None:
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        out = checkpoint(lambda w: (X @ w).sin(), w, use_reentrant=False)
        return out.square().mean() + (w - lam).square().sum()

    report = hypergradcheck(inner, lambda w, lam: w.square().sum(), torch.ones(3), torch.ones(3), "cg")
    assert report.passed


# Engines


class Decay(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.fit(x), y)


class Fit(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        decay = self.decay.module["log"].exp()
        return F.cross_entropy(self(x), y) + sum((decay * p.square().sum()).sum() for p in self.module.parameters())


def engine(method: Any, *, batches: bool = True, dropout: float = 0.0, steps: int = 200) -> Engine:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    v, u = torch.randn(30, 4, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Dropout(dropout), nn.Linear(4, 3))
    sgd = lambda params: torch.optim.SGD(params, lr=0.5)  # noqa: E731
    problems = [
        Decay(
            nn.ParameterDict({"log": nn.Parameter(torch.tensor([-3.0]))}),
            optimizer=sgd,
            data=[(v, u)] if batches else None,
        ),
        Fit(network, optimizer=sgd, data=[(x, y)] if batches else None, steps=steps),
    ]
    return Engine(problems, EngineConfig(progress=False), hypergradient=method)


@pytest.mark.parametrize("method", ["exact", ConjugateGradient(max_iterations=300, damping=0.0, rtol=1e-7)])
def test_engines_are_checked_and_unchanged(method: Any) -> None:
    running = engine(method)
    running.step()
    state = {key: value.clone() for key, value in running.problems["fit"].module.state_dict().items()}
    generators = torch.get_rng_state()
    again = running.hypergradient()
    report = hypergradcheck(running)
    assert isinstance(report, HypergradientReport)
    assert report.passed
    assert report.reference_dtype == DOUBLE
    assert list(report.per_parameter) == ["log"]
    assert report.inner_distance < 0.5
    for key, value in running.problems["fit"].module.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(torch.get_rng_state(), generators)
    assert torch.equal(running.hypergradient().grad["log"], again.grad["log"])
    assert running.step_count == 1


def test_engines_with_dropout_are_checked_on_the_same_masks() -> None:
    running = engine("exact", dropout=0.5, steps=20)
    torch.manual_seed(0)
    running.step()
    report = hypergradcheck(running, rtol=1e-2)
    assert report.passed


def test_engines_without_data_are_checked_on_given_batches() -> None:
    running = engine("exact", batches=False, steps=50)
    source = engine("exact")
    given = {name: problem.data[0] for name, problem in source.problems.items()}  # type: ignore[index]
    running.step(given)
    assert hypergradcheck(running, batches=given).passed
    assert hypergradcheck(running, batches={name: iter([batch]) for name, batch in given.items()}).passed


def test_failing_engines_are_told_why() -> None:
    running = engine("identity")
    running.step()
    report = hypergradcheck(running)
    assert not report.passed
    assert "takes H⁻¹ = I" in str(report)
    with pytest.raises(HypergradientCheckError):
        hypergradcheck(running, raise_on_failure=True)
    with pytest.raises(ConfigError, match="takes losses, parameters and methods from the engine"):
        hypergradcheck(running, method="cg")  # type: ignore[call-overload]


class Target(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.second.module["w"] - 1.0).square().sum() + self.first.module["w"].sum()


class First(Problem):
    def loss(self, batch: Any) -> Tensor:
        w, lam = self.module["w"], self.target.module["w"]
        return (w - lam.sin()).square().sum() + 0.1 * (w**4).sum()


class Second(Problem):
    def loss(self, batch: Any) -> Tensor:
        w, first, lam = self.module["w"], self.first.module["w"], self.target.module["w"]
        return 2 * (w - first * lam).square().sum() + 0.1 * (w**4).sum()


def test_cotangents_of_dependent_inner_problems_are_accumulated() -> None:
    def held(value: float) -> nn.ParameterDict:
        return nn.ParameterDict({"w": nn.Parameter(torch.full((2,), value))})

    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    problems = [
        Target(held(0.7), optimizer=sgd),
        First(held(0.0), optimizer=sgd, steps=100),
        Second(held(0.0), optimizer=sgd, steps=200),
    ]
    running = Engine(problems, EngineConfig(progress=False), hypergradient="exact")
    running.step()
    report = hypergradcheck(running)
    assert report.passed
    assert report.relative_error < 1e-5
    # Not because both are alike: without the path through the first problem the answer is another one.
    running.problems["first"].hypergradient = as_estimator("identity")
    assert not hypergradcheck(running).passed
