from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel import Engine, EngineConfig, Estimator, Hypergradient, Problem, Status, Unrolled, hypergradient
from bilevel.errors import ConfigError
from bilevel.hypergrad.pzobo import PZOBO
from tests.bilevel.strategies import EPSILON, logarithmic, make_quadratic, make_ridge, quadratics
from tests.contract.contract import (
    DOUBLE,
    EstimatorContract,
    Sample,
    forall,
    operator_norm,
    solve,
)
from tests.contract.test_finite_difference import attention_losses


def six_by_six() -> Sample:
    return make_quadratic(6, 6, 3.0, 1.0, 1)


SURE = 7.0  # standard deviations: beyond them with probability 1e-11


def contraction(sample: Sample, rate: float, stretch: float = 0.0) -> float:
    """``‖I − ηH‖`` wherever a ridge regression's log-decays move by at most ``stretch``."""
    low, high = float(sample.eigenvalues[0]), float(sample.eigenvalues[-1])
    if sample.kind == "ridge":
        decay = (sample.data["S"] @ sample.outer).exp()
        low = low - (1 - math.exp(-stretch)) * float(decay.max())
        high = high + (math.exp(stretch) - 1) * float(decay.max())
    return max(abs(1 - rate * low), abs(1 - rate * high))


def response_curvature(sample: Sample, rate: float, steps: int, stretch: float) -> float:
    """A bound of ``‖d²w_K(λ + tu)/dt²‖`` for unit u.

    With ``w' = (I − ηH) w + ηb`` and ``D = diag(exp(λ))``: ``ẇ' = (I − ηH) ẇ − η Ḋ w`` and ``ẅ' = (I − ηH) ẅ − 2η Ḋ ẇ −
    η D̈ w``; both derivatives of D have norms of at most that of D. A quadratic's response is linear.
    """
    if sample.kind == "quadratic":
        return 0.0
    decay = float((sample.data["S"] @ sample.outer).exp().max()) * math.exp(stretch)
    rho = contraction(sample, rate, stretch)
    push = float((sample.data["X"].T @ sample.data["y"]).norm()) / len(sample.data["y"])
    size, first, second = float(sample.inner.norm()), 0.0, 0.0
    for _ in range(steps):
        second = rho * second + 2 * rate * decay * first + rate * decay * size
        first = rho * first + rate * decay * size
        size = rho * size + rate * push
    return second


