"""What it costs to keep every hypergradient of a run within a relative error of 1e-3.

    python -m benchmarks.peers.precision [WORKLOAD …] --environments DIR [--size small] [--rounds 5] [--save]

A run of 50 outer steps is made once, in float64: λ by Adam with exact hypergradients, w by the workload's inner steps.
All libraries then start each of these steps from the same w and λ, and every hypergradient is compared with the exact
one in float64 at the new w. A peer has a fixed number of terms (and a step size): the smallest with which all 50 are
within the limit, searched first in float64, then in the library itself: at a few steps, to which the worst of the run
is added until the number that they need is enough for all. This library's solves stop by their residual; the largest
tolerance of a grid with which all 50 are within the limit is taken. What is timed is the whole outer step.
"""

from __future__ import annotations

import argparse
import importlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import add_comparison, command, named, new_parser, show_and_keep
from benchmarks.peers.environments import LIBRARIES, interpreters
from benchmarks.peers.protocol import Remote, WorkerError
from benchmarks.peers.reference import IndefiniteError, Point, conjugate_gradient, new_inner, unflat
from benchmarks.peers.report import about, complain, lines_of, scientific
from benchmarks.peers.run import Settings, has_side
from benchmarks.peers.side import Arrays, Method, NotOffered, Task
from benchmarks.peers.timing import median, rotated
from benchmarks.peers.verdict import error

__all__ = ["Path50", "main", "path"]

LIMIT, STEPS = 1e-3, 50
# Of Adam; 0.01 where nothing is said. (a): 0.1 ends at a lower outer loss, with decays so small that solves in float32
# need some 490 products. (b): at 0.02 the inner Hessian becomes indefinite within the run.
OUTER_RATES = {"regularisation": 0.05, "reweighting": 0.01, "adapters": 0.001}
PEERS = ("hand", "betty", "torchopt", "boat", "jaxopt")
LOOK = (0, 25, 49)  # the steps at which a search looks first
CG_CAP, SERIES_CAP, SOLVE_CAP = 400, 600, 20_000
PERIOD = 50  # products over which a series' rate is taken
SOLVED = 1e-7  # residual of the exact solves of a run
HOPELESS = 1.0  # a method that is right is nearer with twice of what suffices in float64, however rounding delays it
FRACTIONS = (1.9, 1.5, 1.0)  # of 1/λmax, for α
TOLERANCES = tuple(10 ** (-0.25 * k) for k in range(2, 21))
START = 11  # of these, where the search begins
OURS: dict[str, dict[str, Any]] = {
    "stopped by the residual": {},
    "warm start": {"warm_start": True},
    "linear warm start": {"warm_start": "linear"},
    "quadratic warm start": {"warm_start": "quadratic"},
}


@dataclass
class Path50:
    """The points that every library starts a step from, and what is right there.

    Attributes:
        inner: For each inner parameter its values at all steps, stacked.
        outer: Likewise.
        exact: Exact hypergradients at the inner parameters after each step's inner update.
    """

    inner: list[np.ndarray]
    outer: list[np.ndarray]
    exact: np.ndarray

    def write(self, file: Path) -> None:
        parts = {f"inner{i:04d}": x for i, x in enumerate(self.inner)}
        np.savez(file, **parts, **{f"outer{i:04d}": x for i, x in enumerate(self.outer)})

    def at(self, steps: Sequence[int]) -> Path50:
        """Returns only these steps."""
        chosen = list(steps)
        return Path50([x[chosen] for x in self.inner], [x[chosen] for x in self.outer], self.exact[chosen])

    def task(self, task: Task, step: int) -> Task:
        """Returns the task with a step's points for its start."""
        parts = ([torch.tensor(x[step], dtype=torch.float64) for x in part] for part in (self.inner, self.outer))
        inner, outer = parts
        return replace(task, inner=inner, outer=outer)


