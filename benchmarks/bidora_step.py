"""What a step of BiDoRA costs in training passes of LoRA, and how far each way of taking it is off.

    python -m benchmarks.bidora_step [--shape minilm] [--rounds 7] [--save] [--page docs/benchmarks/bidora_step.md]
    python -m benchmarks.bidora_step --device cuda --shape 1b 7b …

The unit is one forward and backward pass of PEFT's LoRA on the same batch, without an update. Beside it, in turn in
one process: PEFT's DoRA and the exact one; one outer step of the engine, with both AdamW updates, for every way of
taking the mixed product and 1, 2, 4, 8 inner steps; the same step as a loop that somebody would write by hand with the
fewest passes; and that loop on PEFT's own DoRA layers. Times are medians of ratios within a round. The error is that of
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dora_gpu import STACKS, Case, adapted, inputs
from benchmarks.options import add_append, add_clock, add_results, carry_out, earlier, keep, named, new_parser
from benchmarks.peers.memory import peak_bytes
from benchmarks.peers.timing import median, ratio, rotated, timed
from bidora import BiDoRAConfig, Direction, Magnitude, get_bidora_model
from bidora.loading import load_model_and_tokenizer
from bidora.orthogonality import orthogonality
from bilevel import Callback, Engine, EngineConfig, Estimator, FiniteDifference, Identity

EPSILON = 0.01  # BiDoRA's published default
CENTRAL = FiniteDifference(epsilon=EPSILON)
FORWARD = FiniteDifference(epsilon=EPSILON, difference="forward", center="old")
EXACT, SHARED = Identity(), Identity(center="old")
UNIT = "LoRA (PEFT), a pass"


@dataclass(frozen=True)
class Row:
    """A method, who runs it, and with how many inner steps.

    Attributes:
        name: For the table.
        method: How the magnitude is differentiated; None for a plain pass.
        runs: ``"engine"``, ``"hand"``, ``"pass"`` or ``"penalty"``.
        model: Whose layers: ``"lora"``, ``"peft"`` or ``"exact"``.
        inner_steps: For each outer step.
        limit: The most that is asked for, in units for each inner step.
    """

    name: str
    method: Estimator | None
    runs: str
    model: str = "exact"
    inner_steps: int = 1
    limit: float | None = None

    @property
    def eager(self) -> bool:
        """Whether attention must have a second derivative."""
        return self.method is not None and self.method.needs_double_backward


def rows(inner_steps: Sequence[int], hand: bool) -> Iterator[Row]:
    yield Row(UNIT, None, "pass", "lora")
    yield Row("DoRA (PEFT), a pass", None, "pass", "peft")
    yield Row("exact DoRA, a pass", None, "pass")
    yield Row("the orthogonality penalty alone", None, "penalty")
    yield Row("central differences", CENTRAL, "engine", limit=4.0)
    yield Row("forward difference, old point", FORWARD, "engine", limit=3.2)
    yield Row("exact product", EXACT, "engine")
    yield Row("exact product, old point, shared graph", SHARED, "engine")
    if hand:
        yield Row("by hand: central differences", CENTRAL, "hand")
        yield Row("by hand: forward difference, old point", FORWARD, "hand")
        yield Row("by hand: exact product", EXACT, "hand")
        yield Row("by hand: exact product, old point, shared graph", SHARED, "hand")
    yield Row("by hand, PEFT's DoRA: central differences", CENTRAL, "hand", "peft")
    for count in inner_steps:
        if count > 1:
            yield Row(f"forward difference, {count} inner steps", FORWARD, "engine", "exact", count,
                      (count + 2.2) / count * 1.1)  # fmt: skip
            yield Row(f"shared graph, {count} inner steps", SHARED, "engine", "exact", count)


@dataclass(frozen=True)
class Setting:
    """A model, its batches and the rates.

    Attributes:
        shape: ``"minilm"`` or a stack.
        rank: r.
        batch: Sequences.
        length: Tokens of each.
        device: ``"cpu"`` or ``"cuda"``.
        rate: Learning rate of both AdamW.
        gamma: Weight of the orthogonality penalty.
    """

    shape: str
    rank: int
    batch: int
    length: int
    device: str
    rate: float
    gamma: float

    def model(self, kind: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Returns an adapted model in which B is not zero; ``dtype`` for a reference of that precision."""
        if self.shape != "minilm":
            method = {"lora": "LoRA", "peft": "PEFT DoRA", "exact": "exact DoRA"}[kind]
            case = Case(self.shape, self.rank, "autocast", self.batch, self.length)
            model = adapted(case, method, torch.device(self.device), dtype or torch.bfloat16)
            return model.eval() if dtype is None else model.to(dtype).eval()
        base, _ = load_model_and_tokenizer(num_labels=2)
        torch.manual_seed(0)
        targets = "all-linear" if kind == "exact" else ["query", "key", "value", "dense"]
        config: Any = BiDoRAConfig(task_type="SEQ_CLS", r=self.rank, lora_alpha=2 * self.rank, target_modules=targets)
        if kind == "exact":
            model = get_bidora_model(base, config)
        else:
            from peft import LoraConfig, get_peft_model

            names = {**config.to_dict(), "use_dora": kind == "peft"}
            kept = ("task_type", "r", "lora_alpha", "target_modules", "use_dora")
            model = get_peft_model(base, LoraConfig(**{key: names[key] for key in kept}))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02, generator=generator)
        return model.to(self.device, dtype or torch.float32).eval()

    def batches(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns one for the direction and one for the magnitude."""
        if self.shape != "minilm":
            ids, _ = inputs(
                Case(self.shape, self.rank, "autocast", 2 * self.batch, self.length), torch.device(self.device)
            )
            first, second = ids.chunk(2)
            return {"input_ids": first, "labels": first}, {"input_ids": second, "labels": second}
        torch.manual_seed(2)
        return tuple(  # type: ignore[return-value]
            {
                "input_ids": torch.randint(1000, 20000, (self.batch, self.length), device=self.device),
                "attention_mask": torch.ones(self.batch, self.length, dtype=torch.long, device=self.device),
                "labels": torch.randint(0, 2, (self.batch,), device=self.device),
            }
            for _ in range(2)
        )

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.rate, weight_decay=0.0)


def attention(model: Any, kind: str) -> None:
    base = model.get_base_model()
    if base.config._attn_implementation != kind:
        base.set_attn_implementation(kind)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns A, B and head, and the magnitudes."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if "magnitude" not in name]
    return inner, [p for name, p in trained if "magnitude" in name]


def make_engine(
    setting: Setting, model: nn.Module, row: Row, callbacks: Sequence[Callback] = (), freeze: bool = False
) -> Engine:
    """Returns BiDoRA's engine; with ``freeze`` the magnitudes stay where they are."""
    outer = (lambda params: torch.optim.SGD(params, lr=0.0)) if freeze else setting.optimizer
    direction = Direction(model, optimizer=setting.optimizer, orthogonality=setting.gamma, steps=row.inner_steps)
    magnitude = Magnitude(model, optimizer=outer)
    return Engine([magnitude, direction], EngineConfig(progress=False), hypergradient=row.method, callbacks=callbacks)


class Hand:
    """The loop that somebody would write for one method, with the fewest passes."""

    def __init__(self, setting: Setting, model: nn.Module, row: Row) -> None:
        self.model, self.gamma, self.method = model, setting.gamma if row.model == "exact" else 0.0, row.method
        self.inner, self.outer = split_parameters(model)
        self.optimizers = setting.optimizer(self.inner), setting.optimizer(self.outer)

    def inner_loss(self, batch: dict[str, Tensor], *, penalty: bool = True) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss + self.gamma * orthogonality(self.model) if self.gamma and penalty else loss

    def step(self, batches: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        first, second = batches
        shared, forward = self.method == SHARED, self.method == FORWARD
        size = len(self.inner)
        start = [p.detach().clone() for p in self.inner] if forward else []
        if shared:  # the graph holds copies: the update changes the parameters in place
            with swapped(self.model, self.inner) as leaves:
                graph = torch.autograd.grad(self.inner_loss(first), leaves, create_graph=True)
            grads = [g.detach() for g in graph]
        else:
            grads = torch.autograd.grad(self.inner_loss(first), self.inner + (self.outer if forward else []))
        self.update(0, self.inner, grads[:size])
        both = torch.autograd.grad(self.model(**second).loss, self.inner + self.outer, allow_unused=True)
        v = [torch.zeros_like(p) if g is None else g for g, p in zip(both[:size], self.inner, strict=True)]
        if shared:
            implicit = torch.autograd.grad(graph, self.outer, v)
        elif forward:
            implicit = self.difference(first, v, start, grads[size:])
        elif self.method == EXACT:
            graph = torch.autograd.grad(self.inner_loss(first, penalty=False), self.inner, create_graph=True)
            implicit = torch.autograd.grad(graph, self.outer, v)
        else:
            implicit = self.difference(first, v, [p.detach().clone() for p in self.inner], None)
        self.update(1, self.outer, [d - i for d, i in zip(both[size:], implicit, strict=True)])

    def difference(self, batch: Any, v: list[Tensor], center: list[Tensor], base: Sequence[Tensor] | None) -> Any:
        size = torch.stack(torch._foreach_norm(v)).norm()
        here = [p.detach().clone() for p in self.inner]
        sides: list[Sequence[Tensor]] = []
        for sign in (1, -1) if base is None else (1,):
            with torch.no_grad():
                torch._foreach_copy_(self.inner, center)
                torch._foreach_add_(self.inner, torch._foreach_mul(v, sign * EPSILON / size))
            sides.append(torch.autograd.grad(self.inner_loss(batch, penalty=False), self.outer))
        with torch.no_grad():
            torch._foreach_copy_(self.inner, here)
        width = 2 * EPSILON if base is None else EPSILON
        return [(a - b) * (size / width) for a, b in zip(sides[0], sides[1] if base is None else base, strict=True)]

    def update(self, which: int, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()


@contextmanager
def swapped(model: nn.Module, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Puts copies that require gradients in the places of parameters."""
    copies = {id(p): nn.Parameter(p.detach().clone()) for p in params}
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if id(p) in copies
    ]
    for module, name, p in places:
        module._parameters[name] = copies[id(p)]
    try:
        yield [copies[id(p)] for p in params]
    finally:
        for module, name, p in places:
            module._parameters[name] = p


def runner(setting: Setting, row: Row, models: dict[str, nn.Module]) -> Callable[[], object]:
    """Returns one step of a row; attention is switched outside of it."""
    model, batches = models[row.model], setting.batches()
    if row.runs == "pass":
        trained = [p for p in model.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(model(**batches[0]).loss, trained, allow_unused=True)
    if row.runs == "penalty":
        own = split_parameters(model)[0]
        return lambda: torch.autograd.grad(orthogonality(model), own, allow_unused=True)
    if row.runs == "hand":
        hand = Hand(setting, model, row)
        return lambda: hand.step(batches)
    engine = make_engine(setting, model, row)
    return lambda: engine.step({"direction": batches[0], "magnitude": batches[1]})


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
        exact = reference(precise, inner, outer, batches)
        gap, size, along = 0.0, 0.0, 0.0
        other = 0.0
        for a, b in zip(seen.value, exact, strict=True):
            a = a.to(b.dtype)
            gap, size = gap + float((a - b).square().sum()), size + float(b.square().sum())
            along, other = along + float((a * b).sum()), other + float(a.square().sum())
        found[row.name] = {
            "error": (gap / size) ** 0.5,
            "cosine": along / (size * other) ** 0.5,
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
    models = {kind: setting.model(kind) for kind in dict.fromkeys(row.model for row in chosen)}
    cuda = setting.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    steps = {row.name: runner(setting, row, models) for row in chosen}
    by_name = {row.name: row for row in chosen}
    memory: dict[str, int] = {}
    for name in sorted(steps, key=lambda name: by_name[name].eager):  # compile, allocate the optimisers' memory
        attention(models[by_name[name].model], "eager" if by_name[name].eager else "sdpa")
        try:
            for _ in range(2):
                steps[name]()
            memory[name] = peak_bytes(steps[name]) if cuda or arguments.memory else 0
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error)[:100]}", flush=True)
            del steps[name]
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for order in rotated(list(steps), arguments.rounds):
        for name in order:
            attention(models[by_name[name].model], "eager" if by_name[name].eager else "sdpa")
            seconds[name].append(timed(steps[name], wait, arguments.repeats, cpu_time=arguments.cpu_time))
    del steps, models
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
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


def hand_ratio(result: dict[str, Any], name: str) -> float | None:
    """Returns the engine's time over that of the same step by hand."""
    found = {row["name"]: row["ms"] for row in result["rows"]}
    own = found.get(f"by hand: {name}")
    return None if own is None else found[name] / own


def title(setting: dict[str, Any], device: str) -> str:
    what = "MiniLM-L6" if setting["shape"] == "minilm" else f"{setting['shape'].upper()}-like stack"
    where = device if setting["device"] == "cuda" else "CPU, one thread"
    return f"{what}, r = {setting['rank']}, {setting['batch']} × {setting['length']} tokens, {where}"


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """Returns the page's tables."""
    lines: list[str] = []
    for result in document["results"]:
        memory = any(row["mib"] for row in result["rows"])
        head = [
            "step",
            "passes",
            "ms",
            "÷ LoRA's pass",
            "for each inner step",
            "asked for",
            "engine ÷ hand",
            "error",
            "cosine",
        ]
        lines += [*([""] if lines else []), f"**{title(result['setting'], document['device'])}**", ""]
        lines += ["| " + " | ".join(head + ["MiB"] * memory) + " |", "|" + "---|" * (len(head) + memory)]
        for row in result["rows"]:
            each = row["ratio"]["median"] / row["inner_steps"]
            off = (f"{row['error']:.1e}", f"{row['cosine']:.5f}") if "error" in row else ("", "")
            hand = hand_ratio(result, row["name"])
            cells = [
                row["name"],
                "{}, {}".format(*row["passes"]) if "passes" in row else "",
                f"{row['ms']:.1f}",
                f"{row['ratio']['median']:.2f} ×",
                f"{each:.2f} ×" if row["inner_steps"] > 1 else "",
                f"{row['limit']:.2f} ×" if row["limit"] else "",
                f"{hand:.2f}" if hand else "",
                *off,
                *([f"{row['mib']:.0f}"] if memory else []),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        for row in result["epsilons"]:
            cells = [
                row["name"],
                "{}, {}".format(*row["passes"]),
                "",
                "",
                "",
                "",
                "",
                f"{row['error']:.1e}",
                f"{row['cosine']:.5f}",
            ]
            lines.append("| " + " | ".join(cells + [""] * memory) + " |")
        if result["out_of_memory"]:
            lines += ["", f"Out of memory: {'; '.join(result['out_of_memory'])}."]
    told = (f"torch {document['torch']}", f"{document['rounds']} rounds", document.get("clock"), document.get("date"))
    return [*lines, "", ", ".join(filter(None, told)) + "."]


def main() -> None:
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
    arguments = parser.parse_args()
    carry_out(arguments, lambda: run(arguments), lines_of)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the tables and keeps what is to be kept, table by table."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    name = named("bidora_step", arguments.device)
    document: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "clock": "processor time" if arguments.cpu_time else "wall clock",
        "date": time.strftime("%Y-%m-%d"),
        "results": earlier(name, arguments).get("results", []),
    }
    for shape in arguments.shape:
        small = shape == "minilm"
        for tokens in arguments.tokens or ["16x96" if small else "4x512"]:
            batch, length = map(int, tokens.split("x"))
            rate = arguments.rate or (1.5e-3 if small else 2e-4)
            gamma = arguments.gamma if arguments.gamma is not None else 1e-5 if small else 0.0
            setting = Setting(shape, arguments.rank, batch, length, arguments.device, rate, gamma)
            started = time.perf_counter()
            document["results"].append(measure(setting, arguments))
            print(*lines_of({**document, "results": document["results"][-1:]}), sep="\n", flush=True)
            print(f"({time.perf_counter() - started:.0f} s)", flush=True)
            keep(name, document, arguments)


if __name__ == "__main__":
    main()
