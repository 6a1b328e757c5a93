"""What the engine costs beyond its passes: its time per outer step beside a hand-written torch loop's.

    python -m benchmarks.overhead [--pass-ms 0.2 5 20] [--rounds 15] [--threads 1] [--device cpu] [--cpu-time]
                                  [--save] [--page docs/benchmarks/overhead.md]

All run in one process, in turns, on the same numbers: an MLP with weighted training examples (inner, SGD), whose
weights are the outer problem (Adam). Its batch is chosen in the run, so that a forward and backward pass take about the
milliseconds asked for. The loop does the same passes as the engine, which is asserted; so is that both find the same
hypergradient, and end with the same parameters. It checks nothing, keeps no copy for a step that fails, and reports
nothing. Prints a table in Markdown: medians; "without copy" is the ratio with ``restore_on_error=False``.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.options import add_clock, add_results, carry_out, keep, named, new_parser
from benchmarks.peers.memory import keep_memory
from benchmarks.peers.report import as_told, processor
from benchmarks.peers.sides.hand.implicit import conjugate_gradient
from bilevel import (
    ConjugateGradient,
    Engine,
    EngineConfig,
    Estimator,
    FiniteDifference,
    Identity,
    Neumann,
    Problem,
    Unrolled,
)

INNER_RATE, OUTER_RATE = 0.05, 0.01
EPOCH = 50  # batches: to begin an epoch takes more than to draw a batch


@dataclass(frozen=True)
class Case:
    """A method, and how many inner updates an outer step makes."""

    method: Estimator
    steps: int = 1

    @property
    def label(self) -> str:
        if isinstance(self.method, Unrolled):
            return f"unrolled, {self.method.memory}, {self.steps} step{'s' * (self.steps > 1)}"
        kept = getattr(self.method, "center", "new") == "old"
        return f"{self.method.name}, on the graph of the step" if kept else self.method.name


CASES: tuple[Case, ...] = (
    Case(FiniteDifference()),
    Case(Identity()),
    Case(Identity(center="old")),
    Case(Neumann(terms=10, step_size=0.1, damping=1.0)),
    Case(ConjugateGradient(max_iterations=5, rtol=0.0, damping=1.0)),
    *(Case(Unrolled(memory=memory), steps) for memory in ("graph", "replay") for steps in (1, 5, 20)),
)
# In units in the last place of float32, over sums of some thousand terms.
TOLERANCE = 1e-3
# Central differences lose a third of the digits.
DIFFERENCE_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Size:
    """A model and batch whose forward and backward pass takes ``pass_ms`` milliseconds, as measured."""

    pass_ms: float
    batch: int
    width: int
    hidden: int

    @classmethod
    def taking(cls, milliseconds: float, clock: Callable[[], float], device: str) -> Size:
        """Chooses the batch, by measuring, for a network that grows with the time asked for."""
        hidden = 1 << round(math.log2(64 * milliseconds**0.5 + 32))
        batch = 8
        for _ in range(6):
            found = cls(pass_time(Task.of(cls(0.0, batch, hidden, hidden), device), clock), batch, hidden, hidden)
            if 0.9 < found.pass_ms / milliseconds < 1.1:
                break
            batch = max(1, round(batch * min(8.0, milliseconds / found.pass_ms)))
        return found


def pass_time(task: Task, clock: Callable[[], float]) -> float:
    """Returns the median milliseconds of an inner forward and backward pass."""
    loop = Loop(task, Case(Identity()))
    times = []
    for _ in range(9):
        started = clock()
        loop.grad(loop.inner(), loop.w)
        times.append((clock() - started) * 1e3)
    return statistics.median(times)


@dataclass
class Task:
    """A model, the logits of its training examples' weights, and two batches."""

    model: nn.Module
    logits: nn.ParameterDict
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, size: Size, device: str) -> Task:
        torch.manual_seed(0)
        layers = nn.Linear(size.width, size.hidden), nn.Tanh(), nn.Linear(size.hidden, size.hidden), nn.Tanh()
        model = nn.Sequential(*layers, nn.Linear(size.hidden, 10))
        batches = [
            (torch.randn(size.batch, size.width).to(device), torch.randint(10, (size.batch,)).to(device))
            for _ in range(2)
        ]
        return cls(model.to(device), nn.ParameterDict({"logits": torch.zeros(size.batch)}).to(device), *batches)

    def parameters(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.logits.parameters()]


