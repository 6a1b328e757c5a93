"""Training passes in the precision that was asked for, products in float32; loss scaling; activation checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import Engine, EngineConfig, Problem
from bilevel.errors import LossError, NonFiniteError
from tests.bilevel.test_every_method import METHODS, engine
from tests.bilevel.test_optimizers import batches

# a small network is not convex, and some solves are not finished
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FAST = [
    "identity",
    "finite_difference",
    "unrolled",
    {"method": "unrolled", "memory": "graph"},
    {"method": "conjugate_gradient", "damping": 1.0, "products": "finite_difference"},
    {"method": "neumann", "damping": 1.0, "curvature": "gauss_newton"},
]


def methods(*, graphs: bool) -> list[object]:
    """Every method; one of each kind of product in the fast tests."""
    more = [{"method": "minres", "damping": 1.0, "products": "finite_difference"}]
    every = [*FAST, *(method for method in [*METHODS, *more] if method not in FAST)]
    kept = [
        method
        for method in every
        if graphs or not (isinstance(method, dict) and ("memory" in method or method.get("center") == "old"))
    ]
    return [pytest.param(m, id=str(m), marks=() if m in FAST else pytest.mark.slow) for m in kept]


def watched(made: Engine, name: str = "network") -> list[torch.dtype]:
    """Returns a list that will hold the dtype of the module's output in every pass."""
    seen: list[torch.dtype] = []
    made.problems[name].module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    return seen


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("method", methods(graphs=False))
def test_training_passes_are_in_low_precision_and_products_in_float32(method, precision):
    """Two inner updates and the outer loss under autocast, everything else in full precision."""
    made = engine(method, torch.float32, EngineConfig(progress=False, precision=precision))
    _ = made.dependencies
    seen = watched(made)
    made.step()
    assert seen.count(HALF[precision]) == 3
    assert set(seen) <= {HALF[precision], torch.float32}
    products = made.passes.forward - 3
    assert seen.count(torch.float32) == len(seen) - 3 >= (1 if products else 0)


@pytest.mark.parametrize(
    "method", ["identity", "finite_difference", {"method": "neumann", "products": "finite_difference"}], ids=str
)
def test_products_are_in_float32_under_the_users_autocast_too(method):
    made = engine(method, torch.float32)
    _ = made.dependencies
    seen = watched(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.step()
    assert seen.count(torch.bfloat16) == 3
    assert len(seen) > 3
    assert set(seen[3:]) == {torch.float32}


def test_what_the_users_loss_asks_for_itself_is_done():
    class Low(Problem):
        def loss(self, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self(self.scale(batch[0]))
            return F.cross_entropy(logits.float(), batch[1])

    made = engine("identity", torch.float32)
    inner = made.problems["network"]
    low = Low(inner.module, name="network", optimizer=inner.optimizer, data=inner.data, steps=2)
    made = Engine([made.problems["scale"], low], EngineConfig(progress=False), "identity")
    _ = made.dependencies
    seen = watched(made)
    made.step()
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


class Decay(Problem):
    """Outer: the logarithm of a weight decay, and a factor that tells the loss's size."""

    def loss(self, batch):
        return F.cross_entropy(self.network(batch[0]).float(), batch[1])


class Network(Problem):
    """Inner: cross entropy times a factor."""

    factor = 1.0

    def loss(self, batch):
        return by_hand_loss(self.module, self.decay.module[0], batch) * self.factor


def by_hand_loss(module: nn.Module, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum(p.square().sum() for p in module.parameters())
    return F.cross_entropy(module(batch[0]), batch[1]) + decay.exp() * penalty


def small(precision: str, factor: float = 1.0, rate: float = 0.1, device: str = "cpu", **more) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    sgd = lambda lr: lambda params: torch.optim.SGD(params, lr=lr)  # noqa: E731
    inner = Network(module, **{"optimizer": sgd(rate), "steps": 2, **more})
    inner.factor = factor
    start = nn.ParameterList([torch.tensor(-3.0, device=device)])
    outer = Decay(start, optimizer=sgd(0.0), data=[[part.to(device) for part in batches(1)[0]]])
    return Engine([outer, inner], EngineConfig(progress=False, precision=precision), "identity")


def run(made: Engine, part: list) -> None:
    for start in range(0, len(part), 2):
        made.step({"network": iter(part[start : start + 2])})


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1.0, 1e3])
@pytest.mark.parametrize("precision", HALF)
def test_inner_updates_are_those_of_a_hand_written_loop_bit_for_bit(precision, factor, device):
    """With ``torch.amp.GradScaler`` for float16; the large factor makes gradients overflow at first."""
    made = small(precision, factor, 0.1 / factor, device)
    module, decay = copy.deepcopy(made.problems["network"].module), torch.tensor(-3.0, device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1 / factor)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
    every = [(x.to(device), y.to(device)) for x, y in batches(16)]
    for batch in every:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=HALF[precision]):
            loss = by_hand_loss(module, decay, batch) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    overflows = [made.step({"network": iter(every[n : n + 2])}).overflows.get("network", 0) for n in range(0, 16, 2)]
    assert all(map(torch.equal, made.problems["network"].module.parameters(), module.parameters()))
    if precision == "float16":
        assert made.scales["network"].value == scaler.get_scale()
        assert (sum(overflows) > 0) == (factor > 1)
        assert made.scales["network"].overflows == sum(overflows) < 14
        assert 0 in overflows


