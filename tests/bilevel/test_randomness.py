"""Dropout and batch norm: passes of one derivative draw the same masks; statistics move once a training pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import Engine, EngineConfig, Problem
from bilevel.randomness import HostGenerators
from tests.bilevel.test_every_method import METHODS, engine

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
RATE, DECAY, SEED = 0.3, 0.05, 7
PROBABILITIES = [0.1, 0.3, 0.5]


class Net(nn.Module):
    """Batch norm and dropout before a linear layer: convex in the layer's parameters."""

    def __init__(self, p: float, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4, affine=False, device=device, dtype=torch.float64)
        self.dropout = nn.Dropout(p)
        self.linear = nn.Linear(4, 3).to(device, torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(z)))


class Mix(Problem):
    """Outer: a matrix that mixes the inputs before they are normalised."""

    def loss(self, batch):
        return F.cross_entropy(self.network(self(batch[0])), batch[1])


class Network(Problem):
    """Inner: the layer, with a weight decay."""

    def loss(self, batch):
        penalty = sum(p.square().sum() for p in self.module.linear.parameters())
        return F.cross_entropy(self(self.mix(batch[0])), batch[1]) + DECAY * penalty


def batches(device: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        made.append((x.to(device), torch.randint(3, (16,), generator=generator).to(device)))
    return made


def mixing(device: str) -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False, device=device, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) + 0.3 * torch.randn(4, 4, generator=generator))
    return layer


def engine_of(method, p: float, device: str) -> Engine:
    *inner, outer = batches(device)
    sgd = lambda rate: lambda params: torch.optim.SGD(params, lr=rate)  # noqa: E731
    problems = [
        Mix(mixing(device), optimizer=sgd(1.0), data=[outer]),
        Network(Net(p, device), optimizer=sgd(RATE), data=inner, steps=2),
    ]
    return Engine(problems, EngineConfig(progress=False), method)


def generators(device: str) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *((torch.cuda.get_rng_state(),) if device == "cuda" else ()))


def put(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


class ByHand:
    """One outer step as a loop, with the generators' states before each of its passes."""

    def __init__(self, p: float, device: str) -> None:
        self.p, self.device = p, device
        *self.inner, self.outer = batches(device)
        self.net, self.mix = Net(p, device), mixing(device).weight.detach()
        layer = self.net.linear
        optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
        self.start = self.flat(layer.weight, layer.bias)
        self.before: list[tuple[Tensor, ...]] = []
        torch.manual_seed(SEED)
        for x, y in self.inner:
            self.before.append(generators(device))
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in layer.parameters())
            (F.cross_entropy(self.net(x @ self.mix.T), y) + DECAY * penalty).backward()
            optimizer.step()
        self.before.append(generators(device))
        self.net(self.outer[0] @ self.mix.T)  # the outer loss's pass
        self.end = self.flat(layer.weight, layer.bias)

    @staticmethod
    def flat(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.detach().reshape(-1), bias.detach()])

    def loss(self, place: int, w: Tensor, mix: Tensor) -> Tensor:
        """The loss of a pass as a function, with the masks that it had."""
        put(self.before[place])
        x, y = self.outer if place == 2 else self.inner[place]
        z = F.dropout(F.batch_norm(x @ mix.T, None, None, training=True), self.p, training=True)
        value = F.cross_entropy(F.linear(z, w[:12].view(3, 4), w[12:]), y)
        return value if place == 2 else value + DECAY * w.square().sum()

    def implicit(self, *, identity: bool, place: int = 1) -> Tensor:
        """The hypergradient by a dense Hessian (or the identity for it)."""
        w, mix = (part.clone().requires_grad_() for part in (self.end, self.mix))
        v, direct = torch.autograd.grad(self.loss(2, w, mix), (w, mix))
        hessian = torch.autograd.functional.hessian(lambda w: self.loss(place, w, self.mix), self.end)
        q = v if identity else torch.linalg.solve(hessian, v)
        (slope,) = torch.autograd.grad(self.loss(place, w, mix), w, create_graph=True)
        return direct - torch.autograd.grad(slope @ q, mix)[0]

    def unrolled(self) -> Tensor:
        """The derivative of the whole step."""
        w, mix = (part.clone().requires_grad_() for part in (self.start, self.mix))
        for place in range(2):
            w = w - RATE * torch.autograd.grad(self.loss(place, w, mix), w, create_graph=True)[0]
        return torch.autograd.grad(self.loss(2, w, mix), mix)[0]


SOLVING = {
    "exact": ({"method": "exact"}, 1e-9),
    "conjugate_gradient": ({"method": "conjugate_gradient", "max_iterations": 100, "rtol": 1e-12}, 1e-9),
    "neumann": ({"method": "neumann", "terms": 400}, 1e-8),
    "gmres of differences": (
        {"method": "gmres", "max_iterations": 60, "rtol": 1e-9, "products": "finite_difference"},
        1e-5,
    ),
    "minres": ({"method": "minres", "max_iterations": 100, "rtol": 1e-12}, 1e-9),
}
ONE_PRODUCT = {
    "identity": ({"method": "identity"}, 1e-11),
    "finite_difference": ({"method": "finite_difference"}, 1e-5),
}
UNROLLING = {
    "replay": ({"method": "unrolled"}, 1e-11),
    "graph": ({"method": "unrolled", "memory": "graph"}, 1e-11),
    "forward": ({"method": "unrolled", "mode": "forward"}, 1e-11),
}


