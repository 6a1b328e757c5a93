"""The comparison with other libraries: what it calls right is right, what it calls wrong is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import precision, run
from benchmarks.peers.__main__ import main, workloads
from benchmarks.peers.environments import share
from benchmarks.peers.memory import peak_bytes
from benchmarks.peers.protocol import Remote, WorkerError
from benchmarks.peers.reference import implicit
from benchmarks.peers.report import lines_of
from benchmarks.peers.side import Method, NotOffered, Task
from benchmarks.peers.sides.bilevel.implicit import build as build_library
from benchmarks.peers.sides.hand.implicit import Loop
from benchmarks.peers.timing import ratio, rotated
from benchmarks.peers.verdict import error, reason
from benchmarks.peers.worker import backward_counted
from benchmarks.peers.workloads import regularisation

RATE = 0.05
METHODS = {
    "identity": Method("identity"),
    "finite_difference": Method("finite_difference", tolerance=3e-2),
    "neumann": Method("neumann", 6, RATE),
    "conjugate_gradient": Method("conjugate_gradient", 5),
}


def quadratic(dtype: str = "float64", *, direct: bool = False) -> Task:
    """``f = ½ wᵀHw − wᵀCλ + ¼ Σ λ²w²``, ``F = ½ ‖w − t‖² (+ ½ ‖λ‖²)``, in 6 and 6 dimensions."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    H, C = draw @ draw.T + torch.eye(6, dtype=torch.float64), torch.randn(6, 6, generator=generator).double()
    w, lam, t = (torch.randn(6, generator=generator).double() for _ in range(3))
    kind = getattr(torch, dtype)
    H, C, w, lam, t = (part.to(kind) for part in (H, C, w, lam, t))

    def inner_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        (w,), (lam,) = inner, outer
        return w @ H @ w / 2 - w @ C @ lam + (lam.square() * w.square()).sum() / 4

    def outer_loss(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> Tensor:
        fit = (inner[0] - t).square().sum() / 2
        return fit + outer[0].square().sum() / 2 if direct else fit

    return Task([w], [lam], inner_loss, outer_loss, rate=RATE, direct=direct)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_both_sides_compute_the_reference_with_the_same_passes(kind: str, direct: bool) -> None:
    method = METHODS[kind]
    reference = implicit(quadratic(direct=direct), method)
    passes = []
    for build in (Loop, build_library):
        task = quadratic(direct=direct)
        side = build(task, method)
        task.passes.forward = 0
        with backward_counted(task.passes):
            side.step()
        passes.append((task.passes.forward, task.passes.backward))
        found = torch.cat([part.flatten() for part in side.hypergradient()]).numpy()
        limit = 1e-6 if kind == "finite_difference" else 1e-12
        assert error(found, reference.own) < limit
        assert reason(found, reference, limit) == ""
    assert passes[0] == passes[1]


@pytest.mark.parametrize("direct", [False, True])
def test_the_exact_reference_is_the_dense_formula(direct: bool) -> None:
    task = quadratic(direct=direct)
    w, lam = task.inner[0], task.outer[0]
    gradient = torch.func.grad(lambda w, lam: task.inner_loss([w], [lam]))
    w = w - RATE * gradient(w, lam)
    v = torch.func.grad(lambda w: task.outer_loss([w], [lam]))(w)
    hessian, mixed = torch.func.jacrev(gradient, argnums=(0, 1))(w, lam)
    expected = -torch.linalg.solve(hessian, v) @ mixed + (lam if direct else 0)
    found = implicit(task, METHODS["identity"]).exact
    assert found is not None
    assert error(found, expected.numpy()) < 1e-9


def test_a_step_moves_both_sides_to_the_same_place_and_place_puts_them_back() -> None:
    task = quadratic()
    sides = [Loop(task, METHODS["neumann"]), build_library(task, METHODS["neumann"])]
    first = []
    for side in sides:
        for _ in range(3):
            side.step()
        third = side.hypergradient()[0].clone()
        side.place([task.inner[0].numpy()], [task.outer[0].numpy()])
        side.step()
        first.append((third, side.hypergradient()[0].clone()))
    torch.testing.assert_close(first[0], first[1])
    assert not torch.allclose(*first[0])
    expected = implicit(task, METHODS["neumann"]).own
    torch.testing.assert_close(first[1][1], torch.from_numpy(expected))


def test_the_reason_of_a_wrong_hypergradient_is_named() -> None:
    reference = implicit(quadratic(direct=True), METHODS["conjugate_gradient"])
    own = reference.own
    told = {name: reason(value, reference, 1e-6) for name, value in reference.others.items()}
    assert told == {name: f"it is {name}" for name in reference.others}
    assert any("4 products" in name for name in told)
    assert reason(-own, reference, 1e-6) == "-1 × the right value: the sign is flipped"
    assert reason(RATE * own, reference, 1e-6) == "0.05 × the right value: it carries the inner learning rate"
    assert reason(3 * own, reference, 1e-6) == "3 × the right value"
    assert reason(1.001 * own, reference, 1e-6) == "0.001 away from the method's value, cosine 1.000"
    assert reason(0 * own, reference, 1e-6) == "zero"
    assert reason(np.where(own > 0, np.nan, own), reference, 1e-6).endswith("not finite")
    assert reason(own[:-1], reference, 1e-6) == "5 numbers instead of 6"
    assert "cosine" in reason(own[::-1].copy(), reference, 1e-6)


class Flipped(Loop):
    """A side that forgets the minus sign."""

    def hypergradient(self) -> Sequence[Tensor]:
        return [-part for part in super().hypergradient()]


class Failing(Loop):
    def step(self) -> None:
        raise ZeroDivisionError("no step")


@pytest.mark.usefixtures("local", "few")
def test_a_wrong_side_is_reported_as_wrong_and_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, side in (("boat", Flipped), ("betty", Failing)):
        module = types.ModuleType(f"benchmarks.peers.sides.{library}.regularisation")
        module.build = side  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    pythons = dict.fromkeys(("hand", "bilevel", "boat", "betty"), Path(sys.executable))
    absent = {"torchopt": "not here", "higher": "no side, so not mentioned"}
    found = run.measure("regularisation", pythons, absent, run.Settings(size="small", rounds=2))
    rows = {row.library: row for row in found.rows}
    assert [rows[name].wrong for name in ("hand", "bilevel")] == ["", ""]
    assert rows["boat"].wrong == "-1 × the right value: the sign is flipped"
    assert rows["betty"].failed == "ZeroDivisionError: no step"
    assert found.absent == {"torchopt": "not here"}
    assert rows["hand"].passes == rows["bilevel"].passes == (3, 7)
    assert 0 < rows["hand"].peak <= rows["bilevel"].peak
    about = {"command": "x", "date": "today", "machine": "m", "threads": 1, "clock": "wall clock", "torch": "2"}
    table = lines_of({"about": about, **found.as_json()})
    assert [line.split("|")[2].strip() for line in table[2:6]] == ["by hand", "bilevel", "BOAT", "Betty"]
    assert "**wrong**: -1 ×" in table[4]
    assert table[4].split("|")[5].strip() == ""
    assert "**fails**: ZeroDivisionError" in table[5]


@pytest.mark.usefixtures("few")
def test_a_worker_process_answers_and_its_failures_are_told(tmp_path: Path) -> None:
    arrays, _ = regularisation.data("small", None)
    np.savez(tmp_path / "data.npz", **arrays)
    with Remote("hand") as remote:
        assert remote.versions["torch"] == torch.__version__
        remote.ask("load", data="d", file=str(tmp_path / "data.npz"))
        fields = {"data": "d", "workload": "regularisation", "size": "small"}
        remote.ask("build", key="k", method="neumann", **fields)
        found, passes = remote.gradient("k")
        reference = regularisation.reference(arrays, "small", regularisation.METHODS["neumann"])
        assert error(found, reference.own) < 1e-4
        assert passes == {"forward": 3, "backward": 4 + regularisation.METHODS["neumann"].products}
        assert remote.ask("time", key="k", steps=2) > 0
        assert remote.ask("memory", key="k")["peak"] > 4 * 7840
        with pytest.raises(WorkerError, match="unknown command"):
            remote.ask("no_such_thing")
        with pytest.raises(WorkerError, match="KeyError"):
            remote.ask("step", key="other")
        with pytest.raises(NotOffered, match="no loop for magic"):
            remote.ask("build", key="m", method={"kind": "magic"}, **fields)
        remote.process.kill()
        with pytest.raises(WorkerError, match="ended with status"):
            remote.ask("step", key="k")


def test_peak_memory_is_exact_for_small_steps_too() -> None:
    for kilobytes in (4, 2048):
        count = 256 * kilobytes

        def step(count: int = count) -> None:
            first = torch.ones(count)
            second = torch.ones(2 * count)
            del first
            third = torch.ones(count // 2)
            del second, third

        assert peak_bytes(step) == 3 * 1024 * kilobytes


def test_orders_are_rotated_and_ratios_are_those_of_neighbours() -> None:
    orders = list(rotated(["a", "b", "c"], 6))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    found = ratio({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 400.0]}, "b", "a")
    assert (found.median, found.low, found.high) == (2.0, 2.0, 3.0)


def test_an_environment_shares_torch_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "first")], check=True)
    share(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    python = tmp_path / "moved" / "bin" / "python"
    code = "import importlib.util as u, torch; print(torch.__version__, u.find_spec('hypothesis'), u.find_spec('peft'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [torch.__version__, "None", "None"]


def test_a_run_of_exact_steps_and_what_suffices_there() -> None:
    task = quadratic()
    run_ = precision.path(task, 0.05, 6)
    for step, exact in enumerate(run_.exact):
        start = run_.task(task, step)
        assert error(exact, implicit(start, METHODS["identity"]).exact) < 1e-12
        if step:
            before = run_.task(task, step - 1)
            moved = before.inner[0] - RATE * torch.func.grad(task.inner_loss)(before.inner, before.outer)[0]
            torch.testing.assert_close(start.inner[0], moved, rtol=1e-6, atol=1e-6)
    conjugate, (terms, alpha) = precision.smallest(task, run_)
    assert conjugate <= 6 < terms
    for kind, count, step_size in (("conjugate_gradient", conjugate, 1.0), ("neumann", terms, alpha)):
        errors = {
            number: max(
                error(implicit(run_.task(task, step), Method(kind, number, step_size)).own, run_.exact[step])
                for step in precision.LOOK
                if step < 6
            )
            for number in (count - 1, count)
        }
        assert errors[count] <= precision.LIMIT < errors[count - 1]


@pytest.mark.parametrize("rate", [0.93, 0.985, 0.995])
def test_a_series_that_is_too_slow_is_left_early_and_no_other(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    # Two modes, of which the slower one decides in the end: the error falls ever more slowly.
    monkeypatch.setattr(precision, "error", lambda number, exact: 0.9 * 0.8**number + 0.1 * rate**number)

    class Counting:
        def total(self, number: Tensor) -> Tensor:
            taken.append(int(number))
            return number

    numbers = (torch.tensor(float(number)) for number in range(1, 1000))
    found = precision.first_within(numbers, Counting(), np.zeros(1), 600, slowing=True)  # type: ignore[arg-type]
    need = math.ceil(math.log(1e-2) / math.log(rate))
    if need < 600:
        assert found == need
    else:
        assert found == 600
        assert len(taken) <= 150


class Pretended(precision.Field):
    """Libraries whose errors are known: a peer's by its number of products, this library's by its tolerance."""

    def __init__(self, folder: Path, needs: np.ndarray) -> None:
        run_ = precision.Path50([np.zeros((50, 1))], [np.zeros((50, 1))], np.ones((50, 1)))
        super().__init__("a workload", {}, run_, {}, run.Settings("small", 1), folder)
        self.needs, self.whole = needs, 0
        self.remotes = {"torchopt": self, "betty": self}  # type: ignore[dict-item]

    def ask(self, command: str, key: str) -> None:
        assert command == "drop"
        assert key

    def take(self, contender: precision.Contender) -> None:
        method = contender.method
        steps = list(contender.part or range(50))
        self.whole += not contender.part
        if contender.library == "betty":
            contender.errors = [40.0 for _ in steps]
        elif contender.library == "bilevel":
            contender.errors = [float(method.options["rtol"] * 5) for _ in steps]
        else:
            contender.errors = [precision.LIMIT * (needed / method.products) ** 3 for needed in self.needs[steps]]


def test_searches_end_at_the_smallest_number_and_at_the_largest_tolerance(tmp_path: Path) -> None:
    needs = np.full(50, 20)
    needs[[0, 7, 31]] = 30, 36, 41  # the search begins at steps 0, 25 and 49
    field = Pretended(tmp_path, needs)
    found = field.peer("torchopt", "conjugate_gradient", 18, 1.0)
    assert found is not None
    assert not found.part
    assert len(found.errors) == 50
    assert found.method.products == 41
    assert (field.look, field.whole) == ((0, 25, 31, 49), 2)
    assert field.peer("torchopt", "conjugate_gradient", 18, 1.0).method.products == 41  # type: ignore[union-attr]
    assert field.whole == 3  # the next library's numbers are looked for where the last one's were decided

    wrong = field.peer("betty", "conjugate_gradient", 18, 1.0)
    assert wrong is not None
    assert max(wrong.errors) == 40.0
    assert field.whole == 3
    limit = max(place for place in precision.TOLERANCES if place * 5 <= precision.LIMIT)
    for place in (0, 7, len(precision.TOLERANCES) - 1):
        ours, end = field.ours("warm start", {}, place)
        assert ours is not None
        assert ours.method.options["rtol"] == limit
        assert abs(precision.TOLERANCES.index(limit) - end) <= 1


def test_unknown_workloads_are_refused_with_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"regularisation", "reweighting"} <= set(workloads())
    for arguments, exists in (
        (["regularization"], "regularisation"),
        (["regularisation", "--size", "huge"], "small, full"),
        (["regularisation", "--methods", "neuman"], "neumann"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert exists in capsys.readouterr().err
