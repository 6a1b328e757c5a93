"""What grows, from where to where, and which lines are drawn. Needs torch only."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from benchmarks.growth.problems import (
    RATE,
    One,
    softmax_case,
    softmax_task,
    softmax_unrolled_reference,
)
from benchmarks.peers.reference import implicit
from benchmarks.peers.side import Method, Reference, Side
from benchmarks.peers.workloads import few_shot, unrolled

__all__ = ["AXES", "Axis", "Line", "Run"]

PRODUCTS, STEPS = 10, 5  # of methods that have them, where something else grows


@dataclass(frozen=True)
class Line:
    """One library with one method.

    Attributes:
        library: A key of ``benchmarks.peers.environments.LIBRARIES``.
        kind: Of :class:`~benchmarks.peers.side.Method`, or one that only :mod:`benchmarks.growth.ours` knows.
        options: Of the method.
        values: Sizes of its own; the axis's without any.
    """

    library: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Sequence[int] = ()

    @property
    def key(self) -> str:
        return "-".join([self.library, self.kind, *(str(key) for key, value in self.options.items() if value)])


@dataclass(frozen=True)
class Run:
    """Where a line is measured.

    Attributes:
        size: ``"small"`` or ``"full"``.
        device: ``"cpu"`` or ``"cuda"``.
    """

    size: str
    device: str

    @property
    def key(self) -> str:
        """Of the settings of an axis: a GPU has its own."""
        return "cuda" if self.device == "cuda" and self.size == "full" else self.size


@dataclass(frozen=True)
class Axis:
    """A quantity that grows.

    Attributes:
        title: What the picture says.
        quantity: What the abscissa says.
        problem: What is solved, by "small", "full" and "cuda".
        values: Sizes, by "small", "full" and "cuda".
        lines: What is measured.
        build: ``(line, value, run) -> Side``.
        check: ``line -> (value, Reference)``: where a line's hypergradient is compared with its method's value in
            float64. On the CPU, at a small size.
    """

    title: str
    quantity: str
    problem: Mapping[str, str]
    values: Mapping[str, Sequence[int]]
    lines: Sequence[Line]
    build: Callable[[Line, int, Run], Side]
    check: Callable[[Line], tuple[int, Reference]]

    def line(self, key: str) -> Line:
        return next(line for line in self.lines if line.key == key)

    def values_of(self, line: Line, run: Run) -> Sequence[int]:
        return line.values or self.values[run.key]


def side_module(library: str, name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.peers.sides.{library}.{name}")


def method_of(line: Line, products: int = PRODUCTS) -> Method:
    tolerance = 3e-2 if line.kind in ("finite_difference", "conjugate_gradient") else 5e-3
    count = products if line.kind in ("neumann", "conjugate_gradient") else 0
    return Method(line.kind, count, RATE, line.options, tolerance)


def softmax_side(line: Line, inner: int, outer: int, batch: int, device: str, products: int = PRODUCTS) -> Side:
    """Returns a line's side for softmax regression."""
    if line.library == "bilevel" and line.kind in ("exact", "forward"):
        ours = importlib.import_module("benchmarks.growth.ours")
        if line.kind == "exact":
            return ours.exact(softmax_task(inner, outer, batch, device))
        return ours.forward(softmax_case(inner, outer, batch, device), STEPS)
    if line.kind == "unrolled":
        options = {"steps": STEPS, "least_memory": False, **line.options}
        return side_module(line.library, "unrolled").build(
            One(softmax_case(inner, outer, batch, device)), Method("unrolled", options=options)
        )
    task = softmax_task(inner, outer, batch, device)
    return side_module(line.library, "implicit").build(task, method_of(line, products))


def softmax_reference(line: Line, inner: int, outer: int, batch: int) -> Reference:
    """Returns what a line's method gives in float64."""
    if line.kind in ("unrolled", "forward"):
        return softmax_unrolled_reference(inner, outer, batch, STEPS)
    task = softmax_task(inner, outer, batch, dtype="float64")
    if line.kind == "exact":
        found = implicit(task, Method("identity"))
        assert found.exact is not None
        return Reference(found.exact)
    return implicit(task, method_of(line))


SMALL_BATCH, BATCH = 32, 256
GRAPH, REPLAY = {"least_memory": False}, {"least_memory": True}


