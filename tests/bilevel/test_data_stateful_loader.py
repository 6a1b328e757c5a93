"""torchdata's StatefulDataLoader goes on in the middle of an epoch, bit for bit, and draws nothing again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

import bilevel.data
from bilevel.checkpoint import read_state, write_state
from bilevel.data import BatchStream
from bilevel.errors import BilevelWarning, CheckpointError, DataError

torchdata = pytest.importorskip("torchdata.stateful_dataloader")
samplers = pytest.importorskip("torchdata.stateful_dataloader.sampler")

# torchdata's constructor calls what torch has deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

SIZE, BATCH = 10, 3
PER_EPOCH = 4


class Noisy(Dataset):
    """Examples with noise: what augmentation draws, from every generator there is."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        self.reads += 1
        return index, torch.rand(()).item(), random.random(), float(np.random.rand())


class Counting(Noisy):
    """A data set whose examples depend on how often it was read, and that says how often."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*super().__getitem__(index), self.reads)

    def state_dict(self) -> dict[str, Any]:
        return {"reads": self.reads, "blob": bytes([self.reads % 256]), "numpy": np.int64(self.reads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["blob"] == bytes([state["reads"] % 256])
        assert isinstance(state["numpy"], np.int64)
        self.reads = state["reads"]


class Shard:
    """What a worker reads of ``range(size)``."""

    def __init__(self) -> None:
        worker = get_worker_info()
        self.numbers = range(SIZE)[worker.id :: worker.num_workers] if worker else range(SIZE)


class Plain(IterableDataset):
    """An iterable data set without a state."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        order = list(Shard().numbers)
        random.shuffle(order)
        for number in order:
            yield number, torch.rand(()).item()


