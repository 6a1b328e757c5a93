"""What exact DoRA costs beside PEFT's LoRA and DoRA: one training pass of layers and of Llama-like stacks.

    python -m benchmarks.dora_gpu [--shapes small layer wide 1b 7b] [--rank 8 64] [--precision autocast bfloat16]
                                  [--tokens 4x512 8x1024] [--rounds 7] [--save] [--page docs/benchmarks/dora.md]

A pass is forward, backward to the adapters (and to the input of a single layer). All models are on the device at
once and take turns; times are medians of ratios within a round, by CUDA events. Memory is the peak of a pass, the
model's own weights included. Gradients are compared with those of the same formula in float32 from the same values.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.options import add_append, add_results, carry_out, earlier, keep, new_parser
from bidora import use_exact_dora

METHODS = ("LoRA", "PEFT DoRA", "exact DoRA", "exact DoRA, torch")
LAYERS = {"tiny": (64, 96), "small": (1024, 1024), "layer": (4096, 4096), "wide": (4096, 11008)}
STACKS = {
    "tiny stack": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "intermediate_size": 96},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008},
}  # fmt: skip
VOCABULARY = 1024
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: str
    rank: int
    precision: str
    batch: int
    length: int
    checkpointing: bool = False
    graph: bool = False

    def __str__(self) -> str:
        note = ", checkpointing" if self.checkpointing else ", as a CUDA graph" if self.graph else ""
        return f"{self.shape}, r = {self.rank}, {self.batch}×{self.length} tokens, {self.precision}{note}"


@functools.lru_cache(maxsize=1)
def base_model(shape: str, device: torch.device) -> nn.Module:
    """Returns the frozen bfloat16 model; a layer is wrapped so that PEFT finds it."""
    torch.manual_seed(0)
    if shape in LAYERS:
        columns, rows = LAYERS[shape]
        with device:
            model: nn.Module = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**STACKS[shape], vocab_size=VOCABULARY, use_cache=False, attn_implementation="sdpa")
    with device:
        return LlamaForCausalLM(settings).to(torch.bfloat16)


def shared(model: nn.Module) -> nn.Module:
    """Returns a copy of a model's modules with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adapted(case: Case, method: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Returns an adapted model whose A, B and m are the same for every method."""
    targets = ["0"] if case.shape in LAYERS else LINEARS
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=targets, use_dora="DoRA" in method, lora_dropout=0.0
    )
    base = base_model(case.shape, device)
    base = shared(base) if dtype == torch.bfloat16 else copy.deepcopy(base).to(dtype)
    model = get_peft_model(base, config, autocast_adapter_dtype=case.precision != "bfloat16")
    if method.startswith("exact"):
        use_exact_dora(model, kernels="torch" if method.endswith("torch") else "auto")
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                value = torch.empty(parameter.shape, device=device).normal_(generator=generator)
                size = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
                parameter.copy_((value * size).bfloat16())
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # of PEFT's own initial values
                factor = torch.empty(parameter.shape, device=device).uniform_(0.9, 1.1, generator=generator)
                parameter.copy_((parameter.bfloat16() * factor).bfloat16())
    if case.checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the input and, for a layer, the cotangent."""
    torch.manual_seed(2)
    if case.shape not in LAYERS:
        ids = torch.randint(0, VOCABULARY, (case.batch, case.length), device=device)
        return ids, ids
    columns, rows = LAYERS[case.shape]
    make = [torch.randn(case.batch, case.length, size, device=device).bfloat16() for size in (columns, rows)]
    return make[0], make[1]


def passes(model: nn.Module, case: Case, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Returns one training pass as a function."""
    first, second = data
    autocast = case.precision == "autocast"

    def run() -> None:
        with torch.autocast(first.device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            if case.shape in LAYERS:
                y = model(first.detach().requires_grad_())
            else:
                y = model(input_ids=first, labels=second).loss
        y.backward(second.to(y.dtype) if case.shape in LAYERS else None)

    return run


def captured(run: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    """Returns a replay of one pass as a CUDA graph, in which the CPU starts no kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            clear(model)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def gradients(model: nn.Module, case: Case, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    clear(model)
    passes(model, case, data)()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    clear(model)
    return found


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], kind: str) -> float:
    """Returns the relative error over all parameters of a kind."""
    names = [name for name in exact if kind in name]
    gap = sum(float((found[n] - exact[n]).double().square().sum()) for n in names)
    return (gap / sum(float(exact[n].double().square().sum()) for n in names)) ** 0.5


def sized(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Clock:
    """Times a function by CUDA events, or by the process's CPU time."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], None], repeats: int) -> float:
        if not self.cuda:
            start = time.process_time()
            for _ in range(repeats):
                run()
            return 1e3 * (time.process_time() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / repeats


def measure(
    case: Case, methods: tuple[str, ...], rounds: int, device: torch.device, compare: bool
) -> dict[str, object]:
    """Returns milliseconds, peak memory and the errors of the gradients of every method."""
    data = inputs(case, device)
    models = {method: adapted(case, method, device) for method in methods}
    runs = {method: passes(model, case, data) for method, model in models.items()}
    clock = Clock(device)
    times: dict[str, list[float]] = {method: [] for method in methods}
    memory: dict[str, float] = {}
    for method, model in models.items():  # warm up, compile, measure memory
        for _ in range(2):
            runs[method]()
            clear(model)
        memory[method] = peak(runs[method], model, device)
        if case.graph:
            runs[method] = captured(runs[method], model)
    repeats = max(1, min(50, int(100 / max(1e-3, clock(runs[methods[0]], 3)))))
    for _ in range(rounds):
        for method, model in models.items():
            clear(model)
            runs[method]()  # allocates the gradients
            times[method].append(clock(runs[method], repeats))
            clear(model)
    compare = compare and not case.graph  # the same operations
    found = {method: gradients(model, case, data) for method, model in models.items()} if compare else {}
    del models, runs
    gc.collect()
    errors = _errors(case, found, data, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    lora = methods[0]
    rows = {
        method: {
            "ms": statistics.median(times[method]),
            "time_ratio": statistics.median(a / b for a, b in zip(times[method], times[lora], strict=True)),
            "spread": (max(times[method]) - min(times[method])) / statistics.median(times[method]),
            "memory_mib": memory[method] / 2**20,
            "memory_ratio": memory[method] / memory[lora] if memory[lora] else None,
            "errors": errors.get(method),
        }
        for method in methods
    }
    return {"case": case.__dict__ | {"name": str(case)}, "methods": rows}


def _errors(
    case: Case, found: Mapping[str, dict[str, Tensor]], data: tuple[Tensor, Tensor], device: torch.device
) -> dict[str, dict[str, float]]:
    """Returns how far methods' gradients are from those of the same formula in float32, by kind of parameter."""
    errors = {}
    for kind in ("LoRA", "exact DoRA, torch") if found else ():
        model = adapted(case, kind, device, torch.float32)
        exact = gradients(model, Case(case.shape, case.rank, "float32", case.batch, case.length), _wide(data))
        del model
        parts = ("lora_A", "lora_B", *(["magnitude"] if "DoRA" in kind else []))
        for method, own in found.items():
            if ("DoRA" in method) == ("DoRA" in kind):
                errors[method] = {part: distance(own, exact, part) for part in parts}
    return errors


def _wide(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = (t.float() if t.is_floating_point() else t for t in data)
    return first, second


def peak(run: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    """Returns the bytes allocated at the peak of a pass, with the model's own weights and gradients, and no others."""
    clear(model)
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    clear(model)
    return float(extra + sized(model))


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for shape in arguments.shapes:
        for rank in arguments.rank:
            for precision in arguments.precision:
                for tokens in arguments.tokens:
                    batch, length = map(int, tokens.split("x"))
                    yield Case(shape, rank, precision, batch, length)
                    if arguments.graph and shape in STACKS:
                        yield Case(shape, rank, precision, batch, length, graph=True)
    if arguments.checkpointing:
        for shape in arguments.shapes:
            if shape in STACKS:
                batch, length = map(int, arguments.tokens[0].split("x"))
                yield Case(shape, arguments.rank[0], arguments.precision[0], batch, length, checkpointing=True)


def line(result: dict[str, object]) -> str:
    case, methods = result["case"], result["methods"]
    cells = []
    for method, row in methods.items():
        errors = row["errors"] or {}
        text = " ".join(f"{value:.1e}" for value in errors.values())
        ratio = f"{row['memory_ratio']:.2f}" if row["memory_ratio"] else "–"
        cells.append(f"  {method:18s} {row['ms']:9.3f} ms {row['time_ratio']:6.2f} ×  memory {ratio} ×  errors {text}")
    return "\n".join([case["name"], *cells])


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """Returns what the page shows; columns of which nothing was measured are left out."""
    rows, errors = [], []
    for result in document["results"]:
        name, methods = result["case"]["name"], result["methods"]
        lora, theirs, ours, torch_path = (methods.get(method, {}) for method in METHODS)
        rows.append(
            {
                "": name,
                "LoRA, ms": f"{lora['ms']:.2f}",
                "PEFT DoRA": times(theirs.get("time_ratio")),
                "exact DoRA": f"**{times(ours['time_ratio'])}**" if ours else "",
                "torch path": times(torch_path.get("time_ratio")),
                "PEFT DoRA ÷ exact": times(theirs["time_ratio"] / ours["time_ratio"] if ours and theirs else None),
                "memory, LoRA, MiB": f"{lora['memory_mib']:.0f}" if lora.get("memory_mib") else "",
                "memory, PEFT DoRA": times(theirs.get("memory_ratio")),
                "memory, exact DoRA": times(ours.get("memory_ratio")),
            }
        )
        sides = {"exact DoRA": ours, "torch path": torch_path, "PEFT DoRA": theirs, "LoRA": lora}
        worst = {key: f"{max(row['errors'].values()):.1e}" if row.get("errors") else "" for key, row in sides.items()}
        if any(worst.values()):
            errors.append({"": name, **worst})
    told = "{device}, torch {torch}, PEFT {peft}".format(**document)
    rounds = " and ".join(map(str, sorted({result["rounds"] for result in document["results"]})))
    lines = [f"Measured on {told}, {rounds} rounds.", "", *table(rows)]
    if errors:
        lines += ["", "Largest relative error of the gradients of A, B and m:", "", *table(errors)]
    return lines


def times(value: float | None) -> str:
    return f"{value:.2f} ×" if value else ""


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns rows in Markdown, without columns that are empty in all of them."""
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    cells = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=[*LAYERS, *STACKS], default=["small", "layer", "wide", "1b", "7b"]
    )
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--precision", nargs="+", choices=["autocast", "bfloat16"], default=["autocast", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", default=["8x1024"])
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=list(METHODS[1:]))
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="each stack with gradient checkpointing as well")
    parser.add_argument("--graph", action="store_true", help="each stack's passes captured in a CUDA graph as well")
    add_append(parser)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    add_results(parser)
    arguments = parser.parse_args()
    if arguments.graph and arguments.device != "cuda":
        parser.error("--graph needs --device cuda")
    carry_out(arguments, lambda: run(arguments), lines_of)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the tables and keeps what is to be kept."""
    warnings.simplefilter("ignore", FutureWarning)
    name = "dora" if arguments.device == "cuda" else "dora-cpu"
    document = measured(arguments)
    print(*lines_of(document), sep="\n", flush=True)
    document["results"] = earlier(name, arguments).get("results", []) + document["results"]
    keep(name, document, arguments)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = []
    for case in cases(arguments):
        methods = arguments.methods
        if case.graph:  # the torch path reads from the device, whether a row is ill-conditioned
            methods = [method for method in methods if not method.endswith("torch")]
        result = measure(case, ("LoRA", *methods), arguments.rounds, device, not arguments.no_errors)
        results.append(result | {"rounds": arguments.rounds})
        print(line(result), flush=True)
    return {
        "device": name,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "results": results,
    }


if __name__ == "__main__":
    main()
