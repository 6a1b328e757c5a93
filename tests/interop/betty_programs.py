"""Programs in Betty's terms, built from Betty's own classes or from ours, that tell all that happens in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

BETTY = "betty"
OURS = "bilevel.interop.betty"

FEATURES, TARGETS = 3, 2

SMALL = 1e-3
"""In comparisons what is smaller than this counts as of this size."""


class Namespace(NamedTuple):
    """What a program imports."""

    Config: Any
    EngineConfig: Any
    Engine: Any
    Env: Any
    ImplicitProblem: Any
    IterativeProblem: Any


def namespace(root: str) -> Namespace:
    """Imports as a program does: the same modules and names under either root."""
    configs, engine, envs, problems = (
        importlib.import_module(f"{root}.{part}") for part in ("configs", "engine", "envs", "problems")
    )
    return Namespace(
        configs.Config,
        configs.EngineConfig,
        engine.Engine,
        envs.Env,
        problems.ImplicitProblem,
        problems.IterativeProblem,
    )


@dataclass(frozen=True)
class Level:
    """How one problem is set.

    Attributes:
        config: Fields of ``Config`` other than their defaults.
        optimizer: A key of :data:`OPTIMIZERS`.
        scheduler: A key of :data:`SCHEDULERS`.
        batches: ``"pairs"``, ``"dicts"`` or ``"two"`` (a tuple of two loaders of different lengths).
        groups: Parameters in two groups by ``param_groups()``, with rates of their own.
        restricted: ``trainable_parameters()`` returns the weight only.
        own_step: ``custom_optimizer_step()``.
        direct: The loss depends on the problem's own parameters beside those below.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    scheduler: str = "none"
    batches: str = "pairs"
    groups: bool = False
    restricted: bool = False
    own_step: bool = False
    direct: bool = False


@dataclass(frozen=True)
class Program:
    """A whole program.

    Attributes:
        structure: A key of :data:`STRUCTURES`.
        levels: By name of the problem; those left out are ``Level()``.
        iterations: ``train_iters``.
        valid_step: Iterations between validations.
        roll_back: As in ``EngineConfig``.
        drive: ``"run"``, ``"run twice"`` or ``"by hand"`` (``train_step`` in a loop).
        seed: Of parameters and data.
    """

    structure: str = "two levels"
    levels: Mapping[str, Level] = field(default_factory=dict)
    iterations: int = 12
    valid_step: int = 5
    roll_back: bool = False
    drive: str = "run"
    seed: int = 0

    def level(self, name: str) -> Level:
        """The settings of a problem."""
        return self.levels.get(name, Level())

    def having(self, name: str, **changes: Any) -> Program:
        """The same with other settings of one problem."""
        return replace(self, levels={**self.levels, name: replace(self.level(name), **changes)})


class Entry(NamedTuple):
    """Something that happened: where, which hook, with which counts, and the numbers to be seen there."""

    problem: str
    hook: str
    counts: tuple[Any, ...]
    numbers: tuple[Tensor, ...]


class AdamW(torch.optim.AdamW):
    """Takes its own ``defaults``, which Betty rebuilds an optimiser from; recent versions of torch's class do not."""

    def __init__(self, params: Any, decoupled_weight_decay: bool = True, **fields: Any) -> None:
        super().__init__(params, **fields)


OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.9, weight_decay=0.02),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.8, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.01),
    "adamw": lambda params: AdamW(params, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}

SCHEDULERS: Mapping[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "steps": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.001),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
}


@dataclass(frozen=True)
class Structure:
    """Which problems there are: by name, those below (u2l) and those above (l2u)."""

    below: Mapping[str, tuple[str, ...]]
    above: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """All problems."""
        return tuple(dict.fromkeys([*self.below, *self.above]))

    @property
    def methods(self) -> tuple[str, ...]:
        """The problems that are differentiated through."""
        return tuple(self.above)