class TestPZOBO(EstimatorContract):
    # The inner problems of the contract's own tests are quadratic, where differences are exact at any distance.
    default = PZOBO("all", smoothing=1.0, steps=40, learning_rate=1.0, directions="orthogonal")
    roundoff = 1e-8  # differences of rounded iterates, divided by the smoothing
    bfloat16_error = None  # forty rounded steps

    def stays(self, estimator: Estimator) -> bool:
        return False  # the outer loss is taken at the end of the steps

    def estimators(self, sample: Sample) -> st.SearchStrategy[Estimator]:
        largest, size = float(sample.eigenvalues[-1]), len(sample.outer)
        common: dict[str, Any] = {
            "smoothing": logarithmic(1e-4, 1e-2),
            "steps": st.integers(1, 4),
            "learning_rate": st.floats(0.05, 1.8).map(lambda share: share / largest),
            "seed": st.integers(0, 2**31),
        }
        numbers: st.SearchStrategy[int | str] = st.integers(1, size) | st.just("all")
        return st.one_of(
            st.builds(PZOBO, num_directions=st.integers(1, 4), **common),
            st.builds(PZOBO, num_directions=numbers, directions=st.just("orthogonal"), **common),
        )

    def bound(self, estimator: Estimator, sample: Sample, result: Hypergradient) -> float:
        # Unrolled's truncation, then what the directions leave out of that, smoothing and rounding.
        assert isinstance(estimator, PZOBO)
        rate, steps, mu = estimator.learning_rate, estimator.steps, estimator.smoothing
        assert rate is not None
        assert steps is not None
        assert isinstance(mu, float)
        size = len(sample.outer)
        number = size if estimator.num_directions == "all" else int(estimator.num_directions)
        v, mixed = float(sample.cotangent.norm()), operator_norm(sample.mixed)
        tail = mixed * v * contraction(sample, rate) ** steps / float(sample.eigenvalues[0])
        if estimator.directions == "orthogonal":
            length, spread = math.sqrt(size), max(size / number - 1, 1.0) if number < size else 0.0
        else:
            # U/√Q has singular values within s of 1 (Davidson and Szarek), each row a length within SURE of √P
            length, s = math.sqrt(size) + SURE, (math.sqrt(size) + SURE) / math.sqrt(number)
            spread = 2 * s + s * s
        smoothing = response_curvature(sample, rate, steps, mu * length) * mu * length**3 * v / 2
        iterates = float(sample.inner.norm()) + mu * length * mixed / float(sample.eigenvalues[0])
        rounding = 100 * (steps + len(sample.inner)) * EPSILON * iterates * v * length / mu
        return tail + spread * (sample.scale() + tail) + smoothing + rounding

    def passes(self, estimator: Estimator, result: Hypergradient) -> tuple[int, int]:
        assert isinstance(estimator, PZOBO)
        number = result.grad.numel() if estimator.num_directions == "all" else int(estimator.num_directions)
        assert result.info.products == number * result.info.iterations
        return (number + 1) * result.info.iterations, (number + 1) * result.info.iterations

    @forall(20, sample=quadratics(max_condition=100.0), number=st.integers(0, 2**31), data=st.data())
    def test_permuting_coordinates_changes_rounding_only(
        self, sample: Sample, number: int, data: st.DataObject
    ) -> None:
        """Directions are drawn in the order of the outer variables: permuting these gives other ones.

        So the inner coordinates are permuted under any directions, and the outer ones where all directions are taken,
        whose answer is the same in every basis.
        """
        estimator = data.draw(self.estimators(sample))
        assert isinstance(estimator, PZOBO)
        inner_loss, outer_loss = sample.losses()
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(sample.inner), generator=generator)
        outer_order = torch.arange(len(sample.outer))
        if estimator.num_directions == "all":
            outer_order = torch.randperm(len(sample.outer), generator=generator)
        back, outer_back = order.argsort(), outer_order.argsort()
        result = hypergradient(
            lambda w, lam: inner_loss(w[back], lam[outer_back]),
            lambda w, lam: outer_loss(w[back], lam[outer_back]),
            sample.inner[order],
            sample.outer[outer_order],
            estimator,
        )
        self._close_on(sample, result.grad[outer_back], solve(sample, estimator).grad)

    def test_unused_parameters_have_no_influence(self) -> None:
        """As inherited, but an outer parameter that is not used has a response of zero up to rounding only.

        A sum over directions has no way to know that it should vanish exactly.
        """
        sample = six_by_six()
        inner_loss, outer_loss = sample.losses()
        expected = solve(sample, self.default)
        unused = torch.ones(3, 2, dtype=DOUBLE)
        result = hypergradient(
            lambda w, lam: inner_loss(w["used"], lam["used"]),
            lambda w, lam: outer_loss(w["used"], lam["used"]),
            {"unused": unused, "used": sample.inner},
            {"used": sample.outer, "unused": unused.clone()},
            self.default,
        )
        self._close(result.grad["used"], expected.grad)
        assert float(result.grad["unused"].abs().max()) < 1e-12


def implicit_part(result: Hypergradient) -> Tensor:
    part: Tensor = result.grad - result.direct
    return part


def unrolled_part(sample: Sample, estimator: PZOBO) -> Tensor:
    return implicit_part(solve(sample, Unrolled(steps=estimator.steps, learning_rate=estimator.learning_rate)))


@forall(2, sample=quadratics(max_dimension=5, max_condition=10.0, scale=False), seed=st.integers(0, 2**31))
def test_gaussian_directions_are_unbiased_with_the_stated_variance(sample: Sample, seed: int) -> None:
    # E (uᵀg) u = g, and (uᵀg) uᵢ has the variance ‖g‖² + gᵢ²; a quadratic has no error of smoothing.
    number = 400
    estimator = PZOBO(number, smoothing=0.1, steps=2, learning_rate=1.0, seed=seed)
    g = unrolled_part(sample, estimator)
    error = (implicit_part(solve(sample, estimator)) - g).abs()
    deviation = ((g.square().sum() + g.square()) / number).sqrt()
    assert bool((error <= 5.5 * deviation + 1e-12).all())


@forall(2, seed=st.integers(0, 2**31))
def test_orthogonal_directions_are_unbiased_with_less_variance(seed: int) -> None:
    # E ‖(P/Q) V Vᵀ g − g‖² = (P/Q − 1) ‖g‖² for V uniform, where Gaussian directions have (P + 1)/Q ‖g‖².
    sample, calls, number = make_quadratic(3, 4, 3.0, 1.0, seed), 100, 3
    estimator = PZOBO(number, smoothing=0.1, steps=2, learning_rate=1.0, directions="orthogonal", seed=seed)
    g = unrolled_part(sample, estimator)
    state: Any = {}
    total, squares = torch.zeros_like(g), 0.0
    for _ in range(calls):
        result = hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state=state)
        state = result.state
        error = implicit_part(result) - g
        total, squares = total + error, squares + float(error.square().sum())
    variance = (4 / number - 1) * float(g.square().sum())
    assert float(total.norm()) / calls <= 5.5 * math.sqrt(variance / calls)
    assert squares / calls == pytest.approx(variance, rel=0.4)