@dataclass
class Contender:
    """A library with a method, and what became of it.

    Attributes:
        library: Its key.
        label: What the table says of the method.
        method: The method.
        errors: Of every hypergradient.
        seconds: Of all steps, one for every time that the run was gone through; the first is the search's.
        products: A step's backward passes, without those of inner step, outer gradient and graph.
        failed: Why there is nothing.
        lacks: Whether that is because the library does not offer the method.
        part: The steps that are taken, where these are not all; the seconds are scaled to all.
    """

    library: str
    label: str
    method: Method
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    products: float = math.nan
    failed: str = ""
    lacks: bool = False
    part: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.library} {self.label}"


def path(task: Task, rate: float, steps: int = STEPS) -> Path50:
    """Makes the run in float64, from points that float32 holds; shorter where the inner Hessian becomes indefinite."""
    inner = [part.detach().float().double() for part in task.inner]
    outer = [part.detach().clone().requires_grad_() for part in task.outer]
    adam = torch.optim.Adam(outer, lr=rate)
    inners, outers, exact = [], [], []
    solutions: list[Tensor] = []
    for _ in range(steps):
        here = [part.detach().float().double() for part in outer]
        new = new_inner(replace(task, inner=inner, outer=here))
        point = Point(task, new, here)
        try:
            solutions = [_solve(point, solutions), *solutions[:2]]
            total = point.total(solutions[0])
        except IndefiniteError:
            if not exact:
                raise
            break  # conjugate gradients, and the implicit hypergradient with them, make no sense from here on
        exact.append(total.numpy())
        inners.append([part.numpy().astype(np.float32) for part in inner])
        outers.append([part.numpy().astype(np.float32) for part in here])
        for part, grad in zip(outer, unflat(total, outer), strict=True):
            part.grad = grad.clone()
        adam.step()
        inner = [part.float().double() for part in new]
    stack = [[np.stack(parts) for parts in zip(*rows, strict=True)] for rows in (inners, outers)]
    return Path50(stack[0], stack[1], np.stack(exact))


def _solve(point: Point, before: Sequence[Tensor]) -> Tensor:
    """Returns ``H⁻¹ v`` to a residual of :data:`SOLVED`, from where the last solutions lead."""
    coefficients: Mapping[int, tuple[float, ...]] = {0: (), 1: (1.0,), 2: (2.0, -1.0), 3: (3.0, -3.0, 1.0)}
    start = torch.zeros_like(point.v)
    for factor, q in zip(coefficients[len(before)], before, strict=True):
        start = start + factor * q
    residual = point.v - point.hessian(start)
    rtol = SOLVED * float(point.v.norm() / residual.norm())
    q = start + conjugate_gradient(point.hessian, residual, SOLVE_CAP, rtol)
    left = float((point.hessian(q) - point.v).norm() / point.v.norm())
    if left > 10 * SOLVED:
        raise ValueError(f"the exact solve of a step ended at a residual of {left:.1e}")
    return q


def smallest(task: Task, run: Path50) -> tuple[int, tuple[int, float]]:
    """Returns how many products conjugate gradients need at every step looked at, and a Neumann series with its α."""
    steps = [step for step in LOOK if step < len(run.exact)]
    points = []
    for step in steps:
        start = run.task(task, step)
        points.append((Point(task, new_inner(start), start.outer), run.exact[step]))
    conjugate = max(first_within(iterates(point), point, exact, CG_CAP) for point, exact in points)
    largest = max(largest_eigenvalue(point) for point, _ in points)
    best = (SERIES_CAP, 1 / largest)
    for fraction in FRACTIONS:
        alpha, need = fraction / largest, 0
        for point, exact in points:
            need = max(need, first_within(series(point, alpha), point, exact, best[0], slowing=True))
            if need >= best[0]:
                break
        if need < best[0]:
            best = (need, alpha)
    return conjugate, best


def iterates(point: Point) -> Iterator[Tensor]:
    """Yields the iterates of conjugate gradients, the first after one product."""
    q, r, p = torch.zeros_like(point.v), point.v, point.v
    rr = r @ r
    while True:
        image = point.hessian(p)
        step = rr / (p @ image)
        q, r = q + step * p, r - step * image
        new = r @ r
        p, rr = r + new / rr * p, new
        yield q


