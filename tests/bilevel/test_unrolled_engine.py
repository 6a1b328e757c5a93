"""Unrolling the updates of an engine's inner problem: what must hold beyond the numbers of one step."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel import Engine, EngineConfig, Estimator, Problem, Unrolled
from bilevel.errors import BilevelWarning, ConfigError
from bilevel.functional import FunctionObjective, PassCount, leaves
from bilevel.hypergrad import StepGraph, unrolled
from bilevel.hypergrad.mixed_product import mixed_product
from bilevel.levels.differentiate import Differentiator
from bilevel.randomness import Replay

QUIET = EngineConfig(progress=False)

Make = Callable[[Any], torch.optim.Optimizer]
sgd: Make = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731

OPTIMIZERS: dict[str, Make] = {
    "sgd": sgd,
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def batches(number: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 4, generator=generator).double(), torch.randint(3, (6,), generator=generator))
        for _ in range(number)
    ]


class Average(nn.Module):
    """Multiplies by a running average that it changes in place, and that its graph holds."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return x * self.scale


class Codebook(nn.Module):
    """Adds a moving average that it writes through ``.data``, of which autograd's versions tell nothing."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data.copy_(0.9 * self.mean + x.detach().mean(0))
        return x * (1 + self.mean.clone())


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]


def hidden(kind: str) -> list[nn.Module]:
    layers: dict[str, list[nn.Module]] = {
        "plain": [nn.Tanh()],
        "dropout": [nn.Tanh(), nn.Dropout(0.5)],
        "batch norm": [nn.BatchNorm1d(8), nn.Tanh()],
        "buffer in the graph": [nn.Tanh(), Average()],
        "codebook": [nn.Tanh(), Codebook()],
        "checkpoint": [Checkpointed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)))],
    }
    return layers[kind]


class Weights(Problem):
    def loss(self, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)


class Classifier(Problem):
    def loss(self, batch: Any) -> Any:
        x, y = batch
        weights = self.weights.module.weight.sigmoid().squeeze(0)
        decay = sum(p.square().sum() for p in self.module.parameters())
        return (weights * F.cross_entropy(self(x), y, reduction="none")).mean() + 1e-3 * weights[0] * decay


def make(
    method: Estimator, kind: str = "plain", optimizer: Make = sgd, steps: int = 4, config: EngineConfig = QUIET
) -> Engine:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), *hidden(kind), nn.Linear(8, 3)).double()
    weights = nn.Linear(6, 1, bias=False).double()
    return Engine(
        [
            Weights(weights, optimizer=sgd, data=batches(3)),
            Classifier(network, optimizer=optimizer, data=batches(), steps=steps),
        ],
        config,
        hypergradient=method,
    )


def state_of(engine: Engine) -> list[Tensor]:
    found = [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]
    return found + [b.clone() for problem in engine.problems.values() for b in problem.module.buffers()]


def run(engine: Engine, steps: int = 3) -> tuple[list[Tensor], list[tuple[int, int]]]:
    torch.manual_seed(7)
    passes = [engine.step().passes for _ in range(steps)]
    return [*state_of(engine), torch.get_rng_state()], passes


KINDS = ["plain", "dropout", "batch norm", "buffer in the graph", "codebook", "checkpoint"]


@pytest.mark.parametrize(("steps", "graphs"), [(None, None), (2, None), (None, 1), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_replay_bit_for_bit(kind: str, steps: int | None, graphs: int | None) -> None:
    replayed, kept = make(Unrolled(steps), kind), make(Unrolled(steps, memory="graph", graphs=graphs), kind)
    before = state_of(replayed)[0]
    one, _ = run(replayed)
    other, _ = run(kept)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_graph_equals_replay_for_every_kind_of_optimiser(optimizer: str) -> None:
    results = [
        run(make(Unrolled(memory=memory), "dropout", OPTIMIZERS[optimizer]))[0] for memory in ("replay", "graph")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("kind", "optimizer", "steps"),
    [*((kind, "sgd", None) for kind in KINDS), *(("dropout", optimizer, 2) for optimizer in OPTIMIZERS)],
)
def test_forward_mode_equals_reverse_mode(kind: str, optimizer: str, steps: int | None) -> None:
    methods = [Unrolled(steps, mode=mode) for mode in ("reverse", "forward")]
    results = [run(make(method, kind, OPTIMIZERS[optimizer]), 2)[0] for method in methods]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("buffer in the graph", "codebook")])  # constants here
def test_equals_central_differences_of_the_whole_step(kind: str) -> None:
    engine = make(Unrolled(memory="graph"), kind, steps=3)
    torch.manual_seed(7)
    engine.step()
    weight = engine.problems["weights"].parameters[0]
    start = copy.deepcopy(engine.problems["classifier"].module)
    stream, outer_batch = batches()[:3], batches(3)[1]

    def outer_loss(move: Tensor) -> Tensor:
        network = copy.deepcopy(start)
        optimizer = sgd(list(network.parameters()))
        given = (weight.detach() + move).sigmoid().squeeze(0)
        torch.manual_seed(11)
        for x, y in stream:
            decay = sum(p.square().sum() for p in network.parameters())
            value = (given * F.cross_entropy(network(x), y, reduction="none")).mean() + 1e-3 * given[0] * decay
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return F.cross_entropy(network(outer_batch[0]), outer_batch[1]).detach()

    expected = torch.zeros_like(weight)
    for place in range(weight.numel()):
        move = torch.zeros_like(weight)
        move.view(-1)[place] = 1e-5
        expected.view(-1)[place] = (outer_loss(move) - outer_loss(-move)) / 2e-5
    torch.manual_seed(11)
    before = weight.detach().clone()
    engine.step({"classifier": iter(stream), "weights": outer_batch})
    found = (before - weight.detach()) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # 4 inner updates and the outer loss take 5 forward and 5 backward passes
        (Unrolled(), (5 + 4, 5 + 2 * 4)),
        (Unrolled(memory="graph"), (5, 5 + 4)),
        (Unrolled(2), (5 + 2, 5 + 2 * 2)),
        (Unrolled(2, memory="graph"), (5, 5 + 2)),
        (Unrolled(memory="graph", graphs=1), (5 + 3, 5 + 3 + 4)),
        (Unrolled(3, memory="graph", graphs=2), (5 + 1, 5 + 1 + 3)),
        (Unrolled(memory="graph", graphs=9), (5, 5 + 4)),
        (Unrolled(mode="forward"), (5 + 4, 5 + 2 * 4 + 4 * 6)),
    ],
)
def test_passes_are_what_the_documentation_says(method: Unrolled, expected: tuple[int, int]) -> None:
    _, passes = run(make(method))
    assert passes == [expected] * 3


@pytest.mark.parametrize(("optimizer", "more"), [("sgd", 0), ("momentum", 0), ("adamw", 4), ("rmsprop", 4)])
@pytest.mark.parametrize("memory", ["graph", "replay"])
def test_autograd_runs_once_a_pass(memory: str, optimizer: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once for each of 4 updates that are not linear, to differentiate them."""
    engine = make(Unrolled(memory=memory), optimizer=OPTIMIZERS[optimizer])
    engine.step()
    run_backward, runs = torch.autograd._engine_run_backward, 0

    def counted(*arguments: Any, **how: Any) -> Any:
        nonlocal runs
        runs += 1
        return run_backward(*arguments, **how)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counted)
    _, backward = engine.step().passes
    assert runs == backward + more


