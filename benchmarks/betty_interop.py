"""What the same Betty program costs under betty-ml 0.2.1 and under ``bilevel.interop.betty``.

    python -m benchmarks.betty_interop [--widths 32 1024] [--unroll 1 10] [--repeats 15] [--cpu-time] [--json]

The program is a classifier with a learned weight decay for each tensor, written once and given either library's names;
data, initial values and settings are the same. Both are timed by their own ``run()`` in one process, in turns, and end
with the same parameters, which is asserted. Passes are counted for both in the same way: calls of the classifier, and
runs of autograd's engine. An iteration is one update of the classifier; every ``--unroll``-th is followed by one of the
decay. Prints a table in Markdown: medians over the repeats, ratios ours/Betty of neighbouring runs with their
quartiles; "without copy" is the ratio with ``restore_on_error=False``, where a step that fails is not undone. Memory is
what a run needs beyond what stands before it (models, data, optimisers), by the kernel's high-water mark, each library
in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import itertools
import json
import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel

LIBRARIES = {"betty": "betty", "ours": "bilevel.interop.betty", "ours without copy": "bilevel.interop.betty"}
METHODS = {"darts": {"type": "darts"}, "neumann": {"type": "neumann", "neumann_iterations": 5, "neumann_alpha": 0.1}}
CLASSES = 10
# Of the way from the start, in float32 after some hundred updates; central differences lose a third of the digits.
TOLERANCE = {"darts": 3e-2, "neumann": 1e-3}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    width: int
    batch: int
    method: str
    unroll: int

    def data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        draw = lambda: (  # noqa: E731
            torch.randn(self.batch, self.width, generator=generator),
            torch.randint(CLASSES, (self.batch,), generator=generator),
        )
        return draw(), draw()


@dataclass
class Program:
    """The program under one library."""

    run: Callable[[int], None]
    classifier: nn.Module
    decay: nn.Module

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in (*self.classifier.parameters(), *self.decay.parameters())]


def program(library: str, case: Case) -> Program:
    """Builds the program with the names of ``library``."""
    source = LIBRARIES[library]
    problems, engines, configs = (importlib.import_module(f"{source}.{n}") for n in ("problems", "engine", "configs"))

    class Outer(problems.ImplicitProblem):  # type: ignore[misc,name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.inner(x), y)

    class Inner(problems.ImplicitProblem):  # type: ignore[misc,name-defined]
        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            pairs = zip(self.outer.module.parameters(), self.module.parameters(), strict=True)
            return F.cross_entropy(self(x), y) + sum(rate.exp() * p.square().sum() for rate, p in pairs)

    torch.manual_seed(0)
    layers = nn.Linear(case.width, case.width), nn.Tanh(), nn.Linear(case.width, case.width), nn.Tanh()
    classifier = nn.Sequential(*layers, nn.Linear(case.width, CLASSES))
    decay = nn.ParameterList([torch.tensor(-6.0) for _ in classifier.parameters()])
    train, valid = case.data()
    outer = Outer("outer", configs.Config(), decay, torch.optim.Adam(decay.parameters(), lr=0.0005), None, [valid])
    inner = Inner(
        "inner",
        configs.Config(unroll_steps=case.unroll, **METHODS[case.method]),
        classifier,
        torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9),
        None,
        [train],
    )
    more = {}
    if library == "ours without copy":
        more["settings"] = bilevel.EngineConfig(progress=False, restore_on_error=False)
    edges = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = engines.Engine([outer, inner], configs.EngineConfig(strategy="cpu"), edges, **more)

    def run(iterations: int) -> None:
        if library == "betty":
            engine.train_iters = iterations
            engine.run()
        else:
            engine.run(iterations)

    return Program(run, classifier, decay)


@contextlib.contextmanager
def counted(classifier: nn.Module) -> Iterator[SimpleNamespace]:
    """Counts calls of the classifier, and what ``torch.autograd`` runs."""
    passes = SimpleNamespace(forward=0, backward=0)
    engine = torch.autograd._engine_run_backward

    def forward(*_: Any) -> None:
        passes.forward += 1

    def backward(*args: Any, **kwargs: Any) -> Any:
        passes.backward += 1
        return engine(*args, **kwargs)

    hook = classifier.register_forward_pre_hook(forward)
    torch.autograd._engine_run_backward = backward
    try:
        yield passes
    finally:
        hook.remove()
        torch.autograd._engine_run_backward = engine


def per_iteration(made: Program, unroll: int) -> tuple[float, float]:
    """Returns the classifier's passes in an iteration, forward and backward."""
    with counted(made.classifier) as passes:
        made.run(unroll)
    return passes.forward / unroll, passes.backward / unroll


