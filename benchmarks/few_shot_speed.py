"""MAML's outer step: tasks together and in chunks, beside loops over tasks.

    python -m benchmarks.few_shot_speed [--problem sinusoid conv] [--tasks 16 64] [--steps 1 5] [--device cpu|cuda]
        [--rounds 7] [--threads 1] [--cpu-time] [--every] [--save] [--page docs/tutorials/few_shot.md]

``sinusoid``: regression from ten points, an MLP with two layers of 40 (Finn et al., 2017). ``conv``: 5-way 1-shot, 28 ×
28 images, 5 query images a class, four blocks of a 3 × 3 convolution with 64 channels, batch normalisation, ReLU and
max-pooling. All sides start each step from the same weights and take the same gradient, which is compared with a loop
in float64; all end it with an update by Adam. They take turns in one process. TF32 is off. Memory is what a step's
tensors take at most beside what was there before it.

The loops are hand-written (all tasks' graphs are freed before the next one's begin) and, where it can be imported,
higher's. ``vmap`` is hand-written too: all tasks at once. Times are medians; factors are medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.options import add_append, add_clock, add_results, command, earlier, keep, named, new_parser
from benchmarks.peers.report import about, conditions
from benchmarks.peers.timing import median, ratio, rotated, timed
from bilevel import ConjugateGradient, Engine, EngineConfig, Unrolled
from bilevel.problems import Adaptation, MetaLearner, TaskBatch
from bilevel.problems.few_shot.budget import measured_peak

WAYS, QUERIES, CHANNELS = 5, 5, 64
POINTS = 10
RATES = {"sinusoid": 0.01, "conv": 0.4}


@dataclass(frozen=True)
class Case:
    """What is learned from.

    Attributes:
        problem: ``"sinusoid"`` or ``"conv"``.
        tasks: M.
        steps: Inner steps.
        device: Where.
    """

    problem: str
    tasks: int
    steps: int
    device: torch.device

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        torch.manual_seed(0)
        if self.problem == "sinusoid":
            made = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        else:
            blocks = [block for before in (1, CHANNELS, CHANNELS, CHANNELS) for block in _block(before)]
            made = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(CHANNELS, WAYS))
        return made.to(self.device, dtype)

    def batch(self, dtype: torch.dtype = torch.float32) -> TaskBatch:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.rand(self.tasks, *shape, generator=generator)

        if self.problem == "sinusoid":
            x, height, shift = 10 * random(2 * POINTS, 1) - 5, 0.1 + 4.9 * random(1, 1), torch.pi * random(1, 1)
            y = height * (x - shift).sin()
            parts = [x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:]]
        else:
            numbers = torch.arange(WAYS)
            support, query = (random(WAYS * count, 1, 28, 28) for count in (1, QUERIES))
            targets = [
                each.expand(self.tasks, -1).contiguous() for each in (numbers, numbers.repeat_interleave(QUERIES))
            ]
            parts = [support, targets[0], query, targets[1]]
        return TaskBatch(*(p.to(self.device, dtype if p.is_floating_point() else p.dtype) for p in parts))

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.problem == "sinusoid" else F.cross_entropy

    @property
    def rate(self) -> float:
        return RATES[self.problem]

    def title(self) -> str:
        return f"{self.problem}, {self.tasks} tasks, {self.steps} inner step{'s' if self.steps > 1 else ''}"


def _block(channels: int) -> list[nn.Module]:
    norm = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    return [nn.Conv2d(channels, CHANNELS, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]


class Side:
    """One way to take outer steps.

    Args:
        case: What is learned from.
        dtype: Of parameters and inputs.
    """

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.network, self.batch = case.network(dtype), case.batch(dtype)
        self.start = [p.detach().clone() for p in self.network.parameters()]
        self.adam = torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def step(self) -> None:
        """Takes an outer step."""
        self.adam.zero_grad()
        for parameter, grad in zip(self.network.parameters(), self.gradient(), strict=True):
            parameter.grad = grad
        self.adam.step()

    def gradient(self) -> Sequence[Tensor]:
        """Returns the gradient."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Puts the weights back."""
        with torch.no_grad():
            for parameter, value in zip(self.network.parameters(), self.start, strict=True):
                parameter.copy_(value)

    def note(self) -> str:
        """Returns what there is to say."""
        return ""


