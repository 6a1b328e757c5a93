"""How an engine of several levels runs: who is updated when, on which batches, and what survives a stop."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bilevel import ConjugateGradient, Engine, EngineConfig, Exact, Problem
from bilevel.errors import ConfigError, DataError, GraphError, NonFiniteError, SolveError
from tests.proofs.nest_engines import engine_of, hypergradient_of, values_of
from tests.proofs.nest_structures import STRUCTURES, Structure
from tests.proofs.nests import make_quadratic

QUIET = EngineConfig(progress=False, nested_solver=Exact())


class Logged(torch.optim.SGD):
    """Writes down whose parameters it updates."""

    def __init__(self, params: Any, name: str, log: list[str], rate: float = 0.1) -> None:
        super().__init__(params, lr=rate)
        self.name, self.log = name, log

    def step(self, closure: Any = None) -> None:
        self.log.append(self.name)
        super().step(closure)


def logged(structure: str | Structure, steps: dict[str, int], **settings: dict[str, Any]) -> tuple[Engine, list[str]]:
    """An engine whose optimisers write down every update."""
    made = STRUCTURES[structure] if isinstance(structure, str) else structure
    nest = make_quadratic(made, dict.fromkeys(made.names, 2), number=1)
    log: list[str] = []
    more = {
        name: {"optimizer": lambda params, name=name: Logged(params, name, log), **settings.get(name, {})}
        for name in made.names
    }
    return engine_of(nest, nest.point, steps=steps, **more), log


@pytest.mark.parametrize(
    ("structure", "steps", "expected"),
    [
        ("two_levels", {"b": 3}, "b b b a"),
        ("three_levels_next_only", {"b": 2, "c": 3}, "c c c b  c c c b  a"),
        # a reads c itself: c takes another block, so that a sees its response to the last b
        ("three_levels", {"b": 2, "c": 3}, "c c c b  c c c b  c c c  a"),
        ("top_reads_lowest", {"b": 1, "c": 2}, "c c b  c c  a"),
        ("lowest_reads_top", {"b": 2, "c": 1}, "c b  c b  a"),
        ("four_levels_next_only", {"b": 2, "c": 2, "d": 1}, "d c d c b  d c d c b  a"),
        ("four_levels", {"b": 1, "c": 2, "d": 1}, "d c d c  d  b  d c d c  d  a"),
        ("two_inner", {"b": 2, "c": 3}, "c c c  b b  a"),  # the last listed first
        ("sibling_responds", {"b": 2, "c": 1}, "c  b b  a"),
        ("sibling_responds_upwards", {"b": 1, "c": 2}, "c c  b  a"),
        ("two_outer", {"c": 2}, "c c  p q"),
        ("two_outer_over_a_chain", {"b": 2, "c": 2}, "c c b  c c b  c c  p q"),
        ("middle_beside_inner", {"b": 2, "c": 1, "d": 3}, "d d d  c b c b  a"),
        ("two_middles_two_lowest", {"b1": 2, "b2": 1, "c1": 1, "c2": 2}, "c2 c2 b2  c1 b1 c1 b1  a"),
        # rounds of the shared problem's block and one update of each of those that have some left
        ("two_middles_one_lowest", {"b1": 2, "b2": 3, "c": 2}, "c c b1 b2  c c b1 b2  c c b2  c c  a"),
    ],
)
def test_order_of_updates(structure: str, steps: dict[str, int], expected: str) -> None:
    engine, log = logged(structure, steps)
    for _ in range(2):
        log.clear()
        engine.step()
        assert " ".join(log) == " ".join(expected.split())


def test_warmup_updates_are_made_once_before_the_first_block() -> None:
    engine, log = logged("three_levels_next_only", {"b": 1, "c": 2}, b={"warmup_steps": 2}, c={"warmup_steps": 3})
    engine.step()
    assert "".join(log) == "cccccb" + "ccb" + "ccb" + "a"
    log.clear()
    engine.step()
    assert "".join(log) == "ccba"


@pytest.mark.parametrize("method", ["exact", "unrolled"])
def test_a_warmed_up_engine_goes_on_like_one_that_starts_there(method: str) -> None:
    """Warm-up updates are no part of what is differentiated."""
    nest = make_quadratic(STRUCTURES["three_levels"], dict.fromkeys("abc", 2), number=3)
    rates = dict.fromkeys("abc", 0.2)
    z = nest.point.clone()
    for _ in range(4):  # four gradient steps on c alone
        z[nest.place("c")] -= 0.2 * nest.closed_form("c", z)
    plain = engine_of(nest, z, method, rates=rates, steps={"c": 2})
    warmed = engine_of(nest, nest.point, method, rates=rates, steps={"c": 2}, c={"warmup_steps": 4})
    for engine in (plain, warmed):
        engine.step()
    torch.testing.assert_close(values_of(plain), values_of(warmed), rtol=1e-12, atol=1e-12)


def test_the_preconditioner_of_an_optimizer_serves_first_derivatives_below_a_middle_level() -> None:
    """Further ones have no optimiser to ask, and are the nested solver's."""
    nest = make_quadratic(STRUCTURES["three_levels"], dict.fromkeys("abc", 2), number=3)
    found = []
    for kind in ("optimizer", "none"):
        methods = {"b": "exact", "c": ConjugateGradient(preconditioner=kind, max_iterations=50, rtol=1e-13)}
        adam = {"optimizer": lambda params: torch.optim.Adam(params, lr=0.1)}
        engine = engine_of(nest, nest.point, methods, rates={"a": 0.1, "b": 0.1}, steps={"b": 2, "c": 3}, c=adam)
        for _ in range(2):
            engine.step()
        found.append(values_of(engine))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match=r"nested_solver.*preconditioner='optimizer'.*use 'nystrom' or 'none'"):
        EngineConfig(nested_solver=ConjugateGradient(preconditioner="optimizer"))


