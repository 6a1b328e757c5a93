"""Who steps when: the order of the real Betty's steps, and the clock as a function of the number of iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem
from bilevel.interop.betty.clock import Clock, Pace, Turn
from bilevel.interop.betty.dependencies import declared
from tests.bilevel.strategies import forall

Names = Mapping[str, Sequence[str]]
Settings = Mapping[str, Mapping[str, int]]
"""By problem, ``unroll_steps``, ``gradient_accumulation`` and ``warmup_steps``."""


def above(name: str, l2u: Names) -> set[str]:
    return set().union(*({upper} | above(upper, l2u) for upper in l2u.get(name, ())))


@st.composite
def programs(draw: Any) -> tuple[list[str], dict[str, list[str]], dict[str, dict[str, int]], int]:
    """A graph in which every problem but some tops has one above it, periods and warm-ups, and iterations."""
    ranked = [f"p{place}" for place in range(draw(st.integers(2, 5)))]
    tops = draw(st.integers(1, len(ranked) - 1))
    l2u: dict[str, list[str]] = {}
    for place, low in enumerate(ranked[tops:], tops):
        uppers = draw(st.permutations(ranked[:place]))
        l2u[low] = uppers[: draw(st.integers(1, min(place, 2)))]
    used = {upper for uppers in l2u.values() for upper in uppers} | set(l2u)
    names = draw(st.permutations([name for name in ranked if name in used]))
    small = st.integers(1, 3)
    settings = {
        name: {
            "unroll_steps": draw(small),
            "gradient_accumulation": draw(small),
            "warmup_steps": draw(st.sampled_from([0, 0, 1, 2, 3, 5, 6])),
        }
        for name in names
    }
    order = draw(st.permutations(list(l2u)))
    return names, {low: l2u[low] for low in order}, settings, draw(st.integers(1, 30))


def u2l_of(names: Sequence[str], l2u: Names) -> dict[str, list[str]]:
    """Every problem is differentiated through all below it."""
    lowers: dict[str, list[str]] = {name: [low for low in names if name in above(low, l2u)] for name in names}
    return {name: several for name, several in lowers.items() if several}


def clock_of(names: Sequence[str], l2u: Names, settings: Settings) -> Clock:
    known: dict[str, Any] = {name: ImplicitProblem(name, Config()) for name in names}
    edges = {
        kind: {known[key]: [known[value] for value in values] for key, values in given.items()}
        for kind, given in (("u2l", u2l_of(names, l2u)), ("l2u", l2u))
    }
    paces = {
        name: Pace(each["unroll_steps"] * each["gradient_accumulation"], each["warmup_steps"])
        for name, each in settings.items()
    }
    return Clock(declared(list(known.values()), edges), paces)


def steps(clock: Clock, iterations: int) -> list[list[tuple[str, int] | str]]:
    """By iteration, the problems that begin an inner loop, and the steps as problem and count."""
    several: list[list[tuple[str, int] | str]] = []
    for _ in range(iterations):
        one: list[tuple[str, int] | str] = []
        for turn in clock.tick():
            one += [*([turn.name] if turn.place == 0 else []), (turn.name, turn.count)]
        several.append(one)
    return several


# The real Betty


def bettys_steps(
    names: Sequence[str], l2u: Names, settings: Settings, iterations: int
) -> list[list[tuple[str, int] | str]]:
    """What the real Betty's engine does, of which only the training itself is taken out."""
    engine_module, problem_module = pytest.importorskip("betty.engine"), pytest.importorskip("betty.problems")
    configs = pytest.importorskip("betty.configs")
    seen: list[tuple[str, int] | str] = []

    class Recorder(problem_module.ImplicitProblem):  # type: ignore[misc, name-defined]
        def on_inner_loop_start(self) -> None:
            seen.append(self.name)

        def one_step_descent(self, batch: Any = None) -> dict[str, float]:
            seen.append((self.name, self.count))
            return {"loss": 0.0}

    known: dict[str, Any] = {}
    for name in names:
        module = nn.Linear(1, 1)
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        known[name] = Recorder(name, configs.Config(**settings[name]), module, sgd, train_data_loader=[(0,)])
    edges = {
        kind: {known[key]: [known[value] for value in values] for key, values in given.items()}
        for kind, given in (("u2l", u2l_of(names, l2u)), ("l2u", l2u))
    }
    engine = engine_module.Engine(list(known.values()), configs.EngineConfig(strategy="cpu"), edges)
    engine.train()
    several = []
    for _ in range(iterations):
        seen.clear()
        engine.global_step += 1
        engine.train_step()
        several.append(list(seen))
    return several


@forall(40, program=programs())
def test_steps_have_bettys_order_and_counts(program: Any) -> None:
    names, l2u, settings, iterations = program
    assert steps(clock_of(names, l2u, settings), iterations) == bettys_steps(names, l2u, settings, iterations)


