"""Going back: what was drawn since the mark comes again, and what is saved then is the position of the mark."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from bilevel.data import BatchStream
from bilevel.errors import DataError, UnknownNameError
from bilevel.feed import Feed


def loader(size: int = 10, **settings: Any) -> DataLoader:
    return DataLoader(torch.arange(size), batch_size=3, **{"shuffle": True, **settings})


def drawing_from_a_generator() -> DataLoader:
    """A loader whose order draws from the user's generator all through the epoch."""
    generator = torch.Generator().manual_seed(5)
    sampler = RandomSampler(range(10), replacement=True, num_samples=70, generator=generator)
    return loader(shuffle=False, sampler=sampler, generator=generator)


def distributed() -> DataLoader:
    return loader(shuffle=False, sampler=DistributedSampler(range(10), num_replicas=2, rank=1))


MAKERS = {
    "shuffled": loader,
    "one batch an epoch": lambda: loader(3),
    "generator": drawing_from_a_generator,
    "distributed": distributed,
    "list": lambda: [torch.tensor([number]) for number in range(4)],
}


def take(stream: BatchStream, count: int) -> list[list[int]]:
    return [stream.next().tolist() for _ in range(count)]


@pytest.mark.parametrize("drawn", [1, 5, 13], ids=lambda n: f"{n} since")
@pytest.mark.parametrize("before", [0, 1, 4], ids=lambda n: f"{n} before")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_was_drawn_since_the_mark_comes_again(make, before, drawn):
    expected = take(BatchStream(make(), "p", 0), before + 20)
    stream = BatchStream(make(), "p", 0)
    take(stream, before)
    stream.mark()
    for _ in range(3):
        assert take(stream, drawn) == expected[before : before + drawn]
        assert stream.drawn == before + drawn
        stream.rewind()
        assert stream.drawn == before
    saved = stream.state_dict()
    assert take(stream, 20) == expected[before : before + 20]
    resumed = BatchStream(make(), "p", 7)
    resumed.load_state_dict(saved)
    assert resumed.drawn == before
    assert take(resumed, 20) == expected[before : before + 20]


OPERATIONS = st.lists(
    st.sampled_from(["next", "next", "next", "peek", "mark", "rewind", "fault", "load here", "load in a new stream"]),
    min_size=5,
    max_size=25,
)


class Flaky(Dataset):
    """Fails as often as it is told to."""

    def __init__(self, size: int) -> None:
        self.size, self.faults = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float]:
        if self.faults:
            self.faults -= 1
            raise OSError("the disk is busy")
        return index, torch.rand(()).item()


class Model:
    """What a stream is: a list, and a place in it."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.place, self.marked = batches, 0, None


def plain(batch: Any) -> list[Any]:
    return [part.tolist() for part in batch]


def flaky_stream(size: int, batch_size: int, seed: int) -> tuple[Flaky, BatchStream]:
    data = Flaky(size)
    return data, BatchStream(DataLoader(data, batch_size=batch_size, shuffle=True), "p", seed)


@given(size=st.integers(1, 7), batch_size=st.integers(1, 4), operations=OPERATIONS)
def test_whatever_is_done_the_batches_are_those_of_a_list(size, batch_size, operations):
    reference = flaky_stream(size, batch_size, 0)[1]
    model = Model([plain(reference.next()) for _ in range(len(operations) + 1)])
    data, stream = flaky_stream(size, batch_size, 0)
    causes: list[type] = []
    for operation in operations:
        if operation == "next":
            assert plain(stream.next()) == model.batches[model.place]
            model.place += 1
        elif operation == "peek":
            assert plain(stream.peek()) == model.batches[model.place]
        elif operation == "mark":
            stream.mark()
            model.marked = model.place
        elif operation == "rewind" and model.marked is None:
            with pytest.raises(DataError, match="mark"):
                stream.rewind()
        elif operation == "rewind":
            stream.rewind()
            model.place = model.marked
        elif operation == "fault":
            data.faults = 1
            try:
                batch = stream.next()
            except DataError as error:
                causes.append(type(error.__cause__))
            else:  # one that was ahead needs no data set
                assert plain(batch) == model.batches[model.place]
                model.place += 1
            data.faults = 0
        else:
            state = stream.state_dict()
            if operation == "load in a new stream":
                data, stream = flaky_stream(size, batch_size, 1)
            stream.load_state_dict(state)
            model.marked = None
        assert stream.drawn == model.place
    assert plain(stream.next()) == model.batches[model.place]
    assert set(causes) <= {OSError}


def test_an_iterator_goes_back_too():
    stream = BatchStream(iter(range(6)), "p", 0)
    stream.next()
    stream.mark()
    assert [stream.next() for _ in range(3)] == [1, 2, 3]
    stream.rewind()
    assert [stream.next() for _ in range(5)] == [1, 2, 3, 4, 5]
    for _ in range(2):
        with pytest.raises(DataError, match="was an iterator and has ended"):
            stream.next()
    stream.rewind()
    assert stream.next() == 1


def test_batches_that_come_again_are_the_same_objects():
    stream = BatchStream(loader(), "p", 0)
    stream.mark()
    first = [stream.next() for _ in range(6)]
    stream.rewind()
    assert all(stream.next() is batch for batch in first)


class Watched(Sequence):
    """Batches that can be watched as they go."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, place: int) -> torch.Tensor:
        if place >= len(self):
            raise IndexError(place)
        batch = torch.tensor(place)
        self.alive.add(batch)
        return batch


