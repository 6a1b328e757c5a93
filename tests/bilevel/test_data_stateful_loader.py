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

from bilevel.checkpoint import read_state, write_state
from bilevel.data import BatchStream

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