STRUCTURES: Mapping[str, Structure] = {
    "two levels": Structure({"top": ("low",)}, {"low": ("top",)}),
    "two below": Structure({"top": ("low", "other")}, {"low": ("top",), "other": ("top",)}),
    "two above": Structure({"top": ("low",), "side": ("low",)}, {"low": ("top", "side")}),
    # top enters low's loss, low the middle one's, and the middle one top's
    "chain": Structure({"top": ("low",)}, {"low": ("middle",), "middle": ("top",)}),
}


class Rows(Dataset[dict[str, Tensor]]):
    """Examples as mappings."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def loader(kind: str, size: int, seed: int) -> Any:
    """Unshuffled batches; the last one of an epoch is smaller."""
    generator = torch.Generator().manual_seed(seed)

    def part(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, FEATURES, generator=generator)
        return x, torch.sin(x[:, :TARGETS]) + 0.3 * torch.randn(size, TARGETS, generator=generator)

    if kind == "dicts":
        return DataLoader(Rows(*part(size)), batch_size=4)
    if kind == "two":
        return tuple(DataLoader(TensorDataset(*part(length)), batch_size=4) for length in (size, size + 7))
    return DataLoader(TensorDataset(*part(size)), batch_size=4)


def unpack(kind: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets, and with them the assertion that a batch has Betty's form."""
    if kind == "dicts":
        assert type(batch) is dict
        return batch["x"], batch["y"]
    assert type(batch) is tuple
    if kind == "two":
        (x, y), (more_x, more_y) = batch
        return torch.cat([x, more_x]), torch.cat([y, more_y])
    return batch


def squares(problem: Any, x: Tensor, y: Tensor) -> Tensor:
    """Squared errors by example, of a prediction that is mildly curved in the parameters."""
    z = problem(x)
    errors: Tensor = (z + 0.1 * torch.sin(z) - y).square().sum(1)
    return errors


def weighted(problem: Any, uppers: Any, x: Tensor, y: Tensor) -> Tensor:
    """What those above want of a problem: examples have weights, and parameters a penalty."""
    weights = sum(torch.sigmoid(upper(x).sum(1)) for upper in uppers)
    norm = sum(p.square().sum() for p in problem.module.parameters())
    loss: Tensor = (weights * squares(problem, x, y)).mean() / 2 + 0.2 * norm
    return loss