@pytest.mark.parametrize("memory", ["graph", "replay"])
def test_products_of_float16_stay_in_its_range(memory: str) -> None:
    # Of w̄ = 100 and H = 1000 the product is above 65504, the largest number; with the rate it is 50.
    class Upper(Problem):
        def loss(self, batch: Any) -> Tensor:
            return 100 * self.inner.module.weight.float().sum()

    class Lower(Problem):
        def loss(self, batch: Any) -> Tensor:
            return 500 * (self.module.weight - self.outer.module.weight).square().sum()

    def weights(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        upper, lower = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False).to(dtype)
        data, make_sgd = [0], lambda params: torch.optim.SGD(params, lr=5e-4)
        outer = Upper(upper, optimizer=make_sgd, data=data, name="outer")
        method = Unrolled(memory=memory)
        inner = Lower(lower, optimizer=make_sgd, data=data, steps=3, hypergradient=method, name="inner")
        Engine([outer, inner], QUIET).step()
        return upper.weight.detach()

    torch.testing.assert_close(weights(torch.float16), weights(torch.float32), rtol=1e-3, atol=1e-4)


def test_asking_for_the_hypergradient_after_a_step_replays() -> None:
    # The graphs speak of the outer parameters before their update; they are gone, not used in silence.
    found = []
    for memory in ("replay", "graph"):
        engine = make(Unrolled(memory=memory), "dropout")
        run(engine, 2)
        assert all(step.graph is None for step in engine._records["classifier"].trajectory)
        found.append(engine.hypergradient().grad["weight"])
    assert torch.equal(*found)


