"""Compiled products and iterations: the same numbers as without, on whatever the loss reads at that moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import (
    ConjugateGradient,
    Engine,
    EngineConfig,
    Hypergradient,
    Neumann,
    Problem,
    Status,
    argmin,
    hypergradient,
    load_config,
)
from bilevel.errors import ConfigError, LossError, UnknownNameError
from bilevel.hypergrad import available_methods
from tests.bilevel.strategies import DOUBLE, Sample, forall, make_quadratic, make_ridge
from tests.bilevel.test_optimizers import batches

pytestmark = [
    pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning"),  # a small network is not convex
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FAST = "eager"  # what is captured, traced and split, run operation by operation
ROUNDABOUT = "aot_eager"  # the same path as inductor's, without its code generation
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
METHODS: dict[str, dict[str, Any]] = {
    "conjugate_gradient": {"rtol": 1e-10},
    "neumann": {"terms": 7, "step_size": 0.05},
    "minres": {"max_iterations": 4},
    "gmres": {"max_iterations": 4},
    "nystrom": {"rank": 3, "damping": 0.1},
    "exact": {},
    "stocbio": {"terms": 3, "step_size": 0.05},
}


@pytest.fixture(autouse=True)
def afresh() -> None:
    """Captures belong to code, and a test counts its own."""
    torch._dynamo.reset()


def made(method: str, compile: Any = False, **more: Any) -> Any:
    return available_methods()[method](**{**METHODS[method], **more}, compile=compile)


def graphs(result: Hypergradient) -> int:
    """How many graphs a call has compiled, as it reports."""
    message = result.info.message
    assert "compiled" in message
    return sum(int(part.split("compiled: ")[1].split()[0]) for part in message.split("; ") if "compiled: " in part)


def of(sample: Sample, method: Any, **more: Any) -> Hypergradient:
    return hypergradient(*sample.losses(), sample.inner, sample.outer, method, **more)


# The same numbers


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_method_is_the_method(method: str) -> None:
    sample = make_ridge(5, 9, 0.3, False, 1)
    expected, found = of(sample, made(method)), of(sample, made(method, FAST))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-13)
    assert found.info.status is expected.info.status
    assert (found.info.iterations, found.info.products) == (expected.info.iterations, expected.info.products)
    assert found.info.residual == pytest.approx(expected.info.residual, abs=1e-9)
    assert graphs(found) > 0
    assert graphs(of(sample, made(method, FAST))) == 0


SEEN: set[tuple[str, float]] = set()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    """What another test has had compiled may have been dropped since."""
    SEEN.clear()


@forall(25, condition=st.floats(1.0, 1e5), number=st.integers(0, 10_000), damping=st.sampled_from([0.0, 0.1]))
def test_data_that_change_are_seen_and_nothing_is_compiled_for_them(condition, number, damping):
    """Matrices, parameters and cotangents differ in every example; the code and the shapes do not.

    A new damping is a new iteration; the set-up and the last product are shared.
    """
    sample = make_quadratic(6, 3, condition, 1.0, number)
    for method in ("conjugate_gradient", "neumann"):
        expected, found = (of(sample, made(method, compiler, damping=damping)) for compiler in (False, FAST))
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)
        assert found.info.status is expected.info.status
        assert graphs(found) == 0 or (method, damping) not in SEEN
        SEEN.add((method, damping))


def test_negative_curvature_ends_a_compiled_solve_as_it_ends_another() -> None:
    curvatures = torch.tensor([2.0, -1.0, 3.0], dtype=DOUBLE)
    lam, w = torch.ones(3, dtype=DOUBLE), torch.full((3,), 0.5, dtype=DOUBLE)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (curvatures * w.square()).sum() / 2 - w @ lam

    for method in ("conjugate_gradient", "neumann"):
        expected, found = (
            hypergradient(inner, lambda w, lam: w.sum(), w, lam, made(method, compiler)) for compiler in (False, FAST)
        )
        assert found.info.status is expected.info.status is Status.NEGATIVE_CURVATURE
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_compiled_solve_that_is_cut_short_says_just_that() -> None:
    """The looks at symmetry and curvature between iterations find nothing where there is nothing."""
    sample = make_quadratic(8, 3, 100.0, 1.0, 3)
    expected, found = (of(sample, made("conjugate_gradient", c, max_iterations=4)) for c in (False, FAST))
    assert found.info.status is expected.info.status is Status.STOPPED_AT_CAP
    assert found.info.residual == pytest.approx(expected.info.residual, rel=1e-8)


def test_the_residual_stops_a_compiled_solve() -> None:
    sample = make_quadratic(8, 3, 100.0, 1.0, 3)
    loose, tight = (of(sample, made("conjugate_gradient", FAST, rtol=rtol)).info for rtol in (1e-1, 1e-10))
    assert loose.status is tight.status is Status.CONVERGED
    assert loose.iterations < tight.iterations
    series = of(sample, made("neumann", FAST, terms=500, step_size=1.0, rtol=1e-2)).info
    assert series.status is Status.CONVERGED
    assert series.iterations == of(sample, made("neumann", terms=500, step_size=1.0, rtol=1e-2)).info.iterations < 500


@pytest.mark.parametrize("fields", [{"warm_start": True}, {"preconditioner": "nystrom", "preconditioner_rank": 2}])
@pytest.mark.parametrize("method", ["conjugate_gradient", "neumann"])
def test_warm_starts_and_preconditioners_work_with_compiled_products(method: str, fields: dict[str, Any]) -> None:
    sample = make_ridge(5, 9, 0.3, False, 2)
    near = Sample(sample.kind, sample.data, sample.outer + 0.1, sample.inner)
    results = []
    for compiler in (False, FAST):
        estimator = made(method, compiler, **fields)
        results.append(of(near, estimator, state=of(sample, estimator, state={}).state))
    torch.testing.assert_close(results[1].grad, results[0].grad, rtol=1e-9, atol=1e-10)
    assert results[1].info.products == results[0].info.products


def test_argmin_takes_a_compiled_method() -> None:
    sample = make_ridge(5, 9, 0.3, False, 4)
    inner, outer = sample.losses()
    grads = []
    for compiler in (False, FAST):
        lam = sample.outer.clone().requires_grad_()
        solve = argmin(inner, made("conjugate_gradient", compiler))(sample.solution)
        grads.append(torch.autograd.grad(outer(solve(lam), lam), lam)[0])
    torch.testing.assert_close(grads[1], grads[0])


# What is an input, and what is compiled for again


def loss_at(scale: Any, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return ((x @ w - 1).square().mean() * scale + (lam.exp() * w.square()).sum()) / 2

    return loss


def evaluated(inner: Any, compile: Any, rows: int = 4) -> Hypergradient:
    w, lam = torch.linspace(-1, 1, 3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    return hypergradient(inner, lambda w, lam: w.square().sum(), w, lam, ConjugateGradient(compile=compile))


def some(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_a_new_shape_is_compiled_for_once() -> None:
    counts = []
    for rows in (4, 6, 4, 6):
        inner = loss_at(1.0, some(rows))
        found = evaluated(inner, FAST)
        torch.testing.assert_close(found.grad, evaluated(inner, False).grad)
        counts.append(graphs(found))
    assert counts[2:] == [0, 0] < counts[:2]


def test_a_number_in_the_loss_is_compiled_for_and_one_that_keeps_changing_is_an_error() -> None:
    for scale in (1.0, 2.0, 1.0):
        inner = loss_at(scale, some(4))
        torch.testing.assert_close(evaluated(inner, FAST).grad, evaluated(inner, False).grad)

    def always_another() -> None:
        for step in range(50):
            evaluated(loss_at(1.0 + step, some(4)), FAST)

    with pytest.raises(LossError, match="Pass numbers that change as tensors"):
        always_another()


def test_the_same_number_as_a_tensor_is_an_input() -> None:
    counts = []
    for scale in (1.0, 2.0, 3.0):
        inner = loss_at(torch.tensor(scale, dtype=DOUBLE), some(4))
        found = evaluated(inner, FAST)
        torch.testing.assert_close(found.grad, evaluated(inner, False).grad)
        counts.append(graphs(found))
    assert counts[0] > 0 == counts[1] == counts[2]


def test_variables_that_the_loss_does_not_read_have_no_response() -> None:
    w = [torch.ones(2, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)]
    lam = [torch.tensor([0.5, 0.2], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)]

    def inner(w: list[Tensor], lam: list[Tensor]) -> Tensor:
        return (lam[0].exp() * w[0] ** 4).sum() + (w[0] * w[0]).sum()

    def outer(w: list[Tensor], lam: list[Tensor]) -> Tensor:
        return w[0].sum() + w[1].sum()

    expected, found = (hypergradient(inner, outer, w, lam, ConjugateGradient(compile=c)) for c in (False, FAST))
    torch.testing.assert_close(found.grad, expected.grad)
    assert not found.grad[1].any()
    assert found.grad[0].any()


def test_a_loss_that_is_linear_in_the_inner_variables_has_no_curvature() -> None:
    w, lam = torch.ones(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    found = hypergradient(lambda w, lam: w @ lam, lambda w, lam: w.sum(), w, lam, ConjugateGradient(compile=FAST))
    assert found.info.status.failed


# In the engine


class Decay(Problem):
    """Outer: logarithms of weight decays."""

    def loss(self, batch):
        return F.cross_entropy(self.network(batch["x"]), batch["y"])


class Network(Problem):
    """Inner: a network with these weight decays; batches are mappings."""

    def loss(self, batch):
        rates = self.decay.module
        penalty = sum(r.exp() * p.square().sum() for r, p in zip(rates, self.module.parameters(), strict=True))
        value = F.cross_entropy(self(batch["x"]), batch["y"]) + penalty
        return {"loss": value, "penalty": penalty}


def engine_of(method: Any, module: nn.Module | None = None, dtype: torch.dtype = torch.float32, **config) -> Engine:
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    module.to(dtype)
    rates = nn.ParameterList([torch.tensor(-3.0, dtype=dtype) for _ in module.parameters()])
    data = [{"x": x.to(dtype), "y": y} for x, y in batches(4)]
    outer = Decay(rates, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), data=data[:1])
    inner = Network(module, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=data, steps=3)
    return Engine([outer, inner], EngineConfig(progress=False, **config), method)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("method", ["conjugate_gradient", pytest.param("neumann", marks=pytest.mark.slow)])
def test_an_engine_trains_alike(method: str, dtype: torch.dtype) -> None:
    """Batches and parameters change in every step, batch norm's statistics too: all of them are seen."""
    fields = {"damping": 1.0, **({"rtol": 1e-3} if method == "conjugate_gradient" else {})}
    found, expected = (engine_of(made(method, compiler, **fields), dtype=dtype) for compiler in (ROUNDABOUT, False))
    start = [p.detach().clone() for p in expected.problems["decay"].parameters]
    counts = []
    for _ in range(4):
        results = [engine.step() for engine in (found, expected)]
        assert results[0].passes == results[1].passes
        counts.append("new graph" in results[0].solves["network"].message)
    assert counts == [True, False, False, False]
    for name in ("decay", "network"):
        for a, b in zip(found.problems[name].parameters, expected.problems[name].parameters, strict=True):
            torch.testing.assert_close(a, b)
    buffers = [dict(engine.problems["network"].module.named_buffers()) for engine in (found, expected)]
    for key, value in buffers[1].items():
        torch.testing.assert_close(buffers[0][key], value)
    moved = expected.problems["decay"].parameters
    assert sum(float((p.detach() - before).abs()) for p, before in zip(moved, start, strict=True)) > 1e-3


