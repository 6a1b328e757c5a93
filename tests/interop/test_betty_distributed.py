"""Betty's data parallelism on two processes: equal parameters, those of one process with both batches."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel.errors import BilevelError, ConfigError
from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from tests.ranks import free_port

LOWER: dict[str, dict[str, Any]] = {
    "darts": {"type": "darts", "unroll_steps": 2},
    "neumann": {"type": "neumann", "neumann_alpha": 0.1, "neumann_iterations": 3, "gradient_accumulation": 2},
    "cg": {"type": "cg", "cg_iterations": 2, "warmup_steps": 1},
    "sama": {"type": "sama", "gradient_clipping": 0.1},
    "iterative": {"unroll_steps": 2},
    "roll-back": {"type": "neumann", "neumann_alpha": 0.1, "unroll_steps": 2},
}
ITERATIONS = 6


class Outer(ImplicitProblem):
    def training_step(self, batch: Any) -> Any:
        return F.mse_loss(self.inner(batch[0]), batch[1])


class Losses:
    def training_step(self, batch: Any) -> Any:
        # the outer parameter acts through the data, so that every product differs from rank to rank
        out = self.module(batch[0] * self.outer.module.weight.exp())  # type: ignore[attr-defined]
        return F.mse_loss(out, batch[1])

    def param_callback(self) -> None:
        self.__dict__.setdefault("seen", []).append(self.cur_batch[0].clone())  # type: ignore[attr-defined]


class Inner(Losses, ImplicitProblem):
    pass


class Followed(Losses, IterativeProblem):
    pass


class Stops(Engine):
    """The metric gets worse on the first process, and would get better on the others."""

    calls = 0

    def validation(self) -> Mapping[str, float]:
        self.calls += 1
        return {"loss": self.calls if dist.get_rank() == 0 else -self.calls}


def batches(count: int, seed: int, merged: int) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of four examples, ``merged`` in one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 4, 1, generator=generator, dtype=torch.float64)
    count //= merged
    return [(a.reshape(-1, 3), b.reshape(-1, 1)) for a, b in zip(x.chunk(count), y.chunk(count), strict=True)]


def make(
    method: str, strategy: str, *, engine: type[Engine] = Engine, seed: int = 0, data: Any = None, **config: Any
) -> Engine:
    """Builds a program.

    Args:
        method: A key of :data:`LOWER`.
        strategy: ``"distributed"``, or ``"cpu"`` for one process with the batches of two.
        engine: The class of the engine.
        seed: Of the parameters.
        data: Of the lower problem.
        config: Fields of ``EngineConfig``.
    """
    merged = 1 if strategy == "distributed" else 2
    torch.manual_seed(seed)
    above = nn.Linear(1, 1, bias=False).double()
    below = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    low_optimizer = torch.optim.Adam(below.parameters(), lr=0.02)
    kind = Followed if method == "iterative" else Inner
    high = Outer("outer", Config(), above, torch.optim.Adam(above.parameters(), lr=0.05), None, batches(6, 1, merged))
    data = batches(10, 2, merged) if data is None else data
    low = kind("inner", Config(**LOWER[method]), below, low_optimizer, None, data)
    fields = {"train_iters": ITERATIONS, "roll_back": method == "roll-back", **config}
    return engine(
        [high, low],
        EngineConfig(strategy=strategy, backend="gloo", **fields),
        {"u2l": {high: [low]}, "l2u": {low: [high]}},
        settings=bilevel.EngineConfig(progress=False),
    )


def parameters(engine: Engine) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for problem in engine.problems for p in problem.module.parameters()])


def trained(rank: int) -> dict[str, Any]:
    """Every method; each process begins with parameters of its own."""
    found: dict[str, Any] = {}
    for method in LOWER:
        engine = make(method, "distributed", seed=rank)
        found[f"begin {method}"] = parameters(engine).clone()
        engine.run()
        found[method] = parameters(engine)
        found[f"seen {method}"] = [x.clone() for x in engine.problems[1].seen]
    return found


def stopped(rank: int) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        fields = {"valid_step": 2, "early_stopping": True, "early_stopping_tolerance": 1, "train_iters": 20}
        engine = make("darts", "distributed", engine=Stops, **fields)
        engine.run()
    return {
        "iterations": engine.global_step,
        "reason": engine.driver.stop_reason,
        "validations": engine.calls,  # type: ignore[attr-defined]
        "said": said.getvalue(),
        "stopped with": parameters(engine),
    }


def broken(rank: int) -> dict[str, Any]:
    """A validation that fails on the first process, where alone it runs, leaves no other one waiting."""

    class Breaks(Engine):
        def validation(self) -> None:
            raise OSError("a full disk")

    engine = make("darts", "distributed", engine=Breaks, valid_step=2)
    try:
        engine.run()
    except (OSError, BilevelError) as error:
        return {"broken": f"{type(error).__name__}: {error}", "broken at": engine.global_step}
    return {"broken": ""}


def shuffled(rank: int) -> dict[str, Any]:
    data = TensorDataset(torch.arange(36.0).double().reshape(12, 3), torch.zeros(12, 1).double())
    engine = make("cg", "distributed", data=DataLoader(data, batch_size=2, shuffle=True), train_iters=3)
    engine.run()
    return {"rows": [int(x[0]) // 3 for batch in engine.problems[1].seen for x in batch]}


def resumed(rank: int, folder: str) -> dict[str, Any]:
    path = os.path.join(folder, f"state-{rank}")
    first = make("neumann", "distributed", seed=rank)
    first.run(3)
    first.save(path)
    second = make("neumann", "distributed", seed=rank)
    second.load(path)
    second.run()
    return {"resumed": parameters(second), "resumed at": second.global_step}


def refused(rank: int) -> dict[str, Any]:
    """Three levels."""
    uses = {"outer": ["inner"], "inner": ["outer", "lowest"], "lowest": ["inner"]}
    problems: list[Any] = []
    for name, others in uses.items():
        module = nn.Linear(1, 1, bias=False)

        def step(self: Any, batch: Any, others: list[str] = others) -> Tensor:
            return sum((self.module.weight - getattr(self, other).module.weight).square().sum() for other in others)

        kind = type(name.title(), (ImplicitProblem,), {"training_step": step})
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        problems.append(kind(name, Config(), module, sgd, None, [(torch.zeros(1),)] * 2))
    outer, inner, lowest = problems
    edges = {"u2l": {outer: [inner], inner: [lowest]}, "l2u": {lowest: [inner], inner: [outer]}}
    try:
        Engine(problems, EngineConfig(strategy="distributed", backend="gloo"), edges).run(1)
    except BilevelError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"refused": ""}


def worker(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    try:
        found = {
            **trained(rank),
            **stopped(rank),
            **broken(rank),
            **shuffled(rank),
            **resumed(rank, folder),
            **refused(rank),
            "quiet": said_by_all(rank),
        }
        torch.save(found, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()  # gloo's threads do not like a peer that has gone
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def said_by_all(rank: int) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        make("cg", "distributed").run()
    return said.getvalue()


Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the two processes found: they are started once."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    port = free_port()
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


pytestmark = pytest.mark.timeout(200)


@pytest.mark.filterwarnings("ignore:hypergradient:bilevel.errors.BilevelWarning")
@pytest.mark.parametrize("method", LOWER)
def test_two_processes_equal_one_with_both_batches(method: str, results: Results) -> None:
    first, second = results
    assert torch.equal(first[f"begin {method}"], second[f"begin {method}"])
    assert torch.equal(first[method], second[method])
    whole = make(method, "cpu")
    assert torch.equal(first[f"begin {method}"], parameters(whole))
    whole.run()
    torch.testing.assert_close(first[method], parameters(whole), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(first[method], first[f"begin {method}"])


def test_each_process_has_every_second_batch(results: Results) -> None:
    expected = batches(10, 2, 1)
    for rank, found in enumerate(results):
        for place, x in enumerate(found["seen cg"]):
            assert torch.equal(x, expected[2 * (place % 5) + rank][0])
        assert len(found["seen cg"]) == ITERATIONS


def test_shuffled_shares_make_one_epoch(results: Results) -> None:
    first, second = (found["rows"] for found in results)
    assert sorted([*first, *second]) == list(range(12))
    assert [*first, *second] != list(range(12))


def test_the_first_process_validates_and_ends_all_runs(results: Results) -> None:
    first, second = results
    assert first["iterations"] == second["iterations"] == 4
    assert first["reason"] == second["reason"] == "early stopping"
    assert (first["validations"], second["validations"]) == (2, 0)
    assert torch.equal(first["stopped with"], second["stopped with"])
    assert "[Validation] [Global Step 4] loss: 2" in first["said"]
    assert second["said"] == ""


def test_only_the_first_process_writes_lines(results: Results) -> None:
    first, second = results
    assert "Problem 'inner'" in first["quiet"]
    assert second["quiet"] == ""


def test_processes_resume_together(results: Results) -> None:
    first, second = results
    assert first["resumed at"] == ITERATIONS
    for found in results:
        assert torch.equal(found["resumed"], first["neumann"])
    assert torch.equal(first["resumed"], second["resumed"])


def test_three_levels_are_refused(results: Results) -> None:
    for found in results:
        assert re.search(r"^ConfigError: .*two levels", found["refused"]), found["refused"]


def test_without_torchrun_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"strategy='distributed'.*torchrun"):
        make("cg", "distributed")


def test_data_without_shares_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.distributed.size", lambda: 2)
    with pytest.raises(BilevelError, match="use a DataLoader with batches over a data set with indices, or get_batch"):
        make("cg", "cpu", data=iter(batches(4, 1, 1)))


def test_a_validation_that_fails_is_told_on_all_ranks(results: Results) -> None:
    assert results[0]["broken"] == "OSError: a full disk"
    assert results[1]["broken"].startswith("DataError: validation() failed on the first process")
    assert results[0]["broken at"] == results[1]["broken at"] == 2