class Cleaner(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)


class Classifier(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (torch.sigmoid(self.cleaner.module.logits) * F.cross_entropy(self(x), y, reduction="none")).mean()


Outer = Callable[[Any], torch.optim.Optimizer]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=OUTER_RATE)


def engine_step(task: Task, case: Case, restore: bool, outer: Outer = adam) -> Callable[[], tuple[int, int]]:
    sgd = lambda params: torch.optim.SGD(params, lr=INNER_RATE)  # noqa: E731
    problems = [
        Cleaner(task.logits, optimizer=outer, data=[task.valid] * EPOCH),
        Classifier(task.model, optimizer=sgd, data=[task.train] * EPOCH, steps=case.steps),
    ]
    engine = Engine(problems, EngineConfig(progress=False, restore_on_error=restore), case.method)
    return lambda: engine.step().passes


class Loop:
    """The same steps, written by hand."""

    def __init__(self, task: Task, case: Case, outer: Outer = adam) -> None:
        self.task, self.method, self.steps = task, case.method, case.steps
        self.names = [name for name, _ in task.model.named_parameters()]
        self.w: list[Tensor] = list(task.model.parameters())
        self.lam: list[Tensor] = list(task.logits.parameters())
        self.sgd = torch.optim.SGD(self.w, lr=INNER_RATE)
        self.outer = outer(self.lam)
        self.passes = [0, 0]
        self.keeps = getattr(self.method, "center", "new") == "old" or getattr(self.method, "memory", "") == "graph"

    def step(self) -> tuple[int, int]:
        self.passes = [0, 0]
        record = [self.descend() for _ in range(self.steps)]
        x, y = self.task.valid
        self.passes[0] += 1
        v = self.grad(F.cross_entropy(self.task.model(x), y), self.w)
        for part, grad in zip(self.lam, self.response(v, record), strict=True):
            part.grad = grad
        self.outer.step()
        return self.passes[0], self.passes[1]

    def descend(self) -> tuple[list[Tensor], list[Tensor]]:
        """Makes an inner update; returns where from, and the gradient, with its graph where that is wanted."""
        before: list[Tensor] = []
        if self.keeps or isinstance(self.method, Unrolled):
            before = [part.detach().clone() for part in self.w]
        if self.keeps:
            before = [part.requires_grad_() for part in before]
            g = self.grad(self.inner(before), before, create_graph=True)
        else:
            g = self.grad(self.inner(), self.w)
        for part, grad in zip(self.w, g, strict=True):
            part.grad = grad.detach()
        self.sgd.step()
        return before, g

    def inner(self, at: list[Tensor] | None = None) -> Tensor:
        x, y = self.task.train
        self.passes[0] += 1
        model = self.task.model
        z = model(x) if at is None else functional_call(model, dict(zip(self.names, at, strict=True)), (x,))
        per_example = F.cross_entropy(z, y, reduction="none")
        return (torch.sigmoid(self.task.logits["logits"]) * per_example).mean()

    def grad(
        self, value: Any, inputs: list[Tensor], cotangent: Sequence[Tensor] | None = None, **how: bool
    ) -> list[Tensor]:
        self.passes[1] += 1
        return list(torch.autograd.grad(value, inputs, cotangent, **how))

    def response(self, v: list[Tensor], record: list[tuple[list[Tensor], list[Tensor]]]) -> list[Tensor]:
        if isinstance(self.method, FiniteDifference):
            return self.differences(v)
        if isinstance(self.method, Unrolled):
            return self.unrolled(v, record)
        if self.keeps:
            return [-part for part in self.grad(record[-1][1], self.lam, v)]
        g = self.grad(self.inner(), self.w, create_graph=True)
        if isinstance(self.method, Identity):
            return [-part for part in self.grad(g, self.lam, v)]
        if isinstance(self.method, Neumann):
            q = self.neumann(self.method, g, v)
        else:
            assert isinstance(self.method, ConjugateGradient)
            q = self.conjugate_gradient(self.method, g, v)
        both = self.grad(g, self.w + self.lam, q)  # the residual comes with the answer, as in the engine
        return [-part for part in both[len(self.w) :]]

    def unrolled(self, v: list[Tensor], record: list[tuple[list[Tensor], list[Tensor]]]) -> list[Tensor]:
        total = [torch.zeros_like(part) for part in self.lam]
        count = len(self.w)
        for place in reversed(range(len(record))):
            at, g = record[place]
            if not self.keeps:
                at = [part.requires_grad_() for part in at]
                g = self.grad(self.inner(at), at, create_graph=True)
            inputs = at + self.lam if place else self.lam  # nothing comes before the first step
            pulled = self.grad(g, inputs, [-INNER_RATE * part for part in v])
            if place:
                v = [a + b for a, b in zip(v, pulled[:count], strict=True)]
                pulled = pulled[count:]
            total = [a + b for a, b in zip(total, pulled, strict=True)]
        return total

    def hessian(self, g: list[Tensor], q: Sequence[Tensor]) -> list[Tensor]:
        return self.grad(g, self.w, q, retain_graph=True)

    def neumann(self, method: Neumann, g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        alpha, damping = float(method.step_size), method.damping
        term, total = v, v
        for _ in range(method.terms):
            image = self.hessian(g, term)
            term = [t - alpha * (h + damping * t) for t, h in zip(term, image, strict=True)]
            total = [a + b for a, b in zip(total, term, strict=True)]
        return [alpha * part for part in total]

    def conjugate_gradient(self, method: ConjugateGradient, g: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        def product(p: Sequence[Tensor], _: int) -> list[Tensor]:
            return [h + method.damping * part for h, part in zip(self.hessian(g, p), p, strict=True)]

        return conjugate_gradient(product, v, method.max_iterations, inner_product)

    def differences(self, v: list[Tensor]) -> list[Tensor]:
        epsilon = torch.finfo(torch.float32).eps ** (1 / 3) * math.sqrt(1 + inner_product(self.w, self.w) ** 0.5)
        size = inner_product(v, v) ** 0.5
        here = [part.detach().clone() for part in self.w]
        found = []
        for sign in (1, -1):
            self.put([part + sign * epsilon / size * step for part, step in zip(here, v, strict=True)])
            found.append(self.grad(self.inner(), self.lam))
        self.put(here)
        return [(b - a) * (size / (2 * epsilon)) for a, b in zip(*found, strict=True)]

    def put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for part, value in zip(self.w, values, strict=True):
                part.copy_(value)


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.detach() * y.detach()).sum() for x, y in zip(a, b, strict=True)))


