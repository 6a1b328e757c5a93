"""Optimisers are the user's own objects: an engine drives them as a hand-written loop does, bit for bit."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import ConfigError, ParameterError
from bilevel.stepper import Stepper

QUIET = EngineConfig(progress=False)
REFUSED = {torch.optim.LBFGS: "evaluates the loss by itself", torch.optim.SparseAdam: "sparse gradients"}
KINDS = [
    kind
    for _, kind in sorted(vars(torch.optim).items())
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
]
DRIVEN = [kind for kind in KINDS if kind not in REFUSED]


def options(*names: str) -> list[object]:
    """Every optimiser with each of torch's implementations that it has."""
    pairs = [(kind, name) for kind in DRIVEN for name in names if name in inspect.signature(kind).parameters]
    return [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind, name in pairs]


class Decay(Problem):
    """Outer: the logarithm of a weight decay."""

    def loss(self, batch):
        return F.cross_entropy(self.network(batch[0]), batch[1])


class Network(Problem):
    """Inner: a network with that weight decay."""

    def loss(self, batch):
        return inner_loss(self.module, self.decay.module[0], batch)


def inner_loss(module: nn.Module, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum(p.square().sum() for p in module.parameters())
    return F.cross_entropy(module(batch[0]), batch[1]) + decay.exp() * penalty


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]