def without(structure: Structure, *constant: str) -> Structure:
    """The structure where some problems are constants."""
    below = {
        name: () if name in constant else tuple(lower for lower in below if lower not in constant)
        for name, below in structure.below.items()
    }
    return Structure(structure.reads, below)


@pytest.mark.parametrize("resting", ["b", "c"])
def test_outside_its_steps_a_problem_is_a_constant(resting: str) -> None:
    """Neither updated nor differentiated through; what is below it still responds to those above."""
    structure = STRUCTURES["three_levels"]
    whole = make_quadratic(structure, dict.fromkeys("abc", 2), number=3)
    rest = make_quadratic(without(structure, resting), dict.fromkeys("abc", 2), number=3)
    for settings, active in (({"start": 1}, [False, True]), ({"stop": 1}, [True, False])):
        z = whole.solved()
        engine = engine_of(whole, z, rates={"a": 0.1}, **{resting: settings})
        for on in active:
            before = values_of(engine)
            nest = whole if on else rest
            assert torch.equal(before[2:], z[2:])  # the learning rates below a are zero
            moved = values_of(engine)[:2]
            engine.step()
            torch.testing.assert_close(moved - values_of(engine)[:2], 0.1 * partial_or_total(nest, before))


def partial_or_total(nest: Any, z: Tensor) -> Tensor:
    """The hypergradient of a with the lower vectors where they are: ``Sᵀ ∂F/∂z``."""
    S, _ = nest.affine_substitution("a")
    return S[:, :2].T @ (nest.A["a"] @ z + nest.b["a"])


@pytest.mark.parametrize("resting", ["b", "c"])
def test_a_resting_problem_makes_no_update(resting: str) -> None:
    engine, log = logged("three_levels", {"b": 2, "c": 2}, **{resting: {"start": 1, "stop": 2}})
    for step in range(3):
        log.clear()
        engine.step()
        assert (resting in log) == (step == 1)
        assert {"a", "b", "c"} - {resting} <= set(log)