def objective(problem: Any, structure: str, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a problem by its name and where it stands."""
    name = problem.name
    if name in ("top", "side"):
        loss = squares(problem.middle if structure == "chain" else problem.low, x, y).mean() / 2
        if structure == "two below":
            loss = loss + squares(problem.other, x, y).mean() / 3
        return loss
    if name == "middle":
        return weighted(problem, [problem.low], x, y)
    uppers = [getattr(problem, upper) for upper, lowers in STRUCTURES[structure].below.items() if name in lowers]
    return weighted(problem, uppers, x, y)


def optional(level: Level) -> dict[str, Any]:
    """The methods that a problem has only where its settings say so."""
    methods: dict[str, Any] = {}
    if level.scheduler != "none":
        methods["configure_scheduler"] = lambda self: SCHEDULERS[level.scheduler](self.optimizer)
    if level.groups:
        methods["param_groups"] = lambda self: [
            {"params": [self.module.weight], "lr": 0.02},
            {"params": [self.module.bias], "weight_decay": 0.3},
        ]
    if level.restricted:
        methods["trainable_parameters"] = lambda self: [self.module.weight]
    if level.own_step:

        @torch.no_grad()
        def custom_optimizer_step(self: Any) -> None:
            for p in self.trainable_parameters():
                p -= 0.04 * p.grad / (1.0 + p.grad.norm())

        methods["custom_optimizer_step"] = custom_optimizer_step
    return methods


def build(root: str, program: Program) -> tuple[Any, list[Entry]]:
    """Makes a program's engine.

    Args:
        root: :data:`BETTY` or :data:`OURS`.
        program: The program.

    Returns:
        The engine, and the list to which all hooks append what they see.
    """
    names = namespace(root)
    structure = STRUCTURES[program.structure]
    trace: list[Entry] = []

    def values(problem: Any) -> tuple[Tensor, ...]:
        return tuple(p.detach().clone() for p in problem.module.parameters())

    class Told(names.ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            level = program.level(self.name)
            x, y = unpack(level.batches, batch)
            loss = objective(self, program.structure, x, y)
            if level.direct:
                loss = loss + 0.3 * self.module.weight.square().sum()
            if self.name in structure.methods:
                return loss  # Betty's hypergradients crash where a problem that they pass returns a mapping
            return {"loss": loss, "rows": len(x), "mean": y.mean()}

        def tell(self, hook: str, *counts: Any, numbers: tuple[Tensor, ...] = ()) -> None:
            trace.append(Entry(self.name, hook, counts, numbers))

        def on_inner_loop_start(self) -> None:
            self.tell("on_inner_loop_start", self.count, numbers=values(self))

        def grad_callback(self) -> None:
            parameters = self.module.parameters()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
            self.tell("grad_callback", self.count, numbers=tuple(grads))

        def param_callback(self) -> None:
            rates = [torch.tensor(group["lr"]) for group in self.optimizer.param_groups]
            self.tell("param_callback", self.count, *self.epoch_counter, numbers=(*values(self), *rates))

        def epoch_callback(self) -> None:
            self.tell("epoch_callback", self.count, *self.epoch_counter)

        def log(self, stats: Any, global_step: Any) -> None:
            numbers = tuple(torch.as_tensor(value, dtype=torch.float64) for value in stats.values())
            self.tell("log", self.count, global_step, *stats, numbers=numbers)

    class Watched(names.Engine):
        def validation(self) -> dict[str, Any]:
            assert not any(problem.module.training for problem in self.problems)
            found = tuple(part for problem in self.problems for part in values(problem))
            trace.append(Entry("engine", "validation", (self.global_step,), found))
            return {"norm": sum(float(part.norm()) for part in found)}

    def problem(place: int, name: str) -> Any:
        level = program.level(name)
        torch.manual_seed(1000 * program.seed + place)
        module = nn.Linear(FEATURES, TARGETS)
        held = [module.weight] if level.restricted else module.parameters()
        kind = type(name.title(), (Told,), optional(level))
        config = dict(level.config)
        if level.direct:
            config["retain_graph"] = True  # Betty's own gradient frees the graph that its hypergradient needs
        return kind(
            name=name,
            config=names.Config(**config),
            module=module,
            optimizer=OPTIMIZERS[level.optimizer](held),
            train_data_loader=loader(level.batches, 14 + 5 * place, 1000 * program.seed + 100 + place),
        )

    problems = {name: problem(place, name) for place, name in enumerate(structure.names)}
    engine = Watched(
        problems=list(problems.values()),
        config=names.EngineConfig(
            train_iters=program.iterations,
            valid_step=program.valid_step,
            roll_back=program.roll_back,
            strategy="cpu",
        ),
        dependencies={
            kind: {problems[name]: [problems[other] for other in others] for name, others in edges.items()}
            for kind, edges in (("u2l", structure.below), ("l2u", structure.above))
        },
    )
    return engine, trace


def play(root: str, program: Program) -> list[Entry]:
    """Runs a program, and returns what happened; at the end, all parameters."""
    engine, trace = build(root, program)
    if program.drive == "by hand":
        engine.train()
        for _ in range(program.iterations):
            engine.train_step()
    else:
        engine.run()
        if program.drive == "run twice":
            engine.run()
    for problem in engine.problems:
        final = tuple(p.detach().clone() for p in problem.module.parameters())
        trace.append(Entry(problem.name, "end", (problem.count,), final))
    return trace


def assert_same(found: list[Entry], expected: list[Entry], tolerance: float) -> None:
    """Both traces: the same hooks in the same order with the same counts, and the same numbers."""
    for place, (ours, bettys) in enumerate(zip(found, expected, strict=False)):
        where = f"entry {place} of {bettys.problem!r}, {bettys.hook} {bettys.counts}"
        assert ours[:3] == bettys[:3], where
        assert len(ours.numbers) == len(bettys.numbers), where
        for number, theirs in zip(ours.numbers, bettys.numbers, strict=True):
            error = float((number - theirs).norm()) / max(float(theirs.norm()), SMALL)
            assert error <= tolerance, f"{where}: {number} is not {theirs} ({error:.1e})"
    assert len(found) == len(expected)


def numbers_of(trace: list[Entry], problem: str, hook: str) -> Iterator[tuple[Tensor, ...]]:
    """The numbers seen by one hook of one problem."""
    return (entry.numbers for entry in trace if (entry.problem, entry.hook) == (problem, hook))


Loss = Callable[..., Tensor]


class Vector(nn.Module):
    """One tensor of parameters."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())


@dataclass
class Seen:
    """What happened in a :func:`pair`, as one vector a step: top's gradients, and both problems' parameters."""

    hypergradients: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)


