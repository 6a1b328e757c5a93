"""Who is over whom: Betty's reading of ``u2l`` and ``l2u``, and an error by name where it cannot be run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel.errors import BilevelWarning, ConfigError, GraphError, UnknownNameError
from bilevel.interop.betty import Config, Engine, EngineConfig, ImplicitProblem
from bilevel.interop.betty.dependencies import Declared, declared
from tests.bilevel.strategies import forall

Names = Mapping[str, Iterable[str]]


def problems(names: Iterable[str]) -> dict[str, Any]:
    return {name: ImplicitProblem(name, Config()) for name in names}


def read(names: Sequence[str], u2l: Names, l2u: Names) -> Declared:
    """Reads a declaration that is given by names."""
    known = problems(names)

    def edges(given: Names) -> dict[Any, list[Any]]:
        return {known[key]: [known[value] for value in values] for key, values in given.items()}

    return declared(list(known.values()), {"u2l": edges(u2l), "l2u": edges(l2u)})


# The same reading


def bettys(names: Sequence[str], u2l: Names, l2u: Names) -> dict[str, Any]:
    """What the real Betty makes of a declaration, by names."""
    engine_module, problem_module = pytest.importorskip("betty.engine"), pytest.importorskip("betty.problems")
    configs = pytest.importorskip("betty.configs")
    known = {name: problem_module.ImplicitProblem(name, configs.Config()) for name in names}
    engine = object.__new__(engine_module.Engine)  # what follows is all that its parsing needs
    engine.problems, engine.leaves = list(known.values()), []
    engine.dependencies = {
        kind: {known[key]: [known[value] for value in values] for key, values in given.items()}
        for kind, given in (("u2l", u2l), ("l2u", l2u))
    }
    engine.parse_dependency()

    def shown(several: Iterable[Any]) -> tuple[str, ...]:
        return tuple(problem.name for problem in several)

    return {
        "leaves": shown(engine.leaves),
        "parents": {name: shown(problem.parents) for name, problem in known.items()},
        "children": {name: shown(problem.children) for name, problem in known.items()},
        "paths": {name: tuple(map(shown, problem.paths)) for name, problem in known.items()},
    }


def ours(graph: Declared) -> dict[str, Any]:
    return {
        "leaves": graph.leaves,
        "parents": dict(graph.parents),
        "children": dict(graph.children),
        "paths": dict(graph.paths),
    }


def above(name: str, l2u: Names) -> set[str]:
    """All problems that a chain in ``l2u`` leads to."""
    return set().union(*({upper} | above(upper, l2u) for upper in l2u.get(name, ())))


@st.composite
def graphs(draw: Any) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """A declaration without cycles, in which every edge downwards has a way up; all orders are random."""
    ranked = [f"p{place}" for place in range(draw(st.integers(2, 6)))]
    l2u: dict[str, list[str]] = {}
    u2l: dict[str, list[str]] = {}
    for low in draw(st.permutations(ranked)):
        uppers = draw(st.permutations(ranked[: ranked.index(low)]))
        l2u[low] = uppers[: draw(st.integers(0, min(len(uppers), 3)))]
    l2u = {low: uppers for low, uppers in l2u.items() if uppers or draw(st.booleans())}
    pairs = [(high, low) for low in ranked for high in sorted(above(low, l2u))]
    for high, low in draw(st.permutations(pairs)):
        if draw(st.integers(0, 3)):
            u2l.setdefault(high, []).append(low)
    return draw(st.permutations(ranked)), u2l, l2u


@forall(80, graph=graphs())
def test_a_declaration_is_read_as_betty_does(graph: Any) -> None:
    """Leaves, parents, children and paths, in Betty's order; except that a problem on no path is refused here."""
    names, u2l, l2u = graph
    expected = bettys(names, u2l, l2u)
    reached = {name for paths in expected["paths"].values() for path in paths for name in path}
    idle = [name for name in names if name not in reached]
    if idle:
        with pytest.raises(GraphError, match=f"missing dependency: no hypergradient flows to or through .*{idle[0]!r}"):
            read(names, u2l, l2u)
        return
    graph = read(names, u2l, l2u)
    assert ours(graph) == expected
    for name in names:
        assert all(graph.names.index(upper) < graph.names.index(name) for upper in graph.parents[name])
    assert sorted(graph.names) == sorted(names)


