"""Loaders that fail: the stream stands where it stood, says what happened, and goes on with the batches due."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from bilevel.data import BatchStream
from bilevel.errors import BilevelWarning, DataError

SIZE, BATCH = 10, 3


class Faulty(Dataset):
    """Fails once, when a file that says so is there: in any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.fail_if_due("raise", index)
        if index == 7 and self.due("kill"):
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return index, self.noise()

    def noise(self) -> float:
        return torch.rand(()).item()

    def fail_if_due(self, what: str, index: int) -> None:
        if index == 7 and self.due(what):
            raise ZeroDivisionError("example 7 is bad")

    def due(self, what: str) -> bool:
        try:
            (self.folder / what).unlink()
        except FileNotFoundError:
            return False
        return True

    def collate(self, examples: list[tuple[int, float]]) -> list[torch.Tensor]:
        for index, _ in examples:
            self.fail_if_due("collate", index)
        return [torch.tensor([index for index, _ in examples]), torch.tensor([noise for _, noise in examples])]


class Silent(Faulty):
    """The same without random numbers."""

    def noise(self) -> float:
        return 0.0


WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "two": {"num_workers": 2},
    "two that live on": {"num_workers": 2, "persistent_workers": True},
}
KINDS = ["DataLoader", "StatefulDataLoader"]


def make(folder: Path, kind: str = "DataLoader", **settings: Any) -> BatchStream:
    # What persistent workers draw is lost with them, where no state is kept: of that there is a test below.
    data = Silent(folder) if kind == "DataLoader" and settings.get("persistent_workers") else Faulty(folder)
    kinds = {"DataLoader": DataLoader}
    if kind == "StatefulDataLoader":
        kinds[kind] = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loader = kinds[kind](data, batch_size=BATCH, shuffle=True, collate_fn=data.collate, **settings)
    return BatchStream(loader, "p", 3)


def plain(batch: Any) -> Any:
    return [part.tolist() for part in batch]


def take_until_fault(stream: BatchStream, kind: type[BaseException] = DataError) -> tuple[list[Any], str, type]:
    """Returns the batches before the fault, its message and its cause, and keeps no exception.

    Its traceback would keep the frames of the test, and with them workers, until the garbage is collected.
    """
    batches: list[Any] = []
    for _ in range(8):
        try:
            batches.append(plain(stream.next()))
        except kind as error:
            return batches, str(error), type(error.__cause__)
    raise AssertionError(f"no {kind.__name__} in 8 batches")


def check_recovery(folder: Path, fault: str, kind: str, settings: dict[str, Any]) -> tuple[str, type]:
    """Lets a step fail, rewinds it, saves, goes on, and resumes from what was saved."""
    (folder / "never").mkdir()
    reference = make(folder / "never", kind, **settings)
    expected = [plain(reference.next()) for _ in range(12)]
    stream = make(folder, kind, **settings)
    assert plain(stream.next()) == expected[0]
    stream.mark()
    (folder / fault).touch()
    batches, message, cause = take_until_fault(stream)
    assert batches == expected[1 : 1 + len(batches)]
    assert stream.drawn == 1 + len(batches)
    assert f"batch number {stream.drawn + 1} " in message
    stream.rewind()
    saved = stream.state_dict()
    assert stream.drawn == 1
    assert [plain(stream.next()) for _ in range(11)] == expected[1:]
    again = make(folder, kind, **settings)
    again.load_state_dict(saved)
    assert [plain(again.next()) for _ in range(11)] == expected[1:]
    return message, cause


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*persistent workers draw themselves")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", WORKERS.values(), ids=WORKERS)
@pytest.mark.parametrize("fault", ["raise", pytest.param("collate", marks=pytest.mark.slow)])
def test_a_loader_that_raises_once_changes_nothing(fault, settings, kind, tmp_path):
    message, cause = check_recovery(tmp_path, fault, kind, settings)
    assert cause is ZeroDivisionError
    assert "example 7 is bad" in message
    assert "data of problem 'p'" in message
    assert ("Set num_workers=0 (now 2)" in message) == bool(settings)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*persistent workers draw themselves")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [WORKERS["two"], WORKERS["two that live on"]], ids=["two", "two that live on"])