def flat(tensors: Any) -> Tensor:
    """One vector of many tensors, apart from what they were made of."""
    return torch.cat([tensor.detach().clone().reshape(-1) for tensor in tensors])


def pair(
    root: str,
    lower: Loss,
    upper: Loss,
    low: nn.Module,
    top: nn.Module,
    *,
    optimizer: Any = None,
    config: Mapping[str, Any] | None = None,
    above: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    batches: Any = ((0,),),
    rate: float = 0.1,
    methods: Mapping[str, Any] | None = None,
    validation: Callable[[Any], Any] | None = None,
    kind: str = "ImplicitProblem",
) -> tuple[Any, Seen]:
    """Makes a program of two levels from two losses of both modules and a batch.

    Args:
        root: :data:`BETTY` or :data:`OURS`.
        lower: ``lower(low, top, *batch)``.
        upper: ``upper(low, top, *batch)``.
        low: The lower problem's module.
        top: The upper problem's.
        optimizer: Of the lower problem; gradient descent with a rate of 0.1 by default.
        config: Fields of the lower problem's ``Config``.
        above: Of the upper one's.
        engine: Fields of ``EngineConfig``.
        batches: Of both.
        rate: Of the upper problem's gradient descent.
        methods: Further ones of the lower problem.
        validation: Of the engine.
        kind: The lower problem's base class.

    Returns:
        The engine and what is seen in it.
    """
    names = namespace(root)
    seen = Seen()

    def values(problem: Any) -> Tensor:
        return flat(problem.module.parameters())

    class Top(names.ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return upper(self.low.module, self.module, *batch)

        def grad_callback(self) -> None:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.module.parameters()]
            seen.hypergradients.append(flat(grads))

        def param_callback(self) -> None:
            seen.top.append(values(self))

    class Low(getattr(names, kind)):
        def training_step(self, batch: Any) -> Any:
            return lower(self.module, self.top.module, *batch)

        def param_callback(self) -> None:
            seen.low.append(values(self))

    inner = type("Low", (Low,), dict(methods or {}))(
        "low",
        names.Config(**(config or {})),
        low,
        torch.optim.SGD(low.parameters(), lr=0.1) if optimizer is None else optimizer,
        train_data_loader=list(batches),
    )
    gradient_descent = torch.optim.SGD(top.parameters(), lr=rate)
    outer = Top("top", names.Config(**(above or {})), top, gradient_descent, train_data_loader=list(batches))
    base = type("Validated", (names.Engine,), {} if validation is None else {"validation": validation})
    made = base(
        [outer, inner],
        names.EngineConfig(**{"strategy": "cpu", **(engine or {})}),
        {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    return made, seen


def watch(root: str, *arguments: Any, iterations: int = 1, **options: Any) -> Seen:
    """Runs a :func:`pair`, and returns what was seen."""
    made, seen = pair(root, *arguments, engine={"train_iters": iterations, **options.pop("engine", {})}, **options)
    made.run()
    return seen