def test_two_levels() -> None:
    graph = read(["outer", "inner"], {"outer": ["inner"]}, {"inner": ["outer"]})
    assert graph.leaves == ("inner",)
    assert graph.parents == {"outer": (), "inner": ("outer",)}
    assert graph.children == {"outer": ("inner",), "inner": ()}
    assert graph.paths == {"outer": (("outer", "inner", "outer"),), "inner": ()}


def test_a_path_for_every_way_up() -> None:
    """A diamond: the top is differentiated along both sides."""
    graph = read(
        ["top", "left", "right", "leaf"],
        {"top": ["leaf"]},
        {"leaf": ["right", "left"], "left": ["top"], "right": ["top"]},
    )
    assert graph.paths["top"] == (("top", "right", "leaf", "top"), ("top", "left", "leaf", "top"))
    assert graph.names[0] == "top"
    assert graph.names[-1] == "leaf"


@pytest.mark.parametrize("order", list(itertools.permutations(["top", "middle", "leaf"])), ids="-".join)
def test_the_order_of_the_problems_does_not_matter(order: tuple[str, ...]) -> None:
    chain = ({"top": ["middle"], "middle": ["leaf"]}, {"leaf": ["middle"], "middle": ["top"]})
    assert read(order, *chain).names == ("top", "middle", "leaf")
    first, second = ours(read(order, *chain)), ours(read(["leaf", "middle", "top"], *chain))
    assert first == second


def test_what_is_named_twice_counts_once() -> None:
    """In Betty a problem twice in ``u2l`` has its hypergradient twice, and twice in ``l2u`` is an assertion."""
    once = ours(read(["outer", "inner"], {"outer": ["inner"]}, {"inner": ["outer"]}))
    assert ours(read(["outer", "inner"], {"outer": ["inner", "inner"]}, {"inner": ["outer", "outer"]})) == once


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_lists_tuples_and_sets_of_problems(kind: type) -> None:
    known = problems(["outer", "inner"])
    outer, inner = known.values()
    graph = declared([outer, inner], {"u2l": {outer: kind([inner])}, "l2u": {inner: kind([outer])}})
    assert graph.paths["outer"] == (("outer", "inner", "outer"),)


# What cannot be run


GRAPH_ERRORS: dict[str, tuple[Sequence[str], Names, Names, str]] = {
    "an edge to itself, up": (
        ["a", "b"],
        {"a": ["b"]},
        {"b": ["b", "a"]},
        r"cyclic dependency: dependencies\['l2u'\] makes 'b' depend on itself",
    ),
    "an edge to itself, down": (
        ["a", "b"],
        {"a": ["a", "b"]},
        {"b": ["a"]},
        r"cyclic dependency: dependencies\['u2l'\] makes 'a' depend on itself",
    ),
    "a cycle of two": (
        ["a", "b"],
        {"a": ["b"]},
        {"b": ["a"], "a": ["b"]},
        r"cyclic dependency: dependencies\['l2u'\] .*\(a → b → a\).*take one of these edges out",
    ),
    "a cycle of three": (
        ["a", "b", "c"],
        {"a": ["c"]},
        {"a": ["b"], "b": ["c"], "c": ["a"]},
        r"cyclic dependency: .*\(a → b → c → a\)",
    ),
    "a cycle above a chain": (
        ["a", "b", "c"],
        {"a": ["c"]},
        {"c": ["b"], "b": ["a"], "a": ["b"]},
        r"cyclic dependency: .*\((a → b → a|b → a → b)\)",
    ),
    "no way up": (
        ["outer", "inner"],
        {"outer": ["inner"]},
        {},
        r"missing dependency: .*'u2l'.* the loss of 'inner' uses .*'outer', but no chain .* Add inner: \[outer\] to it",
    ),
    "a way up to another": (
        ["a", "b", "c"],
        {"a": ["c"], "b": ["c"]},
        {"c": ["b"]},
        r"missing dependency: .*no chain in dependencies\['l2u'\] leads from 'c' up to 'a'",
    ),
    "an isolated problem": (
        ["outer", "inner", "alone"],
        {"outer": ["inner"]},
        {"inner": ["outer"]},
        r"missing dependency: no hypergradient flows to or through problem 'alone'",
    ),
    "no edge down": (
        ["outer", "inner"],
        {},
        {"inner": ["outer"]},
        r"missing dependency: no hypergradient flows to or through problem 'outer'.*dependencies\['u2l'\]",
    ),
    "no edges": (["outer", "inner"], {}, {}, "missing dependency: no hypergradient flows to or through"),
}


