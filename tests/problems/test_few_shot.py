"""Few-shot learning: against loops over tasks in plain torch, against closed forms, and as an engine runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ConjugateGradient, Engine, EngineConfig, Neumann, Unrolled, hypergradcheck
from bilevel.errors import (
    BilevelWarning,
    ConfigError,
    DataError,
    GraphError,
    NonFiniteError,
    ParameterError,
    UnknownNameError,
)
from bilevel.hypergrad.registry import available_methods
from bilevel.problems import (
    Adaptation,
    Episodes,
    FunctionEpisodes,
    MetaLearner,
    PrototypeMetaLearner,
    TaskBatch,
)

DOUBLE = torch.float64
WAYS, SHOTS, QUERIES, TASKS, RATE = 3, 2, 4, 3, 0.3


def sgd(lr: float = RATE, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def episodes(dtype: torch.dtype = DOUBLE, *, tasks: int = TASKS, image: bool = False, seed: int = 0) -> Episodes:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % 8
    shape = (1, 6, 6) if image else (5,)
    centres = torch.randn(8, *shape, generator=generator)
    inputs = (centres[labels] + 0.5 * torch.randn(80, *shape, generator=generator)).to(dtype)
    return Episodes((inputs, labels), WAYS, SHOTS, QUERIES, tasks, seed=seed)


def network(dtype: torch.dtype = DOUBLE, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS)).to(dtype)


def convolutional(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(2, track_running_stats=False)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), norm, nn.Softplus(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, WAYS)
        ).to(dtype)


def engine_of(
    method: Any = "unrolled",
    *,
    learner: Callable[..., MetaLearner] = MetaLearner,
    made: nn.Module | None = None,
    tasks: Any = None,
    steps: int = 3,
    optimizer: Any = None,
    config: EngineConfig | None = None,
    outer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    made = network() if made is None else made
    tasks = episodes() if tasks is None else tasks
    meta = learner(made, **{"optimizer": sgd(0.1), **(outer or {})})
    inner = Adaptation(made, tasks, optimizer=optimizer or sgd(), steps=steps, **settings)
    return Engine([meta, inner], config or EngineConfig(progress=False), hypergradient=method)


class Watched(MetaLearner):
    """Keeps the gradient of each update, and lets θ stand where it is."""

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        self.seen = dict(zip(self.parameter_names, (g.clone() for g in gradients), strict=True))
        self.num_updates += 1


class WatchedPrototypes(PrototypeMetaLearner, Watched):
    pass


def hypergradient_of_a_step(**settings: Any) -> dict[str, Tensor]:
    running = engine_of(**{"learner": Watched, **settings})
    running.step()
    meta = running.problems["watched" if "learner" not in settings else "watched_prototypes"]
    assert isinstance(meta, Watched)
    return meta.seen


# A loop over tasks in plain torch: what the papers' algorithms say, with a graph through every step.


def reference(
    made: nn.Sequential,
    batch: TaskBatch,
    *,
    steps: int,
    adapt: Callable[[str], bool] = lambda name: True,
    rates: Mapping[str, Tensor] | None = None,
    first_order: bool = False,
    prototypes: bool = False,
    criterion: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    total = torch.zeros((), dtype=DOUBLE)
    for sx, sy, qx, qy in zip(*batch, strict=True):
        fast = {name: p.clone() for name, p in made.named_parameters()}  # a step's gradient is not that of prototypes
        if prototypes:
            features = made[:-1](sx)
            centres = torch.stack([features[sy == k].mean(0) for k in range(WAYS)])
            fast["2.weight"], fast["2.bias"] = 2 * centres, -(centres**2).sum(1)
        for _ in range(steps):
            loss = criterion(torch.func.functional_call(made, fast, (sx,)), sy)
            names = [name for name in fast if adapt(name)]
            grads = torch.autograd.grad(loss, [fast[name] for name in names], create_graph=not first_order)
            for name, grad in zip(names, grads, strict=True):
                rate = RATE if rates is None else rates[name]
                fast[name] = fast[name] - rate * (grad.detach() if first_order else grad)
        total = total + criterion(torch.func.functional_call(made, fast, (qx,)), qy) / len(batch.support_targets)
    return total


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-10) -> bool:
    assert list(found) == list(expected)
    return all(torch.allclose(found[name], expected[name], rtol=tolerance, atol=tolerance) for name in found)


def gradients(value: Tensor, made: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    known = {name: p for name, p in made.named_parameters() if names is None or name in names}
    return dict(zip(known, torch.autograd.grad(value, list(known.values())), strict=True))


@pytest.mark.parametrize("steps", [1, 5])
class TestAgainstPlainTorch:
    def test_maml(self, steps: int) -> None:
        made = network()
        expected = gradients(reference(made, episodes()[0], steps=steps), made)
        assert close(hypergradient_of_a_step(steps=steps), expected)
        first = gradients(reference(made, episodes()[0], steps=steps, first_order=True), made)
        assert not close(first, expected, 1e-3)  # they could be told apart

    def test_first_order_maml(self, steps: int) -> None:
        made = network()
        expected = gradients(reference(made, episodes()[0], steps=steps, first_order=True), made)
        method = {"method": "one_step", "learning_rate": 0, "difference": "central"}
        assert close(hypergradient_of_a_step(steps=steps, method=method), expected)

    def test_anil(self, steps: int) -> None:
        made = network()
        value = reference(made, episodes()[0], steps=steps, adapt=lambda name: name.startswith("2."))
        assert close(hypergradient_of_a_step(steps=steps, params="2.*"), gradients(value, made))

    def test_meta_sgd(self, steps: int) -> None:
        made = network()
        rates = {name: torch.full_like(p, RATE, requires_grad=True) for name, p in made.named_parameters()}
        value = reference(made, episodes()[0], steps=steps, rates=rates)
        own = torch.autograd.grad(value, [*made.parameters(), *rates.values()])
        # The rate of a step on w is η s², whose derivative by s at s = 1 is 2 η.
        expected = dict(zip([f"network.{name}" for name in rates], own[: len(rates)], strict=True))
        expected |= {f"factors.{name}": 2 * RATE * g for name, g in zip(rates, own[len(rates) :], strict=True)}
        assert close(hypergradient_of_a_step(steps=steps, outer={"learned_rates": "*"}), expected)

    def test_prototypes(self, steps: int) -> None:
        made = network()
        value = reference(made, episodes()[0], steps=steps, prototypes=True)
        expected = gradients(value, made, ["0.weight", "0.bias"])
        found = hypergradient_of_a_step(learner=WatchedPrototypes, outer={"head": "2"}, steps=steps)
        assert close(found, expected)


def test_momentum_and_adam_are_differentiated_too() -> None:
    made, batch = network(), episodes()[0]
    total = torch.zeros((), dtype=DOUBLE)
    for sx, sy, qx, qy in zip(*batch, strict=True):
        fast, speed = dict(made.named_parameters()), {name: torch.zeros_like(p) for name, p in made.named_parameters()}
        for _ in range(3):
            loss = F.cross_entropy(torch.func.functional_call(made, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            for name, grad in zip(fast, grads, strict=True):
                speed[name] = 0.9 * speed[name] + grad
                fast[name] = fast[name] - RATE * speed[name]
        total = total + F.cross_entropy(torch.func.functional_call(made, fast, (qx,)), qy) / TASKS
    assert close(hypergradient_of_a_step(optimizer=sgd(momentum=0.9)), gradients(total, made))


def test_regression_of_sinusoids() -> None:
    made = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(DOUBLE)
    tasks = FunctionEpisodes(sinusoid, tasks=4)
    value = reference(made, tasks[0], steps=2, criterion=F.mse_loss)
    found = hypergradient_of_a_step(made=made, tasks=tasks, steps=2, criterion=F.mse_loss)
    assert close(found, gradients(value, made))
    running = engine_of(made=made, tasks=tasks, steps=2, criterion=F.mse_loss)
    assert "meta_learner/accuracy" not in running.step().metrics
    inner = adaptation(running)
    assert inner.assess(tasks, 3).accuracies is None
    assert set(inner.assess(tasks, 3).metrics()) == {"loss", "loss_interval"}


def sinusoid(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    height = 0.1 + 4.9 * torch.rand((), generator=generator, dtype=DOUBLE)
    shift = torch.pi * torch.rand((), generator=generator, dtype=DOUBLE)
    x = 10 * torch.rand(15, 1, generator=generator, dtype=DOUBLE) - 5
    y = height * (x - shift).sin()
    return x[:5], y[:5], x[5:], y[5:]


def test_meta_learned_sinusoids_are_learned_faster() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).to(DOUBLE)
    adam = {"optimizer": lambda params: torch.optim.Adam(params, lr=5e-3)}
    running = engine_of(
        made=made,
        tasks=FunctionEpisodes(sinusoid, tasks=8),
        steps=1,
        optimizer=sgd(0.05),
        criterion=F.mse_loss,
        outer=adam,
    )
    new = FunctionEpisodes(sinusoid, tasks=50, seed=1)
    before = adaptation(running).assess(new, 2).metrics()["loss"]
    running.run(250)
    after = adaptation(running).assess(new, 2)
    at_start = adaptation(running).assess(new, 2, steps=0).metrics()["loss"]
    assert after.metrics()["loss"] < 0.7 * before
    assert after.metrics()["loss"] < 0.75 * at_start  # the step is what helps
    assert adaptation(running).assess(new, 2, steps=5).metrics()["loss"] < after.metrics()["loss"]


def adaptation(running: Engine) -> Adaptation:
    found = running.problems["adaptation"]
    assert isinstance(found, Adaptation)
    return found


# Implicit MAML


def test_implicit_maml_is_the_exact_implicit_derivative() -> None:
    made, strength = network(), 2.0
    batch = episodes()[0]
    sizes = [p.numel() for p in made.parameters()]
    flat = torch.cat([p.detach().flatten() for p in made.parameters()])

    def evaluated(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = w.split(sizes)
        values = {n: part.view_as(p) for (n, p), part in zip(made.named_parameters(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(made, values, (x,)), y)

    total = torch.zeros_like(flat)
    for sx, sy, qx, qy in zip(*batch, strict=True):
        w = flat.clone()
        for _ in range(400):
            w = w - 0.2 * (torch.func.grad(evaluated)(w, sx, sy) + strength * (w - flat))
        H = torch.func.jacrev(torch.func.grad(evaluated))(w, sx, sy)
        v = torch.func.grad(evaluated)(w, qx, qy)
        total += torch.linalg.solve(torch.eye(len(w), dtype=DOUBLE) + H / strength, v) / TASKS  # equation (6)
    for method in ("exact", ConjugateGradient(max_iterations=200, rtol=1e-12, damping=0.0)):
        running = engine_of(method, learner=Watched, made=made, steps=100, optimizer=sgd(0.2), proximal=strength)
        running.step()
        meta = running.problems["watched"]
        assert isinstance(meta, Watched)
        found = torch.cat([g.flatten() for g in meta.seen.values()])
        assert torch.allclose(found, total, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "method",
    [
        "exact",
        ConjugateGradient(max_iterations=300, rtol=1e-9, damping=0.0),
        Neumann(terms=100, step_size="auto"),
        Unrolled(),
        "gmres",
        "minres",
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "rates", "prototypes", "head only"])
def test_hypergradients_pass_the_check(method: Any, kind: str) -> None:
    choices: dict[str, dict[str, Any]] = {
        "plain": {},
        "rates": {"outer": {"learned_rates": "0.*"}},
        "prototypes": {"learner": PrototypeMetaLearner, "outer": {"head": "2"}},
        "head only": {"params": "2.*"},
    }
    tasks = episodes(tasks=2)
    running = engine_of(method, steps=25, proximal=3.0, optimizer=sgd(0.2), tasks=tasks, **choices[kind])
    running.step()
    report = hypergradcheck(running)
    assert report.passed, report


def test_float32_engines_and_batch_normalisation_pass_the_check() -> None:
    tasks = episodes(torch.float32, tasks=2, image=True)
    running = engine_of(
        "cg", made=convolutional(torch.float32), tasks=tasks, steps=50, proximal=1.0, optimizer=sgd(0.2)
    )
    running.step()
    assert hypergradcheck(running, rtol=5e-3).passed


@pytest.mark.parametrize("method", sorted(available_methods()))
@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
def test_every_method_runs(method: str) -> None:
    running = engine_of(method, steps=2, proximal=1.0, tasks=episodes(tasks=2))
    before = [p.detach().clone() for p in running.problems["meta_learner"].parameters]
    for _ in range(2):
        running.step()
    moved = [not torch.equal(p, b) for p, b in zip(running.problems["meta_learner"].parameters, before, strict=True)]
    assert all(moved)


# Together, in chunks, one after the other


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("made", [network, convolutional])
@pytest.mark.parametrize("method", ["unrolled", "identity"])
def test_tasks_together_in_chunks_and_one_after_the_other(dtype: torch.dtype, made: Any, method: str) -> None:
    found = []
    for how in ({}, {"chunk_size": 2}, {"vectorized": False}):
        tasks = episodes(dtype, image=made is convolutional)
        running = engine_of(method, made=made(dtype), tasks=tasks, proximal=1.0, steps=2, **how)
        running.step()
        state = running.problems["meta_learner"].module.state_dict()
        assert all(value.dtype == dtype for value in state.values())
        found.append(torch.cat([value.flatten() for value in state.values()]))
    tolerance = 1e-10 if dtype == DOUBLE else 1e-4
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=tolerance, atol=tolerance)


def test_a_network_without_batching_rules_is_evaluated_one_after_the_other() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out if float(out.sum()) > 0 else 2 * out

    with pytest.raises(RuntimeError, match="vmap"):
        engine_of(made=Branching()).step()
    running = engine_of(made=Branching(), vectorized=False)
    assert running.step().losses["meta_learner"] > 0


def test_tasks_have_their_own_dropout_masks_and_products_see_the_same_ones() -> None:
    made = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, WAYS)).to(DOUBLE)
    one = episodes(tasks=1)[0]
    same = TaskBatch(*(part.expand(2, *part.shape[1:]) for part in one))
    running = engine_of("exact", made=made, tasks=[same], steps=3, proximal=1.0)
    first, second = adaptation(running).outputs(dict(made.named_parameters()), same.support_inputs)
    assert not torch.allclose(first, second)
    running.step()
    assert hypergradcheck(running).passed


def test_statistics_are_those_of_a_task() -> None:
    made = convolutional()
    inner = adaptation(engine_of(made=made, tasks=episodes(image=True)))
    batch = episodes(image=True)[0]
    together = inner.outputs(dict(made.named_parameters()), batch.query_inputs)
    alone = torch.stack([made(inputs) for inputs in batch.query_inputs])
    mixed = made(batch.query_inputs.flatten(0, 1)).unflatten(0, (TASKS, -1))
    assert torch.allclose(together, alone)
    assert not torch.allclose(together, mixed, rtol=1e-2)


# Which tasks


class Noted(MetaLearner):
    """Notes the tasks that the outer loss is taken on."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, name="meta_learner", **settings)
        self.noted: list[Tensor] = []

    def on_step_end(self, result: Any) -> None:
        self.noted.append(self.adaptation().tasks().query_inputs)