def series(point: Point, alpha: float) -> Iterator[Tensor]:
    """Yields the partial sums of the Neumann series, the first with one product."""
    term = total = alpha * point.v
    while True:
        term = term - alpha * point.hessian(term)
        total = total + term
        yield total


def first_within(
    solutions: Iterator[Tensor], point: Point, exact: np.ndarray, cap: int, *, slowing: bool = False
) -> int:
    """Returns after how many products the hypergradient is, and stays for two more, within the limit; at most the cap.

    Args:
        solutions: One a product.
        point: Where.
        exact: The hypergradient there.
        cap: Of products.
        slowing: Whether the error falls ever more slowly, as that of a series does: the cap is then returned as soon as
            the rate of the last products is too low for it.
    """
    inside, before = 0, math.inf
    for number, q in zip(range(1, cap + 1), solutions, strict=False):
        now = error(point.total(q).numpy(), exact)
        inside = inside + 1 if now <= LIMIT else 0
        if inside == 3:
            return number - 2
        if slowing and number % PERIOD == 0:
            fall = now / before if before < math.inf else 0.0
            if not now * fall ** ((cap - number) / PERIOD) <= LIMIT:
                return cap
            before = now
    return cap


def largest_eigenvalue(point: Point) -> float:
    """Returns λmax by 40 power iterations."""
    q, value = torch.ones_like(point.v), 0.0
    for _ in range(40):
        q = point.hessian(q / q.norm())
        value = float(q.norm())
    return value