CHAIN: dict[str, list[str]] = {"bottom": ["middle"], "middle": ["top"]}
DIAMOND: dict[str, list[str]] = {"bottom": ["left", "right"], "left": ["top"], "right": ["top"]}
VEE: dict[str, list[str]] = {"first": ["top"], "second": ["top"]}
SHARED: dict[str, list[str]] = {"bottom": ["first", "second"]}

PLAIN = {"unroll_steps": 1, "gradient_accumulation": 1, "warmup_steps": 0, "retain_graph": True}


def paces(**several: Mapping[str, int]) -> dict[str, dict[str, int]]:
    return {name: {**PLAIN, **each} for name, each in several.items()}


@pytest.mark.parametrize(
    ("l2u", "settings"),
    [
        (
            CHAIN,
            paces(
                top={},
                middle={"unroll_steps": 2, "gradient_accumulation": 3, "warmup_steps": 7},
                bottom={"unroll_steps": 2, "warmup_steps": 3},
            ),
        ),
        (
            DIAMOND,
            paces(top={}, left={"unroll_steps": 2}, right={"unroll_steps": 3}, bottom={"gradient_accumulation": 2}),
        ),
        (VEE, paces(top={"gradient_accumulation": 2}, first={"unroll_steps": 4, "warmup_steps": 8}, second={})),
        (SHARED, paces(first={}, second={"unroll_steps": 2}, bottom={"unroll_steps": 3, "warmup_steps": 3})),
    ],
    ids=["chain", "diamond", "vee", "shared"],
)
def test_known_graphs_in_every_order(l2u: dict[str, list[str]], settings: dict[str, dict[str, int]]) -> None:
    for names in (list(settings), list(settings)[::-1]):
        for edges in (l2u, dict(reversed(l2u.items())), {low: uppers[::-1] for low, uppers in l2u.items()}):
            assert steps(clock_of(names, edges, settings), 60) == bettys_steps(names, edges, settings, 60)


def test_two_levels_by_hand() -> None:
    """A period of 2 · 2 iterations and 5 of warm-up: the problem above steps after 8, 12, …"""
    clock = clock_of(
        ["outer", "inner"],
        {"inner": ["outer"]},
        paces(outer={}, inner={"unroll_steps": 2, "gradient_accumulation": 2, "warmup_steps": 5}),
    )
    whole = steps(clock, 12)
    assert [place for place, each in enumerate(whole, 1) if ("outer", 1) in each or ("outer", 2) in each] == [8, 12]
    assert whole[0] == ["inner", ("inner", 1)]
    assert whole[7] == [("inner", 8), "outer", ("outer", 1)]
    assert whole[8] == ["inner", ("inner", 9)]


# A function of the number of iterations


def state(clock: Clock) -> dict[str, Any]:
    return {**{name: part for name, part in vars(clock).items() if name not in ("_graph", "_paces")}}


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return set(value) if isinstance(value, set) else value


@forall(30, program=programs(), targets=st.lists(st.integers(0, 20), min_size=1, max_size=4), turns=st.integers(0, 5))
def test_where_the_clock_stands_does_not_depend_on_how_it_came_there(
    program: Any, targets: list[int], turns: int
) -> None:
    """Forwards, backwards, and out of an iteration that was broken off after some of its turns."""
    names, l2u, settings, _ = program
    clock, straight = clock_of(names, l2u, settings), clock_of(names, l2u, settings)
    states = [copied(state(straight))]
    for _ in range(max(targets) + 1):
        steps(straight, 1)
        states.append(copied(state(straight)))
    for target in targets:
        clock.move_to(target)
        assert copied(state(clock)) == states[target]
        broken = clock.tick()
        taken = [turn for turn, _ in zip(broken, range(turns), strict=False)]
        assert len(taken) <= turns
        clock.move_to(target)
        assert copied(state(clock)) == states[target]
    last = targets[-1]
    clock.move_to(last)
    again = clock_of(names, l2u, settings)
    assert steps(clock, 3) == steps(again, last + 3)[last:]


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_an_iteration_that_is_broken_off_does_not_count(turns: int) -> None:
    clock = clock_of(["top", "middle", "bottom"], CHAIN, paces(top={}, middle={}, bottom={}))
    clock.move_to(4)
    broken = clock.tick()
    for _ in range(turns):
        next(broken)
    assert clock.iteration == 4
    broken.close()
    clock.move_to(4)
    assert clock.counts == {"top": 4, "middle": 4, "bottom": 4}
    assert [turn.count for turn in clock.tick()] == [5, 5, 5]


def test_the_last_turn_alone_does_not_make_an_iteration() -> None:
    """The iterator has to be exhausted: what follows the last turn may still fail."""
    clock = clock_of(["outer", "inner"], {"inner": ["outer"]}, paces(outer={}, inner={}))
    ticking = clock.tick()
    assert [next(ticking).name, next(ticking).name] == ["inner", "outer"]
    assert clock.iteration == 0
    assert next(ticking, None) is None
    assert clock.iteration == 1


# Inner loops


