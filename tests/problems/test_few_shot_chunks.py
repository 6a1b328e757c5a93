"""Tasks in chunks: the same numbers as together, less memory, and a size that is measured, kept and saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

from bilevel import ConjugateGradient, Engine, EngineConfig, Neumann, Unrolled, hypergradcheck
from bilevel.errors import ConfigError, LossError
from bilevel.hypergrad.registry import as_estimator
from bilevel.problems import Adaptation, Episodes, MetaLearner, PrototypeMetaLearner, TaskBatch
from bilevel.problems.few_shot import budget as budget_module
from bilevel.problems.few_shot.batching import convolved
from bilevel.problems.few_shot.budget import Need, choose, free_memory, measured_peak
from bilevel.problems.few_shot.stacked import stacked_outputs
from bilevel.result import StepResult
from tests.ranks import free_port

DOUBLE, MIB = torch.float64, 2**20
PAGES = Path(__file__).parents[2] / "docs" / "tutorials"
WAYS, TASKS = 3, 5
CPU = torch.device("cpu")


def sgd(lr: float = 0.3, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05)


def episodes(dtype: torch.dtype = DOUBLE, *, tasks: int = TASKS, size: int = 5, queries: int = 4) -> Episodes:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % 8
    inputs = torch.randn(8, size, generator=generator)[labels] + 0.5 * torch.randn(80, size, generator=generator)
    return Episodes((inputs.to(dtype), labels), WAYS, 2, queries, tasks)


def network(dtype: torch.dtype = DOUBLE, *, size: int = 5, width: int = 4, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.Sequential(nn.Tanh(), nn.Dropout(dropout)) if dropout else nn.Tanh()
        return nn.Sequential(nn.Linear(size, width), middle, nn.Linear(width, WAYS)).to(dtype)


class Watched(MetaLearner):
    """Keeps the gradient of the last update."""

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        self.seen = torch.cat([g.flatten() for g in gradients])
        super().update(gradients, values)


class WatchedPrototypes(PrototypeMetaLearner, Watched):
    pass


def engine_of(
    method: Any = "unrolled",
    *,
    learner: type[Watched] = Watched,
    made: nn.Module | None = None,
    tasks: Any = None,
    steps: int = 3,
    optimizer: Any = None,
    outer: Mapping[str, Any] | None = None,
    config: EngineConfig | None = None,
    **settings: Any,
) -> Engine:
    made = network() if made is None else made
    meta = learner(made, name="meta", **{"optimizer": sgd(0.1), **(outer or {})})
    inner = Adaptation(
        made, episodes() if tasks is None else tasks, optimizer=optimizer or sgd(), steps=steps, **settings
    )
    return Engine([meta, inner], config or EngineConfig(progress=False), hypergradient=method)


def watched(engine: Engine) -> Watched:
    found = engine.problems["meta"]
    assert isinstance(found, Watched)
    return found


def adaptation(engine: Engine) -> Adaptation:
    found = engine.problems["adaptation"]
    assert isinstance(found, Adaptation)
    return found


def after(steps: int, **settings: Any) -> tuple[Tensor, StepResult]:
    """Returns the gradient of the last of some outer steps, and its report."""
    engine = engine_of(**settings)
    results = [engine.step() for _ in range(steps)]
    return watched(engine).seen, results[-1]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


# The same numbers


METHODS: Mapping[str, tuple[Any, float]] = {
    "replay": (Unrolled(), 1e-12),
    "graph": (Unrolled(memory="graph"), 1e-12),
    "last graphs": (Unrolled(memory="graph", graphs=2), 1e-12),
    "forward mode": (Unrolled(mode="forward"), 1e-12),
    "truncated": (Unrolled(steps=2), 1e-12),
    "identity": ("identity", 1e-12),
    "first order": ({"method": "one_step", "learning_rate": 0, "difference": "central"}, 1e-12),
    "one step": ("one_step", 1e-12),
    "finite difference": ("finite_difference", 1e-8),
    "exact": ("exact", 1e-10),
    "neumann": (Neumann(terms=4, step_size=0.1), 1e-12),
    "cg": (ConjugateGradient(max_iterations=300, rtol=1e-13), 1e-9),
    "cg, differences": (ConjugateGradient(max_iterations=60, rtol=1e-6, products="finite_difference"), 1e-4),
    "gauss-newton": (ConjugateGradient(max_iterations=300, rtol=1e-13, curvature="gauss_newton"), 1e-9),
    "soba": ("soba", 1e-12),
}


def test_a_layer_that_the_network_holds_twice_is_adapted_in_both_places() -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        return nn.Sequential(nn.Linear(5, 4), layer, nn.Tanh(), layer, nn.Linear(4, WAYS)).to(DOUBLE)

    class Once(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            first, layer, last = self
            out: Tensor = last(layer(layer(first(x)).tanh()))
            return out

    expected, _ = after(2, made=Once(*[made()[place] for place in (0, 1, 4)]))
    hows: list[dict[str, Any]] = [{}, {"chunk_size": 2}, {"chunk_size": 1}, {"vectorized": False}]
    for how in hows:
        assert close(after(2, made=made(), **how)[0], expected)


@pytest.mark.parametrize("name", METHODS)
def test_chunks_give_the_gradients_of_all_tasks_together(name: str) -> None:
    method, tolerance = METHODS[name]
    # β above the curvature's most negative eigenvalue, so that every system is definite
    expected, together = after(2, method=method, proximal=3.0, optimizer=sgd(0.1))
    found, chunked = after(2, method=method, proximal=3.0, optimizer=sgd(0.1), chunk_size=2)
    assert close(found, expected, tolerance)
    assert chunked.losses == pytest.approx(together.losses, rel=1e-7)
    assert chunked.metrics == pytest.approx(together.metrics)


@pytest.mark.parametrize(
    "kind",
    [
        {"outer": {"learned_rates": "0.*"}},
        {"learner": WatchedPrototypes, "outer": {"head": "2"}},
        {"params": "2.*"},
        {"optimizer": adam},
        {"optimizer": sgd(momentum=0.9)},
        {"max_grad_norm": 0.2},
        {"vectorized": False},
        {"criterion": lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=0.1)},
    ],
    ids=["rates", "prototypes", "head only", "adam", "momentum", "clipped", "not vectorised", "criterion"],
)
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(memory="graph")], ids=["replay", "graph"])
def test_whatever_adapts_and_however(kind: dict[str, Any], method: Any) -> None:
    expected, _ = after(2, method=method, proximal=3.0, **kind)
    found, _ = after(2, method=method, proximal=3.0, chunk_size=2, **kind)
    assert close(found, expected, 1e-10)


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(memory="graph")], ids=["replay", "graph"])
def test_a_chunks_masks_are_the_same_in_all_passes(method: Any) -> None:
    found = []
    for limit in (None, 1e9):  # clipping is of all tasks: updates are then differentiated by products of the whole sum
        torch.manual_seed(0)
        made = network(dropout=0.5, width=12)
        gradient, _ = after(2, method=method, made=made, chunk_size=2, max_grad_norm=limit)
        found.append(gradient)
    assert close(*found)


def test_masks_are_the_same_in_products_of_a_chunk_and_of_the_sum() -> None:
    engine = engine_of("exact", made=network(dropout=0.5), tasks=episodes(tasks=2), chunk_size=1, proximal=3.0)
    engine.step()
    assert hypergradcheck(engine).passed


def test_chunks_have_masks_of_their_own_and_leave_the_generators_alone() -> None:
    one = episodes(tasks=1)[0]
    same = TaskBatch(*(part.expand(2, *part.shape[1:]) for part in one))
    inner = adaptation(engine_of(made=network(dropout=0.5, width=12), tasks=[same], chunk_size=1))
    states = []
    for _ in range(2):
        inner.loss(None)["loss"].backward()
        states.append(torch.get_rng_state())
    first, second = inner.displacements()["0.weight"].grad  # type: ignore[misc]
    assert not torch.allclose(first, second)
    torch.set_rng_state(states[0])
    torch.randint(2**62, ())  # the one number that a loss draws
    assert torch.equal(torch.get_rng_state(), states[1])


def test_the_check_finds_what_chunks_computed() -> None:
    for method in ("cg", Unrolled()):
        engine = engine_of(method, tasks=episodes(tasks=2), chunk_size=1, steps=25, proximal=3.0, optimizer=sgd(0.2))
        engine.step()
        assert hypergradcheck(engine).passed


def test_products_of_the_sum_of_chunks() -> None:
    """What the engine does not ask for, as it goes chunk by chunk: second derivatives by all tensors at once."""
    for size in (None, 2):
        inner = adaptation(engine_of(chunk_size=size))
        with torch.no_grad():
            for place, part in enumerate(inner.parameters):
                part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(place), dtype=DOUBLE))
        parameters = (*inner.parameters, *inner.network.parameters())
        grads = torch.autograd.grad(2 * inner.loss(None)["loss"], inner.parameters, create_graph=True)
        products = torch.autograd.grad(grads, parameters, [grad.detach().cos() for grad in grads])
        mixed = torch.autograd.grad(inner.loss(None)["loss"], list(inner.network.parameters()), create_graph=True)
        back = torch.autograd.grad(mixed, parameters, [grad.detach().cos() for grad in mixed])
        flat = torch.cat([part.flatten() for part in (*grads, *products, *mixed, *back)]).detach()
        if size is None:
            expected = flat
    assert close(flat, expected)
    first = torch.autograd.grad(inner.loss(None)["loss"], inner.parameters, create_graph=True)
    with pytest.raises(LossError, match="no third derivatives"):
        torch.autograd.grad(sum(part.square().sum() for part in first), inner.parameters, create_graph=True)


def test_half_precision_is_that_of_the_pass() -> None:
    config = EngineConfig(progress=False, precision="bfloat16")
    tasks = episodes(torch.float32, tasks=4)  # a single task's products round in another order
    expected, _ = after(1, made=network(torch.float32), tasks=tasks, config=config)
    found, _ = after(1, made=network(torch.float32), tasks=tasks, config=config, chunk_size=2)
    full, _ = after(1, made=network(torch.float32), tasks=tasks, chunk_size=2)
    assert close(found, expected, 1e-5)
    assert not close(full, expected, 1e-5)


def test_adaptation_to_new_tasks_goes_in_chunks() -> None:
    whole, parts = (adaptation(engine_of(chunk_size=size, optimizer=adam)) for size in (None, 2))
    expected, found = (inner.adapt(episodes()[3], steps=4) for inner in (whole, parts))
    assert list(found) == list(expected)
    assert all(close(found[name], value) for name, value in expected.items())
    head = adaptation(engine_of(chunk_size=2, params="2.*")).adapt(episodes()[3])
    assert head["0.weight"].shape == (4, 5)
    assert head["2.weight"].shape == (TASKS, WAYS, 4)


def test_outputs_are_those_of_all_tasks_or_none() -> None:
    engine = engine_of(chunk_size=2)
    assert "outputs" not in adaptation(engine).loss(None)
    assert "outputs" not in watched(engine).loss(None)
    assert "outputs" in adaptation(engine_of(chunk_size=TASKS)).loss(None)


# What it costs


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        # each update 1 forward and 1 backward pass; on the way back, for each chunk, 1 forward and 2 backward passes
        (Unrolled(), lambda chunks: (3 * chunks, 6 * chunks)),
        # the set-up 1 and 1, then the products: 4 of the series, and the mixed one
        (Neumann(terms=4, step_size=0.1), lambda chunks: (chunks, 6 * chunks)),
    ],
    ids=["unrolled", "neumann"],
)
def test_passes(method: Any, extra: Callable[[int], tuple[int, int]]) -> None:
    for size, chunks in ((None, 1), (2, 3), (1, 5)):
        _, result = after(1, method=method, chunk_size=size, proximal=3.0)
        forward, backward = extra(chunks)
        assert result.passes == (4 + forward, 4 + backward)


@pytest.mark.parametrize(
    ("method", "share"),
    [(Unrolled(), 0.3), ("cg", 0.3), ("identity", 0.3)],
    ids=["replay", "cg", "identity"],
)
def test_memory_is_that_of_a_chunk(method: Any, share: float) -> None:
    def peak(size: int | None) -> int:
        made = network(size=40, width=4)  # activations outweigh parameters
        tasks = episodes(tasks=16, size=40, queries=8)
        engine = engine_of(method, made=Wide(made), tasks=tasks, chunk_size=size, proximal=3.0)
        engine.step()
        with measured_peak(CPU) as found:
            engine.step()
        return found.peak

    assert peak(1) < share * peak(None)


class Wide(nn.Module):
    """A network whose activations are much larger than its parameters."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        wide = x.unsqueeze(1) * torch.linspace(0.5, 1.5, 32, dtype=x.dtype).unsqueeze(-1)
        out: Tensor = self.inner(wide.sin()).mean(1)
        return out