def cases(table) -> list[object]:
    """All of a table at all probabilities; the fast tests take its first row at all, and the others at the largest."""
    first = next(iter(table))
    return [
        pytest.param(name, p, marks=() if name == first or p == PROBABILITIES[-1] else pytest.mark.slow)
        for name in table
        for p in PROBABILITIES
    ]


def check(method, p: float, device: str, expected: Tensor, rtol: float) -> None:
    made = engine_of(method, p, device)
    before = made.problems["mix"].module.weight.detach().clone()
    torch.manual_seed(SEED)
    made.step()
    found = before - made.problems["mix"].module.weight.detach()
    assert (found - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "p"), cases(SOLVING))
def test_solves_see_the_masks_of_the_last_inner_update(name, p, device):
    check(SOLVING[name][0], p, device, ByHand(p, device).implicit(identity=False), SOLVING[name][1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "p"), cases(ONE_PRODUCT))
def test_products_and_differences_see_the_masks_of_the_last_inner_update(name, p, device):
    check(ONE_PRODUCT[name][0], p, device, ByHand(p, device).implicit(identity=True), ONE_PRODUCT[name][1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "p"), cases(UNROLLING))
def test_unrolling_sees_the_masks_of_every_update(name, p, device):
    check(UNROLLING[name][0], p, device, ByHand(p, device).unrolled(), UNROLLING[name][1])


def test_other_masks_would_be_seen_in_the_result():
    """What the tolerances above are small against."""
    reference = ByHand(0.1, "cpu")
    right = reference.implicit(identity=True)
    reference.before[1] = reference.before[2]
    assert (reference.implicit(identity=True) - right).norm() > 0.02 * right.norm()


ROWS = (*SOLVING.values(), *ONE_PRODUCT.values(), *UNROLLING.values())
FAST = ("conjugate_gradient", "gmres", "identity", "finite_difference", "unrolled", "f2sa")
EVERY = [
    pytest.param(method, id=str(method), marks=() if method["method"] in FAST else pytest.mark.slow)
    for method in (*(row[0] for row in ROWS), *({"method": name} for name in ("f2sa", "pzobo", "one_step")))
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", EVERY)
def test_statistics_move_once_a_training_pass_as_by_hand(method, device):
    """Two inner updates and the outer loss; products, differences and repeated updates leave them alone, to the bit."""
    reference = ByHand(0.3, device)
    made = engine_of(method, 0.3, device)
    net = made.problems["network"].module
    torch.manual_seed(SEED)
    made.step()
    assert net.norm.num_batches_tracked.item() == 3
    assert torch.equal(net.norm.running_mean, reference.net.norm.running_mean)
    assert torch.equal(net.norm.running_var, reference.net.norm.running_var)
    assert torch.equal(net.linear.weight, reference.net.linear.weight)
    assert torch.equal(torch.rand(1, device=device), after(reference, device))


def after(reference: ByHand, device: str) -> Tensor:
    """The next random number once the loop's last pass has drawn."""
    put(reference.before[2])
    F.dropout(torch.ones(16, 4, dtype=torch.float64, device=device), reference.p, training=True)
    return torch.rand(1, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", EVERY)
def test_asking_for_a_hypergradient_changes_no_buffer_generator_or_mode(method, device):
    made = engine_of(method, 0.5, device)
    torch.manual_seed(SEED)
    made.step()
    net = made.problems["network"].module
    buffers, held = copy.deepcopy(dict(net.named_buffers())), [id(buffer) for buffer in net.buffers()]
    states = generators(device)
    first = made.hypergradient().grad["weight"]
    assert all(map(torch.equal, generators(device), states))
    assert [id(buffer) for buffer in net.buffers()] == held
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in net.named_buffers())
    assert all(module.training for module in net.modules())
    assert torch.equal(made.hypergradient().grad["weight"], first)


@pytest.mark.slow
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_gives_the_same_twice_at_any_probability(method, p):
    made = engine(method, dropout=p)
    torch.manual_seed(SEED)
    made.step()
    states = generators("cpu")
    first = made.hypergradient().grad["weight"]
    assert all(map(torch.equal, generators("cpu"), states))
    assert torch.equal(made.hypergradient().grad["weight"], first)


@pytest.mark.parametrize("between", [0, 1, 2])
@pytest.mark.parametrize("drawn", ["nothing", "uniform", "normal", "shuffle", "python"])
def test_the_host_generators_go_back_to_where_they_were_taken_last(between: int, drawn: str) -> None:
    # NumPy keeps the second of two normal numbers outside its generator, where a look at that does not show it.
    draws: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "uniform": lambda: np.random.rand(3),
        "normal": lambda: np.random.randn(1),
        "shuffle": lambda: np.random.shuffle([1, 2, 3]),
        "python": random.random,
    }
    numpys, pythons, host = np.random.get_state(), random.getstate(), HostGenerators()
    try:
        np.random.seed(0)
        random.seed(0)
        host.take()
        for _ in range(between):
            draws[drawn]()
            host.take()
        expected = np.random.get_state(), random.getstate()
        for _ in range(2):
            np.random.randn(1)
            random.random()
            host.restore()
            found = np.random.get_state(), random.getstate()
            torch.testing.assert_close(found[0][1].astype(np.int64), expected[0][1].astype(np.int64))
            assert (found[0][2:], found[1]) == (expected[0][2:], expected[1])
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)
