"""What a step of BiDoRA costs in training passes of LoRA, and how far each way of taking it is off.

    python -m benchmarks.bidora_step [--shape minilm] [--rounds 7] [--save] [--page docs/benchmarks/bidora_step.md]
    python -m benchmarks.bidora_step --device cuda --shape 1b 7b …

The unit is one forward and backward pass of PEFT's LoRA on the same batch, without an update. Beside it, in turn in
one process: PEFT's DoRA and the exact one; one outer step of the engine, with both AdamW updates, for every way of
taking the mixed product and 1, 2, 4, 8 inner steps; the same step as a loop that somebody would write by hand with the
fewest passes; and that loop on PEFT's own DoRA layers. Times are medians of ratios within a round, but for the engine's
to the loop by hand, which is one of medians. The error is that of
``∂²f/∂m∂w · ∂F/∂w``, the implicit part of the hypergradient, against the exact product at the new point in float64
(float32 on a GPU), from the same values, after ``--warm`` outer steps.

MiniLM is float32. The stacks are Llama-like with random bfloat16 weights and float32 adapters. Exact products need
attention with a second derivative, so these steps run with eager attention, all others with PyTorch's own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bidora_rows import UNIT, Row, Setting, attention, make_engine, rows, runner, split_parameters
from benchmarks.dora_gpu import STACKS, table, times
from benchmarks.options import add_append, add_clock, add_results, command, earlier, keep, named, new_parser
from benchmarks.peers.memory import peak_bytes
from benchmarks.peers.reference import flat
from benchmarks.peers.report import about, conditions
from benchmarks.peers.timing import median, ratio, rotated, timed
from benchmarks.peers.verdict import cosine, error
from benchmarks.peers.worker import as_array
from bilevel import Callback, Engine, FiniteDifference

TIMES = "ms", "÷ LoRA's pass", "for each inner step", "asked for", "engine ÷ hand"
HEADS = "step", "passes", *TIMES, "error", "cosine", "MiB"


class Implicit(Callback):
    """Keeps the implicit part of the last hypergradient."""

    def on_hypergradient(self, engine: Engine, problem: str, hypergradient: Any) -> None:
        self.value = [g - d for g, d in zip(hypergradient.grad.values(), hypergradient.direct.values(), strict=True)]


def errors(setting: Setting, methods: Sequence[Row], warm: int) -> dict[str, dict[str, Any]]:
    """Returns how far each method's implicit part is from the exact product at the new point."""
    model, batches = setting.model("exact"), setting.batches()
    inner, outer = split_parameters(model)
    attention(model, "sdpa")
    engine = make_engine(setting, model, replace(methods[0], inner_steps=1))
    feed = {"direction": batches[0], "magnitude": batches[1]}
    for _ in range(warm):
        engine.step(feed)
    start = [p.detach().clone() for p in inner + outer]
    moments = copy.deepcopy(engine.problems["direction"].optimizer.state_dict())
    del engine
    precise = setting.model("exact", torch.float64 if setting.device == "cpu" else torch.float32)
    attention(precise, "eager")
    found: dict[str, dict[str, Any]] = {}
    for row in methods:
        with torch.no_grad():
            for parameter, value in zip(inner + outer, start, strict=True):
                parameter.copy_(value)
        attention(model, "eager" if row.eager else "sdpa")
        seen = Implicit()
        engine = make_engine(setting, model, row, [seen], freeze=True)
        engine.problems["direction"].optimizer.load_state_dict(copy.deepcopy(moments))
        result = engine.step(feed)
        own, exact = (as_array(flat(part)) for part in (seen.value, reference(precise, inner, outer, batches)))
        found[row.name] = {
            "error": error(own, exact),
            "cosine": cosine(own, exact),
            "passes": list(result.passes),
            "message": result.solves["direction"].message,
        }
        del engine
    return found


def reference(model: nn.Module, inner: list[Tensor], outer: list[Tensor], batches: Any) -> list[Tensor]:
    """Returns the exact implicit part at the inner and outer values given."""
    w, m = split_parameters(model)
    with torch.no_grad():
        for parameter, value in zip(w + m, inner + outer, strict=True):
            parameter.copy_(value)
    v = torch.autograd.grad(model(**batches[1]).loss, w, allow_unused=True)
    graph = torch.autograd.grad(model(**batches[0]).loss, w, create_graph=True, allow_unused=True)
    pairs = [(g, part) for g, part in zip(graph, v, strict=True) if g is not None and part is not None]
    return [-part for part in torch.autograd.grad([g for g, _ in pairs], m, [part for _, part in pairs])]


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = [
        row for row in rows(arguments.inner_steps, not arguments.no_hand) if not (arguments.no_exact and row.eager)
    ]
    seconds, memory = timings(setting, chosen, arguments)
    give_back(setting)
    checked = [row for row in chosen if row.runs == "engine"]
    for epsilon in arguments.epsilons:
        method = FiniteDifference(epsilon=epsilon)
        checked.append(Row(f"central differences, ε = {epsilon}", method, "engine"))
    # In higher precision the exact product takes most memory of all: one sequence of a stack is enough.
    off = errors(setting if setting.shape == "minilm" else replace(setting, batch=1), checked, arguments.warm)
    table = [
        {
            "name": row.name,
            "inner_steps": row.inner_steps,
            "ms": 1e3 * median(seconds[row.name]),
            "ratio": asdict(ratio(seconds, row.name, UNIT)),
            "mib": memory[row.name] / 2**20,
            "limit": row.limit,
            **off.get(row.name, {}),
        }
        for row in chosen
        if row.name in seconds
    ]
    extra = [{"name": row.name, **off[row.name]} for row in checked if row not in chosen]
    lost = [row.name for row in chosen if row.name not in seconds]
    return {"setting": asdict(setting), "rows": table, "epsilons": extra, "out_of_memory": lost}