def check_hypergradients(start: Task, case: Case) -> float:
    """Returns the relative difference of the loop's and the engine's first hypergradient.

    One outer step of SGD with rate 1 from zero logits leaves them at minus the hypergradient.
    """
    found = []
    for contender in (Loop, partial(engine_step, restore=True)):
        task = copy.deepcopy(start)
        made = contender(task, case, outer=lambda params: torch.optim.SGD(params, lr=1.0))
        made.step() if isinstance(made, Loop) else made()
        found.append(task.logits["logits"].detach())
    difference = float((found[0] - found[1]).norm() / found[0].norm())
    limit = DIFFERENCE_TOLERANCE if isinstance(case.method, FiniteDifference) else TOLERANCE
    assert difference < limit, f"{case.label}: the loop's and the engine's hypergradients differ by {difference:.1e}"
    return difference


def measure(size: Size, case: Case, rounds: int, clock: Callable[[], float], device: str) -> dict[str, Any]:
    """Times the three in turns, and sees that they computed the same."""
    start = Task.of(size, device)
    tasks = [copy.deepcopy(start) for _ in range(3)]
    contenders = [
        Loop(tasks[0], case).step,
        engine_step(tasks[1], case, restore=True),
        engine_step(tasks[2], case, restore=False),
    ]
    passes = {contender() for contender in contenders}
    assert len(passes) == 1, f"{case.label}: the loop and the engine take different passes: {passes}"
    steps = max(1, round(20 / size.pass_ms / case.steps))
    times: list[list[float]] = [[], [], []]
    for turn in range(rounds):
        order = list(zip(contenders, times, strict=True))
        for contender, found in order if turn % 2 == 0 else reversed(order):
            started = clock()
            for _ in range(steps):
                contender()
            found.append((clock() - started) / steps * 1e3)
    drift = agreement(start, tasks[0], tasks[1])
    assert drift < 1e-2, f"{case.label}: the loop and the engine end at different parameters ({drift:.1e})"
    loop, engine, bare = times
    ratios = sorted(b / a for a, b in zip(loop, engine, strict=True))
    return {
        "pass_ms": size.pass_ms,
        "batch": size.batch,
        "width": size.width,
        "method": case.label,
        "passes": list(passes.pop()),
        "loop_ms": statistics.median(loop),
        "engine_ms": statistics.median(engine),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else [ratios[0]] * 2,
        "ratio_without_restore": statistics.median(b / a for a, b in zip(loop, bare, strict=True)),
        "hypergradient_difference": check_hypergradients(start, case),
        "difference": drift,
    }


