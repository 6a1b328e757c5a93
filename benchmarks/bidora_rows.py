"""What the benchmark of BiDoRA's step times: models, batches, engines, and loops written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dora_gpu import Case, adapted, inputs
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