@pytest.mark.parametrize("case", GRAPH_ERRORS)
def test_a_structure_that_cannot_be_run_is_refused(case: str) -> None:
    names, u2l, l2u, message = GRAPH_ERRORS[case]
    with pytest.raises(GraphError, match=message):
        read(names, u2l, l2u)


@pytest.mark.parametrize("missing", ["u2l", "l2u"])
def test_both_fields_are_needed(missing: str) -> None:
    outer, inner = problems(["outer", "inner"]).values()
    whole = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    del whole[missing]
    with pytest.raises(ConfigError, match=rf"missing dependency: dependencies has no field '{missing}'.*'u2l' says"):
        declared([outer, inner], whole)


def test_an_unknown_field_lists_the_two() -> None:
    outer, inner = problems(["outer", "inner"]).values()
    with pytest.raises(UnknownNameError, match=r"field of dependencies: 'l2l'.*'l2u', 'u2l'"):
        declared([outer, inner], {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}, "l2l": {}})
    with pytest.raises(UnknownNameError, match="did you mean 'u2l'"):
        declared([outer, inner], {"U2l": {outer: [inner]}, "l2u": {inner: [outer]}})


@pytest.mark.parametrize("given", [None, [], "u2l", 3, ({}, {})], ids=repr)
def test_dependencies_of_the_wrong_kind(given: Any) -> None:
    outer, inner = problems(["outer", "inner"]).values()
    with pytest.raises(ConfigError, match="dependencies must be a mapping {'u2l': {upper: "):
        declared([outer, inner], given)


@pytest.mark.parametrize("kind", ["u2l", "l2u"])
@pytest.mark.parametrize("given", [None, [], "inner", 3], ids=repr)
def test_a_field_of_the_wrong_kind(kind: str, given: Any) -> None:
    outer, inner = problems(["outer", "inner"]).values()
    whole: dict[str, Any] = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    with pytest.raises(ConfigError, match=rf"dependencies\['{kind}'\] must be a mapping from problems to lists"):
        declared([outer, inner], {**whole, kind: given})


@pytest.mark.parametrize("kind", ["u2l", "l2u"])
def test_values_of_the_wrong_kind(kind: str) -> None:
    outer, inner = problems(["outer", "inner"]).values()
    whole: dict[str, Any] = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    key = "outer" if kind == "u2l" else "inner"
    low, high = (outer, inner) if kind == "u2l" else (inner, outer)
    for values in (high, None, "inner", 3, {high: low}):  # the first: a problem that is not in a list
        with pytest.raises(ConfigError, match=rf"dependencies\['{kind}'\]\['{key}'\] must be a list of problems, not "):
            declared([outer, inner], {**whole, kind: {low: values}})
    for stranger, shown in (("inner", "'inner'"), (None, "None"), (ImplicitProblem("third", Config()), "'third'")):
        for edges in ({low: [stranger]}, {stranger: [high]}):
            with pytest.raises(
                GraphError, match=rf"dependencies\['{kind}'\] names {shown}, which is none .*: 'outer', 'inner'"
            ):
                declared([outer, inner], {**whole, kind: edges})


def test_a_problem_of_the_same_name_is_another() -> None:
    """As when the problems were made again and the declaration was not."""
    outer, inner = problems(["outer", "inner"]).values()
    old = ImplicitProblem("inner", Config())
    with pytest.raises(GraphError, match=r"dependencies\['u2l'\] names 'inner', which is none of the engine's"):
        declared([outer, inner], {"u2l": {outer: [old]}, "l2u": {inner: [outer]}})


# Against what the losses use


class Level(ImplicitProblem):
    """``‖w − Σ w_other‖² + ‖w‖²``, over the problems that ``extra_config`` names."""

    def training_step(self, batch: Any) -> Tensor:
        others = sum(getattr(self, name).module.weight for name in self.cfg)
        return (self.module.weight - others).square().sum() + self.module.weight.square().sum()


def level(name: str, *uses: str) -> Level:
    module = nn.Linear(1, 1, bias=False)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    return Level(name, Config(type="cg"), module, sgd, train_data_loader=[(0,)], extra_config=uses)


def engine(levels: Sequence[Level], u2l: Names, l2u: Names) -> Engine:
    known = {one.name: one for one in levels}
    edges = {
        kind: {known[key]: [known[value] for value in values] for key, values in given.items()}
        for kind, given in (("u2l", u2l), ("l2u", l2u))
    }
    return Engine(levels, EngineConfig(train_iters=4), edges)