def test_scaling_keeps_gradients_that_float16_would_lose():
    """Of the size of 1e-8: none of them is a float16 number."""
    factor, rate = 1e-8, 1e7
    ends = {}
    for name, precision, scale in (
        ("exact", "float32", None),
        ("scaled", "float16", 2.0**16),
        ("lost", "float16", 1.0),
    ):
        made = small(precision, factor, rate)
        if scale is not None:
            made.scales["network"].value = scale
        start = [p.detach().clone() for p in made.problems["network"].parameters]
        run(made, batches(4))
        ends[name] = [p.detach() - before for p, before in zip(made.problems["network"].parameters, start, strict=True)]
    for exact, scaled in zip(ends["exact"], ends["scaled"], strict=True):
        assert (exact - scaled).norm() < 0.02 * exact.norm()
    assert (ends["exact"][0] - ends["lost"][0]).norm() > 0.1 * ends["exact"][0].norm()


def test_an_overflow_moves_neither_parameters_nor_scheduler_nor_optimizer():
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    made = small("float16", optimizer=lambda params: torch.optim.Adam(params, lr=0.1), scheduler=schedule)
    made.scales["network"].value = 2.0**60
    problem = made.problems["network"]
    before = copy.deepcopy(problem.module.state_dict())
    result = made.step({"network": batches(1)[0]})
    assert result.overflows["network"] == 2
    assert result.skipped is None
    assert made.scales["network"].value == 2.0**58
    assert all(torch.equal(value, before[key]) for key, value in problem.module.state_dict().items())
    assert problem.optimizer.state == {}
    assert problem.scheduler.last_epoch == 0


def test_an_overflow_of_the_outer_loss_takes_no_product():
    made = small("float16")
    made.step({"network": batches(1)[0]})
    made.scales["decay"].value = 2.0**60
    passes = made.step({"network": batches(1)[0]}).passes
    assert passes[0] == 3  # two inner passes, and the outer loss
    assert made.scales["decay"].value == 2.0**59
    assert made.step({"network": batches(1)[0]}).overflows == {"decay": 1}


def test_the_scales_are_saved_and_go_on(tmp_path):
    whole, first = (small("float16", 1e4, 1e-5) for _ in range(2))
    run(whole, batches(12))
    run(first, batches(12)[:4])
    first.save(tmp_path / "state")
    second = small("float16", 1e4, 1e-5)
    second.load(tmp_path / "state")
    assert second.scales["network"].state_dict() == first.scales["network"].state_dict()
    assert second.scales["network"].overflows > 0
    run(second, batches(12)[4:])
    assert all(map(torch.equal, whole.problems["network"].parameters, second.problems["network"].parameters))
    assert whole.scales["network"].state_dict() == second.scales["network"].state_dict()


def test_a_refused_step_puts_the_scale_back():
    made = small("float16", 1e4, 1e-5)
    run(made, batches(2))
    before = made.scales["network"].state_dict()
    x, y = batches(1)[0]
    with pytest.raises(NonFiniteError, match="network"):
        made.step({"network": iter([(x, y), (x * torch.nan, y)])})
    assert made.scales["network"].state_dict() == before


def test_a_loss_that_is_not_finite_is_no_overflow():
    made = small("float16")
    x, y = batches(1)[0]
    with pytest.raises(NonFiniteError, match="the loss of problem 'network' is nan"):
        made.step({"network": (x * torch.nan, y)})
    assert made.scales["network"].overflows == 0


class Recomputed(nn.Module):
    """A body whose activations may be computed again in the backward pass; with dropout in it."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def recomputing(method, reentrant: bool | None) -> Engine:
    made = engine(method)
    scale, network = made.problems.values()
    module = Recomputed(reentrant).double()
    inner = type(network)(module, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), data=network.data, steps=2)
    return Engine([scale, inner], EngineConfig(progress=False), method)


@pytest.mark.parametrize("method", methods(graphs=True))
def test_activation_checkpointing_changes_no_gradient(method):
    ends = []
    for reentrant in (None, False):
        made = recomputing(method, reentrant)
        torch.manual_seed(3)
        for _ in range(2):
            made.step()
        torch.manual_seed(5)
        ends.append([made.hypergradient().grad["weight"], *(p.detach() for p in made.problems["network"].parameters)])
    assert ends[0][0].norm() > 0
    for plain, recomputed in zip(*ends, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-9, atol=1e-12)


def test_reentrant_checkpointing_is_refused_with_the_reason():
    with pytest.raises(LossError, match=r"reentrant.*use_reentrant=False"):
        recomputing("identity", True).step()
