"""What all single-loop stochastic methods share: products, states, separate batches, the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Engine, EngineConfig, Problem, Status, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad import as_estimator, available_methods
from bilevel.hypergrad.amigo import AmIGO
from bilevel.hypergrad.fsla import FSLA
from bilevel.hypergrad.soba import SOBA
from bilevel.hypergrad.stocbio import StocBiO
from bilevel.hypergrad.stochastic import Stochastic
from bilevel.hypergrad.ttsa import TTSA
from tests.bilevel.strategies import DOUBLE, make_quadratic
from tests.contract.contract import _six_by_six
from tests.contract.repeated import Repeated, finite_sum, truncated_series, vector

KINDS: list[type[Stochastic]] = [SOBA, AmIGO, StocBiO, TTSA, FSLA]
METHODS = [
    SOBA(step_size=0.8),
    AmIGO(steps=3, step_size=0.8),
    AmIGO(steps=3, solver="conjugate_gradient"),
    StocBiO(terms=3, step_size=0.8),
    TTSA(terms=4, step_size=0.8),
    FSLA(step_size=0.8),
]


def with_fields(method: Stochastic, **fields: Any) -> Stochastic:
    described = {key: value for key, value in method.describe().items() if key != "method"}
    return type(method)(**{**described, **fields})


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_difference_products_agree_with_autodiff(method: Stochastic) -> None:
    sample = _six_by_six()
    other = with_fields(method, products="finite_difference", difference_step=1e-2)
    for damping in (0.0, 0.3):
        found, expected = (
            hypergradient(*sample.losses(), sample.inner, sample.outer, Repeated(with_fields(m, damping=damping), 3))
            for m in (other, method)
        )
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-8)
        assert found.info.residual == pytest.approx(expected.info.residual, rel=1e-6, abs=1e-8)
        assert found.info.products == expected.info.products


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_difference_products_need_no_double_backward(method: Stochastic) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * cotangent

    other = with_fields(method, products="finite_difference")
    w, lam = vector(3, 1), vector(3, 2)
    calls = [
        hypergradient(lambda w, x, f=f: f(w - x).sum() / 2, lambda w, x: w.sum(), w, lam, Repeated(other, 2))
        for f in (Once.apply, torch.square)
    ]
    torch.testing.assert_close(calls[0].grad, calls[1].grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gauss_newton_is_the_hessian_of_a_linear_model(method: Stochastic) -> None:
    X, y, w, lam = torch.eye(4, dtype=DOUBLE)[:, :3] + 0.1, vector(4, 1), vector(3, 2), vector(4, 3)

    def inner(w: Tensor, lam: Tensor) -> dict[str, Tensor]:
        z = X @ w
        return {"loss": (lam.exp() * (z - y) ** 2).sum() / 8, "outputs": z}

    found, expected = (
        hypergradient(inner, lambda w, x: w.square().sum(), w, lam, Repeated(m, 3))
        for m in (with_fields(method, curvature="gauss_newton"), method)
    )
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_state_must_be_given_and_belong_to_the_problem(method: Stochastic) -> None:
    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return (w - lam[0]).square().sum()

    w, lam = torch.ones(3), torch.zeros(2)
    if method.needs_state:
        with pytest.raises(ConfigError, match=r"continues from the state of its last call: pass state=\{\}"):
            hypergradient(loss, lambda w, x: w.sum(), w, lam, method)
    first = hypergradient(loss, lambda w, x: w.sum(), w, lam, method, state={})
    if "solution" in first.state:
        with pytest.raises(ConfigError, match=r"belongs to another problem: its solution has shapes \[\(3,\)\]"):
            hypergradient(loss, lambda w, x: w.sum(), torch.ones(2), lam, method, state=first.state)


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12])
def test_conjugate_gradients_on_tiny_and_huge_outer_losses(factor: float) -> None:
    sample = make_quadratic(4, 3, 4.0, 1.0, 5)
    inner_loss, outer_loss = sample.losses(torch.float32)
    w, lam = sample.inner.float(), sample.outer.float()
    method = Repeated(AmIGO(steps=2, solver="conjugate_gradient"), 2)
    plain = hypergradient(inner_loss, outer_loss, w, lam, method).grad
    scaled = hypergradient(inner_loss, lambda w, lam: outer_loss(w, lam) * factor, w, lam, method).grad
    torch.testing.assert_close(scaled / factor, plain, rtol=1e-3, atol=1e-3 * float(plain.norm()))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_outer_loss_that_turns_flat_lets_the_solution_decay(method: Stochastic) -> None:
    batches = finite_sum(1, 3, 2, 4)
    response = method.respond(batches.problem([0]))
    state = response.pullback((vector(3, 1),), {}).state
    for _ in range(2):
        pulled = response.pullback((torch.zeros(3, dtype=DOUBLE),), state)
        assert torch.isfinite(pulled.value[0]).all()
        if "solution" in state:
            assert float(pulled.state["solution"][0].norm()) <= float(state["solution"][0].norm())
        state = pulled.state


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cotangent_that_is_not_finite_is_a_failed_solve(method: Stochastic, value: float) -> None:
    # A start at zero must not swallow it.
    response = method.respond(finite_sum(1, 3, 2, 4).problem([0]))
    pulled = response.pullback((torch.tensor([1.0, value, 2.0], dtype=DOUBLE),), {})
    assert pulled.info.status is Status.DIVERGED
    assert not pulled.info.residual < 1
    assert set(pulled.state) <= {"generator"}  # draws go on, solutions start afresh


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_is_selected_by_name(method: Stochastic) -> None:
    assert as_estimator(method.describe()) == method
    assert available_methods()[method.name] is type(method)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_validated(kind: type[Stochastic]) -> None:
    for fields, expected in [
        ({"step_size": 0.0}, "step_size must be a finite number above 0"),
        ({"damping": -1.0}, "damping must be a finite number at least 0"),
        ({"curvature": "newton"}, "curvature"),
        ({"products": "numeric"}, "products"),
        ({"difference_step": 0.1}, "difference_step belongs to products='finite_difference'"),
        ({"products": "finite_difference", "curvature": "gauss_newton"}, "gauss_newton' is taken by autodiff"),
    ]:
        with pytest.raises(ConfigError, match=f"{kind.__name__}.*{expected}"):
            kind(**fields)


def test_displacements_lost_to_rounding_are_reported() -> None:
    w, lam = torch.full((8,), 1.3, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    method = StocBiO(terms=2, products="finite_difference", difference_step=1e-3)
    result = hypergradient(lambda w, x: (w - x).square().sum(), lambda w, x: w.square().sum(), w, lam, method)
    assert result.info.status is Status.INACCURATE
    assert "rounding changes the displacements" in result.info.message


# In an engine


class Penalty(Problem):
    """Outer: the logarithm of the inner problem's ridge."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ self.model.module.weight - y).square().mean() / 2 + 0.25 * self.module.weight.square().sum()