# Three levels with data: weights w, the scales s of their features, and a weight decay for the scales.


class Decay(Problem):
    def loss(self, batch: Any) -> Tensor:
        return prediction_loss(batch, self.scales.module[0], self.weights.module[0])


class Scales(Problem):
    def loss(self, batch: Any) -> Tensor:
        fit = prediction_loss(batch, self.module[0], self.weights.module[0])
        return fit + (self.decay.module[0].exp() * self.module[0].square()).sum()


class Weights(Problem):
    dropout = 0.0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = F.dropout(x, self.dropout)
        return prediction_loss((x, y), self.scales.module[0], self.module[0]) + 0.1 * self.module[0].square().sum()


class Dropped(Weights):
    dropout = 0.5


def prediction_loss(batch: Any, scales: Tensor, weights: Tensor) -> Tensor:
    x, y = batch
    return F.softplus(-y * (torch.tanh(x * scales) @ weights)).mean()


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(4, generator=generator, dtype=torch.float64)).sign()


def loader(seed: int, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(20, seed)), batch_size=batch, shuffle=True)


def vector(*values: float) -> nn.Module:
    return nn.ParameterList([torch.tensor(values, dtype=torch.float64)])


def three(
    method: Any = "exact",
    *,
    kind: type[Weights] = Weights,
    optimizer: Any = lambda params: torch.optim.SGD(params, lr=0.3),
    config: EngineConfig = QUIET,
    data: bool = True,
    decay: dict[str, Any] | None = None,
    scales: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> Engine:
    settings = [
        {"optimizer": optimizer, "data": loader(seed) if data else None, **(more or {})}
        for seed, more in enumerate((decay, scales, weights))
    ]
    problems = [
        Decay(vector(-2.0, -1.0, -2.0, -1.5), **settings[0]),
        Scales(vector(1.0, 0.5, -0.5, 0.2), **{"steps": 2, **settings[1]}),
        kind(vector(0.1, -0.2, 0.3, 0.4), name="weights", **{"steps": 3, **settings[2]}),
    ]
    return Engine(problems, config, hypergradient=method)


def state(engine: Engine) -> list[Tensor]:
    return [p.detach().clone() for problem in engine.problems.values() for p in problem.parameters]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def halves(batch: Any) -> list[Any]:
    return [tuple(part[:10] for part in batch), tuple(part[10:] for part in batch)]


@pytest.mark.parametrize("method", ["exact", "unrolled"])
@pytest.mark.parametrize("accumulating", ["decay", "scales", "weights"])
def test_accumulated_batches_are_one_batch_of_all_their_rows(accumulating: str, method: str) -> None:
    """Gradients and losses, and the products through the problem: two outer steps agree to rounding."""
    names = ["decay", "scales", "weights"]
    ends = []
    for count in (1, 2):
        engine = three(method, data=False, **{accumulating: {"accumulate": count}})
        for step in range(2):
            batches = {name: rows(20, 10 * step + place) for place, name in enumerate(names)}
            given: dict[str, Any] = dict(batches)
            if count == 2:
                given[accumulating] = iter(halves(batches[accumulating]) * 20)
            result = engine.step(given)
        ends.append((state(engine), result.losses[accumulating]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def test_every_update_takes_its_own_batches() -> None:
    """Three updates of the weights before each of two of the scales, two batches each; the decay reads the weights."""
    batches = [rows(5, seed) for seed in range(40)]
    taken = {"weights": 3 * 2 * 2 + 3 * 2, "scales": 2, "decay": 1}
    settings = {"data": False, "weights": {"accumulate": 2}}
    for short in taken:
        given = {name: iter(batches[: count - (name == short)]) for name, count in taken.items()}
        with pytest.raises(DataError, match=f"needs more batches for problem '{short}'"):
            three(**settings).step(given)
    given = {name: iter(batches[:count]) for name, count in taken.items()}
    three(**settings).step(given)
    assert all(next(left, None) is None for left in given.values())


@pytest.mark.parametrize("reset", [None, "initial"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_hypergradient_is_the_derivative_of_the_step_dropout_included(accumulate: int, reset: str | None) -> None:
    """Central differences of the outer loss that a whole step reports, with the generator set back before each.

    Without a reset the start of a block is a constant: with one update of the scales none depends on the decay.
    """
    make = lambda params: torch.optim.Adam(params, lr=0.05, eps=0.1)  # noqa: E731 (with a small ε a first step is a sign)
    adam = {"optimizer": make, "reset": reset, "accumulate": accumulate}
    still = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    names = ("decay", "scales", "weights")

    def run(shift: Tensor) -> tuple[Engine, float]:
        scales = {**adam, "steps": 2 if reset else 1}
        engine = three("unrolled", kind=Dropped, data=False, decay=still, scales=scales, weights=adam)
        with torch.no_grad():
            engine.problems["decay"].parameters[0].add_(shift)
        torch.manual_seed(5)
        result = engine.step({name: rows(20, place) for place, name in enumerate(names)})
        return engine, result.losses["decay"]

    engine, _ = run(torch.zeros(4, dtype=torch.float64))
    found = engine.hypergradient("decay", {"decay": rows(20, 0)}).grad["0"]
    unit = torch.eye(4, dtype=torch.float64)
    expected = torch.tensor([(run(1e-5 * d)[1] - run(-1e-5 * d)[1]) / 2e-5 for d in unit], dtype=torch.float64)
    assert float(expected.norm()) > 1e-5
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("method", ["exact", "unrolled"])
def test_clipping_a_middle_level_limits_its_total_gradient(method: str) -> None:
    still = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    engine = three(method, decay=still, weights=still, scales={"max_grad_norm": 1e-3, "steps": 1})
    before = engine.problems["scales"].parameters[0].detach().clone()
    result = engine.step()
    assert result.gradient_norms["scales"] > 1e-2
    moved = engine.problems["scales"].parameters[0].detach() - before
    assert float(moved.norm()) == pytest.approx(0.3e-3, rel=1e-2)


@pytest.mark.parametrize(
    "method", ["exact", "unrolled", {"method": "soba", "step_size": 0.5}, {"method": "cg", "warm_start": True}], ids=str
)
def test_asking_for_the_hypergradient_of_three_levels_changes_nothing(method: Any) -> None:
    runs = []
    for asked in (False, True):
        engine = three(method, kind=Dropped)
        torch.manual_seed(7)
        for _ in range(3):
            engine.step()
            if asked:
                engine.hypergradient()
        runs.append([*state(engine), torch.get_rng_state()])
    assert same(*runs)


METHODS_WITH_STATE: list[Any] = [
    "unrolled",
    {"method": "soba", "step_size": 0.5},
    *(
        pytest.param(method, marks=pytest.mark.slow)
        for method in (
            "exact",
            {"method": "cg", "warm_start": True},
            {"method": "neumann", "terms": 3},
            {"method": "f2sa", "iterations": 2, "step_size": 0.5},
        )
    ),
]


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # far from solved
@pytest.mark.parametrize("method", METHODS_WITH_STATE, ids=str)
def test_a_saved_engine_of_three_levels_goes_on_bit_for_bit(method: Any, tmp_path: Any) -> None:
    """Saved in the middle of an epoch of every problem, loaded into another engine, continued."""

    def make() -> Engine:
        adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
        weights = {"warmup_steps": 2, "accumulate": 2, "steps": 2}
        return three(method, kind=Dropped, optimizer=adam, weights=weights, scales={"start": 1, "stop": 4, "steps": 1})

    torch.manual_seed(3)
    whole = make()
    for step in range(5):
        if step == 3:
            whole.save(tmp_path / "state")
        whole.step()
    end = torch.get_rng_state()

    torch.manual_seed(99)
    resumed = make()
    resumed.load(tmp_path / "state")
    for _ in range(2):
        resumed.step()
    assert same(state(whole), state(resumed))
    assert torch.equal(torch.get_rng_state(), end)


def test_a_reset_start_survives_a_save(tmp_path: Any) -> None:
    """What ``reset="initial"`` goes back to is that of the engine that was saved, not of the one that loads."""
    reset = {"reset": "initial"}
    whole = three("unrolled", scales=reset, weights=reset)
    whole.step()
    whole.save(tmp_path / "state")
    resumed = three("unrolled", scales=reset, weights=reset)
    with torch.no_grad():
        for problem in resumed.problems.values():
            for parameter in (*problem.parameters, *(problem.initial or ())):
                parameter.add_(1.0)
    resumed.load(tmp_path / "state")
    for engine in (whole, resumed):
        engine.step()
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("bad", ["decay", "scales", "weights"])
def test_a_refused_step_at_any_level_changes_nothing(bad: str) -> None:
    engine = three(optimizer=lambda params: torch.optim.Adam(params, lr=0.1))
    clean = three(optimizer=lambda params: torch.optim.Adam(params, lr=0.1))
    engine.step()
    clean.step()
    before = state(engine)
    x, y = rows(20, 1)
    good = {name: iter([(x, y)] * 30) for name in engine.problems}
    # the last batch that the problem takes in this step: all other updates below it were made
    counts = {"decay": 0, "scales": 1, "weights": 8}
    poisoned = iter([*[(x, y)] * counts[bad], (x * float("nan"), y)])
    with pytest.raises(NonFiniteError, match=f"problem '{bad}'"):
        engine.step({**good, bad: poisoned})
    assert same(before, state(engine))
    for one in (engine, clean):
        one.step(dict.fromkeys(engine.problems, (x, y)))
    assert same(state(engine), state(clean))


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")  # far from solved
@pytest.mark.parametrize("method", ["exact", "unrolled", {"method": "soba", "step_size": 0.5}], ids=str)
def test_records_of_all_levels_are_let_go(method: Any) -> None:
    """The number of living tensors of its own, and their elements, are the same after 2 steps and after 6."""

    def living() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        return len(tensors), sum(t.numel() for t in tensors)

    gc.freeze()  # what others have left behind is not looked at: some of it may go meanwhile
    try:
        engine = three(method, kind=Dropped, data=False, optimizer=lambda params: torch.optim.Adam(params, lr=0.05))
        batches = {name: rows(5, place) for place, name in enumerate(engine.problems)}
        counts = []
        for count in (2, 4):
            for _ in range(count):
                engine.step(batches)
            counts.append(living())
    finally:
        gc.unfreeze()
    assert counts[0][0] > 0
    assert counts[0] == counts[1]


@pytest.mark.parametrize("middle", ["exact", "unrolled"])
def test_a_step_leaves_no_graph_behind(middle: str) -> None:
    """Not even where the lowest level keeps the graphs of its updates until those above are made."""
    weights = {"hypergradient": {"method": "unrolled", "memory": "graph"}}
    engine = three(middle, data=False, weights=weights)
    batches = {name: rows(5, place) for place, name in enumerate(engine.problems)}
    gc.collect()
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor) and o.grad_fn is not None}
    engine.step(batches)
    gc.collect()
    left = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.grad_fn is not None]
    assert not [o.shape for o in left if id(o) not in before]


def test_a_step_reports_every_level() -> None:
    engine = three()
    result = engine.step()
    assert set(result.losses) == set(result.gradient_norms) == {"decay", "scales", "weights"}
    assert {"scales", "weights"} <= set(result.solves)
    assert engine.dependencies.outer == ("decay",)
    assert set(engine.estimators) == {"scales", "weights"}
    described = engine.dependencies.describe()
    assert "decay (outer)" in described
    assert "scales (inner, and outer to others): loss depends on decay, weights" in described


# Structures that make no nest.


def structure(reads: dict[str, tuple[str, ...]]) -> Structure:
    return Structure(reads, dict.fromkeys(reads, ()))


@pytest.mark.parametrize(
    ("reads", "match"),
    [
        # the middle responds to nothing above
        ({"a": ("b",), "b": ("c",), "c": ("b",)}, "'a'"),
        # nobody reads the lowest
        ({"a": ("b",), "b": ("a",), "c": ("b",)}, "no problem above 'c' depends on its parameters"),
        # the lowest responds to nothing
        ({"a": ("b",), "b": ("a", "c"), "c": ()}, "'c' does not depend on the parameters of any problem above"),
        # the top is not connected
        ({"a": (), "b": ("c",), "c": ("b",)}, "'a'"),
    ],
)
def test_structures_in_which_something_can_not_be_learnt_are_refused(
    reads: dict[str, tuple[str, ...]], match: str
) -> None:
    nest = make_quadratic(structure(reads), dict.fromkeys(reads, 1), number=1)
    with pytest.raises(GraphError, match=match):
        engine_of(nest, nest.point)


def test_an_equilibrium_below_a_middle_level_is_refused() -> None:
    """t over a over b1 and b2, which answer each other through c."""
    reads = {"t": ("a",), "a": ("t", "b1", "b2"), "b1": ("a", "c"), "b2": ("a", "c"), "c": ("b1", "b2")}
    nest = make_quadratic(structure(reads), dict.fromkeys(reads, 1), number=1)
    with pytest.raises(GraphError, match="b1 and b2 respond to each other below the middle level 'a'"):
        engine_of(nest, nest.point)


class Pulled(Problem):
    """``½ (x − k c − a)²``: as c is b1 + b2, each of two such problems answers the other with the slope k / (1 − k)."""

    k = 0.5

    def loss(self, batch: Any) -> Tensor:
        return (self.module[0] - self.k * self.c.module[0] - self.a.module[0]).square().sum() / 2


class Sum(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.module[0] - self.b1.module[0] - self.b2.module[0]).square().sum() / 2


class Wanted(Problem):
    def loss(self, batch: Any) -> Tensor:
        return (self.b1.module[0] + self.b2.module[0] - 3.0).square().sum() / 2 + self.module[0].square().sum()


def test_an_equilibrium_that_does_not_exist_is_a_failed_solve() -> None:
    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    kinds = {"a": Wanted, "b1": Pulled, "b2": Pulled, "c": Sum}
    problems = [kind(vector(0.5), optimizer=still, name=name) for name, kind in kinds.items()]
    engine = Engine(problems, EngineConfig(progress=False, on_solve_failure="raise"), hypergradient="exact")
    with pytest.raises(SolveError, match="singular"):
        engine.step()


def test_the_order_of_the_list_says_who_is_over_whom() -> None:
    """Two problems that read each other: the one listed first is over the other, and sees its response."""
    reads = {"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b")}
    turned = {"a": ("b", "c"), "c": ("a", "b"), "b": ("a", "c")}
    for order, middle, lowest in ((reads, "b", "c"), (turned, "c", "b")):
        below = {"a": (middle, lowest), middle: (lowest,), lowest: ()}
        nest = make_quadratic(Structure(order, below), dict.fromkeys(order, 2), number=5)
        z = nest.solved()
        engine = engine_of(nest, z)
        assert engine.dependencies.lower[middle] == {lowest}
        assert engine.dependencies.lower[lowest] == frozenset()
        torch.testing.assert_close(hypergradient_of(engine, "a"), nest.closed_form("a", z), rtol=1e-9, atol=1e-9)