def measure(case: Case, repeats: int, milliseconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Times the libraries in turns, and sees that they computed the same."""
    programs = {library: program(library, case) for library in LIBRARIES}
    start = programs["betty"].parameters()
    passes = {library: per_iteration(made, case.unroll) for library, made in programs.items()}
    began = clock()
    for made in programs.values():
        made.run(2 * case.unroll)
    each = (clock() - began) / (2 * case.unroll * len(programs)) * 1e3
    iterations = max(1, round(milliseconds / each / case.unroll)) * case.unroll
    times: dict[str, list[float]] = {library: [] for library in programs}
    for place in range(repeats):
        turn = list(programs) if place % 2 == 0 else list(reversed(programs))
        for library in turn:
            began = clock()
            programs[library].run(iterations)
            times[library].append((clock() - began) / iterations * 1e3)
    distance = apart(start, programs["betty"].parameters(), programs["ours"].parameters())
    assert distance < TOLERANCE[case.method], f"{case}: the libraries end at different parameters ({distance:.1e})"
    ratios = {
        library: sorted(b / a for a, b in zip(times["betty"], times[library], strict=True)) for library in programs
    }
    return {
        "width": case.width,
        "parameters": sum(p.numel() for p in programs["betty"].classifier.parameters()),
        "method": case.method,
        "unroll": case.unroll,
        "iterations": iterations,
        "ms": {library: statistics.median(several) for library, several in times.items()},
        "passes": passes,
        "ratio": statistics.median(ratios["ours"]),
        "quartiles": statistics.quantiles(ratios["ours"], n=4)[::2] if repeats > 1 else None,
        "ratio_without_copy": statistics.median(ratios["ours without copy"]),
        "difference": distance,
    }


def apart(start: list[Tensor], first: list[Tensor], second: list[Tensor]) -> float:
    """Returns the distance between two ends, relative to the way from the start."""
    gap = sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))
    way = sum(float((a - b).square().sum()) for a, b in zip(start, first, strict=True))
    return float((gap / way) ** 0.5)


def memory(case: Case) -> dict[str, float]:
    """Returns MiB beyond the start, a library at a time, each in a new process."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for library in LIBRARIES:
        with context.Pool(1) as pool:
            found[library] = pool.apply(high_water, (library, case, torch.get_num_threads()))
    return found


def high_water(library: str, case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    with silent():
        made = program(library, case)
        made.run(case.unroll)  # optimisers have their state, threads their buffers
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        made.run(3 * case.unroll)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps both libraries' lines from stdout."""
    before = logging.getLogger("betty").disabled
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            logging.getLogger("betty").disabled = True
            yield
        finally:
            logging.getLogger("betty").disabled = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 1024])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--unroll", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=300.0, help="about how long one run is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="steadier where others use the machine too")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    heads = "parameters", "method", "unroll", "passes Betty, ours", "ms Betty, ours", "ratio", "without copy"
    if not arguments.json:
        print(f"| {' | '.join((*heads, 'MiB Betty, ours'))} |\n|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for width, method, unroll in itertools.product(arguments.widths, arguments.methods, arguments.unroll):
        case = Case(width, arguments.batch, method, unroll)
        with silent():
            row = measure(case, arguments.repeats, arguments.milliseconds, clock)
        rows.append({**row, "mib": None if arguments.no_memory else memory(case)})
        if not arguments.json:
            print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def line(row: dict[str, Any]) -> str:
    passes = (" + ".join(f"{part:g}" for part in row["passes"][name]) for name in ("betty", "ours"))
    low, high = row["quartiles"] or (row["ratio"],) * 2
    cells = (
        f"{row['parameters']:,}",
        row["method"],
        str(row["unroll"]),
        ", ".join(passes),
        f"{row['ms']['betty']:.2f}, {row['ms']['ours']:.2f}",
        f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})",
        f"{row['ratio_without_copy']:.2f}",
        "" if row["mib"] is None else f"{row['mib']['betty']:.0f}, {row['mib']['ours']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
