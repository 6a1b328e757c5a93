"""What the engine costs beyond its passes: its time per outer step beside a hand-written torch loop's.

    python benchmarks/overhead.py [--pass-ms 1 10 100] [--rounds 15] [--threads 1] [--cpu-time] [--json]

All run in one process, in turns, on the same numbers: an MLP with weighted training examples (inner, SGD), whose
weights are the outer problem (Adam). Its batch is chosen in the run, so that a forward and backward pass take about the
milliseconds asked for. The loop does the same passes as the engine, which is asserted; so is that both find the same
hypergradient, and end with the same parameters. It checks nothing, keeps no copy for a step that fails, and reports
nothing. Prints a table in Markdown: medians; "without copy" is the ratio with ``restore_on_error=False``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
METHODS: tuple[Estimator, ...] = (
    FiniteDifference(),
    Identity(),
    Unrolled(),
    Neumann(terms=10, step_size=0.1, damping=1.0),
    ConjugateGradient(max_iterations=5, rtol=0.0, damping=1.0),
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
    def taking(cls, milliseconds: float, clock: Callable[[], float]) -> Size:
        """Chooses the batch, by measuring, for a network that grows with the time asked for."""
        hidden = 1 << round(math.log2(64 * milliseconds**0.5 + 32))
        batch = 8
        for _ in range(6):
            found = cls(pass_time(Task.of(cls(0.0, batch, hidden, hidden)), clock), batch, hidden, hidden)
            if 0.9 < found.pass_ms / milliseconds < 1.1:
                break
            batch = max(1, round(batch * min(8.0, milliseconds / found.pass_ms)))
        return found


def pass_time(task: Task, clock: Callable[[], float]) -> float:
    """Returns the median milliseconds of an inner forward and backward pass."""
    loop = Loop(task, Identity())
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
    def of(cls, size: Size) -> Task:
        torch.manual_seed(0)
        layers = nn.Linear(size.width, size.hidden), nn.Tanh(), nn.Linear(size.hidden, size.hidden), nn.Tanh()
        model = nn.Sequential(*layers, nn.Linear(size.hidden, 10))
        batches = [(torch.randn(size.batch, size.width), torch.randint(10, (size.batch,))) for _ in range(2)]
        return cls(model, nn.ParameterDict({"logits": torch.zeros(size.batch)}), *batches)

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


def engine_step(task: Task, method: Estimator, restore: bool, outer: Outer = adam) -> Callable[[], tuple[int, int]]:
    sgd = lambda params: torch.optim.SGD(params, lr=INNER_RATE)  # noqa: E731
    problems = [
        Cleaner(task.logits, optimizer=outer, data=[task.valid]),
        Classifier(task.model, optimizer=sgd, data=[task.train]),
    ]
    engine = Engine(problems, EngineConfig(progress=False, restore_on_error=restore), method)
    return lambda: engine.step().passes


class Loop:
    """The same steps, written by hand."""

    def __init__(self, task: Task, method: Estimator, outer: Outer = adam) -> None:
        self.task, self.method = task, method
        self.w: list[Tensor] = list(task.model.parameters())
        self.lam: list[Tensor] = list(task.logits.parameters())
        self.sgd = torch.optim.SGD(self.w, lr=INNER_RATE)
        self.outer = outer(self.lam)
        self.passes = [0, 0]

    def step(self) -> tuple[int, int]:
        self.passes = [0, 0]
        before = [part.detach().clone() for part in self.w] if isinstance(self.method, Unrolled) else None
        for part, grad in zip(self.w, self.grad(self.inner(), self.w), strict=True):
            part.grad = grad
        self.sgd.step()
        x, y = self.task.valid
        self.passes[0] += 1
        v = self.grad(F.cross_entropy(self.task.model(x), y), self.w)
        for part, grad in zip(self.lam, self.implicit(v, before), strict=True):
            part.grad = grad
        self.outer.step()
        return self.passes[0], self.passes[1]

    def inner(self) -> Tensor:
        x, y = self.task.train
        self.passes[0] += 1
        per_example = F.cross_entropy(self.task.model(x), y, reduction="none")
        return (torch.sigmoid(self.task.logits["logits"]) * per_example).mean()

    def grad(
        self, value: Any, inputs: list[Tensor], cotangent: list[Tensor] | None = None, **how: bool
    ) -> list[Tensor]:
        self.passes[1] += 1
        return list(torch.autograd.grad(value, inputs, cotangent, **how))

    def implicit(self, v: list[Tensor], before: list[Tensor] | None) -> list[Tensor]:
        if isinstance(self.method, FiniteDifference):
            return self.differences(v)
        if before is not None:
            after = [part.detach().clone() for part in self.w]
            self.put(before)
            mixed = self.grad(self.grad(self.inner(), self.w, create_graph=True), self.lam, v)
            self.put(after)
            return [-INNER_RATE * part for part in mixed]
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

    def hessian(self, g: list[Tensor], q: list[Tensor]) -> list[Tensor]:
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
        damping = method.damping
        q, r, p = [torch.zeros_like(part) for part in v], v, v
        rr = inner_product(r, r)
        for _ in range(method.max_iterations):
            image = [h + damping * part for h, part in zip(self.hessian(g, p), p, strict=True)]
            alpha = rr / inner_product(p, image)
            q = [a + alpha * b for a, b in zip(q, p, strict=True)]
            r = [a - alpha * b for a, b in zip(r, image, strict=True)]
            new = inner_product(r, r)
            p = [a + new / rr * b for a, b in zip(r, p, strict=True)]
            rr = new
        return q

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


def inner_product(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.detach() * y.detach()).sum() for x, y in zip(a, b, strict=True)))


def check_hypergradients(start: Task, method: Estimator) -> float:
    """Returns the relative difference of the loop's and the engine's first hypergradient.

    One outer step of SGD with rate 1 from zero logits leaves them at minus the hypergradient.
    """
    found = []
    for contender in (Loop, partial(engine_step, restore=True)):
        task = copy.deepcopy(start)
        made = contender(task, method, outer=lambda params: torch.optim.SGD(params, lr=1.0))
        made.step() if isinstance(made, Loop) else made()
        found.append(task.logits["logits"].detach())
    difference = float((found[0] - found[1]).norm() / found[0].norm())
    limit = DIFFERENCE_TOLERANCE if isinstance(method, FiniteDifference) else TOLERANCE
    assert difference < limit, f"{method}: the loop's and the engine's hypergradients differ by {difference:.1e}"
    return difference


def measure(size: Size, method: Estimator, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Times the three in turns, and sees that they computed the same."""
    start = Task.of(size)
    tasks = [copy.deepcopy(start) for _ in range(3)]
    contenders = [
        Loop(tasks[0], method).step,
        engine_step(tasks[1], method, restore=True),
        engine_step(tasks[2], method, restore=False),
    ]
    passes = {contender() for contender in contenders}
    assert len(passes) == 1, f"{method}: the loop and the engine take different passes: {passes}"
    steps = max(1, round(20 / size.pass_ms))
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for contender, found in zip(contenders, times, strict=True):
            started = clock()
            for _ in range(steps):
                contender()
            found.append((clock() - started) / steps * 1e3)
    drift = agreement(start, tasks[0], tasks[1])
    assert drift < 1e-2, f"{method}: the loop and the engine end at different parameters ({drift:.1e})"
    loop, engine, bare = times
    return {
        "pass_ms": size.pass_ms,
        "method": method.name,
        "passes": list(passes.pop()),
        "loop_ms": statistics.median(loop),
        "engine_ms": statistics.median(engine),
        "ratio": statistics.median(b / a for a, b in zip(loop, engine, strict=True)),
        "ratio_without_restore": statistics.median(b / a for a, b in zip(loop, bare, strict=True)),
        "hypergradient_difference": check_hypergradients(start, method),
        "difference": drift,
    }


def agreement(start: Task, first: Task, second: Task) -> float:
    """Returns the largest distance between two ends, relative to the way from the start."""
    triples = zip(start.parameters(), first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().norm() / (a - s).detach().norm()) for s, a, b in triples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass-ms", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="steadier where others use the machine too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    sizes = [Size.taking(milliseconds, clock) for milliseconds in arguments.pass_ms]
    rows = [measure(size, method, arguments.rounds, clock) for size in sizes for method in METHODS]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("| pass, ms | method | passes | loop, ms a step | engine, ms a step | ratio | without copy |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        forward, backward = row["passes"]
        numbers = (f"{row[key]:.2f}" for key in ("loop_ms", "engine_ms", "ratio", "ratio_without_restore"))
        cells = (f"{row['pass_ms']:.1f}", row["method"], f"{forward} + {backward}", *numbers)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