@forall(40, program=programs())
def test_loops_are_as_long_as_the_clock_says(program: Any) -> None:
    """Each loop has the length that all its turns are told, of which a period at its end is behind the warm-up."""
    names, l2u, settings, _ = program
    clock = clock_of(names, l2u, settings)
    loops: dict[str, list[list[tuple[Turn, tuple[int, int]]]]] = {name: [] for name in names}
    for _ in range(60):
        for turn in clock.tick():
            if turn.place == 0:
                loops[turn.name].append([])
            assert turn.place == len(loops[turn.name][-1])
            loops[turn.name][-1].append((turn, clock.loop(turn)))
    opened = clock.open_loops()
    for name, several in loops.items():
        period = settings[name]["unroll_steps"] * settings[name]["gradient_accumulation"]
        warmup = settings[name]["warmup_steps"]
        for number, loop in enumerate(several):
            told = {length for _, length in loop}
            assert len(told) == 1, "all turns of a loop are told the same"
            ((length, free),) = told
            assert free == period
            complete = number < len(several) - 1 or name not in opened
            assert len(loop) == length if complete else len(loop) < length
            first = loop[0][0].count
            assert length == period if number else first == 1
            if complete:
                assert loop[-1][0].count > warmup
                assert loop[-1][0].count - period <= warmup or number > 0


def test_open_loops() -> None:
    clock = clock_of(["outer", "inner"], {"inner": ["outer"]}, paces(outer={}, inner={"unroll_steps": 3}))
    opened = []
    for _ in range(6):
        steps(clock, 1)
        opened.append(clock.open_loops())
    assert opened == [["inner"], ["inner"], [], ["inner"], ["inner"], []]


def test_children_of_a_problem() -> None:
    clock = clock_of(["bottom", "left", "right", "top"], DIAMOND, paces(top={}, left={}, right={}, bottom={}))
    assert clock.children("top") == ("left", "right")
    assert clock.children("bottom") == ()


# In an engine


class Follower(ImplicitProblem):
    """``‖w − Σ w_other‖²`` over the problems that it uses; records its callbacks."""

    def training_step(self, batch: Any) -> Tensor:
        total = sum(getattr(self, name).module.weight for name in self.cfg[0])
        return (self.module.weight - total).square().sum()

    def on_inner_loop_start(self) -> None:
        self.cfg[1].append((self.name, "start", self.count))

    def param_callback(self) -> None:
        self.cfg[1].append((self.name, "update", self.count))


def callbacks_of(problem: Any, engine_of: Any, settings: Settings, l2u: Names) -> list[Any]:
    seen: list[Any] = []
    names = list(settings)
    known = {}
    for name in names:
        module = nn.Linear(1, 1, bias=False)
        sgd = torch.optim.SGD(module.parameters(), lr=0.01)
        others = [other for other in names if other in above(name, l2u) or name in l2u.get(other, ())]
        known[name] = problem(name, settings[name], module, sgd, (others, seen))
    edges = {
        kind: {known[key]: [known[value] for value in values] for key, values in given.items()}
        for kind, given in (("u2l", u2l_of(names, l2u)), ("l2u", l2u))
    }
    engine = engine_of(list(known.values()), edges)
    engine.run()
    return [*seen, {name: one.count for name, one in known.items()}, engine.global_step]


@pytest.mark.parametrize(
    ("l2u", "settings"),
    [
        (
            {"inner": ["outer"]},
            paces(
                outer={"gradient_accumulation": 2},
                inner={"unroll_steps": 2, "gradient_accumulation": 3, "warmup_steps": 7},
            ),
        ),
        (CHAIN, paces(top={}, middle={"unroll_steps": 2}, bottom={"unroll_steps": 2, "warmup_steps": 3})),
        (VEE, paces(top={}, first={"unroll_steps": 2}, second={"unroll_steps": 3})),
    ],
    ids=["two levels", "chain", "vee"],
)
def test_callbacks_are_called_in_bettys_order_at_bettys_counts(l2u: Names, settings: Settings) -> None:
    engine_module, problem_module = pytest.importorskip("betty.engine"), pytest.importorskip("betty.problems")
    configs = pytest.importorskip("betty.configs")
    callbacks = {name: vars(Follower)[name] for name in ("training_step", "on_inner_loop_start", "param_callback")}
    theirs = type("Theirs", (problem_module.ImplicitProblem,), callbacks)

    def run(kind: Any, config: Any, engine: Any, engine_config: Any) -> list[Any]:
        def problem(name: str, each: Any, module: nn.Module, sgd: torch.optim.Optimizer, extra: Any) -> Any:
            return kind(name, config(**each), module, sgd, train_data_loader=[(0,)], extra_config=extra)

        def engine_of(problems: Any, edges: Any) -> Any:
            return engine(problems, engine_config(train_iters=26, strategy="cpu"), edges)

        return callbacks_of(problem, engine_of, settings, l2u)

    ours = run(Follower, Config, Engine, EngineConfig)
    assert len(ours) > 15
    assert ours == run(theirs, configs.Config, engine_module.Engine, configs.EngineConfig)