@forall(10, sample=quadratics(max_condition=100.0, scale=False), mu=st.floats(0.01, 10.0), seed=st.integers(0, 2**31))
def test_all_orthogonal_directions_are_exact_where_the_response_is_linear(sample: Sample, mu: float, seed: int) -> None:
    for number in ("all", len(sample.outer)):
        estimator = PZOBO(number, mu, 6, 1.0, directions="orthogonal", seed=seed)
        g = unrolled_part(sample, estimator)
        torch.testing.assert_close(implicit_part(solve(sample, estimator)), g, rtol=1e-8, atol=1e-8 * sample.scale())


@forall(6, number=st.integers(0, 2**31), optimizer=st.sampled_from(["sgd", "momentum", "adam"]))
def test_smoothing_costs_an_error_of_first_order(number: int, optimizer: str) -> None:
    sample = make_ridge(4, 8, 0.5, False, number)
    inner_loss, outer_loss = sample.losses()
    start = sample.inner + 1.0
    rate = 0.5 / float(sample.eigenvalues[-1]) if optimizer != "adam" else 0.1
    common: dict[str, Any] = {"steps": 6, "learning_rate": rate, "optimizer": optimizer}
    exact = hypergradient(inner_loss, outer_loss, start, sample.outer, Unrolled(**common)).grad
    errors = []
    for mu in (1e-3, 5e-4, 2.5e-4):
        estimator = PZOBO("all", mu, directions="orthogonal", **common)
        errors.append(hypergradient(inner_loss, outer_loss, start, sample.outer, estimator).grad - exact)
    scale = float(exact.norm()) + float(errors[0].norm())
    assert float(errors[0].norm()) > 1e-7 * scale
    # e(μ) = aμ + bμ² + …: what is left of 2e(μ/2) − e(μ) is of second order
    for wide, narrow in itertools.pairwise(errors):
        assert float((2 * narrow - wide).norm()) <= 0.1 * float(wide.norm()) + 1e-9 * scale


def test_successive_calls_take_new_directions_and_the_same_state_the_same() -> None:
    sample = six_by_six()
    estimator = PZOBO(3, smoothing=0.1, steps=3, learning_rate=0.5)

    def call(state: Any) -> Hypergradient:
        return hypergradient(*sample.losses(), sample.inner, sample.outer, estimator, state=state)

    first = call({})
    second = call(first.state)
    assert not torch.equal(first.grad, second.grad)
    assert torch.equal(second.grad, call(first.state).grad)
    assert torch.equal(first.grad, call(None).grad)
    assert [type(part) for part in first.state["generator"]] == [Tensor]
    other = PZOBO(3, smoothing=0.1, steps=3, learning_rate=0.5, seed=1)
    assert not torch.equal(first.grad, hypergradient(*sample.losses(), sample.inner, sample.outer, other).grad)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_smoothing_is_chosen_from_the_dtype(dtype: torch.dtype) -> None:
    sample = make_ridge(4, 8, 0.5, False, 3)
    inner_loss, outer_loss = sample.losses(dtype)
    w, lam = sample.inner.to(dtype) + 0.5, sample.outer.to(dtype)
    common: dict[str, Any] = {"steps": 5, "learning_rate": 0.3}
    exact = hypergradient(inner_loss, outer_loss, w, lam, Unrolled(**common))
    found = hypergradient(inner_loss, outer_loss, w, lam, PZOBO("all", directions="orthogonal", **common))
    assert found.info.status is Status.NOT_APPLICABLE
    expected = math.sqrt(torch.finfo(dtype).eps) * math.sqrt(1 + float(lam.norm())) / 2
    assert f"smoothing {expected:.3g}, 4 directions" in found.info.message
    error = float((found.grad - exact.grad).norm()) / float(implicit_part(exact).norm())
    assert error <= 30 * math.sqrt(torch.finfo(dtype).eps)


def test_displacements_that_rounding_swallows_are_told() -> None:
    sample = six_by_six()
    w, lam = sample.inner.float(), sample.outer.float()
    losses = sample.losses(torch.float32)
    for smoothing, status in ((1e-2, Status.NOT_APPLICABLE), (1e-8, Status.INACCURATE)):
        result = hypergradient(*losses, w, lam, PZOBO(4, smoothing, 3, 0.5))
        assert result.info.status is status
    # The outer parameters are displaced, and the inner ones stand on a value that hides their response.
    inner, outer = lambda w, lam: ((w - 1e6 - lam) ** 2).sum() / 2, lambda w, lam: (w * 1.0).sum()
    for smoothing, status in ((100.0, Status.NOT_APPLICABLE), (0.1, Status.INACCURATE), (1e-3, Status.INACCURATE)):
        result = hypergradient(inner, outer, torch.full((2,), 1e6), torch.zeros(2), PZOBO(4, smoothing, 3, 0.5))
        assert result.info.status is status
    assert float(result.grad.norm()) == 0.0  # which looks like no response at all