def test_the_meter_counts_what_is_held_at_once() -> None:
    with measured_peak(CPU) as found:
        first = torch.zeros(MIB // 4)
        second = first + 1
        view = second.view(2, -1)
        del first
        third = view * 2
        del view, second
    assert (found.peak, found.held) == (2 * MIB, MIB)
    with measured_peak(CPU, limit=3 * MIB) as found:
        kept = [torch.zeros(MIB // 4) for _ in range(8)]
        raise AssertionError
    assert found.peak == 4 * MIB  # the fourth is one too many
    assert third.numel() == MIB // 4
    assert "kept" not in locals()


# Which size


def chosen(budget: int, seconds: Mapping[int, float], count: int = 12) -> Any:
    return choose(
        count, budget, lambda size: Need(10 * size, 10 * size), lambda size: seconds[size] * size, given=True, name="it"
    )


def test_the_fastest_size_within_the_budget_is_chosen() -> None:
    seconds = {1: 1.0, 2: 0.8, 4: 0.5, 8: 0.6, 12: 0.55}
    assert chosen(1000, seconds).size == 4
    assert [trial.size for trial in chosen(1000, seconds).trials] == [1, 2, 4, 8, 12]
    assert chosen(39, seconds).size == 2
    assert chosen(10, seconds).size == 1
    falling = {size: 1 / size for size in seconds}
    assert chosen(1000, falling).size == 12
    assert chosen(110, falling).size == 8
    assert chosen(1000, {**falling, 4: 0.09, 8: 0.085, 12: 0.083}).size == 4  # about as fast, in less memory
    rising = {1: 0.5, 2: 0.7, 4: 0.8, 8: 0.1, 12: 0.1}
    assert [trial.size for trial in chosen(1000, rising).trials] == [1, 2, 4]
    assert chosen(1000, {**rising, 4: 0.6}).size == 8
    with pytest.raises(ConfigError, match=r"it: memory_budget is 0.0 MiB, and tasks one by one take 0.0 MiB"):
        chosen(9, seconds)


def test_a_size_that_would_exceed_the_budget_is_not_even_tried() -> None:
    asked = []

    def cost(size: int) -> Need:
        asked.append(size)
        return Need(10 * size, 10 * size)

    choose(64, 100, cost, lambda size: 1.0, given=True, name="it")
    assert asked == [1, 2, 4, 8]


BUDGETED = {
    "replay": Unrolled(),
    "graph": Unrolled(memory="graph"),
    "last graph": Unrolled(memory="graph", graphs=1),
    "cg": "cg",
}


def peaks_of(method: Any) -> list[int]:
    made, tasks = Wide(network(size=40, width=4)), episodes(tasks=1, size=40, queries=8)
    engine = engine_of(method, made=made, tasks=tasks, chunk_size="auto", memory_budget=10**9, proximal=3.0)
    engine.step()
    choice = adaptation(engine).chunking
    assert choice is not None
    return [trial.peak for trial in choice.trials]


def test_graphs_that_are_not_kept_are_not_promised() -> None:
    kept, last, none = (peaks_of(BUDGETED[name])[0] for name in ("graph", "last graph", "replay"))
    assert none < last < kept


@pytest.mark.parametrize("method", BUDGETED.values(), ids=BUDGETED)
@pytest.mark.parametrize("tight", [False, True])
def test_a_steps_memory_stays_in_the_budget(method: Any, tight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the largest chunks the fastest: what a whole outer step takes, measured, is what was promised."""
    monkeypatch.setattr("bilevel.problems.few_shot.measurement.timed", lambda body, device: 1.0)

    def engine(budget: int) -> Engine:
        made, tasks = Wide(network(size=40, width=4)), episodes(tasks=16, size=40, queries=8)
        return engine_of(method, made=made, tasks=tasks, chunk_size="auto", memory_budget=budget, proximal=3.0)

    wide = engine(10**9)
    wide.step()
    choice = adaptation(wide).chunking
    assert choice is not None
    assert choice.size == 16
    peaks = [trial.peak for trial in choice.trials]
    budget = (peaks[2] + peaks[3]) // 2 if tight else max(peaks)
    running = engine(budget)
    running.step()
    choice = adaptation(running).chunking
    assert choice is not None
    assert choice.size == (4 if tight else 16)
    assert all(trial.peak <= budget for trial in choice.trials)
    with measured_peak(CPU) as found:
        running.step()
    size = sum(part.nbytes for problem in running.problems.values() for part in problem.parameters)
    assert found.peak <= budget + 20 * size  # vectors of displacements: the trajectory's, gradients, cotangents


def test_a_budget_that_is_too_small_is_an_error() -> None:
    engine = engine_of(chunk_size="auto", memory_budget=100)
    before = [part.clone() for part in watched(engine).parameters]
    with pytest.raises(ConfigError, match="problem 'adaptation': memory_budget is 0.0 MiB, and tasks one by one take"):
        engine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, watched(engine).parameters, strict=True))


def test_the_choice_is_reported_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(chunk_size="auto")
    inner = adaptation(engine)
    assert inner.chunking is None
    assert len(inner.chunks()) == TASKS  # nothing is known of what fits: one at a time
    generators = torch.get_rng_state()
    first = engine.step()
    choice = inner.chunking
    assert choice is not None
    assert choice.size in (1, 2, 4, TASKS)
    assert first.metrics["adaptation/chunk_size"] == choice.size
    assert 0 < choice.budget <= 0.5 * free_memory(CPU) * 1.2
    assert str(choice).startswith(f"chunks of {choice.size} tasks")
    monkeypatch.setattr(budget_module, "timed", None)  # nothing is measured again
    engine.step()
    assert inner.chunking is choice
    if choice.size == TASKS:
        assert torch.equal(torch.get_rng_state(), generators)
    expected, _ = after(2)
    assert close(watched(engine).seen, expected)


def test_a_run_goes_on_from_a_file_with_the_chunks_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(fastest: int) -> Engine:
        monkeypatch.setattr(
            "bilevel.problems.few_shot.measurement.Costs.seconds",
            lambda costs, size: size * (1.0 if size == fastest else 1.25),
        )
        made, tasks = network(torch.float32, dropout=0.2), episodes(torch.float32)
        return engine_of(made=made, tasks=tasks, chunk_size="auto", memory_budget=MIB)

    torch.manual_seed(0)
    whole = engine(2)
    whole.run(4)
    torch.manual_seed(0)
    first = engine(2)
    first.run(2)
    first.save(tmp_path / "state.ckpt")
    second = engine(4)
    second.load(tmp_path / "state.ckpt")
    second.run(2)
    choice = adaptation(second).chunking
    assert choice is not None
    assert (choice.size, choice.budget, choice.trials) == (2, MIB, ())
    ours, theirs = (watched(e).parameters for e in (second, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = engine(4)
    other.run(4)
    assert not all(torch.equal(a, b) for a, b in zip(watched(other).parameters, theirs, strict=True))


def on_a_rank(rank: int, port: int, folder: str) -> None:
    """Rank 0 is fastest with chunks of 4 and rank 1 with chunks of 2; then rank 1 has too little memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "bilevel.problems.few_shot.measurement.Costs.seconds",
                lambda costs, size: size * (1.0 if size == (4, 2)[rank] else 1.25),
            )
            engine = engine_of("cg", chunk_size="auto", proximal=3.0)
            engine.step()
        found = {"size": engine.step().metrics["adaptation/chunk_size"], "seen": watched(engine).seen}
        chunking = adaptation(engine).chunking
        assert chunking is not None
        sizes = [trial.size for trial in chunking.trials]
        with pytest.raises(ConfigError) as caught:
            engine_of("cg", chunk_size="auto", memory_budget=(10**9, 100)[rank]).step()
        torch.save({**found, "sizes": sizes, "error": str(caught.value)}, Path(folder) / f"{rank}.pt")
        dist.barrier()  # gloo's threads do not like a peer that has gone
    finally:
        dist.destroy_process_group()
    os._exit(0)  # what was found is saved, and gloo's threads can abort an interpreter that is coming to its end


@pytest.mark.timeout(120)
def test_ranks_agree_on_the_smallest_size_and_fail_together(tmp_path: Path) -> None:
    port = free_port()
    multiprocessing.spawn(on_a_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["size"] == second["size"] == 2
    assert 2 in first["sizes"]  # what was measured here is kept, and this size was in the budget
    assert torch.equal(first["seen"], second["seen"])
    expected, _ = after(2, method="cg", proximal=3.0, chunk_size=2)
    assert close(first["seen"], expected, 1e-10)
    assert first["error"] == "problem 'adaptation': another rank could choose no chunk size; its error says why"
    assert "memory_budget is 0.0 MiB, and tasks one by one take" in second["error"]


@pytest.mark.parametrize("given", [2, None])
def test_a_size_that_is_given_stays_whatever_file_is_loaded(
    given: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bilevel.problems.few_shot.measurement.Costs.seconds", lambda costs, size: abs(size - 1) + 1.0)
    chosen, fixed = engine_of(chunk_size="auto"), engine_of(chunk_size=given)
    chosen.run(2)
    chosen.save(tmp_path / "chosen.ckpt")
    fixed.load(tmp_path / "chosen.ckpt")
    assert len(adaptation(fixed).chunks()) == (1 if given is None else 3)
    assert adaptation(fixed).chunking is None
    reports = [engine.step().losses for engine in (chosen, fixed)]
    assert reports[0] == pytest.approx(reports[1], rel=1e-9)
    # And from there to a run that chooses: what was chosen once, or what is found now
    fixed.save(tmp_path / "fixed.ckpt")
    again = engine_of(chunk_size="auto")
    again.load(tmp_path / "fixed.ckpt")
    choice = adaptation(again).chunking
    assert choice is not None
    assert (choice.size, choice.trials) == (1, ())
    never = engine_of(chunk_size=given)
    never.step()
    never.save(tmp_path / "never.ckpt")
    chosen.load(tmp_path / "never.ckpt")
    assert adaptation(chosen).chunking is None
    chosen.step()
    choice = adaptation(chosen).chunking
    assert choice is not None
    assert choice.size == 1
    assert choice.trials


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": "all"}, r"adaptation.chunk_size must be an integer of at least 1, 'auto' or None, not 'all'"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
        ({"chunk_size": 1.5}, "chunk_size must be an integer of at least 1"),
        ({"chunk_size": "auto", "memory_budget": 0}, "memory_budget must be an integer of at least 1"),
        ({"chunk_size": "auto", "memory_budget": "1G"}, "memory_budget must be an integer of at least 1"),
        ({"chunk_size": 2, "memory_budget": 10}, "memory_budget is what chunk_size='auto' keeps to; chunk_size is 2"),
        ({"memory_budget": 10}, "memory_budget is what chunk_size='auto' keeps to; chunk_size is None"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(**settings)


def test_errors_within_chunks_are_those_of_the_whole() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            return slope

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Once.apply(self.inner(x))
            return out

    engine = engine_of("identity", made=Marked(), chunk_size=2, vectorized=False)
    with pytest.raises(LossError, match="cannot be differentiated twice"):
        engine.step()


# Layers of many tasks


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_normalisation_of_all_tasks_at_once(kind: Any, affine: bool) -> None:
    torch.manual_seed(0)
    shape = (4, 6, 3, *([2, 2] if kind is nn.BatchNorm2d else []))
    layer = kind(3, affine=affine, eps=0.1, track_running_stats=False).double()
    inputs = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    values = {name: torch.rand(4, 3, dtype=DOUBLE, requires_grad=True) for name, _ in layer.named_parameters()}
    given = [inputs, *values.values()]
    found = []
    for vectorized in (True, False):
        outputs = stacked_outputs(layer, values, inputs, vectorized=vectorized)
        grads = torch.autograd.grad(outputs.sin().sum(), given, create_graph=True)
        products = torch.autograd.grad(sum(grad.square().sum() for grad in grads), given)
        found.append([outputs, *grads, *products])
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)


def test_layers_that_see_the_same_in_all_tasks() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False, track_running_stats=False)
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) + self.norm(torch.tensor([[0.0, 1.0], [3.0, 5.0]])).prod()
            return out

    made, inputs = Constant(), torch.randn(3, 4, 2)
    values = {"inner.bias": torch.rand(3, 2)}
    found, expected = (stacked_outputs(made, values, inputs, vectorized=vectorized) for vectorized in (True, False))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    "geometry", [{}, {"padding": 1}, {"stride": 2, "padding": (1, 2)}, {"dilation": 2, "stride": (1, 3)}]
)
def test_convolutions_of_each_task_as_products(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 9, 8, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(3, 5, 2, 3, 2, dtype=DOUBLE, requires_grad=True)
    pairs = [(value, value) if isinstance(value, int) else value for value in {**GEOMETRY, **geometry}.values()]
    found = []
    for outputs in (
        convolved(x, weight, *pairs),
        torch.stack([F.conv2d(one, own, **geometry) for one, own in zip(x, weight, strict=True)]),
    ):
        grads = torch.autograd.grad(outputs.sin().sum(), [x, weight], create_graph=True)
        products = torch.autograd.grad(sum(grad.square().sum() for grad in grads), [x, weight])
        found.append([outputs, *grads, *products])
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)


GEOMETRY: Mapping[str, Any] = {"stride": 1, "padding": 0, "dilation": 1}


def test_methods_of_the_table_exist() -> None:
    assert all(as_estimator(method) for method, _ in METHODS.values())


# CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("adapting", ["*", "4.*"])
def test_cuda_convolutions_agree_with_the_cpu(adapting: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        made = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, stride=2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(100, WAYS)
        )
        batch = episodes(size=100)[0]
        images = TaskBatch(*(p.unflatten(-1, (1, 10, 10)) if p.is_floating_point() else p for p in batch))
        engine = engine_of(made=made.to(device, DOUBLE), tasks=[images.to(device)], params=adapting)
        engine.step()
        found.append(watched(engine).seen.cpu())
    assert close(*found, 1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_chunks_agree_with_the_cpu_and_stay_in_the_budget() -> None:
    gradients = []
    for device, size in (("cpu", None), ("cuda", 2), ("cuda", "auto")):
        batches = [episodes()[0].to(device)]
        made = network(dropout=0.0).to(device)
        engine = engine_of(made=made, tasks=batches, chunk_size=size)
        engine.step()
        gradients.append(watched(engine).seen.cpu())
    assert close(gradients[1], gradients[0], 1e-10)
    assert close(gradients[2], gradients[0], 1e-10)
    choice = adaptation(engine).chunking
    assert choice is not None
    assert all(0 < trial.peak <= choice.budget for trial in choice.trials)