# Products of a linear solve

PRODUCTS_AT = {"small": 10_000, "full": 100_000, "cuda": 1_000_000}


def build_products(line: Line, value: int, run: Run) -> Side:
    return softmax_side(line, PRODUCTS_AT[run.key], 10, BATCH, run.device, value)


def check_softmax(line: Line) -> tuple[int, Reference]:
    return PRODUCTS, softmax_reference(line, 10_000, 10, BATCH)


# Inner and outer parameters


def build_inner(line: Line, value: int, run: Run) -> Side:
    return softmax_side(line, value, 10, SMALL_BATCH, run.device)


def check_inner(line: Line) -> tuple[int, Reference]:
    return 1000, softmax_reference(line, 1000, 10, SMALL_BATCH)


OUTER_AT = {"small": 10_000, "full": 1_000_000, "cuda": 1_000_000}


def build_outer(line: Line, value: int, run: Run) -> Side:
    return softmax_side(line, OUTER_AT[run.key], value, SMALL_BATCH, run.device)


def check_outer(line: Line) -> tuple[int, Reference]:
    return 10, softmax_reference(line, OUTER_AT["small"], 10, SMALL_BATCH)


# Inner steps


def conv_method(line: Line, steps: int) -> Method:
    options = {"network": "conv", "steps": steps, "least_memory": False, **line.options}
    return Method("unrolled", options=options, tolerance=5e-3)


def build_steps(line: Line, value: int, run: Run) -> Side:
    size = {"cuda": "full"}.get(run.key, run.key)
    tasks = unrolled.task(conv_data(size), size, run.device)
    if line.kind == "identity":
        return importlib.import_module("benchmarks.growth.ours").implicit(tasks.case(conv_method(line, value)), value)
    return side_module(line.library, "unrolled").build(tasks, conv_method(line, value))


def check_steps(line: Line) -> tuple[int, Reference]:
    arrays = conv_data("small")
    if line.kind == "identity":
        return STEPS, importlib.import_module("benchmarks.growth.ours").implicit_reference(arrays, STEPS)
    return STEPS, unrolled.reference(arrays, "small", conv_method(line, STEPS))


@functools.cache
def conv_data(size: str) -> Any:
    return unrolled.data(size, None)[0]


# Tasks of a meta-batch

MOST_TASKS = 256
TASK_STEPS = {"sinusoid": STEPS, "conv": 1}
HIDDEN = {key: few_shot.SIZES[key]["hidden"] for key in ("small", "full")}


def tasks_method(count: int, network: str) -> Method:
    options = {"network": network, "tasks": count, "steps": TASK_STEPS[network], "implicit": False}
    return Method("unrolled", options=options, tolerance=5e-3)


def build_tasks(line: Line, value: int, run: Run) -> Side:
    network = "conv" if run.device == "cuda" else "sinusoid"
    size = "gpu" if run.key == "cuda" else run.key
    method = tasks_method(value, network)
    tasks = few_shot.task(tasks_data(size), size, run.device)
    if line.kind == "one_by_one":
        return importlib.import_module("benchmarks.growth.ours").one_by_one(tasks.case(method))
    return side_module(line.library, "few_shot").build(tasks, method)


def check_tasks(line: Line) -> tuple[int, Reference]:
    return 4, few_shot.reference(tasks_data("small"), "small", tasks_method(4, "sinusoid"))


@functools.cache
def tasks_data(size: str) -> Any:
    return few_shot.data(size, None, MOST_TASKS)[0]  # the suite's tables have fewer


def powers(low: int, high: int, *factors: int) -> list[int]:
    """Returns ``factor · 10^k`` from ``low`` to ``high``, or powers of the factor where there is one above 1."""
    found, base = [], 1
    while base <= high:
        found += [factor * base for factor in factors if low <= factor * base <= high]
        base *= 10
    return found


HUNDRED = powers(1, 100, 1, 2, 5)


def with_counts(text: str, counts: Mapping[str, int]) -> dict[str, str]:
    return {key: text.format(f"{count:,}") for key, count in counts.items()}


