"""Modules compiled by ``torch.compile``: methods of first derivatives work, others are refused with a way out."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import LossError
from tests.bilevel.test_optimizers import batches

pytestmark = [
    pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning"),  # a small network is not convex
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FIRST_DERIVATIVES = [
    "finite_difference",
    {"method": "neumann", "damping": 1.0, "products": "finite_difference"},
    {"method": "conjugate_gradient", "damping": 1.0, "products": "finite_difference"},
]


class Decay(Problem):
    """Outer: logarithms of weight decays."""

    def loss(self, batch):
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Network(Problem):
    """Inner: a network with these weight decays."""

    def loss(self, batch):
        penalty = sum(r.exp() * p.square().sum() for r, p in zip(self.decay.module, self.parameters_now(), strict=True))
        return F.cross_entropy(self(batch[0]), batch[1]) + penalty

    def parameters_now(self) -> list[Tensor]:
        return list(self.module.parameters())


def network(dropout: float = 0.0, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(4, 8), *between, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def engine_of(module: nn.Module, method) -> Engine:
    rates = nn.ParameterList([torch.tensor(-3.0) for _ in module.parameters()])
    outer = Decay(rates, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), data=[batches(1)[0]])
    inner = Network(module, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), data=batches(4), steps=2)
    return Engine([outer, inner], EngineConfig(progress=False), method)


class Counted:
    """A back end that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        torch._dynamo.reset()
        self._inner = lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self._inner(graph, inputs)


def assert_equal_training(made: Engine, reference: Engine, steps: int = 3, rtol: float = 1e-5) -> None:
    start = [p.detach().clone() for p in reference.problems["decay"].parameters]
    for engine in (made, reference):
        torch.manual_seed(3)
        for _ in range(steps):
            engine.step()
    found, expected = (
        [p for problem in engine.problems.values() for p in problem.parameters] for engine in (made, reference)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)
    moved = reference.problems["decay"].parameters
    assert sum((p - before).abs() for p, before in zip(moved, start, strict=True)) > 1e-3


SOME = [FIRST_DERIVATIVES[0], *(pytest.param(method, marks=pytest.mark.slow) for method in FIRST_DERIVATIVES[1:])]


@pytest.mark.parametrize("method", SOME, ids=str)
def test_compiled_code_sees_swapped_parameters_and_is_not_compiled_again_for_them(method):
    """A product evaluates the loss at other tensors: each kind of tensor is compiled for once, however many come."""
    counter = Counted("aot_eager")
    made = engine_of(torch.compile(network(), backend=counter), method)
    assert_equal_training(made, engine_of(network(), method))
    graphs = counter.graphs
    assert graphs <= 5
    for _ in range(10):
        made.step()
        made.hypergradient()
    assert counter.graphs == graphs


@pytest.mark.slow
def test_dropout_and_batch_norm_in_compiled_code_are_as_without():
    made = engine_of(torch.compile(network(0.5, norm=True), backend=Counted("aot_eager")), "finite_difference")
    reference = engine_of(network(0.5, norm=True), "finite_difference")
    assert_equal_training(made, reference)
    statistics = [dict(engine.problems["network"].module.named_buffers()) for engine in (made, reference)]
    for (_, a), (_, b) in zip(*(sorted(part.items()) for part in statistics), strict=True):
        torch.testing.assert_close(a, b)
    before = {key: value.clone() for key, value in statistics[0].items()}
    made.hypergradient()
    assert all(torch.equal(value, before[key]) for key, value in made.problems["network"].module.named_buffers())


@pytest.mark.parametrize("method", ["identity", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_second_derivatives_through_compiled_code_are_refused_before_any_update(method, monkeypatch):
    module = torch.compile(network(), backend=Counted("aot_eager"))
    updates: list[None] = []
    monkeypatch.setattr(Network, "update", lambda *_: updates.append(None))
    with pytest.raises(LossError) as caught:
        engine_of(module, method).step()
    for part in ("problem 'network'", "torch.compile", "'finite_difference'"):
        assert part in str(caught.value)
    assert not updates


@pytest.mark.slow
@pytest.mark.parametrize("method", ["identity", {"method": "exact", "damping": 1.0}, "unrolled"], ids=str)
def test_the_eager_back_end_has_second_derivatives(method):
    """The alternative that the refusal names."""
    counter = Counted("eager")
    made = engine_of(torch.compile(network(), backend=counter), method)
    assert_equal_training(made, engine_of(network(), method))
    graphs = counter.graphs
    assert graphs <= 6
    for _ in range(5):
        made.step()
    assert counter.graphs == graphs


@pytest.mark.slow
def test_a_module_compiled_in_place_works_too():
    module = network()
    module.compile(backend=Counted("aot_eager"))
    assert_equal_training(engine_of(module, "finite_difference"), engine_of(network(), "finite_difference"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("method", FIRST_DERIVATIVES, ids=str)
def test_inductor_works(method):
    torch._dynamo.reset()
    made = engine_of(torch.compile(network()), method)
    assert_equal_training(made, engine_of(network(), method), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_the_passes_of_one_difference_draw_the_same_masks_in_inductor():
    """Its random numbers are not eager's. With a step that differs, the same derivative must come out."""
    torch._dynamo.reset()
    grads = []
    for epsilon in (1e-2, 2e-2):
        made = engine_of(torch.compile(network(0.5)), {"method": "finite_difference", "epsilon": epsilon})
        torch.manual_seed(1)
        made.step()
        torch.manual_seed(2)
        result = made.hypergradient()
        grads.append(torch.stack([result.grad[key] - result.direct[key] for key in result.grad]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