def test_every_step_has_the_next_tasks_and_both_problems_the_same() -> None:
    running = engine_of(learner=Noted)
    for _ in range(4):
        running.step()
    meta = running.problems["meta_learner"]
    assert isinstance(meta, Noted)
    expected = [batch.query_inputs for batch in itertools.islice(episodes(), 4)]
    assert all(torch.equal(found, wanted) for found, wanted in zip(meta.noted, expected, strict=True))


def test_what_is_asked_of_an_engine_changes_no_tasks() -> None:
    running, other = engine_of(proximal=1.0), engine_of(proximal=1.0)
    for asked in (running.hypergradient, lambda: hypergradcheck(running), running.evaluate):
        running.step()
        other.step()
        asked()
    last = adaptation(running).tasks()
    assert torch.equal(last.query_inputs, episodes()[2].query_inputs)
    ours, theirs = (e.problems["meta_learner"].parameters for e in (running, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_list_of_batches_is_gone_through_again() -> None:
    batches = [episodes()[0], episodes()[1]]
    running = engine_of(tasks=batches)
    for number in range(3):
        running.step()
        assert adaptation(running).tasks().query_inputs is batches[number % 2].query_inputs


def test_a_run_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, first, second = (engine_of(outer={"learned_rates": "*"}) for _ in range(3))
    whole.run(5)
    first.run(2)
    first.save(tmp_path / "state.ckpt")
    second.load(tmp_path / "state.ckpt")
    second.run(3)
    ours, theirs = (e.problems["meta_learner"].parameters for e in (second, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_refused_step_keeps_its_tasks_and_a_skipped_one_leaves_them() -> None:
    broken = episodes()[1]._replace(query_inputs=torch.full_like(episodes()[1].query_inputs, torch.nan))
    batches = [episodes()[0], broken, episodes()[2]]
    running = engine_of(tasks=batches)
    running.step()
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            running.step()
    assert int(adaptation(running).module.number) == 0
    running = engine_of(tasks=batches, config=EngineConfig(progress=False, on_non_finite="skip"))
    results = [running.step() for _ in range(3)]
    assert [bool(result.skipped) for result in results] == [False, True, False]
    assert adaptation(running).tasks().query_inputs is batches[2].query_inputs


# Adapting to new tasks


def test_adapting_repeats_the_engines_updates_and_changes_nothing() -> None:
    adam = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
    running = engine_of(optimizer=adam, max_grad_norm=0.5, steps=4, learner=Watched, outer={"name": "meta_learner"})
    running.step()
    inner = adaptation(running)
    before = {name: value.clone() for name, value in inner.module.state_dict().items()}
    generators = torch.get_rng_state()
    found = inner.adapt(episodes()[0])
    values = dict(inner.network.named_parameters())
    for name, displacement in inner.displacements().items():
        assert torch.allclose(found[name], values[name] + displacement, rtol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in inner.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators)
    assert not any(value.requires_grad for value in found.values())


def test_assessment_is_of_every_task_and_steps_may_differ() -> None:
    running = engine_of(held_out=episodes(seed=5, tasks=10), held_out_batches=4, held_out_steps=20)
    running.run(3)
    inner, made = adaptation(running), adaptation(running).network
    assessed = inner.assess(episodes(seed=5, tasks=10), 4, steps=20)
    assert assessed.losses.shape == (40,)
    assert assessed.accuracies is not None
    batch = episodes(seed=5, tasks=10)[1]
    rights = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        fast = dict(made.named_parameters())
        for _ in range(20):
            loss = F.cross_entropy(torch.func.functional_call(made, fast, (sx,)), sy)
            grads = torch.autograd.grad(loss, list(fast.values()))
            fast = {name: p - RATE * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        rights.append((torch.func.functional_call(made, fast, (qx,)).argmax(1) == qy).double().mean())
    assert torch.allclose(assessed.accuracies[10:20].double(), torch.stack(rights), atol=1e-6)
    metrics = assessed.metrics()
    assert metrics["accuracy"] == pytest.approx(float(assessed.accuracies.mean()))
    assert metrics["accuracy_interval"] == pytest.approx(1.96 * float(assessed.accuracies.std()) / 40**0.5)
    assert running.evaluate() == {f"adaptation/{name}": value for name, value in metrics.items()}
    assert engine_of().evaluate() == {}


def test_queries_are_judged_in_evaluation_mode() -> None:
    made = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.9), nn.Linear(4, WAYS)).to(DOUBLE)
    inner = adaptation(engine_of(made=made))
    results = [inner.assess(episodes(), steps=0).losses for _ in range(2)]
    assert torch.equal(*results)
    assert all(part.training for part in made.modules())


def test_adaptation_takes_the_present_learning_rate() -> None:
    inner = adaptation(engine_of(steps=1))
    assert inner.optimizer is not None
    for group in inner.optimizer.param_groups:
        group["lr"] = 0.0
    found = inner.adapt(episodes()[0])
    assert all(
        torch.equal(value, p.expand_as(value))
        for (_, value), p in zip(found.items(), inner.network.parameters(), strict=True)
    )


# What a user may change


def test_a_subclass_says_where_adaptation_starts() -> None:
    class Tilted(Watched):
        def initial_values(self, tasks: TaskBatch) -> Mapping[str, Tensor]:
            values = dict(super().initial_values(tasks))
            return {**values, "2.bias": values["2.bias"] + tasks.support_inputs.mean((1, 2)).unsqueeze(1)}

    running = engine_of(learner=Tilted)
    assert running.step().losses["tilted"] > 0
    values = Tilted.adapted(running.problems["tilted"], episodes()[0], {})  # type: ignore[arg-type]
    assert values["2.bias"].shape == (TASKS, WAYS)


def test_each_problem_may_have_its_own_criterion() -> None:
    smooth = lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=0.3)  # noqa: E731
    plain, other = engine_of().step(), engine_of(outer={"criterion": smooth}).step()
    assert plain.losses["adaptation"] == other.losses["adaptation"]
    assert plain.losses["meta_learner"] != other.losses["meta_learner"]


def test_two_pairs_in_one_engine_are_told_apart_by_name() -> None:
    def pair(number: int, named: bool) -> list[Any]:
        made = network(seed=number)
        meta = MetaLearner(made, optimizer=sgd(), name=f"meta{number}", adaptation=f"fit{number}" if named else None)
        fit = Adaptation(
            made,
            episodes(),
            optimizer=sgd(),
            name=f"fit{number}",
            meta_learner=f"meta{number}" if named else None,
        )
        return [meta, fit]

    def engine(named: bool) -> Engine:
        (m1, f1), (m2, f2) = pair(1, named), pair(2, named)
        return Engine([m1, m2, f1, f2], EngineConfig(progress=False), hypergradient="unrolled")

    assert set(engine(named=True).step().losses) == {"meta1", "meta2", "fit1", "fit2"}
    with pytest.raises(GraphError, match="name the one that is meant"):
        engine(named=False)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"params": "3.*"}, UnknownNameError, "parameter pattern of problem 'adaptation'"),
        ({"proximal": -1.0}, ConfigError, "proximal must be a finite number at least 0"),
        ({"chunk_size": 0}, ConfigError, "chunk_size must be an integer of at least 1"),
        ({"held_out_batches": 0}, ConfigError, "held_out_batches must be an integer of at least 1"),
        ({"held_out_steps": 0}, ConfigError, "held_out_steps must be an integer of at least 1"),
        ({"tasks": []}, DataError, "has no tasks: the list is empty"),
        ({"tasks": [(1, 2)]}, DataError, "tasks\\[0\\] is a tuple"),
        ({"optimizer": 3}, ConfigError, "optimizer of problem 'adaptation' must be a callable"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, ConfigError, "must be a callable"),
        ({"data": [1]}, ConfigError, "takes no data or batches"),
        ({"accumulate": 2}, ConfigError, "takes no accumulate, and was given 2: draw more tasks a batch"),
        ({"outer": {"accumulate": 4}}, ConfigError, "'meta_learner' takes no accumulate"),
        ({"start": 2}, ConfigError, "takes no start.*tasks of its own"),
        ({"stop": 1}, ConfigError, "takes no stop"),
        ({"outer": {"data": [1]}}, ConfigError, "takes no data or batches"),
        ({"outer": {"learned_rates": "0.*"}, "params": "2.*"}, ConfigError, "learns rates of 0.bias, 0.weight"),
        ({"outer": {"learned_rates": "7"}}, UnknownNameError, "parameter pattern of problem 'meta_learner'"),
        ({"learner": PrototypeMetaLearner, "outer": {"head": "1"}}, ParameterError, "the network has: '0', '2'"),
        ({"made": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))}, ParameterError, "track_running_stats=False"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine_of(**settings)