class Field:
    """All libraries on one run."""

    def __init__(
        self, name: str, arrays: Arrays, run: Path50, pythons: Mapping[str, Path], settings: Settings, folder: Path
    ) -> None:
        self.name, self.run, self.settings, self.folder = name, run, settings, folder
        np.savez(folder / "data.npz", **arrays)
        self.look = tuple(step for step in LOOK if step < len(run.exact))
        run.write(folder / "path.npz")
        self.remotes: dict[str, Remote] = {}
        for library, python in pythons.items():
            known, quiet = LIBRARIES[library].distributions, {"MPLBACKEND": "Agg"}
            remote = Remote(library, python, threads=settings.threads, distributions=known, environment=quiet)
            remote.ask("load", data=name, file=str(folder / "data.npz"))
            self.remotes[library] = remote

    def close(self) -> None:
        for remote in {id(one): one for one in self.remotes.values()}.values():
            remote.close()

    def take(self, contender: Contender) -> None:
        """Makes the side anew and goes through the run once; sets errors, products, and adds the seconds."""
        remote = self.remotes[contender.library]
        file, found = self.folder / "path.npz", self.folder / "found.npz"
        exact = self.run.exact
        if contender.part:
            part, file = self.run.at(contender.part), self.folder / "part.npz"
            part.write(file)
            exact = part.exact
        key, cpu_time = contender.key, self.settings.cpu_time
        if not contender.seconds:
            fields = {"size": self.settings.size, "device": self.settings.device, "method": asdict(contender.method)}
            remote.ask("build", key=key, data=self.name, workload=self.name, **fields)
            remote.ask("step", key=key)  # what is made or compiled at the first call
        remote.ask("forget", key=key)
        told = remote.ask("timed_path", key=key, file=str(file), found=str(found), cpu_time=cpu_time)
        with np.load(found) as arrays:
            gradients = arrays["gradients"]
        contender.errors = [error(a, b) for a, b in zip(gradients, exact, strict=True)]
        # Inner step, outer gradient and the gradient with its graph are no products.
        contender.products = told["backward"] / len(gradients) - 3 if told["backward"] else math.nan
        worst = max(contender.errors)
        complain(f"  {contender.library}: {contender.label}: {worst:.1e}, {sum(told['seconds']):.2f} s")
        contender.seconds.append(sum(told["seconds"]) * len(self.run.exact) / len(exact))

    def holds(self, contender: Contender) -> bool:
        """Whether every hypergradient of the run is within the limit."""
        try:
            self.take(contender)
        except (WorkerError, NotOffered) as failure:
            contender.failed, contender.lacks = str(failure), isinstance(failure, NotOffered)
            return False
        return max(contender.errors) <= LIMIT  # a NaN is not

    def peer(self, library: str, kind: str, products: int, alpha: float) -> Contender | None:
        """Returns a peer with the smallest fixed number that holds; None where it does not offer the method.

        The number is the smallest for some steps, with which it also holds for all: where it does not, the worst step
        is added to them.
        """
        failed = products - 1
        while True:
            contender, failed = self._smallest(library, kind, failed, alpha)
            if contender is None or contender.failed or max(contender.errors) > LIMIT or kind == "neumann":
                return contender
            whole = replace(contender, part=(), errors=[], seconds=[])
            if self.holds(whole) or whole.failed:
                return whole
            self.look = tuple(sorted({*self.look, int(np.argmax(whole.errors))}))
            failed = whole.method.products

    def _smallest(self, library: str, kind: str, failed: int, alpha: float) -> tuple[Contender | None, int]:
        """Returns the same for the steps looked at, above a number that is known (or thought) not to hold."""
        tried: dict[int, Contender] = {}

        def holds(count: int) -> bool:
            label = f"conjugate gradients, {count} products"
            if kind == "neumann":
                label = f"Neumann, {count} products, α = {alpha:.3g}"
            tried[count] = Contender(library, label, Method(kind, count, alpha), part=self.look)
            return self.holds(tried[count])

        low, high, cap = failed, failed + 1, 4 * (failed + 1)
        while not holds(high):
            last = tried[high]
            if last.lacks:
                return None, high
            far = not max(last.errors, default=math.nan) <= HOPELESS
            if last.failed or (far and high >= 2 * failed + 2) or high >= cap:
                return last, high
            more = 2 * failed + 2 if far else high + 2 * (high - failed)  # rounding delays conjugate gradients
            low, high = high, min(cap, more)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        for one in tried.values():
            if one is not tried[high]:
                self.remotes[library].ask("drop", key=one.key)
        return tried[high], low

    def ours(self, label: str, fields: dict[str, Any], place: int) -> tuple[Contender | None, int]:
        """Returns this library with the largest tolerance that holds, and that tolerance's place in the grid.

        Args:
            label: What the table says of the method.
            fields: Of the method.
            place: Where the search begins.
        """
        best: Contender | None = None
        known: dict[int, bool] = {}
        while place not in known and 0 <= place < len(TOLERANCES):
            options = {"max_iterations": CG_CAP, "rtol": TOLERANCES[place], **fields}
            method = Method("conjugate_gradient", options=options)
            contender = Contender("bilevel", f"{label}, rtol = {TOLERANCES[place]:.2g}", method)
            known[place] = self.holds(contender)
            if contender.failed:
                return contender, place
            if known[place]:
                best = contender
            place += -1 if known[place] else 1
        return best, min(max(place, 0), len(TOLERANCES) - 1)

    def compiled(self, found: Sequence[Contender]) -> Contender | None:
        """Returns the fastest of those that hold, with compiled iterations."""
        right = [one for one in found if not one.failed and max(one.errors) <= LIMIT]
        if not right:
            return None
        one = min(right, key=lambda one: one.seconds[-1])
        self.remotes.setdefault("bilevel_compiled", self.remotes["bilevel"])
        place = TOLERANCES.index(one.method.options["rtol"])
        for rtol in TOLERANCES[place : place + 3]:  # rounding is another, and the tolerance at its limit
            options = {**one.method.options, "compile": True, "rtol": rtol}
            label = f"{one.label.partition(', rtol')[0]}, rtol = {rtol:.2g}"
            contender = Contender("bilevel_compiled", label, replace(one.method, options=options))
            if self.holds(contender) or contender.failed:
                break
        return contender


