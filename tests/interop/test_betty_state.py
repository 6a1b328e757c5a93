"""State of a Betty program: saved at any iteration it goes on bit for bit, and an iteration that fails leaves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel.callbacks import BestModel, Checkpoints, CSVLog, JSONLinesLog, Progress, RunPlot
from bilevel.checkpoint.encoding import encode
from bilevel.engine_state import engine_state
from bilevel.errors import BilevelError, BilevelWarning, CheckpointError, NonFiniteError, UnknownNameError
from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from tests.bilevel.strategies import forall

pytestmark = [
    pytest.mark.filterwarnings("ignore:hypergradient:bilevel.errors.BilevelWarning"),  # a small network is not convex
    # Betty's schedulers count the batches of an accumulation, and torch's want an update before.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]

# --- programs ---------------------------------------------------------------------------------------------------------

STRUCTURES: dict[str, tuple[tuple[str, ...], dict[str, dict[str, list[str]]]]] = {
    "two": (("outer", "inner"), {"u2l": {"outer": ["inner"]}, "l2u": {"inner": ["outer"]}}),
    "two leaves": (
        ("outer", "inner", "other"),
        {"u2l": {"outer": ["inner", "other"]}, "l2u": {"inner": ["outer"], "other": ["outer"]}},
    ),
    "three": (
        ("outer", "inner", "lowest"),
        {"u2l": {"outer": ["inner", "lowest"], "inner": ["lowest"]}, "l2u": {"lowest": ["inner"], "inner": ["outer"]}},
    ),
}
STEPS: dict[str, Mapping[str, Any]] = {
    "darts": {"type": "darts"},
    "neumann": {"type": "neumann", "neumann_alpha": 0.1, "neumann_iterations": 2},
    "cg": {"type": "cg", "cg_iterations": 2},
    "sama": {"type": "sama", "sama_adam_alpha": 0.1},
    "unrolled": {"type": "unrolled"},
    "iterative": {},
}
FOLLOWING = ("sama", "unrolled", "iterative")
"""Methods that follow updates, whose accumulations are made at once."""


class Fuse:
    """Burns at a chosen moment, once it is lit."""

    def __init__(self) -> None:
        self.where: tuple[str, str, int] | None = None
        self.fails: Callable[[], None] = lambda: None

    def pass_by(self, problem: Any, where: str) -> None:
        """Fails if it is this problem's hook, at this of its steps."""
        if self.where == (problem.name, where, problem.count):
            self.fails()


@dataclass(frozen=True)
class Program:
    """A program, to be built again and again.

    Attributes:
        structure: A key of :data:`STRUCTURES`.
        method: A key of :data:`STEPS`, of all problems below others.
        inner: Further fields of the problems' ``Config`` below the outer one.
        outer: Those of the outer one.
        engine: Fields of ``EngineConfig``.
        settings: Fields of our own ``EngineConfig``.
        optimizer: The class of all optimisers below.
        hooks: Whether problems have all of Betty's callbacks.
    """

    structure: str = "two"
    method: str = "darts"
    inner: Mapping[str, Any] = field(default_factory=dict)
    outer: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    hooks: bool = False

    def build(self, callbacks: Any = (), fuse: Fuse | None = None) -> Runs:
        """Makes modules, problems and engine as a new process would."""
        torch.manual_seed(1)
        names, edges = STRUCTURES[self.structure]
        problems = {name: self._problem(name, fuse or Fuse()) for name in names}
        dependencies = {
            kind: {problems[key]: [problems[value] for value in values] for key, values in several.items()}
            for kind, several in edges.items()
        }
        config = EngineConfig(**{"train_iters": 13, "valid_step": 4, "strategy": "cpu", **self.engine})
        settings = bilevel.EngineConfig(progress=False, **self.settings)
        torch.manual_seed(12)
        return Runs(list(problems.values()), config, dependencies, settings=settings, callbacks=callbacks)

    def _problem(self, name: str, fuse: Fuse) -> Any:
        top = name == "outer"
        module: nn.Module = Scales() if top else network()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05) if top else self.optimizer(module.parameters(), 0.05)
        kind = IterativeProblem if self.method == "iterative" and not top else ImplicitProblem
        bases = (Hooked, Losses, kind) if self.hooks else (Losses, kind)
        problem = type(name.title(), bases, {})(
            name,
            Config(**(self.outer if top else {**STEPS[self.method], **self.inner})),
            module,
            optimizer,
            lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100),
            DataLoader(examples(10 if top else 14, len(name)), batch_size=4, shuffle=True),
        )
        problem.fuse = fuse
        return problem


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))


