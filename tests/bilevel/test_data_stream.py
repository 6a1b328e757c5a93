"""Batches: endless, reproducible, and independent of what the losses draw."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from bilevel.data import BatchStream
from bilevel.errors import CheckpointError, DataError


def loader(**settings) -> DataLoader:
    return DataLoader(torch.arange(10), **{"batch_size": 3, "shuffle": True, **settings})


def take(stream: BatchStream, count: int) -> list[list[int]]:
    return [stream.next().tolist() for _ in range(count)]


def test_epochs_follow_each_other_and_each_holds_every_example():
    stream = BatchStream(loader(), "p", 0)
    batches = take(stream, 8)
    for epoch in (batches[:4], batches[4:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(10))
    assert batches[:4] != batches[4:]


def test_the_order_depends_on_the_seed_and_the_name_and_on_nothing_else():
    def order(name: str, seed: int, global_seed: int) -> list[list[int]]:
        torch.manual_seed(global_seed)
        stream = BatchStream(loader(), name, seed)
        batches = []
        for _ in range(6):
            torch.rand(global_seed + 1)  # a loss that draws
            batches.append(stream.next().tolist())
        return batches

    assert order("p", 0, 1) == order("p", 0, 2)
    assert order("p", 0, 1) != order("p", 1, 1)
    assert order("p", 0, 1) != order("q", 0, 1)


def test_drawing_a_batch_leaves_the_global_generators_alone():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.rand(1).item(), random.random(), float(np.random.rand())

    stream = BatchStream(DataLoader(Noisy(), batch_size=2, shuffle=True), "p", 0)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = [stream.next() for _ in range(4)]
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]
    again = BatchStream(DataLoader(Noisy(), batch_size=2, shuffle=True), "p", 0)
    assert [[t.tolist() for t in batch] for batch in first] == [[t.tolist() for t in again.next()] for _ in range(4)]


def test_looking_ahead_changes_nothing():
    plain, peeked = BatchStream(loader(), "p", 0), BatchStream(loader(), "p", 0)
    expected = take(plain, 9)
    found = []
    for _ in range(9):
        ahead = peeked.peek()
        assert peeked.peek() is ahead
        found.append(peeked.next().tolist())
    assert found == expected


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 9])
@pytest.mark.parametrize(
    "make",
    [
        loader,
        lambda: loader(generator=torch.Generator().manual_seed(5)),
        lambda: loader(shuffle=False, sampler=RandomSampler(range(10), generator=torch.Generator().manual_seed(5))),
        lambda: loader(num_workers=1),
        lambda: [torch.tensor([1]), torch.tensor([2]), torch.tensor([3])],
    ],
    ids=["loader", "generator", "sampler", "worker", "list"],
)
def test_a_saved_position_is_found_again(make, taken):
    stream = BatchStream(make(), "p", 3)
    take(stream, taken)
    state = stream.state_dict()
    expected = take(stream, 7)
    resumed = BatchStream(make(), "p", 99)
    resumed.load_state_dict(state)
    assert take(resumed, 7) == expected


def test_what_cannot_be_restored_says_so():
    stream = BatchStream(loader(), "p", 0)
    take(stream, 3)
    state = stream.state_dict()
    with pytest.raises(CheckpointError, match="is an iterator"):
        BatchStream(iter([1, 2, 3, 4]), "p", 0).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has fewer batches"):
        BatchStream([1, 2], "p", 0).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "taken": 1, "random": {}}, {"epoch": None}], ids=str)
def test_what_is_no_position_is_refused(state):
    stream, plain = BatchStream(loader(), "p", 0), BatchStream(loader(), "p", 0)
    take(stream, 2)
    with pytest.raises(CheckpointError, match="no position of the data of problem 'p'"):
        stream.load_state_dict(state)
    assert take(stream, 6) == take(plain, 8)[2:]


def test_a_position_that_cannot_be_reached_leaves_the_stream_where_it_was():
    far = BatchStream(loader(batch_size=1), "p", 1)
    take(far, 9)
    stream, plain = BatchStream(loader(), "p", 0), BatchStream(loader(), "p", 0)
    take(stream, 2)
    stream.peek()
    with pytest.raises(CheckpointError, match="has fewer batches"):
        stream.load_state_dict(far.state_dict())
    assert stream.drawn == 2
    assert take(stream, 6) == take(plain, 8)[2:]


def test_an_iterator_that_nothing_was_drawn_from_can_be_loaded():
    saved, stream = BatchStream(iter([1, 2]), "p", 0), BatchStream(iter([1, 2]), "p", 0)
    saved.peek()
    stream.peek()
    stream.load_state_dict(saved.state_dict())
    assert [stream.next(), stream.next()] == [1, 2]
    with pytest.raises(CheckpointError, match="is an iterator"):
        stream.load_state_dict(saved.state_dict())


def test_a_problem_without_data_has_none_as_its_batch():
    stream = BatchStream(None, "p", 0)
    assert stream.next() is None
    assert stream.peek() is None
    assert not stream.has_data
    with pytest.raises(DataError, match="not int"):
        BatchStream(3, "p", 0)