def grouped(kind: type[Optimizer], module: nn.Module, **settings) -> Optimizer:
    """Two groups with rates and decays of their own."""
    first, second = module[0], module[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    groups = [{"params": list(first.parameters()), "lr": 0.02}, {"params": list(second.parameters()), "lr": 0.005}]
    if "weight_decay" in inspect.signature(kind).parameters:
        groups[1]["weight_decay"] = 0.1
    return kind(groups, lr=0.01, **settings)


def train(module: nn.Module, optimizer: Optimizer, part, decay: Tensor, clip: float | None = None) -> None:
    """The loop that everybody writes."""
    for batch in part:
        optimizer.zero_grad()
        inner_loss(module, decay, batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()


def engine_of(module: nn.Module, optimizer: Optimizer, rate: float = 0.0, **settings) -> Engine:
    decay = Decay(
        nn.ParameterList([torch.tensor(-3.0)]),
        optimizer=lambda params: torch.optim.SGD(params, lr=rate),
        data=[batches(1)[0]],
    )
    return Engine([decay, Network(module, optimizer=optimizer, steps=2, **settings)], QUIET, "identity")


def assert_same_training(kind: type[Optimizer], clip: float | None = None, **settings) -> None:
    """Two updates before the engine exists, six in three steps of it, against eight by hand."""
    decay = torch.tensor(-3.0)
    every = batches(8)
    module = network(bias=kind is not getattr(torch.optim, "Muon", None))
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = grouped(kind, module, **settings)
    try:
        train(module, optimizer, every[:2], decay, clip)
    except KeyError as error:  # torch 2.11's Adafactor, on a machine with a GPU
        pytest.skip(f"torch itself cannot: {error!r}")
    by_hand = copy.deepcopy((module, optimizer))
    train(*by_hand, every[2:], decay, clip)
    engine = engine_of(module, optimizer, max_grad_norm=clip)
    for place in (2, 4, 6):
        engine.step({"network": iter(every[place : place + 2])})
    assert engine.problems["network"].optimizer is optimizer
    pairs = list(zip(module.parameters(), by_hand[0].parameters(), start, strict=True))
    assert all(torch.equal(found, expected) for found, expected, _ in pairs)
    assert not any(torch.equal(found, before) for found, _, before in pairs)


@pytest.mark.parametrize("kind", DRIVEN, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_is_driven_bit_for_bit(kind):
    assert_same_training(kind)


@pytest.mark.parametrize(("kind", "implementation"), options("foreach", "fused"))
def test_each_of_torchs_implementations_is_driven_bit_for_bit(kind, implementation):
    assert_same_training(kind, **{implementation: True})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "maximize": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    ],
)
def test_their_options_are_kept(kind, settings):
    assert_same_training(kind, **settings)


@pytest.mark.parametrize("clip", [0.05, 100.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_clipping_is_that_of_a_hand_written_loop(kind, clip):
    assert_same_training(kind, clip)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")  # no graph is captured here
@pytest.mark.parametrize(("kind", "option"), options("foreach", "fused", "capturable"))
def test_implementations_on_the_gpu_are_driven_bit_for_bit(kind, option):
    with torch.device("cuda"):
        module = network()
    optimizer = grouped(kind, module, **{option: True})
    expected, by_hand = copy.deepcopy((module, optimizer))
    gradients = [[torch.randn_like(p) for p in module.parameters()] for _ in range(4)]
    for grads in gradients:
        for p, grad in zip(expected.parameters(), grads, strict=True):
            p.grad = grad.clone()
        try:
            by_hand.step()
        except (KeyError, RuntimeError) as error:
            pytest.skip(f"torch itself cannot: {error!r}")
    stepper = Stepper("network", optimizer, dict(module.named_parameters()))
    for grads in gradients:
        stepper.update(grads, {})
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_an_optimizer_that_cannot_be_driven_is_refused_with_the_reason(kind):
    with pytest.raises(ConfigError, match=f"optimizer of problem 'network': {kind.__name__}.*{REFUSED[kind]}"):
        Network(network(), optimizer=lambda params: kind(params, lr=0.1))


def test_an_optimizer_of_the_users_own_that_needs_a_closure_is_refused():
    class Search(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    with pytest.raises(ConfigError, match=r"Search.step\(\) must be given a closure"):
        Network(network(), optimizer=lambda params: Search(params, lr=0.1))


def test_the_outer_optimizer_is_the_users_too():
    """It sees each hypergradient once, and what it makes of them is what a copy of it makes of them by hand."""
    module = network()
    engine = engine_of(module, torch.optim.SGD(module.parameters(), lr=0.1))
    outer = Decay(nn.ParameterList([torch.tensor(-3.0)]), data=[batches(1)[0]])
    (parameter,) = outer.module.parameters()
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    by_hand = nn.Parameter(parameter.detach().clone())
    copied = torch.optim.Adam([by_hand], lr=0.1)
    outer = Decay(outer.module, optimizer=optimizer, data=[batches(1)[0]])
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(parameter.grad.clone()))
    engine = Engine([outer, Network(module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))], QUIET, "identity")
    for batch in batches(3):
        engine.step({"network": batch})
    assert len(seen) == 3
    assert all(grad != 0 for grad in seen)
    for grad in seen:
        by_hand.grad = grad
        copied.step()
    assert torch.equal(by_hand, parameter)


@pytest.mark.parametrize("change", ["group", "freeze", "unfreeze"])
def test_what_an_optimizer_holds_may_not_change_unnoticed(change):
    module = network()
    first, second = module[0], module[2]
    if change == "unfreeze":
        second.weight.requires_grad_(False)
    held = list(first.parameters()) if change == "group" else list(module.parameters())
    optimizer = torch.optim.SGD(held, lr=0.1)
    engine = engine_of(module, optimizer)
    if change == "group":
        optimizer.add_param_group({"params": list(second.parameters())})
    else:
        second.weight.requires_grad_(change == "unfreeze")
    before = copy.deepcopy(module.state_dict())
    expected = {"group": r"shapes \[\(3, 5\), \(3,\)\]", "freeze": "2.weight no longer", "unfreeze": r"\[\(3, 5\)\]"}
    with pytest.raises(ParameterError, match=rf"optimizer of problem 'network' holds other.*{expected[change]}"):
        engine.step({"network": batches(1)[0]})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert engine.step_count == 0


class Alarm(torch.autograd.Function):
    """The identity, whose gradient nobody may ask for."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise AssertionError("a gradient was computed that nobody needs")


class Guarded(nn.Linear):
    """A layer whose own parameters must not be differentiated; its input may be."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Alarm.apply(self.weight), Alarm.apply(self.bias))


METHODS = [
    "identity",
    "neumann",
    "conjugate_gradient",
    "exact",
    "finite_difference",
    "unrolled",
    {"method": "neumann", "products": "finite_difference"},
]


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # a small network is not convex
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_that_no_problem_owns_never_change_and_cost_nothing(method, frozen):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Guarded(5, 5), nn.Tanh(), nn.Linear(5, 3))
    module[2].requires_grad_(not frozen)
    held = [*module[0].parameters(), *module[4].parameters()]
    if frozen:
        held += module[2].parameters()  # an optimiser may hold what is frozen
        for p in module[2].parameters():
            p.grad = torch.ones_like(p)  # left from another training: the optimiser would move by it
    before = copy.deepcopy(module.state_dict())
    engine = engine_of(module, torch.optim.AdamW(held, lr=0.1, weight_decay=0.1), rate=0.1)
    engine = Engine(list(engine.problems.values()), QUIET, method)
    for batch in batches(2):
        engine.step({"network": batch})
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("2."), key


def test_a_gradient_that_the_user_keeps_stays():
    module = network()
    for p in module.parameters():
        p.grad = torch.full_like(p, 7.0)
    engine = engine_of(module, torch.optim.SGD(module.parameters(), lr=0.1))
    engine.step({"network": batches(1)[0]})
    assert all((p.grad == 7.0).all() for p in module.parameters())


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True, "foreach": True}])
def test_given_gradients_are_not_changed_even_where_tensors_share_memory(settings):
    """autograd returns one expanded tensor for both parameters of ``(a + b).sum()``; clipping works in place."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    grads = torch.autograd.grad((a + b).sum(), [a, b])
    assert grads[0].data_ptr() == grads[1].data_ptr()
    optimizer = torch.optim.SGD([a, b], lr=1.0, **settings)
    Stepper("pair", optimizer, {"a": a, "b": b}, max_grad_norm=0.6).update(grads, {})
    expected = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    by_hand = torch.optim.SGD(expected, lr=1.0, **settings)
    sum(expected).sum().backward()
    nn.utils.clip_grad_norm_(expected, 0.6)
    by_hand.step()
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])
    assert all(grad.eq(1).all() for grad in grads)


SETTINGS = [{}, {"weight_decay": 0.1}, {"maximize": True}, {"momentum": 0.9}, {"amsgrad": True}, {"centered": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("kind", "implementation"), [*options("foreach", "fused"), (torch.optim.Adam, "amsgrad")])
def test_torchs_own_optimizers_get_gradients_that_are_not_copied_and_leave_them_alone(kind, implementation, settings):
    if not set(settings) <= set(inspect.signature(kind).parameters):
        settings = {}
    parameter = nn.Parameter(torch.randn(3, 4))
    optimizer = kind([parameter], **{implementation: True, **settings})
    stepper = Stepper("one", optimizer, {"p": parameter})
    for _ in range(3):
        grad = torch.randn(3, 4)
        before = grad.clone()
        assert stepper.own([grad])[0].data_ptr() == grad.data_ptr()
        stepper.update([grad], {})
        assert torch.equal(grad, before)


class Shrinking(torch.optim.SGD):
    """Of a user's own, and changes gradients in place."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        return super().step(closure)