RUNS = ("small", "full", "cuda")
AXES = {
    "steps": Axis(
        "inner steps",
        "unrolled inner steps",
        with_counts(
            "a conv net with a learned weight decay for each tensor, batches of {} digits",
            {key: unrolled.SIZES["small" if key == "small" else "full"]["batch"] for key in RUNS},
        ),
        {"small": HUNDRED[:5], "full": HUNDRED, "cuda": HUNDRED},
        [
            Line("hand", "unrolled", GRAPH),
            Line("bilevel", "unrolled", GRAPH),
            Line("bilevel", "unrolled", REPLAY),
            Line("bilevel", "identity"),
            Line("torchopt", "unrolled", GRAPH),
            Line("higher", "unrolled", GRAPH),
            Line("boat", "unrolled", GRAPH),
            Line("betty", "unrolled", GRAPH),
        ],
        build_steps,
        check_steps,
    ),
    "products": Axis(
        "Hessian products",
        "Hessian products of the solve",
        with_counts(
            "softmax regression with 10 learned weight decays, {} inner parameters, batches of 256", PRODUCTS_AT
        ),
        {"small": HUNDRED[:5], "full": HUNDRED, "cuda": HUNDRED},
        [
            Line(library, kind)
            for kind in ("conjugate_gradient", "neumann")
            for library in ("hand", "bilevel", "betty", "torchopt", "boat")
        ],
        build_products,
        check_softmax,
    ),
    "inner": Axis(
        "inner parameters",
        "inner parameters",
        dict.fromkeys(RUNS, "softmax regression with 10 learned weight decays, batches of 32"),
        {"small": powers(1000, 10**5, 1), "full": powers(1000, 10**7, 1), "cuda": powers(1000, 10**8, 1)},
        [
            Line("hand", "conjugate_gradient"),
            Line("bilevel", "finite_difference"),
            Line("bilevel", "identity"),
            Line("bilevel", "neumann"),
            Line("bilevel", "conjugate_gradient"),
            Line("bilevel", "unrolled", GRAPH),
            Line("bilevel", "unrolled", REPLAY),
            Line("bilevel", "exact", values=(500, 1000, 2000, 4000)),
            Line("betty", "finite_difference"),
            Line("betty", "neumann"),
            Line("betty", "conjugate_gradient"),
            Line("torchopt", "neumann"),
            Line("torchopt", "conjugate_gradient"),
            Line("torchopt", "unrolled", GRAPH),
            Line("higher", "unrolled", GRAPH),
            Line("boat", "finite_difference"),
            Line("boat", "neumann"),
            Line("boat", "conjugate_gradient"),
        ],
        build_inner,
        check_inner,
    ),
    "outer": Axis(
        "outer parameters",
        "outer parameters",
        with_counts(
            "softmax regression with {} inner parameters, in as many groups with a weight decay each, batches of 32",
            OUTER_AT,
        ),
        {"small": powers(1, 10**4, 1), "full": powers(1, 10**6, 1), "cuda": powers(1, 10**6, 1)},
        [
            Line("hand", "conjugate_gradient"),
            Line("bilevel", "finite_difference"),
            Line("bilevel", "identity"),
            Line("bilevel", "conjugate_gradient"),
            Line("bilevel", "unrolled", GRAPH),
            Line("bilevel", "forward", values=HUNDRED),
            Line("betty", "neumann"),
            Line("torchopt", "conjugate_gradient"),
            Line("higher", "unrolled", GRAPH),
            Line("boat", "neumann"),
        ],
        build_outer,
        check_outer,
    ),
    "tasks": Axis(
        "tasks",
        "tasks of a meta-batch",
        with_counts("MAML with 5 inner steps of a network of {0} and {0} units on sinusoids, 10 points a task", HIDDEN)
        | {"cuda": "MAML with 1 inner step of a conv net of 4 layers, 5-way 1-shot, 15 queries a class"},
        {"small": [1, 2, 4, 8, 16], "full": [4**k for k in range(5)], "cuda": [4**k for k in range(5)]},
        [
            Line("hand", "few_shot"),
            Line("vmap", "few_shot"),
            Line("bilevel", "few_shot"),
            Line("bilevel", "one_by_one"),
            Line("torchopt", "few_shot"),
            Line("higher", "few_shot"),
            Line("learn2learn", "few_shot"),
            Line("boat", "few_shot"),
            Line("betty", "few_shot"),
        ],
        build_tasks,
        check_tasks,
    ),
}