def test_nothing_is_kept_where_nobody_marked_and_one_step_where_somebody_did():
    data = Watched()
    stream = BatchStream(data, "p", 0)
    for _ in range(10_000):
        stream.next()
    assert len(data.alive) <= 1  # the one that the sequence's own iterator still holds
    for _ in range(2500):
        stream.mark()
        for _ in range(4):
            stream.peek()
            stream.next()
    assert len(data.alive) == 4
    stream.rewind()
    for _ in range(4):
        stream.next()
    stream.mark()
    assert len(data.alive) <= 1


def test_there_is_no_going_back_to_before_a_position_was_loaded():
    stream = BatchStream(loader(), "p", 0)
    for marked in (False, True):
        if marked:
            stream.mark()
            stream.next()
            stream.load_state_dict(stream.state_dict())
        with pytest.raises(DataError, match="'p' cannot go back: call mark"):
            stream.rewind()


def test_a_mark_costs_microseconds():
    stream = BatchStream(loader(), "p", 0)
    stream.next()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        stream.mark()
        times.append(time.perf_counter() - start)
    assert sorted(times)[100] < 50e-6


def test_streams_that_share_a_generator_do_not_disturb_each_other():
    def orders(together: bool) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(1)
        found = []
        streams = []
        for name in ("p", "q"):
            sampler = RandomSampler(range(10), replacement=True, num_samples=70, generator=generator)
            streams.append(BatchStream(DataLoader(torch.arange(10), batch_size=3, sampler=sampler), name, 0))
        if together:
            pairs = [(take(streams[0], 1)[0], take(streams[1], 1)[0]) for _ in range(40)]
            found = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
        else:
            found = [take(stream, 40) for stream in streams]
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())  # it is the user's
        return found

    assert orders(together=True) == orders(together=False)


def test_a_generator_of_the_users_goes_on_within_an_epoch():
    rows = [row for batch in take(BatchStream(drawing_from_a_generator(), "p", 0), 23) for row in batch]
    assert rows[:32] != rows[32:64]  # drawn 32 at a time


def test_an_epoch_of_a_distributed_sampler_is_set_again():
    sampler = DistributedSampler(range(10), num_replicas=2, rank=0)
    stream = BatchStream(DataLoader(torch.arange(10), batch_size=5, sampler=sampler), "p", 0)
    stream.mark()
    first = take(stream, 3)
    assert sampler.epoch == 3
    assert first[0] != first[1]
    state = stream.state_dict()
    following = take(stream, 2)
    stream.load_state_dict(state)
    assert sampler.epoch == 3
    assert take(stream, 2) == following


def test_a_given_batch_serves_all_updates_and_a_given_iterator_one_each():
    stream = BatchStream(loader(), "p", 0)
    feed = Feed({"p": stream, "q": stream}, {"q": iter([1, 2])})
    assert [feed.peek("q"), feed.peek("q"), feed.next("q"), feed.next("q")] == [1, 1, 1, 2]
    for draw in (feed.next, feed.peek):
        with pytest.raises(DataError, match="more batches for problem 'q'"):
            draw("q")
    feed = Feed({"p": stream}, {"p": [1, 2]})
    assert [feed.peek("p"), feed.next("p"), feed.next("p")] == [[1, 2]] * 3
    with pytest.raises(UnknownNameError, match="did you mean 'classifier'"):
        Feed({"classifier": stream}, {"classifer": 1})


def test_what_a_given_iterator_raises_comes_through_as_it_is():
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    feed = Feed({"p": BatchStream(loader(), "p", 0)}, {"p": failing()})
    assert feed.next("p") == 1
    with pytest.raises(KeyError, match="lost"):
        feed.next("p")


def test_a_problem_without_data_can_be_marked_and_saved():
    stream = BatchStream(None, "p", 0)
    stream.mark()
    assert stream.next() is None
    stream.rewind()
    stream.load_state_dict(stream.state_dict())
    assert stream.drawn == 0
