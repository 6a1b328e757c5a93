"""A loader's state comes back from a checkpoint as it was: value, type and all."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bilevel.checkpoint import read_state, write_state
from bilevel.data.encoding import decode, encode
from bilevel.errors import CheckpointError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.integers(-(2**63), 2**63 - 1).map(np.int64)
    | st.floats(width=32, allow_nan=False).map(np.float32)
    | st.booleans().map(np.bool_)
)
DTYPES = hnp.integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64)) | hnp.boolean_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
TENSORS = st.sampled_from([torch.arange(3), torch.zeros(0), torch.tensor(2.5), torch.ones(2, 2).bool()])
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.binary()
VALUES = st.recursive(
    SCALARS | ARRAYS | TENSORS | st.frozensets(st.integers()) | st.sets(st.text(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray | np.generic):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(first, dict):
        return list(map(repr, first)) == list(map(repr, second)) and all(
            same(*pair) for pair in zip(first.values(), second.values(), strict=True)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("encoding") / "state"


@given(value=VALUES)
def test_a_state_comes_back_as_it_was(file, value):
    write_state(file, {"state": encode(value, "it")})
    assert same(decode(read_state(file)["state"]), value)


def test_what_is_encoded_is_a_copy():
    array, tensor = np.arange(3), torch.arange(3)
    encoded = encode({"array": array, "tensor": tensor}, "it")
    array[0], tensor[0] = 7, 7
    decoded = decode(encoded)
    assert decoded["array"].tolist() == [0, 1, 2]
    assert decoded["tensor"].tolist() == [0, 1, 2]
    decoded["array"][0] = 1  # and what comes back can be written to


class Words(str):
    """A string that would come back as another type."""


@pytest.mark.parametrize(
    "value",
    [object(), OrderedDict(a=1), Counter("a"), Words("a"), 1j, np.array([object()]), np.zeros(1, [("a", int)])],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_is_refused_with_its_place(value):
    with pytest.raises(CheckpointError, match=rf"it\.here\[1\] is a {type(value).__name__}, which"):
        encode({"here": [0, value]}, "it")


@pytest.mark.parametrize("value", [("unknown", 1), 3j, ["list"]])
def test_what_is_no_encoding_is_an_error(value):
    with pytest.raises((ValueError, TypeError)):
        decode(value)