def test_both_problems_need_the_same_network() -> None:
    meta, inner = MetaLearner(network(), optimizer=sgd()), Adaptation(network(), episodes(), optimizer=sgd())
    with pytest.raises(ParameterError, match="have different networks"):
        Engine([meta, inner], EngineConfig(progress=False))
    with pytest.raises(ParameterError, match="needs a network, an nn.Module, not dict"):
        Adaptation({}, episodes(), optimizer=sgd())  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="must be an nn.Module"):
        MetaLearner({}, optimizer=sgd())  # type: ignore[arg-type]


def test_batches_are_refused() -> None:
    running = engine_of()
    with pytest.raises(ConfigError, match="takes no data or batches"):
        running.step({"adaptation": episodes()[0]})
    with pytest.raises(ConfigError, match="takes no data or batches"):
        running.step({"meta_learner": episodes()[0]})


def test_another_number_of_tasks_is_refused() -> None:
    running = engine_of(tasks=[episodes()[0], episodes(tasks=2)[0]])
    running.step()
    with pytest.raises(DataError, match="made for batches of 3 tasks.* this one has 2"):
        running.step()
    torn = episodes()[0]._replace(query_targets=episodes(tasks=2)[0].query_targets)
    with pytest.raises(DataError, match="must have one entry a task"):
        engine_of(tasks=[torn])