class Scales(nn.Module):
    """A weight decay for each problem below, and a number that shifts what they fit."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((), -2.0))
        self.shift = nn.Parameter(torch.zeros(()))


def examples(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(size, 1, generator=generator))


class Losses:
    """The same text of a loss for every level; what it uses of the others says their place."""

    name: str
    module: Any
    fuse: Fuse

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        self.fuse.pass_by(self, "training_step")
        if self.name == "outer":
            loss = F.mse_loss(self.inner(x), y)  # type: ignore[attr-defined]
            return {"loss": loss + (F.mse_loss(self.other(x), y) if hasattr(self, "other") else 0.0), "twice": 2 * loss}
        scales = self.outer.module  # type: ignore[attr-defined]
        loss = F.mse_loss(self.module(x) + scales.shift, y)
        if self.name == "inner" and hasattr(self, "lowest"):
            loss = loss + 0.1 * F.mse_loss(self.lowest(x), y)
        if self.name == "lowest":
            loss = loss + 0.1 * sum(
                (p - q).square().sum()
                for p, q in zip(self.module.parameters(), self.inner.module.parameters(), strict=True)  # type: ignore[attr-defined]
            )
        loss = loss + scales.decay.exp() * sum(p.square().sum() for p in self.module.parameters())
        return loss * float("nan") if self.fuse.where == (self.name, "nan", self.count) else loss  # type: ignore[attr-defined]


class Hooked:
    """All callbacks of Betty's, each of which does something to the state or draws numbers."""

    def on_inner_loop_start(self) -> None:
        self.fuse.pass_by(self, "on_inner_loop_start")  # type: ignore[attr-defined]
        torch.rand(())

    def grad_callback(self) -> None:
        self.fuse.pass_by(self, "grad_callback")  # type: ignore[attr-defined]

    def param_callback(self) -> None:
        self.fuse.pass_by(self, "param_callback")  # type: ignore[attr-defined]
        with torch.no_grad():
            for p in self.module.parameters():  # type: ignore[attr-defined]
                p.clamp_(-2.0, 2.0)

    def epoch_callback(self) -> None:
        self.fuse.pass_by(self, "epoch_callback")  # type: ignore[attr-defined]
        torch.rand(())


class Runs(Engine):
    """Remembers what its validations said."""

    seen: tuple[float, ...] = ()
    broken_at = 0

    def validation(self) -> dict[str, float]:
        if self.broken_at == self.global_step:
            raise OSError("no validation set")
        x, y = examples(8, 99).tensors
        assert not self.inner.module.training
        with torch.no_grad():
            loss = float(F.mse_loss(self.inner(x), y))
        self.seen = (*self.seen, loss)
        return {"loss": loss}