class Watched(nn.Module):
    """Remembers which of its activations are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        self.alive.append(weakref.ref(x))
        return x.sin()  # keeps x for the backward pass

    @property
    def count(self) -> int:
        return sum(reference() is not None for reference in self.alive)


def watched(method: Estimator, steps: int) -> tuple[Engine, Watched]:
    watch = Watched()
    network = nn.Sequential(nn.Linear(4, 8), watch, nn.Tanh(), nn.Linear(8, 3)).double()
    weights = Weights(nn.Linear(6, 1, bias=False).double(), optimizer=sgd, data=batches())
    return Engine([weights, Classifier(network, optimizer=sgd, data=batches(), steps=steps)], QUIET, method), watch


@pytest.mark.parametrize("graphs", [None, 3])
def test_every_graph_is_gone_once_it_was_pulled_through(graphs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the way back frees is what it works in, so that fewer fresh pages are asked for."""
    engine, watch = watched(Unrolled(memory="graph", graphs=graphs), 5)
    before: list[int] = []
    after: list[int] = []
    pulled_back = unrolled.pulled_back

    def counted(*arguments: Any, **how: Any) -> Any:
        before.append(watch.count)
        found = pulled_back(*arguments, **how)
        after.append(watch.count)  # the gradient is still held here: it is the product itself that frees
        return found

    engine.step()
    watch.alive.clear()
    monkeypatch.setattr(unrolled, "pulled_back", counted)
    engine.step()
    # of the oldest step no cotangent of w is asked for, and what is not passed goes with the gradient
    assert before == ([5, 4, 3, 2, 1] if graphs is None else [3, 2, 1, 1, 1])
    assert after[:-1] == ([4, 3, 2, 1] if graphs is None else [2, 1, 0, 0])
    assert watch.count == 0