@pytest.mark.parametrize("by_hook", [True, False])
def test_the_users_own_optimizers_and_hooks_may_change_gradients(by_hook):
    parameter = nn.Parameter(torch.ones(2))

    def shrink(*_) -> None:
        parameter.grad.mul_(0.5)

    optimizer = (torch.optim.SGD if by_hook else Shrinking)([parameter], lr=1.0)
    if by_hook:
        optimizer.register_step_pre_hook(shrink)
    grad = torch.ones(2)
    Stepper("one", optimizer, {"p": parameter}).update([grad], {})
    assert grad.tolist() == [1.0, 1.0]
    assert parameter.tolist() == [0.5, 0.5]


def test_gradients_come_in_the_parameters_dtype_and_layout():
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16).t())
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.grad))
    Stepper("one", optimizer, {"p": p}).update([torch.ones(4, 3)], {})
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].stride() == p.stride()
    assert p.grad is None


def test_sparse_gradients_become_dense():
    table = nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    grads = torch.autograd.grad(table(torch.tensor([1, 1, 3])).sum(), [table.weight])
    assert grads[0].is_sparse
    Stepper("table", torch.optim.Adam(table.parameters(), lr=0.1), {"weight": table.weight}).update(grads, {})
    moved = (table.weight != before).any(1)
    assert moved.tolist() == [False, True, False, True, False]


class Table(Network):
    def loss(self, batch):
        rows = self.module[0](batch[1])
        return (rows * batch[0][:, :2]).sum().square() + self.decay.module[0].exp() * rows.square().sum()


class Above(Decay):
    def loss(self, batch):
        return self.network.module[0](batch[1]).square().sum()


@pytest.mark.parametrize("method", ["identity", "finite_difference", "unrolled"])
def test_a_sparse_table_is_trained_as_a_dense_one(method):
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(5, 2, sparse=sparse))
        sgd = lambda params: torch.optim.SGD(params, lr=0.01)  # noqa: E731
        outer = Above(nn.ParameterList([torch.tensor(-3.0)]), name="decay", optimizer=sgd, data=batches(2))
        engine = Engine([outer, Table(module, name="network", optimizer=sgd, data=batches(3))], QUIET, method)
        for _ in range(3):
            engine.step()
        ends.append([module[0].weight.detach(), outer.module[0].detach()])
    assert all(map(torch.equal, *ends))
    assert ends[0][1] != -3.0


def test_gradients_are_taken_away_when_the_optimizer_raises():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no")

    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="no"):
        Stepper("one", Failing([p], lr=1.0), {"p": p}).update([torch.ones(2)], {})
    assert p.grad is None