def agreement(start: Task, first: Task, second: Task) -> float:
    """Returns the largest distance between two ends, relative to the way from the start."""
    triples = zip(start.parameters(), first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().norm() / (a - s).detach().norm()) for s, a, b in triples)


def table(rows: list[dict[str, Any]]) -> list[str]:
    heads = "pass, ms", "method", "passes", "loop, ms a step", "engine, ms a step", "ratio (quartiles)", "without copy"
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        (forward, backward), (low, high) = row["passes"], row["quartiles"]
        cells = (
            f"{row['pass_ms']:.2g}",
            row["method"],
            f"{forward} + {backward}",
            f"{row['loop_ms']:.3g}",
            f"{row['engine_ms']:.3g}",
            f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})",
            f"{row['ratio_without_restore']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Returns what the page shows of a result."""
    return [*table(result["rows"]), "", result["source"]]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--pass-ms", type=float, nargs="+", default=[0.2, 5.0, 20.0])
    add_clock(parser, rounds=15)
    add_results(parser)
    arguments = parser.parse_args()
    carry_out(arguments, lambda: run(arguments), lines_of)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the table and keeps what is to be kept."""
    torch.set_num_threads(arguments.threads)
    keep_memory()
    host_clock = time.process_time if arguments.cpu_time else time.perf_counter

    def clock() -> float:
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return host_clock()

    sizes = [Size.taking(milliseconds, clock, arguments.device) for milliseconds in arguments.pass_ms]
    rows = [measure(size, case, arguments.rounds, clock, arguments.device) for size in sizes for case in CASES]
    where = processor() if arguments.device == "cpu" else torch.cuda.get_device_name()
    command = shlex.join(["python", "-m", "benchmarks.overhead", *as_told(sys.argv[1:])])
    source = (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {where}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {'processor time' if arguments.cpu_time else 'wall clock'}; the allocator keeps freed "
        "memory for both."
    )
    result = {"source": source, "rows": rows}
    print("\n".join(lines_of(result)))
    keep(named("overhead", arguments.device), result, arguments)


if __name__ == "__main__":
    main()