def test_a_worker_that_is_killed_changes_nothing(settings, kind, tmp_path):
    message, cause = check_recovery(tmp_path, "kill", kind, settings)
    assert cause is RuntimeError
    assert "memory" in message


def draw_an_epoch(stream: BatchStream) -> None:
    for _ in range(4):
        stream.next()


def children() -> set[int]:
    """The processes that this one started and that have not ended, but for multiprocessing's resource tracker."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z" and "resource_tracker" not in command:
                found.add(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="lists processes")
@pytest.mark.parametrize("settings", [WORKERS["two"], WORKERS["two that live on"]], ids=["two", "two that live on"])
def test_the_workers_of_a_broken_loader_end_though_the_exception_is_kept(settings, tmp_path):
    gc.collect()
    before = children()
    stream = make(tmp_path, **settings)
    (tmp_path / "raise").touch()
    with pytest.raises(DataError) as kept:
        draw_an_epoch(stream)
    deadline = time.monotonic() + 10
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() <= before
    assert isinstance(kept.value.__cause__, ZeroDivisionError)


def test_a_fault_that_stays_is_told_each_time_with_the_same_batch(tmp_path):
    stream = make(tmp_path)
    told = set()
    for _ in range(3):
        (tmp_path / "raise").touch()
        told.add(take_until_fault(stream)[1])
    assert len(told) == 1


def test_a_stream_that_nobody_marked_recovers_in_a_later_epoch(tmp_path):
    (tmp_path / "never").mkdir()
    reference, stream = make(tmp_path / "never"), make(tmp_path)
    expected = [plain(reference.next()) for _ in range(14)]
    found = [plain(stream.next()) for _ in range(8)]
    (tmp_path / "raise").touch()
    found += take_until_fault(stream)[0]
    found += [plain(stream.next()) for _ in range(14 - len(found))]
    assert found == expected


def test_an_interrupted_draw_passes_through_and_is_made_again(tmp_path):
    class Interrupted(Faulty):
        def fail_if_due(self, what: str, index: int) -> None:
            if index == 7 and self.due(what):
                raise KeyboardInterrupt

    (tmp_path / "never").mkdir()
    reference = make(tmp_path / "never")
    expected = [plain(reference.next()) for _ in range(8)]
    stream = BatchStream(DataLoader(Interrupted(tmp_path), batch_size=BATCH, shuffle=True), "p", 3)
    (tmp_path / "raise").touch()
    found = take_until_fault(stream, KeyboardInterrupt)[0]
    assert found == expected[: len(found)]
    assert plain(stream.next())[0] == expected[len(found)][0]


def test_the_global_generators_are_as_before_a_fault(tmp_path):
    stream = make(tmp_path)
    (tmp_path / "raise").touch()
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    take_until_fault(stream)
    assert torch.equal(torch.get_rng_state(), expected)


def test_an_iterable_that_raises_is_begun_again():
    faults = [OSError("gone")]

    class Numbers:
        def __iter__(self) -> Iterator[int]:
            for number in range(5):
                if number == 3 and faults:
                    raise faults.pop()
                yield number

    stream = BatchStream(Numbers(), "p", 0)
    assert [stream.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"batch number 4 \(number 4 of epoch 1\) failed with OSError: gone"):
        stream.next()
    assert [stream.next() for _ in range(4)] == [3, 4, 0, 1]


def test_a_source_that_cannot_be_begun_says_so_and_may_be_tried_again():
    faults = [OSError("not mounted")]

    class Numbers:
        def __iter__(self) -> Iterator[int]:
            if len(begun) == 1 and faults:
                raise faults.pop()
            begun.append(True)
            return iter([1, 2])

    begun: list[bool] = []
    stream = BatchStream(Numbers(), "p", 0)
    assert [stream.next(), stream.next()] == [1, 2]
    with pytest.raises(DataError, match="epoch 2 could not be begun with OSError: not mounted"):
        stream.next()
    assert [stream.next(), stream.next(), stream.next()] == [1, 2, 1]


def test_an_iterator_that_raises_is_not_begun_again():
    class Numbers:
        def __init__(self) -> None:
            self.number = 0

        def __iter__(self) -> Numbers:
            return self

        def __next__(self) -> int:
            self.number += 1
            if self.number == 2:
                raise OSError("lost a packet")
            return self.number

    stream = BatchStream(Numbers(), "p", 0)
    stream.mark()
    assert stream.next() == 1
    with pytest.raises(DataError, match="an iterator, which cannot be begun again"):
        stream.next()
    stream.rewind()
    assert [stream.next(), stream.next()] == [1, 3]


def test_a_source_that_became_shorter_is_an_error_and_not_another_epoch():
    class Numbers:
        def __init__(self) -> None:
            self.size, self.fault = 5, False

        def __iter__(self) -> Iterator[int]:
            for number in range(self.size):
                if self.fault:
                    self.fault = False
                    raise OSError("gone")
                yield number

    data = Numbers()
    stream = BatchStream(data, "p", 0)
    assert [stream.next() for _ in range(3)] == [0, 1, 2]
    data.size, data.fault = 2, True
    with pytest.raises(DataError, match="gone"):
        stream.next()
    for _ in range(2):
        with pytest.raises(DataError, match="fewer batches than when they were first drawn"):
            stream.next()


def test_a_source_without_batches_says_so_each_time():
    stream = BatchStream(DataLoader(torch.arange(2), batch_size=3, drop_last=True), "p", 0)
    for _ in range(2):
        with pytest.raises(DataError, match="yields no batch"):
            stream.next()


def test_workers_that_lived_through_epochs_and_are_lost_are_told_of(tmp_path):
    """The order is right all the same."""

    settings = WORKERS["two that live on"]
    stream, resumed = make(tmp_path, **settings), make(tmp_path, **settings)
    for _ in range(6):
        stream.next()
    state = stream.state_dict()
    with pytest.warns(BilevelWarning, match="persistent workers draw themselves"):
        resumed.load_state_dict(state)
    assert [plain(resumed.next()) for _ in range(6)] == [plain(stream.next()) for _ in range(6)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_workers_that_live_on_are_not_taken_from_somebody_who_iterates_the_same_loader(kind):
    made = (
        DataLoader if kind == "DataLoader" else pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    )
    loader = made(torch.arange(12), batch_size=3, num_workers=1, persistent_workers=True)
    somebody = iter(loader)
    assert next(somebody).tolist() == [0, 1, 2]
    stream = BatchStream(loader, "p", 0)
    assert [stream.next().tolist(), stream.next().tolist()] == [[0, 1, 2], [3, 4, 5]]
    assert next(somebody).tolist() == [3, 4, 5]


def test_batches_as_they_come_are_told_of():
    stream = BatchStream(DataLoader(torch.arange(9), batch_size=3, num_workers=1, in_order=False), "p", 0)
    stream.next()
    with pytest.warns(BilevelWarning, match="in_order=True"):
        stream.load_state_dict(stream.state_dict())


def test_where_that_warning_is_an_error_the_stream_stays_where_it_was():
    def stream() -> BatchStream:
        return BatchStream(DataLoader(torch.arange(9), batch_size=3, num_workers=1, in_order=False), "p", 0)

    far, near = stream(), stream()
    far.next()
    far.next()
    near.next()
    state = far.state_dict()
    with pytest.raises(BilevelWarning):
        near.load_state_dict(state)
    assert near.drawn == 1


def test_an_iterable_data_set_that_fails_in_a_worker_is_begun_again(tmp_path):
    class Numbers(IterableDataset):
        def __init__(self, flag: Path) -> None:
            self.flag = flag

        def __iter__(self) -> Iterator[float]:
            flag = self.flag
            for number in range(6):
                if number == 4 and flag.exists():
                    flag.unlink()
                    raise ZeroDivisionError
                yield number + torch.rand(()).item()

    def stream(flag: Path) -> BatchStream:
        return BatchStream(DataLoader(Numbers(flag), batch_size=1, num_workers=1), "p", 0)

    # each has a flag of its own: a worker that reads ahead would take the other's
    reference, failing = stream(tmp_path / "never"), stream(tmp_path / "raise")
    expected = [reference.next().tolist() for _ in range(9)]
    (tmp_path / "raise").touch()
    found = [failing.next().tolist() for _ in range(4)]
    with pytest.raises(DataError, match="batch number 5 "):
        failing.next()
    assert found + [failing.next().tolist() for _ in range(5)] == expected
