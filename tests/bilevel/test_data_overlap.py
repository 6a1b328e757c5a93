"""Which examples two sources share: a set operation on indices, never a look at the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from bilevel.data.indexed import Indexed
from bilevel.data.overlap import shared_examples, shared_indices
from bilevel.errors import DataError

SIZE = 12


class Unread(Dataset[Any]):
    """A data set that fails when it is read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        raise AssertionError("iterated")


class Own(Sampler[int]):
    def __iter__(self) -> Any:
        raise AssertionError("iterated")

    def __len__(self) -> int:
        return 3


indices = st.lists(st.integers(0, SIZE - 1), max_size=SIZE)


@given(first=indices, second=indices, form=st.sampled_from([list, torch.tensor, np.array, tuple]))
def test_subsets_share_the_intersection(first: list[int], second: list[int], form: Any) -> None:
    data = Unread()
    expected = sorted(set(first) & set(second))
    one, other = (form(part) if part else part for part in (first, second))
    assert shared_indices(Subset(data, one), Subset(data, other)) == expected
    if first and second:
        loaders = DataLoader(Subset(data, one), batch_size=2, shuffle=True), DataLoader(Subset(data, other))
        assert shared_indices(*loaders) == expected
        loaders = (DataLoader(data, sampler=SubsetRandomSampler(part)) for part in (first, second))
        assert shared_indices(*loaders) == expected


@given(first=indices.filter(bool), second=indices.filter(bool), data=st.data())
def test_subsets_of_subsets_are_followed(first: list[int], second: list[int], data: Any) -> None:
    base = Unread()
    places = data.draw(st.lists(st.integers(-len(first), len(first) - 1), min_size=1))
    nested = Indexed(Subset(Indexed(Subset(base, first)), places))
    expected = sorted({first[place] for place in places} & set(second))
    assert shared_indices(DataLoader(nested), DataLoader(Subset(base, second))) == expected


def test_a_whole_data_set_shares_all_that_the_other_has() -> None:
    data = Unread()
    assert shared_indices(DataLoader(data, shuffle=True), DataLoader(data)) == list(range(SIZE))
    assert shared_indices(data, DataLoader(Subset(data, [3, -1]))) == [3, SIZE - 1]
    assert shared_indices(DataLoader(data, batch_size=None), data) == list(range(SIZE))


class Corpus(Dataset[Any]):
    """A data set whose indices fit into no memory."""

    def __len__(self) -> int:
        return 10**15

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read")


def test_of_data_sets_of_any_size_no_more_is_written_out_than_is_asked_for() -> None:
    one, other = Corpus(), Corpus()
    assert shared_indices(DataLoader(one), DataLoader(other)) is None
    parts = Subset(one, range(10**14)), Subset(one, range(10**14 - 2, 10**15))  # type: ignore[arg-type]
    assert shared_indices(DataLoader(parts[0]), DataLoader(parts[1])) == [10**14 - 2, 10**14 - 1]
    assert shared_indices(DataLoader(one), Subset(one, [-1, 5, 5])) == [5, 10**15 - 1]
    assert shared_indices(Subset(parts[1], [-1, 0, 1]), Subset(one, [10**14 - 2, 10**15 - 1])) == [
        10**14 - 2,
        10**15 - 1,
    ]
    assert shared_indices(Subset(parts[0], [10**14]), one) is None
    both = ConcatDataset([other, Indexed(one)])
    assert shared_indices(both, Subset(one, [7, 3])) == [3, 7]
    assert shared_indices(Subset(both, [10**15 + 4]), one) == [4]
    found = shared_examples(DataLoader(one), DataLoader(one))
    assert found == range(10**15)


def test_random_splits_are_apart() -> None:
    parts = random_split(Unread(), [7, 5])
    assert shared_indices(*(DataLoader(part) for part in parts)) == []


def test_samplers_say_what_they_draw() -> None:
    data = Unread()
    weighted = WeightedRandomSampler([0.0, 1.0, 0.0, 2.0], 10)
    assert shared_indices(DataLoader(data, sampler=weighted), DataLoader(Subset(data, [0, 1, 2, 3]))) == [1, 3]
    batched = BatchSampler(SubsetRandomSampler([4, 5]), 2, drop_last=False)
    assert shared_indices(DataLoader(data, batch_sampler=batched), DataLoader(data)) == [4, 5]
    ranks = DistributedSampler(data, num_replicas=2, rank=0)  # the other rank draws the rest
    assert shared_indices(DataLoader(data, sampler=ranks), DataLoader(data)) == list(range(SIZE))