class Tied(nn.Module):
    """Attention with one matrix at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, None, :] * self.mask).reshape(-1, 4, 4)
        scores = torch.softmax(self.first(rows) @ self.second(rows).transpose(1, 2), dim=-1)
        return self.head((scores @ rows).mean(1))


@pytest.mark.slow
def test_tied_weights_and_buffers_in_an_engine() -> None:
    engines = []
    for compiler in (FAST, False):
        torch.manual_seed(0)  # the same start
        engines.append(engine_of(made("conjugate_gradient", compiler, damping=1.0), Tied()))
    found, expected = engines
    for _ in range(3):
        found.step()
        expected.step()
    for a, b in zip(found.problems["decay"].parameters, expected.problems["decay"].parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiler", [FAST, False])
@pytest.mark.parametrize("method", ["conjugate_gradient", "stocbio"])
def test_products_are_in_full_precision_under_autocast(method: str, compiler: Any) -> None:
    """Passes backward follow autocast as those forward do. The losses here have no operation in half precision."""
    w, lam, matrix = torch.randn(5, 5), torch.zeros(5), torch.randn(5, 5)

    def inner(w: Tensor, lam: Tensor) -> Tensor:
        return (matrix @ w).square().sum() / 20 + (lam.exp() * w.square()).sum()

    def outer(w: Tensor, lam: Tensor) -> Tensor:
        return w.square().sum()

    expected = hypergradient(inner, outer, w, lam, made(method, compiler))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hypergradient(inner, outer, w, lam, made(method, compiler))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)


# Refusals


def test_the_field_is_checked_when_it_is_set() -> None:
    with pytest.raises(UnknownNameError, match=r"Neumann\.compile.*'inductr'.*'inductor'"):
        Neumann(compile="inductr")
    with pytest.raises(ConfigError, match=r"ConjugateGradient\.compile must be"):
        ConjugateGradient(compile=1)  # type: ignore[arg-type]
    for fields in ({"products": "finite_difference"}, {"curvature": "gauss_newton"}):
        with pytest.raises(ConfigError, match=r"compile is for products='autodiff' with curvature='hessian'"):
            ConjugateGradient(compile=True, **fields)  # type: ignore[arg-type]


def test_configuration_takes_true_and_a_name(tmp_path) -> None:
    for text, value in (("true", True), ('"aot_eager"', "aot_eager")):
        (tmp_path / "config.toml").write_text(f'[hypergradient]\nmethod = "neumann"\ncompile = {text}\n')
        assert load_config(tmp_path / "config.toml").hypergradient == Neumann(compile=value)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def _looks(w, lam):
    return (w**2).sum() * lam.sum() if float(w.sum()) > 0 else (w**4).sum()


REFUSED = {
    "dropout": (lambda w, lam: F.dropout(w**2 * lam.exp(), 0.5, training=True).sum(), "draws random numbers"),
    "a look": (_looks, "cannot be captured as one graph"),
    "NumPy": (lambda w, lam: (w**2 * lam).sum() * float(w.detach().numpy().max()), "looks at the value of a tensor"),
    "custom function": (lambda w, lam: (_Square.apply(w) * lam.exp()).sum(), "custom autograd function"),
    "checkpoint": (
        lambda w, lam: checkpoint(lambda w: (w**2 * lam.exp()).sum(), w, use_reentrant=False),
        "activation checkpointing",
    ),
    "no second derivative": (
        lambda w, lam: torch.cdist(w[None], lam[None, :]).sum() + (w**2).sum(),
        "cannot be differentiated twice",
    ),
    "independent": (lambda w, lam: lam.sum(), "does not depend on its inner parameters"),
    "constant": (lambda w, lam: torch.tensor(1.0, dtype=DOUBLE), "does not depend on its inner parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_loss_that_cannot_be_compiled_is_refused_with_the_reason(case: str) -> None:
    loss, reason = REFUSED[case]
    w, lam = torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    with pytest.raises(LossError, match=reason):
        hypergradient(loss, lambda w, lam: w.sum(), w, lam, ConjugateGradient(compile=FAST))


# The real compiler


@COMPILER
def test_inductor_gives_the_same_hypergradient() -> None:
    sample = make_ridge(5, 9, 0.3, False, 1)
    expected, found = of(sample, made("conjugate_gradient")), of(sample, made("conjugate_gradient", True))
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10)
    assert graphs(found) == 3


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["conjugate_gradient", "neumann", "stocbio", "minres"])
def test_inductor_in_an_engine(method: str, dtype: torch.dtype) -> None:
    found, expected = (engine_of(made(method, compiler, damping=1.0), dtype=dtype) for compiler in (True, False))
    for _ in range(3):
        found.step()
        expected.step()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for a, b in zip(found.problems["decay"].parameters, expected.problems["decay"].parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["conjugate_gradient", "neumann"])
def test_inductor_on_a_gpu(method: str) -> None:
    sample = make_ridge(5, 9, 0.3, False, 1)
    data = {key: value.cuda() for key, value in sample.data.items()}
    there = Sample(sample.kind, data, sample.outer.cuda(), sample.inner.cuda())
    expected, found = of(sample, made(method)), of(there, made(method, True))
    torch.testing.assert_close(found.grad.cpu(), expected.grad, rtol=1e-9, atol=1e-10)


def test_a_write_through_a_view_is_part_of_the_compiled_products() -> None:
    def inner(w: Tensor, lam: Tensor) -> Tensor:
        z = w * lam
        z[0] = lam[0] * w[0] * 3
        return z.pow(2).sum() + (w**4).sum()

    w, lam = torch.tensor([0.5, -0.7, 1.1], dtype=torch.float64), torch.tensor([1.2, 0.4, -0.8], dtype=torch.float64)
    outer = lambda w, lam: (w - 1).pow(2).sum()  # noqa: E731
    expected, found = (
        hypergradient(inner, outer, w, lam, ConjugateGradient(damping=3.0, compile=how)).grad
        for how in (False, "aot_eager")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