@pytest.mark.parametrize("vectorized", [True, False])
def test_more_classes_than_outputs_are_refused(vectorized: bool) -> None:
    wide = Episodes((torch.randn(80, 5, dtype=DOUBLE), torch.arange(80) % 8), WAYS + 2, SHOTS, QUERIES, TASKS)
    running = engine_of(held_out=wide, vectorized=vectorized)
    with pytest.raises(DataError, match=f"the class {WAYS + 1}, and the network {WAYS} outputs"):
        running.evaluate()


def test_held_out_tasks_of_classes_that_are_trained_on_are_warned_about() -> None:
    data = torch.randn(80, 5, dtype=DOUBLE), torch.arange(80) % 8
    draw = lambda classes, seed: Episodes(data, WAYS, SHOTS, QUERIES, TASKS, classes=classes, seed=seed)  # noqa: E731
    train = draw(range(5), 0)
    with pytest.warns(BilevelWarning, match=r"'adaptation' have classes that it is trained on, 2 of them \(3, 4\)"):
        engine_of(tasks=train, held_out=draw(range(3, 8), 1))
    engine_of(tasks=train, held_out=draw(range(5, 8), 0))
    engine_of(tasks=train, held_out=episodes())  # other examples, of which nothing is known


def test_a_head_with_more_outputs_than_classes_has_no_prototypes() -> None:
    made = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, WAYS + 1)).to(DOUBLE)
    with pytest.raises(DataError, match="the head has 4 outputs, and a task has no support example"):
        engine_of(learner=PrototypeMetaLearner, made=made, outer={"head": "1"}).step()


def test_layers_in_evaluation_mode_may_keep_their_statistics() -> None:
    made = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, WAYS)).to(DOUBLE).eval()
    assert engine_of(made=made).step().losses["meta_learner"] > 0


def test_an_engine_without_the_other_problem_says_so() -> None:
    made = network()
    inner = Adaptation(made, episodes(), optimizer=sgd())
    other = Adaptation(made, episodes(), optimizer=sgd(), name="other")
    with pytest.raises(GraphError, match="works with a MetaLearner, of which its engine has 0"):
        Engine([other, inner], EngineConfig(progress=False))
