from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel.errors import ParameterError
from bilevel.structure import flatten
from tests.bilevel.strategies import forall

Layer = namedtuple("Layer", ["weight", "bias"])

leaves = st.integers(0, 3).map(lambda n: torch.full((n,), float(n)))
structures = st.recursive(
    leaves,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abcd"), inside, max_size=3)
        | st.tuples(inside, inside).map(lambda pair: Layer(*pair))
    ),
    max_leaves=8,
)


def tensors(structure: Any) -> list[Tensor]:
    if isinstance(structure, Tensor):
        return [structure]
    children = structure.values() if isinstance(structure, dict) else structure
    return [tensor for child in children for tensor in tensors(child)]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left is right
    if type(left) is not type(right) or len(left) != len(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return all(same(a, b) for a, b in zip(left, right, strict=True))


@forall(200, structure=structures.filter(lambda s: bool(tensors(s))))
def test_rebuilding_with_the_same_leaves_is_the_identity(structure: Any) -> None:
    flat, held = flatten(structure, "inner")
    assert same(held.rebuild(flat), structure)
    assert len({id(part) for part in flat}) == len(flat) == len(held.names)
    assert len(set(held.names)) == len(held.names)


@forall(100, structure=structures.filter(lambda s: bool(tensors(s))))
def test_leaves_are_in_the_order_of_the_structure(structure: Any) -> None:
    flat, held = flatten(structure, "inner")
    assert list(dict.fromkeys(map(id, tensors(structure)))) == [id(part) for part in flat]
    other = tuple(part + 1 for part in flat)
    assert list(dict.fromkeys(map(id, tensors(held.rebuild(other))))) == [id(part) for part in other]


def test_names_say_where_a_variable_is_held() -> None:
    x = [torch.zeros(1) for _ in range(6)]
    assert flatten(x[0], "inner")[1].names == ("inner",)
    assert flatten(x[:2], "inner")[1].names == ("[0]", "[1]")
    assert flatten({"a": x[0], "b": [x[1], {"c": x[2]}]}, "outer")[1].names == ("a", "b[0]", "b[1].c")
    assert flatten(Layer(x[0], x[1]), "inner")[1].names == ("[0]", "[1]")
    assert flatten({0: x[0], "layer.weight": x[1]}, "inner")[1].names == ("0", "layer.weight")


def test_a_tensor_in_several_places_is_one_variable() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    flat, held = flatten({"a": x, "b": [y, x]}, "inner")
    assert [part is other for part, other in zip(flat, (x, y), strict=True)] == [True, True]
    new = torch.ones(1), torch.ones(1)
    rebuilt = held.rebuild(new)
    assert rebuilt["a"] is rebuilt["b"][1] is new[0]


def test_frozen_parameters_stay_and_have_no_gradient() -> None:
    frozen, free = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    plain = torch.ones(1)  # no Parameter: a variable, whether it requires gradients or not
    flat, held = flatten([frozen, free, plain], "inner")
    assert flat[0] is free
    assert flat[1] is plain
    new = (torch.zeros(1), torch.zeros(1))
    assert held.rebuild(new)[0] is frozen
    assert held.rebuild_gradient(new)[0] is None
    assert held.rebuild_gradient(new)[1] is new[0]


def test_frozen_parameters_may_have_any_dtype() -> None:
    # A quantised, frozen base weight is no reason to refuse a state.
    quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    flat, held = flatten({"base": quantised, "adapter": torch.ones(2)}, "inner")
    assert held.names == ("adapter",)
    assert held.rebuild(flat)["base"] is quantised


def test_what_modules_give_can_be_passed_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert len(flatten(module.parameters(), "inner")[0]) == 4
    flat, held = flatten(dict(module.named_parameters()), "inner")
    assert held.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert list(held.rebuild(flat)) == list(held.names)
    parts = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    assert isinstance(flatten(nn.ParameterList(parts), "inner")[1].rebuild(parts), tuple)
    assert flatten(nn.ParameterDict({"a": parts[0]}), "inner")[1].rebuild(parts[:1]) == {"a": parts[0]}
    assert list(flatten(OrderedDict(b=parts[0], a=parts[1]), "inner")[1].rebuild(parts)) == ["b", "a"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "inner parameters hold no tensor to differentiate"),
        ({}, "hold no tensor"),
        ([nn.Parameter(torch.ones(1), requires_grad=False)], "at least one tensor that is not a frozen nn.Parameter"),
        ([torch.ones(1), 2.0], "[1] is a float"),
        ("weights", "the argument is a str"),
        (None, "the argument is a NoneType"),
        (nn.Linear(1, 1), "the argument is a Linear"),
        ({"a": {"b": nn.Linear(1, 1)}}, "a.b is a Linear"),
        ({"steps": torch.tensor(3)}, "inner parameter 'steps' has dtype torch.int64; real floating point is needed"),
    ],
)
def test_what_is_no_structure_of_tensors_is_refused(params: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(message)):
        flatten(params, "inner")