def fingerprint(engine: Engine, **others: Any) -> str:
    """A digest of everything that a checkpoint would hold, whether or not one may be written here.

    Args:
        engine: Of what.
        others: What to take for a part.
    """
    structure, tensors = encode({**engine_state(engine.driver), **others})
    digest = hashlib.sha256(json.dumps(structure).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def present(engine: Engine) -> tuple[str, dict[str, int]]:
    """The same, with an epoch's end and the next one's beginning taken for one, and the problems' counts."""
    drawn = {name: stream.drawn for name, stream in engine.driver.streams.items()}
    return fingerprint(engine, data=drawn), counts(engine)


def counts(engine: Engine) -> dict[str, int]:
    return {problem.name: problem.count for problem in engine.problems}


class Reference(NamedTuple):
    """How an undisturbed run ends."""

    iterations: int
    seen: tuple[float, ...]
    counts: dict[str, int]
    fingerprint: str


REFERENCES: dict[str, Reference] = {}


def undisturbed(program: Program) -> Reference:
    """Runs a program to its end, once for all tests."""
    if repr(program) not in REFERENCES:
        whole = program.build()
        whole.run()
        REFERENCES[repr(program)] = Reference(whole.global_step, whole.seen, counts(whole), fingerprint(whole))
    return REFERENCES[repr(program)]


def check_resuming(program: Program, stop: int, folder: Path) -> None:
    """Runs to the end, and again in two processes."""
    whole = undisturbed(program)
    first = program.build()
    first.run(stop)
    first.save(folder / "state")
    torch.manual_seed(99)
    second = program.build()
    torch.manual_seed(98)
    second.load(folder / "state")
    assert fingerprint(second) == fingerprint(first)
    assert counts(second) == counts(first)
    second.run()
    assert Reference(second.global_step, first.seen + second.seen, counts(second), fingerprint(second)) == whole


# --- saving and loading -----------------------------------------------------------------------------------------------

ITERATIONS = 13


def slow(*values: Any) -> list[Any]:
    """Cases of the slow variant."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def levels(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    small = {"gradient_accumulation": st.integers(1, 3), "gradient_clipping": st.sampled_from([0.0, 0.5])}
    return st.fixed_dictionaries({**small, **fields})


PROGRAMS = st.builds(
    Program,
    structure=st.sampled_from(["two", "two", "two leaves", "three"]),
    method=st.sampled_from(["darts", "neumann", "cg"]),
    inner=levels(unroll_steps=st.integers(1, 4), warmup_steps=st.sampled_from([0, 0, 3])),
    outer=levels(),
    hooks=st.booleans(),
    settings=st.fixed_dictionaries({"seed": st.integers(0, 3)}),
)


@forall(6, program=PROGRAMS, stop=st.integers(1, ITERATIONS - 1))
def test_a_program_resumed_at_any_iteration_is_the_uninterrupted_one_bit_for_bit(program: Program, stop: int) -> None:
    with TemporaryDirectory() as folder:
        check_resuming(program, stop, Path(folder))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8, 9, *slow(4, 6, 7, 10, 11, 12)])
def test_a_program_with_everything_is_resumed_at_each_iteration(stop: int, tmp_path: Path) -> None:
    """Accumulation on both levels, warm-up, an early stopping that counts, all callbacks."""
    program = Program(
        inner={"unroll_steps": 2, "gradient_accumulation": 2, "warmup_steps": 3},
        outer={"gradient_accumulation": 2},
        engine={"valid_step": 2, "early_stopping": True, "early_stopping_tolerance": 50},
        hooks=True,
    )
    check_resuming(program, stop, tmp_path)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_leaves_that_end_their_loops_at_different_iterations(stop: int, tmp_path: Path) -> None:
    """Saved while one has finished and the problem above still waits for the other."""

    @dataclass(frozen=True)
    class Uneven(Program):
        def _problem(self, name: str, fuse: Fuse) -> Any:
            steps = {"inner": 2, "other": 3}.get(name, 1)
            return replace(self, inner={"unroll_steps": steps}, hooks=False)._even(name, fuse)

        def _even(self, name: str, fuse: Fuse) -> Any:
            return Program._problem(self, name, fuse)

    check_resuming(Uneven("two leaves", "neumann"), stop, tmp_path)


def test_early_stopping_counts_on_after_loading(tmp_path: Path) -> None:
    """The metric rises from the first validation on, so that the third without improvement ends the run."""

    class Worse(Runs):
        def validation(self) -> dict[str, float]:
            return {"loss": float(self.global_step)}

    program = Program(engine={"valid_step": 2, "early_stopping": True, "early_stopping_tolerance": 3})

    def built() -> Runs:
        engine = program.build()
        engine.__class__ = Worse
        return engine

    whole = built()
    whole.run()
    assert (whole.global_step, whole.driver.stop_reason) == (8, "early stopping")
    first = built()
    first.run(5)
    first.save(tmp_path / "state")
    second = built()
    second.load(tmp_path / "state")
    assert (second.early_stopping.best, second.early_stopping.counter) == (2.0, 1)
    second.run()
    assert second.global_step == 8
    assert fingerprint(second) == fingerprint(whole)
    # The run is over, and stays so after loading.
    second.save(tmp_path / "end")
    third = built()
    third.load(tmp_path / "end")
    third.run()
    assert third.global_step == 8


def test_a_resumed_run_makes_what_is_left_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Program().build()
    first.run()
    assert first.global_step == ITERATIONS
    first.save(tmp_path / "state")
    second = Program().build()
    second.load(tmp_path / "state")
    capsys.readouterr()
    second.run()
    assert second.global_step == ITERATIONS
    assert "Nothing to do" in capsys.readouterr().out


def test_loading_into_an_engine_that_has_run_forgets_what_it_did(tmp_path: Path) -> None:
    program = Program(inner={"unroll_steps": 2, "gradient_accumulation": 2}, hooks=True)
    whole = program.build()
    whole.run()
    first = program.build()
    first.run(5)
    first.save(tmp_path / "state")
    expected = fingerprint(first)
    first.run(6)
    first.load(tmp_path / "state")
    assert (first.global_step, fingerprint(first)) == (5, expected)
    first.run()
    assert fingerprint(first) == fingerprint(whole)


def test_a_state_of_another_structure_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    other = Program("three").build()
    other.run(3)
    other.save(tmp_path / "state")
    engine = Program().build()
    engine.run(3)
    before = fingerprint(engine)
    with pytest.raises(CheckpointError, match="belongs to another structure"):
        engine.load(tmp_path / "state")
    assert (fingerprint(engine), counts(engine)["inner"]) == (before, 3)
    engine.run(1)


# --- loops that no checkpoint holds -----------------------------------------------------------------------------------

KEPT = [
    Program(method="iterative", inner={"unroll_steps": 3}),
    Program(method="unrolled", inner={"unroll_steps": 3}, optimizer=torch.optim.SGD),
    Program(inner={"unroll_steps": 3}, engine={"roll_back": True}),
]


@pytest.mark.parametrize("program", KEPT, ids=["iterative", "unrolled", "roll-back"])
def test_a_loop_that_is_followed_or_rolled_back_is_saved_at_its_end_only(program: Program, tmp_path: Path) -> None:
    engine = program.build()
    for iteration in range(1, 8):
        engine.train_step()
        if iteration % 3 == 0:
            engine.save(tmp_path / "state")
            continue
        with pytest.raises(CheckpointError, match=rf"'inner' is in the middle .*iteration {iteration}\b"):
            engine.save(tmp_path / "other")
        assert not (tmp_path / "other").exists()
    check_resuming(program, 6, tmp_path)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_sama_keeps_the_last_update_only_and_may_be_saved_before_it(
    stop: int, accumulation: int, tmp_path: Path
) -> None:
    program = Program(method="sama", inner={"unroll_steps": 3, "gradient_accumulation": accumulation})
    check_resuming(program, stop, tmp_path)


@pytest.mark.parametrize("method", FOLLOWING)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_methods_that_follow_updates_are_resumed_where_their_loop_ends(
    method: str, accumulation: int, tmp_path: Path
) -> None:
    inner = {"unroll_steps": 2, "gradient_accumulation": accumulation}
    check_resuming(Program(method=method, inner=inner, outer={"gradient_accumulation": 2}), 4, tmp_path)


# --- callbacks of ours ------------------------------------------------------------------------------------------------


def test_checkpoints_and_logs_count_iterations(tmp_path: Path) -> None:
    program = Program(inner={"unroll_steps": 2, "gradient_accumulation": 2})

    def callbacks() -> list[Any]:
        return [
            JSONLinesLog(tmp_path / "log.jsonl"),
            CSVLog(tmp_path / "log.csv"),
            RunPlot(tmp_path / "run.png"),
            BestModel("inner", restore=False),
            Progress(),
            Checkpoints(tmp_path / "checkpoints", every=5, keep=None),
        ]

    first = program.build(callbacks())
    first.run(7)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.safetensors"))
    assert names == [f"step-{step:08d}.safetensors" for step in (5, 7)]
    second = program.build(callbacks())
    assert second.resume(tmp_path / "checkpoints") == 7
    second.run()
    whole = program.build()
    whole.run()
    assert second.global_step == ITERATIONS
    assert first.seen + second.seen == whole.seen
    for one, other in zip(second.problems, whole.problems, strict=True):
        for p, q in zip(one.module.state_dict().values(), other.module.state_dict().values(), strict=True):
            assert torch.equal(p, q)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, ITERATIONS + 1))
    # an outer loss where there was an outer step
    assert [line["step"] for line in lines if "outer" in line.get("loss", {})] == [4, 8, 12]
    assert (tmp_path / "run.png").stat().st_size > 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) >= ITERATIONS + 1


def test_best_model_puts_the_best_parameters_back(tmp_path: Path) -> None:
    best = BestModel("inner")
    engine = Program(inner={"unroll_steps": 2}).build([best])
    kept: dict[int, torch.Tensor] = {}

    class Watch(bilevel.callbacks.Callback):
        def on_step_end(self, driver: Any, result: Any) -> None:
            kept[result.step] = torch.cat([p.detach().reshape(-1).clone() for p in driver.problems["inner"].parameters])

    engine.driver.callbacks = (*engine.driver.callbacks, Watch())
    engine.run()
    assert 1 <= best.best_step <= ITERATIONS
    now = torch.cat([p.detach().reshape(-1) for p in engine.problems[1].module.parameters()])
    assert torch.equal(now, kept[best.best_step])


def test_best_values_may_be_validations(tmp_path: Path) -> None:
    best = BestModel("validation/loss", restore=False)
    kept = Checkpoints(tmp_path, every=5, keep=None, best="validation/loss")
    engine = Program().build([best, kept])
    engine.run()
    place = engine.seen.index(min(engine.seen))
    assert best.best == kept.best == pytest.approx(min(engine.seen))
    assert best.best_step == kept.best_step == 4 * (place + 1)
    assert kept.best_path is not None
    again = Program().build([BestModel("validation/loss"), Checkpoints(tmp_path, best="validation/loss")])
    again.load(kept.best_path)
    assert again.global_step == kept.best_step


@pytest.mark.parametrize("metric", ["outer", "outer/twice"])
def test_the_best_value_of_a_problem_that_steps_now_and_then(metric: str) -> None:
    """Its first comes after several iterations, and that is no reason to think that it never does."""
    best = BestModel(metric, restore=False)
    engine = Program(inner={"unroll_steps": 3}).build([best])
    engine.run()
    assert best.best_step in (3, 6, 9, 12)
    with pytest.raises(UnknownNameError, match="outer/typo"):
        Program(inner={"unroll_steps": 3}).build([BestModel("outer/typo")]).run()


def test_checkpoints_come_where_loops_end() -> None:
    """Where they may not be written the run goes on, with a warning that says where to."""
    program = Program(method="iterative", inner={"unroll_steps": 3})
    with TemporaryDirectory() as folder:
        engine = program.build([Checkpoints(folder, every=4, keep=None)])
        said = r"step checkpoint of step [48] was not written.*save where the loop ends"
        with pytest.warns(BilevelWarning, match=said):
            engine.run(9)
        assert [path.name for path in Path(folder).glob("*.safetensors")] == ["step-00000009.safetensors"]


def test_resuming_from_an_empty_folder_changes_nothing(tmp_path: Path) -> None:
    engine = Program().build()
    before = fingerprint(engine)
    assert engine.resume(tmp_path) is None
    assert fingerprint(engine) == before
    engine.run()
    assert engine.global_step == ITERATIONS


# --- iterations that fail ---------------------------------------------------------------------------------------------


def boom() -> None:
    raise OSError("a full disk")


# (problem, hook, its steps so far): first steps of a loop, in the middle of an accumulation, at the end of a loop.
# on_inner_loop_start comes before the step is counted.
MOMENTS = [
    ("inner", "nan", 1),
    ("inner", "nan", 6),
    ("inner", "training_step", 4),
    ("inner", "training_step", 7),
    ("inner", "on_inner_loop_start", 4),
    ("inner", "grad_callback", 3),
    ("inner", "grad_callback", 8),
    ("inner", "param_callback", 6),
    ("inner", "epoch_callback", 5),
    ("outer", "training_step", 1),
    ("outer", "grad_callback", 2),
    ("outer", "param_callback", 2),
    ("outer", "on_inner_loop_start", 0),
]
FAILING = {
    "darts": Program(
        inner={"unroll_steps": 2, "gradient_accumulation": 2}, outer={"gradient_accumulation": 2}, hooks=True
    ),
    "iterative": Program(
        method="iterative", inner={"unroll_steps": 2, "gradient_accumulation": 2}, outer={}, hooks=True
    ),
    "roll-back": Program(
        inner={"unroll_steps": 2, "gradient_accumulation": 2},
        outer={"gradient_accumulation": 2},
        engine={"roll_back": True},
        hooks=True,
    ),
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: "-".join(map(str, m)))
def test_an_iteration_that_fails_is_undone_and_can_be_made_again(moment: tuple[str, str, int], kind: str) -> None:
    program, fuse = FAILING[kind], Fuse()
    program = replace(program, engine={**program.engine, "valid_step": 100})  # train_step() validates nothing
    whole = undisturbed(program)
    engine = program.build(fuse=fuse)
    fuse.where, fuse.fails = moment, boom
    failed, before, after = None, None, None
    while engine.global_step < ITERATIONS:
        before = before if failed else present(engine)
        try:
            engine.train_step()
        except (OSError, BilevelError) as error:
            assert failed is None, "twice"
            failed, after = error, present(engine)
            fuse.where = None
    happens = kind != "iterative" or moment not in NOT_THERE
    assert (failed is not None) == happens
    assert after is None or after == before
    assert isinstance(failed, NonFiniteError) == (happens and moment[1] == "nan")
    assert (fingerprint(engine), counts(engine)) == (whole.fingerprint, whole.counts)


# Updates that are followed draw and evaluate the batches of an accumulation at once, at its last step.
NOT_THERE = [
    ("inner", "grad_callback", 3),
    ("inner", "epoch_callback", 5),
]


def test_a_validation_that_fails_leaves_the_complete_iteration() -> None:
    whole = Program(inner={"unroll_steps": 3}).build()
    whole.run()
    engine = Program(inner={"unroll_steps": 3}).build()
    engine.broken_at = 4
    with pytest.raises(OSError, match="no validation set"):
        engine.run()
    assert engine.global_step == 4
    assert all(problem.module.training for problem in engine.problems)
    engine.broken_at = 0
    engine.run(ITERATIONS - 4)
    assert fingerprint(engine, callbacks=[]) == fingerprint(whole, callbacks=[])  # where runs began is told there
    assert engine.seen == whole.seen[1:]


def test_skipping_iterations_is_refused() -> None:
    """Counts and accumulations would come apart."""
    with pytest.raises(BilevelError, match="on_non_finite"):
        Program(settings={"on_non_finite": "skip"}).build()


def test_other_batches_for_hypergradients_are_refused() -> None:
    """A loop that is rolled back would be made again on them."""
    with pytest.raises(BilevelError, match="hypergradient_batch"):
        Program(settings={"hypergradient_batch": "fresh"}).build()
