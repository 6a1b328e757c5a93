"""The same programs under betty-ml 0.2.1 and here: equal to rounding, wherever Betty is right."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bilevel.strategies import forall
from tests.interop.betty_programs import (
    BETTY,
    OURS,
    SMALL,
    STRUCTURES,
    Entry,
    Level,
    Program,
    assert_same,
    build,
    namespace,
    numbers_of,
    play,
)

pytest.importorskip("betty.problems")  # imports what warns

# Schedulers count batches, so that with accumulation they move before the first update.
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

DIFFERENCES, DERIVATIVES = 1e-9, 1e-11
"""Relative errors: of programs that take differences of gradients, and of all others."""


def happened(root: str, program: Program) -> list[Entry]:
    """What happens in a program, its lines on stdout aside."""
    with redirect_stdout(io.StringIO()):
        trace = play(root, program)
    if program.drive == "by hand":  # Betty's number of iterations moves in run() only
        trace = [without_iteration(entry) for entry in trace]
    return trace


def without_iteration(entry: Entry) -> Entry:
    if entry.hook != "log":
        return entry
    count, _, *names = entry.counts
    return entry._replace(counts=(count, None, *names))


def tolerance(program: Program) -> float:
    types = [program.level(name).config.get("type", "darts") for name in STRUCTURES[program.structure].methods]
    return DIFFERENCES if any(kind in ("darts", "sama", "betty:darts", "betty:sama") for kind in types) else DERIVATIVES


def agree(program: Program) -> list[Entry]:
    """Runs a program under both, and returns the trace that is the same."""
    expected = happened(BETTY, program)
    assert_same(happened(OURS, program), expected, tolerance(program))
    return expected


METHODS: Mapping[str, Mapping[str, Any]] = {
    "darts": {"type": "darts"},
    "darts, short": {"type": "darts", "darts_alpha": 0.001},
    "neumann": {"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.3},
    "neumann, one summand": {"type": "neumann", "neumann_iterations": 0, "neumann_alpha": 0.5},
    "cg": {"type": "cg"},
}


def two(low: Mapping[str, Any] | None = None, top: Mapping[str, Any] | None = None, **fields: Any) -> Program:
    """Two levels with these fields of their configurations."""
    return Program(levels={"low": Level(low or {}), "top": Level(top or {})}, **fields)


NEUMANN, CG = METHODS["neumann"], METHODS["cg"]
CHAIN = Program("chain", iterations=25)

FEATURES: Mapping[str, Program] = {
    **{f"method {name}": two({**fields, "unroll_steps": 2}, iterations=11) for name, fields in METHODS.items()},
    **{
        f"optimizer {name}": two({**NEUMANN}).having("low", optimizer=name).having("top", optimizer=name)
        for name in ("momentum", "nesterov", "adam", "adamw", "rmsprop")
    },
    **{
        f"scheduler {name}": two({**CG, "unroll_steps": 2}).having("low", scheduler=name).having("top", scheduler=name)
        for name in ("steps", "cosine", "lambda")
    },
    "accumulation": two(
        {**NEUMANN, "gradient_accumulation": 2, "unroll_steps": 2}, {"gradient_accumulation": 3}
    ).having("low", optimizer="momentum", scheduler="steps"),
    "clipping": two({**NEUMANN, "gradient_clipping": 0.1}, {"gradient_clipping": 0.01}),
    "clipping a sum": two({**CG, "gradient_accumulation": 3, "gradient_clipping": 0.1}, iterations=20),
    "warm-up": two({**NEUMANN, "warmup_steps": 5, "unroll_steps": 3}, iterations=20),
    "warm-up to a multiple": two({**NEUMANN, "warmup_steps": 6, "unroll_steps": 3}, {"log_step": 1}, iterations=20),
    "roll back": two({**NEUMANN, "unroll_steps": 3}, roll_back=True, iterations=14).having(
        "low", optimizer="momentum", scheduler="steps"
    ),
    "roll back, darts": two({"unroll_steps": 2, "log_step": 1}, roll_back=True).having("low", optimizer="adam"),
    "log": two({**CG, "log_step": 2, "log_local_step": True}, {"log_step": 3}),
    "two loaders": two({**CG, "unroll_steps": 3}, iterations=30)
    .having("low", batches="two")
    .having("top", batches="two"),
    "mappings": two({**CG}).having("low", batches="dicts").having("top", batches="dicts"),
    "groups": two({**CG}).having("low", groups=True, scheduler="steps").having("top", groups=True, optimizer="adam"),
    "restricted": two({**NEUMANN}).having("low", restricted=True).having("top", restricted=True),
    "restricted, darts": two({}).having("low", restricted=True, optimizer="momentum"),
    "own step": two({**NEUMANN, "gradient_clipping": 0.3}).having("low", own_step=True).having("top", own_step=True),
    "direct": two({**NEUMANN}).having("top", direct=True),
    "by hand": two({**NEUMANN, "log_step": 2}, drive="by hand"),
    "run twice": two({**NEUMANN, "unroll_steps": 5, "log_step": 4}, drive="run twice"),
    "two below": Program("two below", iterations=20)
    .having("low", config={**CG, "unroll_steps": 2})
    .having("other", config={**NEUMANN, "unroll_steps": 2}),
    "two below, out of step": Program("two below", iterations=20)
    .having("low", config={**CG, "unroll_steps": 2, "log_step": 2})
    .having("other", config={**NEUMANN, "unroll_steps": 3}),
    "two below, out of step with accumulation": Program("two below", iterations=30)
    .having("low", config={**CG, "unroll_steps": 3, "gradient_accumulation": 2})
    .having("other", config={**NEUMANN, "unroll_steps": 2}),
    "two above": Program("two above", iterations=20)
    .having("low", config={**CG, "unroll_steps": 2})
    .having("top", config={"gradient_accumulation": 2})
    .having("side", direct=True, optimizer="adam"),
    "chain": CHAIN.having("low", config={"unroll_steps": 2}).having("middle", config={**CG, "unroll_steps": 2}),
    "chain with accumulation": CHAIN.having(
        "low", config={**NEUMANN, "unroll_steps": 2, "gradient_accumulation": 2}
    ).having("middle", config={**CG, "unroll_steps": 2}, optimizer="momentum"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_bettys(feature: str) -> None:
    trace = agree(FEATURES[feature])
    hypergradients = list(numbers_of(trace, "top", "grad_callback"))
    assert len(hypergradients) >= 2
    assert all(float(torch.cat([part.flatten() for part in each]).norm()) > SMALL for each in hypergradients)


def test_every_hook_is_seen() -> None:
    trace = agree(two({**NEUMANN, "unroll_steps": 2, "log_step": 3}, {"log_step": 1}))
    hooks = {(entry.problem, entry.hook) for entry in trace}
    names = ("on_inner_loop_start", "grad_callback", "param_callback", "epoch_callback", "log", "end")
    assert hooks == {(name, hook) for name in ("low", "top") for hook in names} | {("engine", "validation")}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_graph_is_bettys(structure: str) -> None:
    def described(root: str) -> dict[str, Any]:
        with redirect_stdout(io.StringIO()):
            engine, _ = build(root, Program(structure))
        names = lambda several: [problem.name for problem in several]  # noqa: E731
        each = {
            problem.name: (
                names(problem.parents),
                names(problem.children),
                list(map(names, problem.paths)),
                bool(problem.leaf),
                problem.count,
            )
            for problem in engine.problems
        }
        return {"leaves": names(engine.leaves), **each}

    assert described(OURS) == described(BETTY)


def test_lines_are_bettys(capsys: pytest.CaptureFixture[str]) -> None:
    program = two({**CG, "unroll_steps": 2, "log_step": 3}, {"log_step": 1})

    def run(root: str) -> None:
        engine, _ = build(root, program)
        for problem in engine.problems:  # the program's own log() out of the way
            problem.log = partial(namespace(root).ImplicitProblem.log, problem)
        engine.run()

    logger, lines = logging.getLogger("betty"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    importlib.import_module("betty.logging.logger_base").get_logger()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)  # other tests have silenced it
    try:
        run(BETTY)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    capsys.readouterr()
    run(OURS)
    text = capsys.readouterr().out
    ours = [re.sub(r"^(\[[^\]]*\] ){2}", "", line) for line in text.splitlines()]
    told = [line for line in lines if line.startswith(("[Problem", "[Validation"))]
    assert len(told) > 8
    assert [rounded(line) for line in ours if line.startswith(("[Problem", "[Validation"))] == list(map(rounded, told))


def rounded(line: str) -> str:
    return re.sub(r"\d+\.\d+(e-\d+)?", lambda match: f"{float(match[0]):.10e}", line)


@st.composite
def levels(draw: st.DrawFn, *, below: bool, methods: Sequence[Mapping[str, Any]], plain: bool) -> Level:
    """One problem's settings; ``plain`` where it is rolled back, which Betty does without accumulation and warm-up."""
    config: dict[str, Any] = {}
    restricted = groups = False
    if methods:
        config |= draw(st.sampled_from(methods))
        config["unroll_steps"] = draw(st.integers(1, 3))
        config["warmup_steps"] = 0 if plain else draw(st.sampled_from([0, 0, 1, 4]))
    config["gradient_accumulation"] = 1 if plain else draw(st.sampled_from([1, 1, 2, 3]))
    config["gradient_clipping"] = draw(st.sampled_from([0.0, 0.02, 0.4]))
    config["log_step"] = draw(st.sampled_from([-1, 0, 1, 2, 5]))
    shape = draw(st.sampled_from(["whole", "groups", "restricted"]))
    # Betty's cg takes Hessian products with all parameters, and crashes where fewer are trained.
    restricted = shape == "restricted" and config.get("type") != "cg"
    groups = shape == "groups"
    # Betty makes a scheduler anew with as many functions as the optimiser had groups before param_groups().
    schedulers = ["none", "steps", "cosine"] + ([] if groups else ["lambda"])
    return Level(
        config,
        optimizer=draw(st.sampled_from(["sgd", "momentum", "nesterov", "adam", "adamw"])),
        scheduler=draw(st.sampled_from(schedulers)),
        batches=draw(st.sampled_from(["pairs", "dicts", "two"])),
        groups=groups,
        restricted=restricted,
        own_step=draw(st.sampled_from([False, False, True])),
        direct=below and draw(st.booleans()),
    )