def test_perturbed_updates_that_overflow_are_told() -> None:
    result = hypergradient(
        lambda w, lam: ((lam * 100).exp() * w**4).sum(),
        lambda w, lam: w.sum(),
        torch.full((2,), 0.1),
        torch.zeros(2),
        PZOBO(4, 1.0, 30, 0.01),
    )
    assert result.info.status is Status.DIVERGED


def test_needs_no_second_derivatives() -> None:
    inner, outer, w, lam = attention_losses()
    result = hypergradient(inner, outer, w, lam, PZOBO(2, 0.1, 2, 0.1))  # type: ignore[arg-type]
    assert bool(torch.isfinite(result.grad).all())


class Decay(Problem):
    def loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Network(Problem):
    def loss(self, batch: Any) -> Any:
        sizes = torch.stack([p.square().sum() for p in self.module.parameters()])
        decay = (self.decay.module.weight.flatten().exp() * sizes).sum()
        return F.cross_entropy(self(batch[0]), batch[1]) + 0.1 * decay


def make(method: Estimator, optimizer: Any = None, steps: int = 4, outer_rate: float = 0.5) -> Engine:
    generator = torch.Generator().manual_seed(5)
    data = [
        (torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)) for _ in range(5)
    ]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.4), nn.Linear(4, 3)).double()
    decay = nn.Linear(2, 1, bias=False).double()
    optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9))
    return Engine(
        [
            Decay(decay, optimizer=lambda params: torch.optim.SGD(params, lr=outer_rate), data=data[:3]),
            Network(network, optimizer=optimizer, data=data, steps=steps),
        ],
        EngineConfig(progress=False),
        hypergradient=method,
    )


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.05),
        lambda params: torch.optim.RMSprop(params, lr=0.01),
    ],
)
def test_repeats_an_engines_updates(optimizer: Any, steps: int | None) -> None:
    """All directions: the derivative of the engine's own updates, with their batches and dropout masks."""
    found = []
    for method in (Unrolled(steps), PZOBO("all", 1e-6, steps, directions="orthogonal")):
        engine = make(method, optimizer, outer_rate=0.0)
        torch.manual_seed(3)
        engine.step()
        engine.step()
        found.append(engine.hypergradient().grad["weight"])
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-8)
    assert float(found[0].abs().max()) > 1e-4


def test_passes_in_an_engine_are_what_the_documentation_says() -> None:
    engine = make(PZOBO(3, 1e-3))
    engine.step()
    assert engine.step().passes == (4 + 1 + 4 * 4, 4 + 1 + 4 * 4)


def test_an_engine_takes_new_directions_at_every_step_and_resumes_them(tmp_path: Any) -> None:
    runs = []
    for interrupted in (False, True):
        engine = make(PZOBO(2, 1e-3))
        torch.manual_seed(3)
        engine.run(2)
        states = engine.estimator_states["decay"]["network"]["generator"][0].clone()
        if interrupted:
            engine.save(tmp_path / "state")
            engine = make(PZOBO(2, 1e-3))
            engine.load(tmp_path / "state")
        engine.run(2)
        assert not torch.equal(states, engine.estimator_states["decay"]["network"]["generator"][0])
        runs.append([p.detach().clone() for problem in engine.problems.values() for p in problem.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_directions": 0}, "PZOBO.num_directions must be an integer of at least 1, not 0"),
        ({"smoothing": 0.0}, "PZOBO.smoothing must be a finite number above 0 or 'auto', not 0.0"),
        ({"steps": 0}, "PZOBO.steps must be an integer of at least 1"),
        ({"learning_rate": -1.0}, "PZOBO.learning_rate must be a finite number above 0"),
        ({"directions": "gausian"}, "gaussian"),
        ({"optimizer": "adm"}, "adam"),
        ({"seed": -1}, "PZOBO.seed must be an integer of at least 0"),
        ({"num_directions": "all"}, "set directions='orthogonal'"),
    ],
)
def test_fields_are_validated(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        PZOBO(**fields)


def test_more_orthogonal_directions_than_outer_variables_are_refused() -> None:
    sample = six_by_six()
    with pytest.raises(ConfigError, match="there are only 6 outer variables"):
        solve(sample, PZOBO(7, 0.1, 2, 0.1, directions="orthogonal"))


def test_an_engines_own_optimiser_decides() -> None:
    with pytest.raises(ConfigError, match=r"PZOBO\.optimizer is for gradient steps"):
        make(PZOBO(optimizer="adam"))