def timings(
    setting: Setting, chosen: Sequence[Row], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Returns the seconds and the peak memory of rows, without those for which there is not enough memory."""
    models = {kind: setting.model(kind) for kind in dict.fromkeys(row.model for row in chosen)}
    steps = {row.name: runner(setting, row, models) for row in chosen}
    by_name = {row.name: row for row in chosen}
    cuda = setting.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def switch(name: str) -> None:
        attention(models[by_name[name].model], "eager" if by_name[name].eager else "sdpa")

    memory: dict[str, int] = {}
    for name in sorted(steps, key=lambda name: by_name[name].eager):  # compile, allocate the optimisers' memory
        switch(name)
        try:
            for _ in range(2):
                steps[name]()
            memory[name] = peak_bytes(steps[name]) if cuda or arguments.memory else 0
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error)[:100]}", flush=True)
            del steps[name]
        give_back(setting)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for order in rotated(list(steps), arguments.rounds):
        for name in order:
            switch(name)
            seconds[name].append(timed(steps[name], wait, arguments.repeats, cpu_time=arguments.cpu_time))
    return seconds, memory


def give_back(setting: Setting) -> None:
    """Lets go of memory that nobody holds."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def title(setting: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    what = "MiniLM-L6" if setting["shape"] == "minilm" else f"{setting['shape'].upper()}-like stack"
    threads = document.get("threads", 1)
    processor = f"CPU, {'one thread' if threads == 1 else f'{threads} threads'}"
    where = document["device"] if setting["device"] == "cuda" else processor
    return f"{what}, r = {setting['rank']}, {setting['batch']} × {setting['length']} tokens, {where}"


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """Returns the page's tables; columns of which nothing was measured are left out."""
    lines: list[str] = []
    for result in document["results"]:
        milliseconds = {row["name"]: row["ms"] for row in result["rows"]}
        shown = [
            cells(row, milliseconds.get(f"by hand: {row['name']}")) for row in (*result["rows"], *result["epsilons"])
        ]
        lines += [f"**{title(result['setting'], document)}**", "", *table(shown), ""]
        if result["out_of_memory"]:
            lines += [f"Out of memory: {'; '.join(result['out_of_memory'])}.", ""]
    return [*lines, f"{document['rounds']} rounds, {conditions(document)}."]


def cells(row: Mapping[str, Any], by_hand: float | None) -> dict[str, str]:
    """Returns a row of the table; ``by_hand`` are the milliseconds of the same step as a loop."""
    found = {**dict.fromkeys(HEADS, ""), "step": row["name"]}
    if "error" in row:
        found["passes"] = "{}, {}".format(*row["passes"])
        found |= {"error": f"{row['error']:.1e}", "cosine": f"{row['cosine']:.5f}"}
    if "ms" in row:
        factor, steps = row["ratio"]["median"], row["inner_steps"]
        found |= {"ms": f"{row['ms']:.1f}", "÷ LoRA's pass": times(factor), "asked for": times(row["limit"])}
        found["for each inner step"] = times(factor / steps) if steps > 1 else ""
        found["engine ÷ hand"] = f"{row['ms'] / by_hand:.2f}" if by_hand else ""
        found["MiB"] = f"{row['mib']:.0f}" if row["mib"] else ""
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", nargs="+", choices=["minilm", *STACKS], default=["minilm"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", help="sequences x tokens: 16x96, and 4x512 for stacks")
    parser.add_argument("--rate", type=float, help="1.5e-3, and 2e-4 for stacks")
    parser.add_argument("--gamma", type=float, help="weight of the orthogonality penalty: 1e-5, and 0 for stacks")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[0.1, 1.0])
    parser.add_argument("--repeats", type=int, default=1, help="steps in a timing")
    parser.add_argument("--warm", type=int, default=3, help="outer steps before errors are taken")
    parser.add_argument("--no-hand", action="store_true", help="leave the hand-written loops out, but for PEFT's")
    parser.add_argument(
        "--no-exact", action="store_true", help="leave exact products out: they hold the gradient's graph"
    )
    add_append(parser)
    parser.add_argument("--memory", action="store_true", help="peak memory on the CPU too, by the profiler")
    add_clock(parser, rounds=7)
    add_results(parser)
    command(parser, given, run, lines_of)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Measures, prints the tables and keeps what is to be kept, table by table."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    name = named("bidora_step", arguments.device)
    results, begun = earlier(name, arguments).get("results", []), time.perf_counter()
    for shape in arguments.shape:
        small = shape == "minilm"
        for tokens in arguments.tokens or ["16x96" if small else "4x512"]:
            batch, length = map(int, tokens.split("x"))
            rate = arguments.rate or (1.5e-3 if small else 2e-4)
            gamma = arguments.gamma if arguments.gamma is not None else 1e-5 if small else 0.0
            setting = Setting(shape, arguments.rank, batch, length, arguments.device, rate, gamma)
            started = time.perf_counter()
            results.append(measure(setting, arguments))
            told = about(given, time.perf_counter() - begun, arguments, "benchmarks.bidora_step")
            document = {"device": device, **told, "results": results}
            print(*lines_of({**document, "results": results[-1:]}), sep="\n", flush=True)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)
            keep(name, document, arguments)


if __name__ == "__main__":
    main()