class Itself(IterableDataset):
    """An iterable data set that is its own iterator, with a state."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Itself:
        self.place = 0
        self.numbers = Shard().numbers
        return self

    def __next__(self) -> tuple[int, float]:
        if self.place == len(self.numbers):
            raise StopIteration
        self.place += 1
        return self.numbers[self.place - 1], torch.rand(()).item()

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Walker:
    """An iterator with a state."""

    def __init__(self) -> None:
        self.order = list(Shard().numbers)
        random.shuffle(self.order)
        self.place = 0

    def __iter__(self) -> Walker:
        return self

    def __next__(self) -> tuple[int, float]:
        if self.place == len(self.order):
            raise StopIteration
        self.place += 1
        return self.order[self.place - 1], torch.rand(()).item()

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = list(state["order"]), state["place"]


class Walked(IterableDataset):
    """An iterable data set whose iterator has the state."""

    def __iter__(self) -> Walker:
        return Walker()


class Continuing(IterableDataset):
    """An iterable data set with a state, whose iterator is a generator and goes on from it, as those of datasets do."""

    def __init__(self) -> None:
        self.place, self.epoch, self.resume = 0, 0, False

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        if not self.resume:
            self.place = 0
            self.epoch += 1
        self.resume = False
        numbers = Shard().numbers
        while self.place < len(numbers):
            self.place += 1
            yield numbers[self.place - 1], self.epoch, torch.rand(()).item()

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.epoch, self.resume = state["place"], state["epoch"], True


class Eager(Sampler):
    """A sampler that draws as soon as it is iterated."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class Remembering(Sampler):
    """A sampler with a state."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        self.order, self.place = torch.randperm(SIZE).tolist(), 0
        while self.place < SIZE:
            self.place += 1
            yield self.order[self.place - 1]

    def __len__(self) -> int:
        return SIZE

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = state["order"], state["place"]


def given() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def distributed() -> DistributedSampler:
    return DistributedSampler(range(SIZE), num_replicas=2, rank=1)


def resuming_distributed() -> Any:
    return samplers.StatefulDistributedSampler(Noisy(), num_replicas=2, rank=1)


ORDERS = {
    "sequential": lambda: {},
    "shuffled": lambda: {"shuffle": True},
    "shuffled with a generator": lambda: {"shuffle": True, "generator": given()},
    "drawn anew with one generator": lambda: (
        lambda g: {"generator": g, "sampler": samplers.RandomSampler(range(SIZE), True, 100, g)}
    )(given()),
    "torch's random sampler": lambda: {"sampler": RandomSampler(range(SIZE))},
    "torch's random sampler with replacement": lambda: (
        lambda g: {"generator": g, "sampler": RandomSampler(range(SIZE), True, 100, g)}
    )(given()),
    "subset": lambda: {"sampler": SubsetRandomSampler(range(2, SIZE), generator=given())},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * 9 + [5.0], SIZE)},
    "distributed": lambda: {"sampler": distributed()},
    "resuming distributed": lambda: {"sampler": resuming_distributed()},
    "batch sampler": lambda: {"batch_size": 1, "batch_sampler": BatchSampler(SequentialSampler(range(SIZE)), 4, True)},
    "random batch sampler": lambda: {
        "batch_size": 1,
        "batch_sampler": BatchSampler(RandomSampler(range(SIZE)), 4, True),
    },
    "no batches": lambda: {"batch_size": None, "shuffle": True},
    "eager": lambda: {"sampler": Eager()},
    "remembering": lambda: {"sampler": Remembering()},
}
# Those that torchdata would restore wrongly, so that their epochs are drawn again.
DRAWN_AGAIN = {"resuming distributed", "random batch sampler", "eager", "remembering"}
WITH_WORKERS = [
    (order, settings)
    for order in ORDERS
    for settings in ({}, {"persistent_workers": True}, {"snapshot_every_n_steps": 3})
    if order not in DRAWN_AGAIN or not settings
]
DATA = {kind.__name__: kind for kind in (Noisy, Counting, Plain, Itself, Walked, Continuing)}


def loader(data: str = "Noisy", order: str = "shuffled", **settings: Any) -> DataLoader:
    dataset = DATA[data]()
    chosen = {} if isinstance(dataset, IterableDataset) else ORDERS[order]()
    return torchdata.StatefulDataLoader(dataset, **{"batch_size": BATCH, **chosen, **settings})


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(part) for part in batch] if isinstance(batch, list | tuple) else batch


def take(stream: BatchStream, count: int) -> list[Any]:
    return [plain(stream.next()) for _ in range(count)]


def through_a_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    write_state(folder / "state", state)
    return read_state(folder / "state")


def resumed(state: dict[str, Any], folder: Path, *arguments: Any, **settings: Any) -> BatchStream:
    stream = BatchStream(loader(*arguments, **settings), "p", 99)
    stream.load_state_dict(through_a_file(state, folder))
    return stream


def check_every_place(folder: Path, places: range, *arguments: Any, **settings: Any) -> None:
    expected = take(BatchStream(loader(*arguments, **settings), "p", 3), places.stop + 6)
    stream = BatchStream(loader(*arguments, **settings), "p", 3)
    for place in places:
        again = resumed(stream.state_dict(), folder, *arguments, **settings)
        assert take(again, 6) == expected[place : place + 6], place
        assert again.drawn == place + 6
        assert take(stream, 1) == expected[place : place + 1]


def check_resumes_in_a_row(folder: Path, steps: int, *arguments: Any, **settings: Any) -> None:
    """Saves after a step that failed and after a look ahead, and goes on in a new stream each time."""
    expected = take(BatchStream(loader(*arguments, **settings), "p", 3), 2 * steps + 4)
    stream = BatchStream(loader(*arguments, **settings), "p", 3)
    for step in range(steps):
        stream.mark()
        take(stream, step % 6)
        stream.rewind()
        if step % 2:
            stream.peek()
        stream = resumed(stream.state_dict(), folder, *arguments, **settings)
        assert take(stream, 2) == expected[2 * step : 2 * step + 2], step
    assert take(stream, 4) == expected[2 * steps :]


@pytest.mark.parametrize("order", ORDERS)
def test_every_place_is_found_again(order, tmp_path):
    check_every_place(tmp_path, range(10), "Noisy", order)


@pytest.mark.parametrize("data", DATA)
def test_every_place_is_found_again_whatever_the_data_set(data, tmp_path):
    check_every_place(tmp_path, range(10), data)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "settings"), WITH_WORKERS, ids=str)
def test_every_place_is_found_again_with_workers(order, settings, tmp_path):
    check_every_place(tmp_path, range(7), "Noisy", order, num_workers=2, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"persistent_workers": True}, {"snapshot_every_n_steps": 3}], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_every_place_is_found_again_with_workers_whatever_the_data_set(data, settings, tmp_path):
    check_every_place(tmp_path, range(9), data, num_workers=2, **settings)


@pytest.mark.parametrize(
    ("data", "order"), [("Counting", "shuffled"), ("Counting", "torch's random sampler"), ("Noisy", "eager")]
)
def test_resumes_in_a_row_go_on_as_one_run(data, order, tmp_path):
    check_resumes_in_a_row(tmp_path, 9, data, order)


@pytest.mark.parametrize("data", [name for name in DATA if issubclass(DATA[name], IterableDataset)])
def test_resumes_in_a_row_go_on_as_one_run_with_iterable_data(data, tmp_path):
    check_resumes_in_a_row(tmp_path, 9, data)


@pytest.mark.parametrize("data", ["Counting", "Plain"])
def test_resumes_in_a_row_go_on_as_one_run_with_workers(data, tmp_path):
    check_resumes_in_a_row(tmp_path, 3, data, num_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"persistent_workers": True}, {"snapshot_every_n_steps": 3}], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_many_resumes_in_a_row_go_on_as_one_run_with_workers(data, settings, tmp_path):
    check_resumes_in_a_row(tmp_path, 7, data, num_workers=2, **settings)


@pytest.mark.parametrize("what", ["saved", "looked ahead", "went back"])
def test_resuming_reads_nothing_again(what, tmp_path):
    def reads_of_a_resumed(kind: Any) -> int:
        stream = BatchStream(kind(Noisy(90), batch_size=3, shuffle=True), "p", 0)
        take(stream, 20)
        if what == "looked ahead":
            stream.peek()
        if what == "went back":
            stream.mark()
            take(stream, 5)
            stream.rewind()
        data = Noisy(90)
        again = BatchStream(kind(data, batch_size=3, shuffle=True), "p", 0)
        again.load_state_dict(through_a_file(stream.state_dict(), tmp_path))
        before = data.reads
        assert take(again, 1) == take(stream, 1)
        return before

    assert reads_of_a_resumed(torchdata.StatefulDataLoader) == 0
    assert reads_of_a_resumed(DataLoader) == 60


@pytest.mark.parametrize("order", sorted(DRAWN_AGAIN))
def test_a_sampler_that_torchdata_would_restore_wrongly_has_its_epoch_drawn_again(order):
    stream = BatchStream(loader("Noisy", order), "p", 0)
    take(stream, 2)
    state = stream.state_dict()
    assert not state["stateful"]
    assert state["anchor"] is None


@pytest.mark.parametrize(
    "make", [lambda: loader("Counting", "eager"), lambda: DataLoader(Counting())], ids=["eager", ""]
)
def test_a_data_set_whose_state_is_not_restored_is_told_of(make):
    stream, again = BatchStream(make(), "p", 0), BatchStream(make(), "p", 0)
    stream.next()
    with pytest.warns(BilevelWarning, match="has a state of its own, which drawing the epoch again does not restore"):
        again.load_state_dict(stream.state_dict())


def test_a_step_takes_the_state_of_a_loader_once():
    class Asked(Counting):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            self.asked += 1
            return super().state_dict()

    data = Asked(300)
    stream = BatchStream(torchdata.StatefulDataLoader(data, batch_size=3), "p", 0)
    stream.next()
    before = data.asked
    for _ in range(10):
        stream.mark()
        take(stream, 5)
    assert data.asked - before == 10
    take(stream, 20)
    stream.rewind()
    assert data.asked - before == 10
    stream = BatchStream(torchdata.StatefulDataLoader(data, batch_size=3), "p", 0)
    take(stream, 2)
    stream.state_dict()
    before = data.asked
    stream.state_dict()
    assert data.asked == before


def test_a_state_that_the_data_set_goes_on_to_change_is_the_state_of_its_time(tmp_path):
    class Living(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def __getitem__(self, index: int) -> int:
            self.seen.append(index)
            return len(self.seen)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state["seen"]

    def stream() -> BatchStream:
        return BatchStream(torchdata.StatefulDataLoader(Living(), batch_size=BATCH), "p", 0)

    saved, again = stream(), stream()
    expected = take(stream(), 9)
    take(saved, 2)
    saved.mark()
    take(saved, 5)
    saved.rewind()
    again.load_state_dict(through_a_file(saved.state_dict(), tmp_path))
    assert take(again, 7) == expected[2:]


def test_an_epoch_of_iterable_data_is_gone_to_from_the_end_of_the_one_before():
    """A generator has begun nothing before it is asked, and what its data set says then is of the epoch before."""
    stream = BatchStream(loader("Continuing"), "p", 0)
    take(stream, PER_EPOCH)
    stream.peek()
    state = stream.state_dict()
    assert (state["epoch"], state["taken"]) == (1, 0)
    assert (state["anchor"]["at"]["epoch"], state["anchor"]["at"]["taken"]) == (0, PER_EPOCH)


def test_the_loader_stays_as_the_user_made_it():
    data = Counting()
    mine = torchdata.StatefulDataLoader(data, batch_size=BATCH, shuffle=True, generator=given())
    first, second = BatchStream(mine, "p", 0), BatchStream(mine, "p", 0)
    expected = [batch[0] for batch in take(BatchStream(loader("Counting"), "p", 0), 8)]
    for place in range(8):
        # streams of one loader do not disturb each other, and neither does somebody who iterates it
        assert take(first, 1)[0][0] == expected[place]
        assert take(second, 1)[0][0] == expected[place]
        next(iter(mine))
    assert mine.dataset is data
    assert mine.next_iter_state is None


def test_workers_see_the_data_set_that_the_user_made():
    def scale(_: int) -> None:
        data: Any = get_worker_info().dataset
        data.scale = 10 * data.size

    class Scaled(Noisy):
        scale = 0

        def __getitem__(self, index: int) -> int:
            return self.scale

        def __getitems__(self, indices: list[int]) -> list[int]:
            return [self.scale + 1 for _ in indices]

    loaded = torchdata.StatefulDataLoader(Scaled(4), batch_size=4, num_workers=1, worker_init_fn=scale)
    assert take(BatchStream(loaded, "p", 0), 1) == [[41] * 4]


def test_another_number_of_workers_is_refused(tmp_path):
    stream = BatchStream(loader(num_workers=1), "p", 0)
    take(stream, 2)
    other = BatchStream(loader(), "p", 0)
    expected = take(BatchStream(loader(), "p", 0), 2)
    with pytest.raises(CheckpointError, match="Set num_workers=1"):
        other.load_state_dict(stream.state_dict())
    assert take(other, 2) == expected


def test_another_kind_of_loader_is_refused():
    plain_loader = BatchStream(DataLoader(Noisy(), batch_size=BATCH, shuffle=True), "p", 0)
    stateful = BatchStream(loader(), "p", 0)
    take(plain_loader, 1)
    take(stateful, 1)
    with pytest.raises(CheckpointError, match="was a StatefulDataLoader .* their orders differ"):
        plain_loader.load_state_dict(stateful.state_dict())
    with pytest.raises(CheckpointError, match="is a StatefulDataLoader .* now: their orders differ"):
        stateful.load_state_dict(plain_loader.state_dict())


def test_a_state_that_no_checkpoint_can_hold_is_named():
    class Odd(Noisy):
        def state_dict(self) -> dict[str, Any]:
            return {"cache": {"lock": object()}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("never saved")

    stream = BatchStream(torchdata.StatefulDataLoader(Odd(), batch_size=BATCH), "p", 0)
    stream.next()
    with pytest.raises(CheckpointError, match=r"problem 'p'\.dataset_state\.dataset\.cache\.lock is a object"):
        stream.state_dict()


def test_a_data_set_that_cannot_say_its_state_is_a_fault():
    class Mute(Noisy):
        mute = False

        def state_dict(self) -> dict[str, Any]:
            if self.mute:
                raise RuntimeError("not now")
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    data = Mute()
    stream = BatchStream(torchdata.StatefulDataLoader(data, batch_size=BATCH), "p", 0)
    expected = take(BatchStream(torchdata.StatefulDataLoader(Noisy(), batch_size=BATCH), "p", 0), 3)
    assert take(stream, 1) == expected[:1]
    data.mute = True
    with pytest.raises(DataError, match="state before batch number 2 could not be taken with RuntimeError: not now"):
        stream.state_dict()
    data.mute = False
    assert take(stream, 2) == expected[1:]


def test_torchdata_is_not_needed_where_no_loader_is_its():
    for path in Path(bilevel.data.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.strip().startswith(("import torchdata", "from torchdata"))], path