class Model(Problem):
    """Inner: ridge regression."""

    seen: list[int]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        w = self.module.weight
        return (x @ w - y).square().mean() / 2 + (self.penalty.module.weight.exp() * w.square()).sum() / 2


class Vector(nn.Module):
    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value, dtype=DOUBLE))


def make_engine(method: Stochastic, batch: int, rate: float = 0.2) -> Engine:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(24, 3, generator=generator, dtype=DOUBLE) for _ in range(2)]
    y = [part @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) for part in x]
    y = [part + 0.3 * torch.randn(24, generator=generator, dtype=DOUBLE) for part in y]

    def data(which: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(x[which], y[which]), batch_size=batch)

    def sgd(rate: float) -> Any:
        return lambda params: torch.optim.SGD(params, lr=rate)

    outer = Penalty(Vector(3, 0.0), optimizer=sgd(rate), data=data(1), name="penalty")
    inner = Model(Vector(3, 0.0), optimizer=sgd(0.5), data=data(0), name="model")
    return Engine([outer, inner], config=EngineConfig(progress=False), hypergradient=method)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, TTSA)], ids=str)
def test_single_loop_in_an_engine_reaches_the_stationary_point(method: Stochastic) -> None:
    # On full batches: one inner step, one linear step, one outer step a time; the fixed point is the exact solution.
    method = with_fields(method, step_size=0.5)
    engine = make_engine(method, batch=24, rate=0.4)
    for _ in range(50):
        engine.step()
    lam, w = (engine.problems[name].module.weight.detach() for name in ("penalty", "model"))
    (x, y), (other, target) = engine_batch(engine, "model"), engine_batch(engine, "penalty")
    H = x.T @ x / 24 + torch.diag(lam.exp())
    exact = torch.linalg.solve(H, x.T @ y / 24)
    torch.testing.assert_close(w, exact, rtol=1e-3, atol=1e-3)
    v = other.T @ (other @ exact - target) / 24
    # A truncated series has a fixed point of its own.
    q = truncated_series(H, 0.5, method.terms + 1) @ v if isinstance(method, StocBiO) else torch.linalg.solve(H, v)
    torch.testing.assert_close(0.5 * lam, lam.exp() * exact * q, rtol=1e-3, atol=1e-3)


def engine_batch(engine: Engine, name: str) -> tuple[Tensor, Tensor]:
    dataset = engine.problems[name].data.dataset
    return dataset.tensors


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resumed_engine_takes_the_same_steps_bit_for_bit(method: Stochastic, tmp_path: Path) -> None:
    method = with_fields(method, step_size=0.3)
    whole = make_engine(method, batch=5, rate=0.05)
    run(whole, 7)
    part = make_engine(method, batch=5, rate=0.05)
    run(part, 3)
    part.save(tmp_path / "state")
    fresh = make_engine(method, batch=5, rate=0.05)
    fresh.load(tmp_path / "state")
    run(fresh, 4)
    for name in ("penalty", "model"):
        assert torch.equal(whole.problems[name].module.weight, fresh.problems[name].module.weight)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_engine_draws_the_batches_that_the_method_asks_for(method: Stochastic) -> None:
    # SOBA shares the inner step's batch; the others get separate ones.
    engine = make_engine(with_fields(method, step_size=0.2), batch=6)
    inner = engine.problems["model"]
    batches: list[Tensor] = []
    loss = inner.loss
    inner.loss = lambda batch: (batches.append(batch[0]), loss(batch))[1]  # type: ignore[method-assign]
    engine.step()
    batches.clear()
    engine.step()
    assert method.num_samples == {"soba": 1, "fsla": 2, "stocbio": 4, "ttsa": 4}.get(
        method.name, 2 if getattr(method, "solver", "") == "conjugate_gradient" else 4
    )
    distinct = {tuple(part.flatten().tolist()) for part in batches}
    if isinstance(method, TTSA):
        assert 2 <= len(distinct) <= 4
    else:
        assert len(distinct) == min(4, method.num_samples + (method.num_samples > 1))  # four batches a pass
    assert engine.step().solves["model"].method == method.name


def run(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.step()