class Keyed(Dataset[Any]):
    """Examples that say which data set they are of, and where in it."""

    def __init__(self, key: int) -> None:
        self.key = key

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < 4:
            raise IndexError(index)
        return self.key, index


KEYED = [Keyed(0), Keyed(1)]


def part_of(data: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def subset(draw: Any) -> Any:
        base = draw(data)
        if draw(st.booleans()):
            start = draw(st.integers(0, len(base)))
            return Subset(base, range(start, draw(st.integers(start, len(base)))))  # type: ignore[arg-type]
        return Subset(base, draw(st.lists(st.integers(0, len(base) - 1), max_size=4)) if len(base) else [])

    return subset()


NESTED: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(KEYED),
    lambda inner: part_of(inner) | st.lists(inner, min_size=1, max_size=3).map(ConcatDataset),
    max_leaves=6,
)


@settings(max_examples=300)
@given(first=NESTED, second=NESTED)
def test_any_nesting_is_followed_to_what_is_drawn(first: Any, second: Any) -> None:
    one, other = ({source[place] for place in range(len(source))} for source in (first, second))
    shared: dict[int, list[int]] = {}
    for key, place in sorted(one & other):
        shared.setdefault(key, []).append(place)
    found = shared_indices(first, second)
    assert found in shared.values() if shared else not found


def test_parts_of_a_concatenation_are_found() -> None:
    first, second = Unread(), Unread()
    both = ConcatDataset([first, second, first])
    assert shared_indices(DataLoader(Subset(both, [1, SIZE + 2, 2 * SIZE + 3])), first) == [1, 3]
    assert shared_indices(DataLoader(Subset(both, [1, SIZE + 2])), second) == [2]
    assert shared_indices(both, Unread()) is None


@pytest.mark.parametrize(
    "other",
    [
        Unread(),  # another object: whether it holds the same examples, nothing says
        DataLoader(Stream()),
        [torch.ones(2)],
        iter([]),
        None,
        DataLoader(Unread(), sampler=Own()),
        Subset(Unread(), ["key"]),  # type: ignore[list-item]
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_cannot_be_known_is_none(other: Any) -> None:
    data = Unread()
    assert shared_indices(DataLoader(data), other) is None
    assert shared_indices(other, DataLoader(data)) is None


def test_an_own_sampler_over_the_same_data_is_not_known() -> None:
    data = Unread()
    assert shared_indices(DataLoader(data, sampler=Own()), data) is None
    own = BatchSampler(Own(), 1, drop_last=False)
    assert shared_indices(DataLoader(data, batch_sampler=own), data) is None


class Batched(TensorDataset):
    """A data set that is asked for whole batches."""

    asked = 0

    def __getitems__(self, places: list[int]) -> list[Any]:
        self.asked += 1
        return [self[place] for place in places]


@pytest.mark.parametrize("kind", [TensorDataset, Batched])
def test_indexed_examples_say_where_they_are(kind: Any) -> None:
    x, y = torch.arange(7.0) * 10, torch.arange(7) + 1
    base = kind(x, y)
    generator = torch.Generator().manual_seed(0)
    for inputs, targets, places in DataLoader(Indexed(base), batch_size=3, shuffle=True, generator=generator):
        assert torch.equal(inputs, x[places])
        assert torch.equal(targets, y[places])
    assert Indexed(base)[-1][2] == 6
    assert Indexed(Subset(base, [4, 5]))[1] == (x[5], y[5], 1)
    assert getattr(base, "asked", 3) == 3


def test_what_has_no_indices_is_refused() -> None:
    with pytest.raises(DataError, match=r"map-style data set, which a Stream is not"):
        Indexed(Stream())
    with pytest.raises(DataError, match=r"example 2 of the data set is a dict, not a tuple"):
        Indexed(StackDataset(x=torch.arange(3)))[2]
