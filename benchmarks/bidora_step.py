"""What one outer step of BiDoRA costs on the demo's model: the engine beside a hand-written loop with the same passes.

    python benchmarks/bidora_step.py [--repeats 5] [--length 96] [--batch 16] [--json FILE]

Both run on one model in one process, in turn, from the same state; the hypergradients are compared at every step.
Evaluation mode (no dropout), eager attention. ``exact`` is left out: it would take one product for each inner
parameter, and there are tens of thousands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bidora import BiDoRAConfig, Direction, Magnitude, get_bidora_model
from bidora.loading import load_model_and_tokenizer
from bidora.orthogonality import orthogonality
from bilevel import Engine, EngineConfig
from bilevel.errors import BilevelWarning
from bilevel.optim import update_of

TERMS = 3
METHODS = {
    "finite_difference": {"method": "finite_difference", "epsilon": 0.01},
    "identity": {"method": "identity"},
    "neumann": {"method": "neumann", "terms": TERMS, "step_size": 0.1},
    "conjugate_gradient": {"method": "conjugate_gradient", "max_iterations": TERMS, "rtol": 0.0, "damping": 10.0},
    "unrolled": {"method": "unrolled"},
}
GAMMA, RATE = 1e-5, 1e-4


def make_model(length: int, batch: int):
    model, _ = load_model_and_tokenizer(num_labels=2, attention="eager")
    torch.manual_seed(0)
    adapted = get_bidora_model(model, BiDoRAConfig(task_type="SEQ_CLS", r=4, lora_alpha=8)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    batches = [
        {
            "input_ids": torch.randint(1000, 20000, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.long),
            "labels": torch.randint(0, 2, (batch,)),
        }
        for _ in range(2)
    ]
    return adapted, batches


def adamw(params):
    return torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)


class Hand:
    """The loop that somebody would write for one method, with the fewest passes."""

    def __init__(self, model, inner: list[Tensor], outer: list[Tensor], method: str) -> None:
        self.model, self.inner, self.outer, self.method = model, inner, outer, method
        self.inner_optimizer, self.outer_optimizer = adamw(inner), adamw(outer)

    def inner_loss(self, batch) -> Tensor:
        return self.model(**batch).loss + GAMMA * orthogonality(self.model)

    def step(self, inner_batch, outer_batch) -> list[Tensor]:
        before = None
        if self.method == "unrolled":
            update, memory = update_of(self.inner_optimizer, self.inner)
            before = [p.detach().clone() for p in self.inner], update, memory
        self._update(self.inner_optimizer, self.inner, torch.autograd.grad(self.inner_loss(inner_batch), self.inner))
        loss = self.model(**outer_batch).loss
        both = torch.autograd.grad(loss, self.inner + self.outer)
        v, direct = both[: len(self.inner)], both[len(self.inner) :]
        implicit = getattr(self, f"_{self.method}")(inner_batch, v, before)
        total = [d + i for d, i in zip(direct, implicit, strict=True)]
        self._update(self.outer_optimizer, self.outer, total)
        return total

    def _update(self, optimizer, params, grads) -> None:
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    def _finite_difference(self, batch, v, _) -> list[Tensor]:
        size = torch.sqrt(sum(part.square().sum() for part in v))
        kept = [p.detach().clone() for p in self.inner]
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, part in zip(self.inner, kept, v, strict=True):
                    parameter.copy_(value + sign * 0.01 / size * part)
            sides.append(torch.autograd.grad(self.inner_loss(batch), self.outer))
        with torch.no_grad():
            for parameter, value in zip(self.inner, kept, strict=True):
                parameter.copy_(value)
        return [-(a - b) * size / 0.02 for a, b in zip(*sides, strict=True)]

    def _graph(self, batch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.inner_loss(batch), self.inner, create_graph=True)

    def _identity(self, batch, v, _) -> list[Tensor]:
        return [-m for m in torch.autograd.grad(self._graph(batch), self.outer, v)]

    def _neumann(self, batch, v, _) -> list[Tensor]:
        graph = self._graph(batch)
        summand, total = v, v
        for _ in range(TERMS):
            product = torch.autograd.grad(graph, self.inner, summand, retain_graph=True)
            summand = [p - 0.1 * h for p, h in zip(summand, product, strict=True)]
            total = [t + p for t, p in zip(total, summand, strict=True)]
        return [-m for m in torch.autograd.grad(graph, self.outer, [0.1 * t for t in total])]

    def _conjugate_gradient(self, batch, v, _) -> list[Tensor]:
        graph = self._graph(batch)
        q, residual, direction = [torch.zeros_like(part) for part in v], v, v
        squared = sum(part.square().sum() for part in residual)
        for _ in range(TERMS):
            product = torch.autograd.grad(graph, self.inner, direction, retain_graph=True)
            product = [h + 10.0 * d for h, d in zip(product, direction, strict=True)]
            step = squared / sum((d * h).sum() for d, h in zip(direction, product, strict=True))
            q = [a + step * d for a, d in zip(q, direction, strict=True)]
            residual = [r - step * h for r, h in zip(residual, product, strict=True)]
            previous, squared = squared, sum(part.square().sum() for part in residual)
            direction = [r + squared / previous * d for r, d in zip(residual, direction, strict=True)]
        return [-m for m in torch.autograd.grad(graph, self.outer, q)]

    def _unrolled(self, batch, v, before) -> list[Tensor]:
        start, update, memory = before
        now = [p.detach().clone() for p in self.inner]
        with torch.no_grad():
            for parameter, value in zip(self.inner, start, strict=True):
                parameter.copy_(value)
        after, _ = update(tuple(self.inner), self._graph(batch), memory)
        grads = torch.autograd.grad(after, self.outer, v)
        with torch.no_grad():
            for parameter, value in zip(self.inner, now, strict=True):
                parameter.copy_(value)
        return list(grads)


def measure(method: str, repeats: int, length: int, batch: int) -> dict[str, object]:
    model, (inner_batch, outer_batch) = make_model(length, batch)
    direction = Direction(model, optimizer=adamw, orthogonality=GAMMA)
    magnitude = Magnitude(model, optimizer=adamw)
    engine = Engine([magnitude, direction], EngineConfig(progress=False), hypergradient=METHODS[method])
    hand = Hand(model, list(direction.parameters), list(magnitude.parameters), method)
    times: dict[str, list[float]] = {"engine": [], "hand": []}
    everything = [*direction.parameters, *magnitude.parameters]
    worst = 0.0
    for repeat in range(repeats + 1):
        start = [p.detach().clone() for p in everything]
        found: list[Tensor] = []
        magnitude.update = recording(type(magnitude).update.__get__(magnitude), found)  # type: ignore[method-assign]
        began = time.perf_counter()
        result = engine.step({"direction": inner_batch, "magnitude": outer_batch})
        middle = time.perf_counter()
        with torch.no_grad():
            for parameter, value in zip(everything, start, strict=True):
                parameter.copy_(value)
        again = time.perf_counter()
        expected = hand.step(inner_batch, outer_batch)
        ended = time.perf_counter()
        gap = torch.sqrt(sum((a - b).square().sum() for a, b in zip(found, expected, strict=True)))
        worst = max(worst, float(gap / torch.sqrt(sum(b.square().sum() for b in expected))))
        if repeat:  # the first one warms up
            times["engine"].append(middle - began)
            times["hand"].append(ended - again)
    ratios = [a / b for a, b in zip(times["engine"], times["hand"], strict=True)]
    return {
        "method": method,
        "passes": list(result.passes),
        "engine_ms": 1e3 * statistics.median(times["engine"]),
        "hand_ms": 1e3 * statistics.median(times["hand"]),
        "ratio": statistics.median(ratios),
        "difference": worst,
    }


def recording(update: Callable[..., None], found: list[Tensor]) -> Callable[..., None]:
    def record(gradients, loss) -> None:
        found.extend(gradient.clone() for gradient in gradients)
        update(gradients, loss)

    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", BilevelWarning)
    table = Table(title=f"One outer step, MiniLM with DoRA r = 4, {arguments.batch} texts of {arguments.length} tokens")
    for name in ("method", "passes f/b", "engine ms", "by hand ms", "ratio", "difference"):
        table.add_column(name, justify="left" if name == "method" else "right")
    rows = [measure(method, arguments.repeats, arguments.length, arguments.batch) for method in METHODS]
    for row in rows:
        passes = " / ".join(map(str, row["passes"]))
        figures = (
            f"{row['engine_ms']:.0f}",
            f"{row['hand_ms']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['difference']:.1e}",
        )
        table.add_row(row["method"], passes, *figures)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