def test_pulling_back_once_more_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the graphs are spent the steps are evaluated again: 2 passes more each."""
    pullback = unrolled._ReverseResponse.pullback
    pairs: list[tuple[Any, Any]] = []

    def twice(self: Any, cotangent: Any, state: Any) -> Any:
        pairs.append((pullback(self, cotangent, state), pullback(self, cotangent, state)))
        return pairs[-1][1]

    monkeypatch.setattr(unrolled._ReverseResponse, "pullback", twice)
    _, passes = run(make(Unrolled(memory="graph"), "dropout"))
    assert passes == [(5 + 4, 5 + 4 + 2 * 4)] * 3
    for one, other in pairs:
        assert one.info == other.info
        assert all(torch.equal(a, b) for a, b in zip(one.value, other.value, strict=True))


def test_a_spent_graph_is_not_taken_by_another_product() -> None:
    """A fallback is given the record that the method has used."""
    w, lam, q = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [0.5, -1.0], [3.0, 1.0]))
    inner, outer = leaves((w,)), leaves((lam,))
    objective = FunctionObjective(lambda w, lam: (w[0] ** 2 * lam[0]).sum(), "f", Replay(["cpu"]), PassCount())
    expected = mixed_product(objective, inner, outer, (q,), difference="exact").value
    for graph in (StepGraph(inner, (2 * inner[0] * outer[0],)), StepGraph(inner, (), once=True)):
        found = mixed_product(objective, inner, outer, (q,), difference="exact", graph=graph)
        assert ("step's own gradient" in found.message) != graph.spent
        torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(expected, (2 * w * q,))


def test_two_problems_above_take_their_products_on_the_same_graphs() -> None:
    class Scale(Problem):
        def loss(self, batch: Any) -> Any:
            return (self.low.module.weight - 1.0).square().sum() + self.module.weight.square().sum()

    class Shift(Problem):
        def loss(self, batch: Any) -> Any:
            return (self.low.module.weight + 1.0).square().sum() + self.module.weight.sum()

    class Low(Problem):
        def loss(self, batch: Any) -> Any:
            own: Any = self.module.weight
            return (own * self.scale.module.weight - self.shift.module.weight).square().sum() + own.cos().sum()

    results = []
    for memory in ("replay", "graph"):
        torch.manual_seed(0)
        scale, shift, low = (nn.Linear(2, 2, bias=False).double() for _ in range(3))
        problems = [Scale(scale, optimizer=sgd), Shift(shift, optimizer=sgd), Low(low, optimizer=sgd, steps=3)]
        engine = Engine(problems, QUIET, Unrolled(memory=memory))
        passes = [engine.step().passes for _ in range(2)]
        # 3 steps and 2 losses; for each of these 3 products, and replay evaluates every step again for each
        assert passes == [(5, 5 + 6) if memory == "graph" else (5 + 6, 5 + 12)] * 2
        results.append(state_of(engine))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_loss_has_computed_once_for_all_steps_is_not_freed_with_one_of_them() -> None:
    class Caching(Classifier):
        kept: tuple[Any, Tensor] | None = None

        def loss(self, batch: Any) -> Any:
            x, y = batch
            weight = self.weights.module.weight
            key = (id(weight), weight._version)
            if self.kept is None or self.kept[0] != key:
                self.kept = key, weight.sigmoid().squeeze(0)  # saves its result
            return (self.kept[1] * F.cross_entropy(self(x), y, reduction="none")).mean()

    class Plain(Caching):
        def loss(self, batch: Any) -> Any:
            self.kept = None
            return super().loss(batch)

    results = []
    for kind in (Plain, Caching):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        weights = Weights(nn.Linear(6, 1, bias=False).double(), optimizer=sgd, data=batches(3))
        inner = kind(network, name="classifier", optimizer=sgd, data=batches(), steps=4)
        engine = Engine([weights, inner], QUIET, Unrolled(memory="graph"))
        before = state_of(engine)[0]
        engine.run(3)
        results.append(state_of(engine))
        assert not torch.equal(results[-1][0], before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_graph_of_parameters_that_have_changed_since_is_not_used() -> None:
    """A chain of inner problems: the middle one is updated after the lowest has made its steps."""

    def nested(memory: str) -> Engine:
        torch.manual_seed(0)

        class Top(Problem):
            def loss(self, batch: Any) -> Any:
                own: Any = self.module.weight
                return (self.middle.module.weight - self.low.module.weight).square().sum() + own.sum()

        class Middle(Problem):
            def loss(self, batch: Any) -> Any:
                own: Any = self.module.weight
                return (own * self.top.module.weight - 1.0).square().sum() + own.square().sum()

        class Low(Problem):
            def loss(self, batch: Any) -> Any:
                return (self.module.weight * self.middle.module.weight - 1.0).square().sum()

        method = Unrolled(memory=memory)
        parts = [nn.Linear(2, 2, bias=False).double() for _ in range(3)]
        return Engine(
            [
                Top(parts[0], optimizer=sgd),
                Middle(parts[1], optimizer=sgd, steps=2),
                Low(parts[2], optimizer=sgd, steps=3),
            ],
            QUIET,
            hypergradient=method,
        )

    results = []
    for memory in ("replay", "graph"):
        engine = nested(memory)
        engine.run(3)
        results.append(state_of(engine))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_refused_step_leaves_graphs_behind_that_are_not_used() -> None:
    engine = make(Unrolled(memory="graph"))
    bad = (torch.full((6, 4), float("nan"), dtype=torch.float64), batches()[0][1])
    run(engine, 1)
    before = state_of(engine)
    with pytest.raises(Exception, match="finite"):
        engine.step({"weights": bad})
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    other = make(Unrolled(memory="replay"))
    run(other, 1)
    with pytest.raises(Exception, match="finite"):
        other.step({"weights": bad})
    assert torch.equal(engine.hypergradient().grad["weight"], other.hypergradient().grad["weight"])


def test_replays_memory_does_not_depend_on_the_size_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that are alive when the outer loss is evaluated: after the inner steps, before the way back."""

    counts, total = {}, Differentiator.total
    for memory, steps in itertools.product(("replay", "graph"), (2, 5)):
        engine, watch = watched(Unrolled(memory=memory), steps)
        watch.alive.clear()

        def counted(self: Any, problem: Any, *rest: Any, watch: Watched = watch, key: Any = (memory, steps)) -> Any:
            if problem.name == "weights":
                counts[key] = watch.count
            return total(self, problem, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(Differentiator, "total", counted)
            engine.step()
    assert counts == {("replay", 2): 0, ("replay", 5): 0, ("graph", 2): 2, ("graph", 5): 5}


def test_buffers_that_do_not_change_are_kept_once() -> None:
    # batch norm has three, which every update changes; a table of constants is copied once
    for kind, expected in (("batch norm", 4 * 3 + 1), ("plain", 1)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), *hidden(kind), nn.Linear(8, 3)).double()
        network.register_buffer("table", torch.zeros(100))
        engine = Engine(
            [
                Weights(nn.Linear(6, 1, bias=False).double(), optimizer=sgd, data=batches()),
                Classifier(network, optimizer=sgd, data=batches(), steps=4),
            ],
            QUIET,
            hypergradient=Unrolled(),
        )
        engine.step()
        steps = engine._records["classifier"].trajectory
        assert len({id(b) for step in steps for values in step.buffers.values for b in values}) == expected