def measure(name: str, pythons: Mapping[str, Path], settings: Settings, steps: int) -> dict[str, Any]:
    """Runs a workload; returns the result as :func:`benchmarks.peers.report.save` takes it."""
    module = importlib.import_module(f"benchmarks.peers.workloads.{name}")
    arrays, source = module.data(settings.size, settings.data)
    task = module.task(arrays, settings.size, dtype="float64")
    run = path(task, OUTER_RATES.get(name, 0.01), steps)
    conjugate, (terms, alpha) = smallest(task, run)
    complain(
        f"{name}: float64 needs {conjugate} products of conjugate gradients, {terms} of a series (α = {alpha:.3g})"
    )
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        everybody = Field(name, arrays, run, pythons, settings, Path(folder))
        try:
            for library in list(everybody.remotes):
                if library == "bilevel":
                    found, place = [], START
                    for label, fields in OURS.items():
                        one, place = everybody.ours(label, fields, place)
                        found.append(one)
                    found.append(everybody.compiled([one for one in found if one is not None]))
                else:
                    found = [everybody.peer(library, "conjugate_gradient", conjugate, 1.0)]
                    holds = found[0] is not None and not found[0].failed and max(found[0].errors) <= LIMIT
                    if not holds:  # Betty's conjugate gradients are wrong: its series is the next best
                        found.append(everybody.peer(library, "neumann", terms, alpha) if terms < SERIES_CAP else None)
                contenders += [one for one in found if one is not None]
            good = {f"{i}": one for i, one in enumerate(contenders) if one.errors and max(one.errors) <= LIMIT}
            for one in good.values():
                del one.seconds[:-1]
            for order in rotated(list(good), settings.rounds):
                for key in order:
                    everybody.take(good[key])
            versions = {library: remote.versions for library, remote in everybody.remotes.items()}
        finally:
            everybody.close()
    return {
        "source": f"{source}, {len(run.exact)} outer steps",
        "rows": [row(one) for one in contenders],
        "lines": lines(contenders),
        "versions": versions,
    }


def row(one: Contender) -> dict[str, Any]:
    return {
        "library": one.library,
        "label": one.label,
        "worst": max(one.errors, default=math.nan),
        "products": one.products,
        "seconds": one.seconds[1:],
        "failed": one.failed,
    }


def lines(contenders: Sequence[Contender]) -> list[str]:
    """Returns the table; the ratio is to the fastest peer that is right and uses torch."""
    right = [one for one in contenders if one.errors and max(one.errors) <= LIMIT]
    peers = [one for one in right if one.library not in ("hand", "bilevel", "bilevel_compiled", "jaxopt")]
    best = min(peers, key=lambda one: median(one.seconds[1:]), default=None)
    table = [
        "| library | method | products a step | worst error | s for all steps | to the best peer |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(contenders, key=lambda one: median(one.seconds[1:]) if one in right else math.inf):
        worst = max(one.errors, default=math.nan)
        products = "–" if math.isnan(one.products) else f"{one.products:.1f}"
        name = LIBRARIES[one.library].name
        if one not in right:
            why = one.failed or f"**wrong**: never within {LIMIT:g}"
            table.append(f"| {name} | {one.label} | {products} | {scientific(worst)} | {why} |  |")
            continue
        ratios = [a / b for a, b in zip(one.seconds[1:], best.seconds[1:], strict=True)] if best else []
        numbers = f"{median(one.seconds[1:]):.3g} | " + (f"{median(ratios):.2f}" if ratios else "–")
        table.append(f"| {name} | {one.label} | {products} | {scientific(worst)} | {numbers} |")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("workloads", nargs="*", default=["regularisation", "reweighting", "adapters"])
    parser.add_argument("--libraries", nargs="+", choices=tuple(LIBRARIES), default=["bilevel", *PEERS])
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--steps", type=int, default=STEPS)
    add_comparison(parser, rounds=5)
    command(parser, arguments, _run, lines_of)


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    settings = Settings(options.size, options.rounds, options.threads, options.device, options.cpu_time, options.data)
    pythons, _ = interpreters(options)
    for name in options.workloads:
        started = time.perf_counter()
        present = {library: python for library, python in pythons.items() if has_side(library, name)}
        found = measure(name, present, settings, options.steps)
        told = about(given, time.perf_counter() - started, settings, "benchmarks.peers.precision")
        result = {"about": told, **found}
        show_and_keep(named(f"{name}-precision", options.device), name, result, lines_of(result), options)


if __name__ == "__main__":
    main()