@st.composite
def programs(draw: st.DrawFn, methods: Sequence[Mapping[str, Any]] = tuple(METHODS.values())) -> Program:
    structure = draw(st.sampled_from(list(STRUCTURES)))
    roll_back = structure == "two levels" and draw(st.booleans())
    shape = STRUCTURES[structure]

    def level(name: str) -> Level:
        inner = name in shape.methods
        own = methods if inner else ()
        return draw(levels(below=name in shape.below, methods=own, plain=inner and roll_back))

    return Program(
        structure,
        {name: level(name) for name in shape.names},
        iterations=draw(st.integers(5, 30)),
        valid_step=draw(st.integers(2, 9)),
        roll_back=roll_back,
        drive=draw(st.sampled_from(["run", "run twice", "by hand"])),
        seed=draw(st.integers(0, 1000)),
    )


@forall(30, program=programs())
def test_programs_agree(program: Program) -> None:
    agree(program)


WRONG_HERE: Sequence[Mapping[str, Any]] = (
    {"type": "cg", "cg_iterations": 3},
    {"type": "cg", "cg_iterations": 2, "cg_alpha": 0.5},
)


def by_bettys_functions(program: Program) -> Program:
    """The same with Betty's own hypergradient functions."""
    for name in STRUCTURES[program.structure].methods:
        config = program.level(name).config
        program = program.having(name, config={**config, "type": f"betty:{config['type']}"})
    return program


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@forall(10, program=programs(methods=(*METHODS.values(), *WRONG_HERE)))
def test_programs_with_bettys_own_functions_agree(program: Program) -> None:
    assert_same(happened(OURS, by_bettys_functions(program)), happened(BETTY, program), DIFFERENCES)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=2000, database=None)
@given(program=programs())
def test_many_programs_agree(program: Program) -> None:
    agree(program)