@pytest.mark.parametrize("mode", [{"memory": "graph"}, {"mode": "forward"}, {}])
def test_an_optimiser_of_the_function_form_is_refused(mode: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"Unrolled\.optimizer is for gradient steps.*'classifier'.*SGD: leave optimizer='adam' out"
    ):
        make(Unrolled(optimizer="adam", **mode))  # type: ignore[arg-type]


def test_a_learning_rate_is_not_used_and_that_is_said() -> None:
    with pytest.warns(BilevelWarning, match=r"Unrolled\.learning_rate is not used"):
        make(Unrolled(learning_rate=0.3))


def test_graphs_in_low_precision_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision='bfloat16'.*use memory='replay'"):
        make(Unrolled(memory="graph"), config=EngineConfig(progress=False, precision="bfloat16"))


class Boxed(Problem):
    def loss(self, batch: Any) -> Any:
        return (self.module[0] - self.aim.module[0] * torch.arange(1.0, 4.0)).square().sum()

    def project(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value.clamp(-1.0, 1.0) for value in values)


class Aim(Problem):
    def loss(self, batch: Any) -> Any:
        return (self.boxed.module[0] * torch.tensor([1.0, 2.0, 3.0])).sum()


def in_a_box(method: Any) -> Engine:
    aim = Aim(nn.ParameterList([torch.tensor(0.4)]), optimizer=sgd)
    boxed = Boxed(nn.ParameterList([torch.zeros(3)]), optimizer=sgd, steps=20, reset="initial")
    return Engine([aim, boxed], QUIET, method)


def test_a_projection_is_part_of_every_update_and_of_what_is_unrolled():
    engine = in_a_box("unrolled")
    aim = torch.tensor(0.4, requires_grad=True)
    w = torch.zeros(3)
    for _ in range(20):
        w = (w - 0.1 * 2 * (w - aim * torch.arange(1.0, 4.0))).clamp(-1.0, 1.0)
    (expected,) = torch.autograd.grad((w * torch.tensor([1.0, 2.0, 3.0])).sum(), aim)
    engine.step()
    assert torch.allclose(engine.problems["boxed"].module[0].detach(), w.detach())
    assert w[2] == 1.0  # on the boundary: moves no more
    assert torch.allclose(engine.problems["aim"].module[0], 0.4 - 0.1 * expected)


def test_a_projection_is_refused_where_the_method_cannot_see_it():
    with pytest.raises(ConfigError, match=r"cannot differentiate through project\(\) of problem 'boxed'"):
        in_a_box("one_step").step()
