"""What every method costs and how far it is off, measured: the table of the page "How to choose a method".

    python -m benchmarks.cost [--page docs/choose.md] [--json] [--repeats 5]

One problem for all: a tanh network (64–10–10, 760 parameters) on scikit-learn's digits, cross-entropy with a learned
weight decay for each layer (inner; trained to its solution in float64, then held in float32), and the loss on other
images (outer). The outer learning rate is 0, so that methods which continue from their last call reach what they tend
to: the numbers are those of the last of ``--steps`` outer steps of five inner steps each. Passes are the method's own,
beyond the inner updates and the outer loss's forward and backward pass; time and memory are a whole outer step's beside
that of a loop with plain gradients (no hypergradient at all). The error is that of the hypergradient against the dense
float64 one, whose size is ‖∂F/∂λ total‖; the cosine is what an outer optimiser that normalises its steps feels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.pages.results import with_texts
from benchmarks.peers.memory import peak_bytes
from bilevel import Engine, EngineConfig, Estimator, Problem, as_estimator, hypergradcheck
from bilevel.errors import BilevelError, BilevelWarning
from bilevel.hypergrad import available_methods

INNER_STEPS, INNER_RATE, TRAIN = 5, 0.5, 600
# Every method with its defaults, and the settings whose price or gain is worth knowing.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "finite_difference": ({}, {"difference": "forward", "center": "old"}),
    "identity": ({}, {"center": "old"}),
    "one_step": ({}, {"memory": "graph"}),
    "neumann": ({}, {"warm_start": True}, {"preconditioner": "nystrom"}),
    "conjugate_gradient": (
        {},
        {"max_iterations": 5},
        {"max_iterations": 5, "warm_start": True},
        {"preconditioner": "nystrom"},
        {"products": "finite_difference"},
        {"curvature": "gauss_newton"},
    ),
    "nystrom": ({}, {"rank": 50}),
    "unrolled": ({}, {"memory": "graph"}, {"mode": "forward"}),
    "f2sa": ({}, {"multiplier": 100.0}),
}


class Decay(Problem):
    def loss(self, batch: Any) -> Tensor:
        x, y = self.data_set
        return F.cross_entropy(self.classifier(x[TRAIN:]), y[TRAIN:])


class Classifier(Problem):
    def loss(self, batch: Any) -> dict[str, Tensor]:
        x, y = self.data_set
        logits = self(x[:TRAIN])
        decay = sum(
            scale.exp() * p.square().sum()
            for scale, p in zip(self.decay.module[0], self.module.parameters(), strict=True)
        )
        return {"loss": F.cross_entropy(logits, y[:TRAIN]) + decay, "outputs": logits}


@dataclass(frozen=True)
class Measured:
    """One row: see the module's docstring for what the columns mean."""

    method: str
    settings: str
    forward: int
    backward: int
    milliseconds: float
    relative_time: float
    megabytes: float
    error: float
    cosine: float
    status: str
    failed: bool


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return x.to(dtype) / 16, y


def solved() -> tuple[nn.Module, Tensor]:
    """Trains the inner problem to its solution in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)).double()
    log_decay = torch.full((4,), math.log(5e-3), dtype=torch.float64)
    x, y = data(torch.float64)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=4000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(s.exp() * p.square().sum() for s, p in zip(log_decay, model.parameters(), strict=True))
        loss: Tensor = F.cross_entropy(model(x[:TRAIN]), y[:TRAIN]) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.float(), log_decay.float()


def engine_for(estimator: Estimator, model: nn.Module, log_decay: Tensor) -> Engine:
    torch.manual_seed(0)
    copied = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10))
    copied.load_state_dict(model.state_dict())
    outer = Decay(nn.ParameterList([log_decay.clone()]), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    inner = Classifier(copied, optimizer=lambda p: torch.optim.SGD(p, lr=INNER_RATE), steps=INNER_STEPS)
    outer.data_set = inner.data_set = data(torch.float32)  # type: ignore[attr-defined]
    return Engine([outer, inner], EngineConfig(progress=False), hypergradient=estimator)


def measure(estimator: Estimator, model: nn.Module, log_decay: Tensor, steps: int, repeats: int) -> Measured:
    engine = engine_for(estimator, model, log_decay)
    for _ in range(steps):
        result = engine.step()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = engine.step()
        seconds.append(time.process_time() - started)
    report = hypergradcheck(engine, rtol=1.0)
    info = result.solves["classifier"]
    return Measured(
        method=estimator.name,
        settings=", ".join(f"{key}={value!r}" for key, value in changed(estimator).items()),
        forward=result.passes[0] - INNER_STEPS - 1,
        backward=result.passes[1] - INNER_STEPS - 1,
        milliseconds=1e3 * statistics.median(seconds),
        relative_time=math.nan,
        megabytes=peak_bytes(engine.step) / 2**20,
        error=report.relative_error,
        cosine=report.cosine,
        status=info.status.value,
        failed=info.status.failed,
    )


def changed(estimator: Estimator) -> dict[str, Any]:
    default = type(estimator)().describe()
    return {key: value for key, value in estimator.describe().items() if value != default[key]}


def baseline(model: nn.Module, log_decay: Tensor, repeats: int) -> tuple[float, float]:
    """Returns milliseconds and megabytes of the same outer step without a hypergradient, by hand."""
    engine = engine_for(as_estimator("identity"), model, log_decay)
    outer, inner = engine.problems["decay"], engine.problems["classifier"]

    def step() -> None:
        for _ in range(INNER_STEPS):
            loss, _ = inner.evaluate_loss(None)
            inner.update(torch.autograd.grad(loss, inner.parameters), 0.0)
        loss, _ = outer.evaluate_loss(None)
        torch.autograd.grad(loss, inner.parameters)

    seconds = []
    for _ in range(repeats + 3):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return 1e3 * statistics.median(seconds[3:]), peak_bytes(step) / 2**20


def markdown(rows: list[Measured], base: tuple[float, float]) -> list[str]:
    lines = [
        "| method | passes | outer step | MiB | relative error | cosine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row.method}`" + (f" {row.settings}" if row.settings else "")
        error = f"{row.error:.1e}" + (f" ({row.status})" if row.failed else "")
        lines.append(
            f"| {name} | {row.forward}, {row.backward} | {row.relative_time:.1f} × | {row.megabytes - base[1]:.1f} "
            f"| {error} | {row.cosine:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="Put the table between the marks of this page.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed outer steps.")
    parser.add_argument("--steps", type=int, default=60, help="Outer steps before.")
    parser.add_argument("--methods", nargs="*", help="Only these.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, log_decay = solved()
    base = baseline(model, log_decay, arguments.repeats)
    rows = []
    # Betty's functions are not compared here: they are for comparing with a Betty program.
    names = arguments.methods or [name for name in available_methods() if not name.startswith("betty:")]
    chosen = [{"method": name, **settings} for name in names for settings in VARIANTS.get(name, ({},))]
    for method in chosen:
        estimator = as_estimator(method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)  # a failed solve is what the status column says
            try:
                row = measure(estimator, model, log_decay, arguments.steps, arguments.repeats)
            except BilevelError as error:
                print(f"{method}: {error}")
                continue
        row = Measured(**{**asdict(row), "relative_time": row.milliseconds / base[0]})
        rows.append(row)
        print(row, flush=True)
    table = markdown(rows, base)
    print(f"without a hypergradient: {base[0]:.2f} ms, {base[1]:.1f} MiB\n", *table, sep="\n")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(with_texts(text, {"costs": table}), encoding="utf-8")


if __name__ == "__main__":
    main()