class Loop(Side):
    """Task after task."""

    def gradient(self) -> Sequence[Tensor]:
        case, parameters = self.case, dict(self.network.named_parameters())
        total: Sequence[Tensor] = ()
        for sx, sy, qx, qy in zip(*self.batch, strict=True):
            weights = parameters
            for _ in range(case.steps):
                loss = case.criterion(functional_call(self.network, weights, (sx,)), sy)
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {name: w - case.rate * g for (name, w), g in zip(weights.items(), grads, strict=True)}
            loss = case.criterion(functional_call(self.network, weights, (qx,)), qy) / case.tasks
            found = torch.autograd.grad(loss, list(parameters.values()))
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total


class Vmap(Side):
    """All tasks at once, by hand."""

    def gradient(self) -> Sequence[Tensor]:
        case, parameters = self.case, dict(self.network.named_parameters())

        def losses(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            each = vmap(lambda own, given: functional_call(self.network, own, (given,)))(weights, x)
            return vmap(case.criterion)(each, y).sum()

        sx, sy, qx, qy = self.batch
        weights = {name: p.expand(case.tasks, *p.shape) for name, p in parameters.items()}
        for _ in range(case.steps):
            grads = torch.autograd.grad(losses(weights, sx, sy), list(weights.values()), create_graph=True)
            weights = {name: w - case.rate * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return torch.autograd.grad(losses(weights, qx, qy) / case.tasks, list(parameters.values()))


class Higher(Side):
    """Task after task, by higher."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.inner = torch.optim.SGD(self.network.parameters(), lr=case.rate)

    def gradient(self) -> Sequence[Tensor]:
        import higher

        case = self.case
        self.network.zero_grad()
        for sx, sy, qx, qy in zip(*self.batch, strict=True):
            with higher.innerloop_ctx(self.network, self.inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(case.steps):
                    optimizer.step(case.criterion(fast(sx), sy))
                (case.criterion(fast(qx), qy) / case.tasks).backward()
        return [p.grad for p in self.network.parameters() if p.grad is not None]


class _Watched(MetaLearner):
    seen: Sequence[Tensor] = ()

    def update(self, gradients: Sequence[Tensor], values: Mapping[str, Any]) -> None:
        self.seen = gradients
        super().update(gradients, values)


class Ours(Side):
    """An engine.

    Args:
        case: What is learned from.
        method: How it is differentiated.
        settings: Those of ``Adaptation``.
    """

    def __init__(self, case: Case, method: Any, **settings: Any) -> None:
        super().__init__(case)
        self.meta = _Watched(self.network, name="meta", optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
        self.inner = Adaptation(
            self.network,
            [self.batch],
            optimizer=lambda p: torch.optim.SGD(p, lr=case.rate),
            steps=case.steps,
            criterion=case.criterion,
            **settings,
        )
        self.engine = Engine([self.meta, self.inner], EngineConfig(progress=False), hypergradient=method)

    def step(self) -> None:
        """Takes an outer step."""
        self.engine.step()

    def gradient(self) -> Sequence[Tensor]:
        """Returns the gradient of a step."""
        self.step()
        return self.meta.seen

    def note(self) -> str:
        """Names the chunk size, where it was chosen."""
        return "" if self.inner.chunking is None else f", chosen: {self.inner.chunking.size}"


IMPLICIT = ConjugateGradient(max_iterations=5, rtol=0.0, damping=1.0)


def sides(case: Case, *, every: bool) -> dict[str, Callable[[], Side]]:
    """Returns what is compared, by name."""
    graph, replay = Unrolled(memory="graph"), Unrolled()
    found: dict[str, Callable[[], Side]] = {"loop by hand": lambda: Loop(case)}
    if importlib.util.find_spec("higher") is not None:
        found["loop, higher"] = lambda: Higher(case)
    found["vmap by hand, all at once"] = lambda: Vmap(case)
    found["here, graphs kept, all at once"] = lambda: Ours(case, graph)
    if case.problem == "conv" and case.device.type == "cpu":
        found["here, graphs kept, one by one"] = lambda: Ours(case, graph, chunk_size=1)
    found["here, graphs kept, chunks auto"] = lambda: Ours(case, graph, chunk_size="auto")
    found["here, replay, all at once"] = lambda: Ours(case, replay)
    found["here, replay, chunks auto"] = lambda: Ours(case, replay, chunk_size="auto")
    if every:
        found["here, replay, chunks of 4"] = lambda: Ours(case, replay, chunk_size=4)
        found["here, implicit, all at once"] = lambda: Ours(case, IMPLICIT, proximal=1.0)
        found["here, implicit, chunks auto"] = lambda: Ours(case, IMPLICIT, proximal=1.0, chunk_size="auto")
    return found


@dataclass
class Row:
    """What was measured of a side.

    Attributes:
        name: Its name.
        seconds: Median time of an outer step.
        factor: How many times faster than the hand-written loop, median over rounds.
        peak: Bytes.
        error: Relative difference of its gradient from the loop's in float64; None where it computes another one.
    """

    name: str
    seconds: float
    factor: float
    peak: int
    error: float | None


def measure(case: Case, rounds: int, *, cpu_time: bool, every: bool) -> list[Row]:
    """Measures all sides of a case, in turns."""
    wait = (lambda: torch.cuda.synchronize(case.device)) if case.device.type == "cuda" else (lambda: None)
    reference = [grad.double() for grad in Loop(case, torch.float64).gradient()]
    made = {name: make() for name, make in sides(case, every=every).items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    errors: dict[str, float | None] = {}
    for name, side in made.items():  # the first steps choose, compile and allocate
        errors[name] = None if "implicit" in name else _error(side.gradient(), reference)
        side.put_back()
        side.step()
        side.put_back()
    for order in rotated([*made], rounds):
        for name in order:
            times[name].append(timed(made[name].step, wait, 1, cpu_time=cpu_time))
            made[name].put_back()
    rows = []
    for name, side in made.items():
        gc.collect()
        with measured_peak(case.device) as memory:
            side.step()
        side.put_back()
        factor = ratio(times, "loop by hand", name).median
        rows.append(Row(name + side.note(), median(times[name]), factor, memory.peak, errors[name]))
    return rows


def _error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    flat, expected = (torch.cat([g.detach().double().flatten() for g in grads]) for grads in (found, reference))
    return float((flat - expected).norm() / expected.norm())


def lines(rows: Sequence[Row]) -> list[str]:
    """Returns a table in Markdown."""
    head = ["", "ms an outer step", "× the loop's speed", "MiB", "difference of the gradient"]
    found = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.0e}"
        cells = [row.name, f"{1e3 * row.seconds:.3g}", f"{row.factor:.3g}", f"{row.peak / 2**20:.3g}", error]
        found.append(f"| {' | '.join(cells)} |")
    return found


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """Returns what the page shows of a device."""
    text = [f"{conditions(result['about'])}:"]
    for title, rows in result["tables"].items():
        text += ["", f"**{title}**", "", *lines([Row(**row) for row in rows])]
    return text


def main(given: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=tuple(RATES), default=[*RATES])
    parser.add_argument("--tasks", nargs="+", type=int, default=[64])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--every", action="store_true", help="implicit methods and a fixed chunk size, too")
    add_append(parser)
    add_clock(parser, rounds=7)
    add_results(parser)
    command(parser, given, run, lines_of)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Measures, prints the tables and keeps what is to be kept, case by case."""
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = named("few_shot_speed", arguments.device)
    tables, started = earlier(name, arguments).get("tables", {}), time.perf_counter()
    for problem in arguments.problem:
        for tasks in arguments.tasks:
            for steps in arguments.steps:
                case = Case(problem, tasks, steps, torch.device(arguments.device))
                rows = measure(case, arguments.rounds, cpu_time=arguments.cpu_time, every=arguments.every)
                tables[case.title()] = [vars(row) for row in rows]
                print(f"\n{case.title()}\n", *lines(rows), sep="\n", flush=True)
                told = about(given, time.perf_counter() - started, arguments, "benchmarks.few_shot_speed")
                keep(name, {"device": arguments.device, "about": told, "tables": tables}, arguments)


if __name__ == "__main__":
    main()