def test_dependencies_of_an_engine_may_not_be_left_out() -> None:
    """In Betty the argument has a default that nothing can be done with."""
    with pytest.raises(ConfigError, match=r"dependencies"):
        Engine([level("outer", "inner"), level("inner", "outer")], EngineConfig())


# By case: u2l, l2u, what each loss uses, the message, and the whole declaration that it asks for. Betty runs what is
# incomplete, and leaves that part of the hypergradient out.
INCOMPLETE: dict[str, tuple[Names, Names, Names, str, Names, Names]] = {
    "no way up": (
        {"a": ["c"], "b": ["c"]},
        {"c": ["a"]},
        {"a": ["c"], "b": ["c"], "c": ["a", "b"]},
        r"missing dependency: dependencies\['u2l'\] .*'c' uses .*'b', but no chain .*Add c: \[b\] to it",
        {"a": ["c"], "b": ["c"]},
        {"c": ["a", "b"]},
    ),
    "no edge at all, the other is below": (
        {"a": ["c"], "b": ["c"]},
        {"c": ["a", "b"]},
        {"a": ["c", "b"], "b": ["c"], "c": ["a", "b"]},
        r"training_step of 'a' uses the parameters of 'b', which .*\['l2u'\] with b: \[a\] if it is below.*no_grad",
        {"a": ["c"], "b": ["c"]},
        {"c": ["a", "b"], "b": ["a"]},
    ),
    "a chain up, and no edge": (
        {"a": ["c"]},
        {"c": ["b"], "b": ["a"]},
        {"a": ["b", "c"], "b": ["c"], "c": ["a"]},
        r"training_step of 'a' uses the parameters of 'c', .*complete dependencies\['l2u'\] with c: \[a\]\. If",
        {"a": ["c"]},
        {"c": ["b", "a"], "b": ["a"]},
    ),
    "a chain down, and no edge": (
        {"b": ["c"]},
        {"c": ["b"], "b": ["a"]},
        {"a": ["b"], "b": ["c"], "c": ["a", "b"]},
        "",
        {"a": ["c"], "b": ["c"]},
        {"c": ["b"], "b": ["a"]},
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_loss_that_uses_what_is_not_declared(case: str) -> None:
    """The message says what to add, and adding it helps."""
    u2l, l2u, uses, message, whole_u2l, whole_l2u = INCOMPLETE[case]

    def levels() -> list[Level]:
        return [level(name, *others) for name, others in uses.items()]

    with pytest.raises(GraphError, match=f"missing dependency: .*{message.removeprefix('missing dependency: ')}"):
        engine(levels(), u2l, l2u)
    made = engine(levels(), whole_u2l, whole_l2u)
    made.run()
    assert made.global_step == 4


def test_a_constant_needs_no_dependency() -> None:
    class Reader(Level):
        def training_step(self, batch: Any) -> Tensor:
            with torch.no_grad():
                constant = self.b.module.weight.clone()
            return super().training_step(batch) + (self.module.weight - constant).square().sum()

    first = level("a", "c")
    first.__class__ = Reader
    made = engine([first, level("b", "c"), level("c", "a", "b")], {"a": ["c"], "b": ["c"]}, {"c": ["a", "b"]})
    made.run()
    assert made.global_step == 4


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["upper first", "lower first"])
def test_fields_that_are_exchanged_are_told_by_the_losses(order: tuple[int, int]) -> None:
    """``inner`` is then the upper problem, and does not use what ``outer`` has learnt: nothing would flow."""
    levels = [level("outer", "inner"), level("inner")]
    levels[0].cfg, levels[1].cfg = ("inner",), ()
    with pytest.raises(BilevelWarning, match="'inner' is declared to use the parameters of 'outer', and does not"):
        engine([levels[place] for place in order], {"inner": ["outer"]}, {"outer": ["inner"]})


def test_engines_show_the_graph() -> None:
    made = engine([level("outer", "inner"), level("inner", "outer")], {"outer": ["inner"]}, {"inner": ["outer"]})
    outer, inner = made.problems
    assert made.leaves == [inner]
    assert (outer.children, outer.parents, outer.leaf) == ([inner], [], False)
    assert (inner.children, inner.parents, inner.leaf) == ([], [outer], True)
    assert outer.paths == [[outer, inner, outer]]
    assert inner.paths == []


def test_dependencies_cannot_be_changed() -> None:
    made = engine([level("outer", "inner"), level("inner", "outer")], {"outer": ["inner"]}, {"inner": ["outer"]})
    with pytest.raises(ConfigError, match="dependencies are fixed when the engine is made"):
        made.set_dependency({"u2l": {}, "l2u": {}})
