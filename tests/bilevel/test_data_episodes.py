"""N-way k-shot tasks: what is in one, that it follows from its number, and what is refused."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from bilevel.data.episodes import Episodes, FunctionEpisodes, TaskBatch, split_classes
from bilevel.errors import ConfigError, DataError


def identified(per_class: int, classes: int) -> tuple[Tensor, Tensor]:
    """Inputs that tell their own place and class."""
    labels = torch.arange(per_class * classes) % classes * 10
    return torch.stack([torch.arange(len(labels)), labels], dim=1).float(), labels


@given(
    ways=st.integers(1, 5),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    tasks=st.integers(1, 4),
    number=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
)
def test_a_task_is_made_of_its_classes_without_repetition(
    ways: int, shots: int, queries: int, tasks: int, number: int, seed: int
) -> None:
    inputs, labels = identified(6, 5)
    batch = Episodes((inputs, labels), ways, shots, queries, tasks, seed=seed)[number]
    assert batch.support_inputs.shape == (tasks, ways * shots, 2)
    assert batch.query_inputs.shape == (tasks, ways * queries, 2)
    for sx, sy, qx, qy in zip(*batch, strict=True):
        places = torch.cat([sx, qx])[:, 0].tolist()
        assert len(set(places)) == len(places)
        counts = collections.Counter(sy.tolist()), collections.Counter(qy.tolist())
        assert counts == (dict.fromkeys(range(ways), shots), dict.fromkeys(range(ways), queries))
        original = {(int(y), int(x[1])) for x, y in zip(torch.cat([sx, qx]), torch.cat([sy, qy]), strict=True)}
        assert len(original) == ways == len({label for _, label in original})  # one class a number, and back
        for x in torch.cat([sx, qx]):
            assert torch.equal(x, inputs[int(x[0])])


def test_batches_follow_from_seed_and_number_alone() -> None:
    data = identified(6, 5)
    one, two, other = (Episodes(data, 3, 1, 2, 4, seed=seed) for seed in (7, 7, 8))
    list(itertools.islice(one, 5))
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(one[9], two[9], strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one[9].query_inputs, other[9].query_inputs)
    assert not torch.equal(one[9].query_inputs, one[10].query_inputs)
    assert one[9] is one[9]
    assert [torch.equal(a.query_inputs, one[i].query_inputs) for i, a in enumerate(itertools.islice(two, 3))] == [
        True
    ] * 3


def test_every_class_and_example_is_equally_likely() -> None:
    inputs, labels = identified(4, 6)
    episodes = Episodes((inputs, labels), 2, 1, 1, 40)
    seen = torch.zeros(len(labels))
    for batch in itertools.islice(episodes, 100):
        places = torch.cat([batch.support_inputs, batch.query_inputs], dim=1)[..., 0].long().flatten()
        seen += torch.bincount(places, minlength=len(labels))
    expected = seen.sum() / len(labels)
    chi_squared = float(((seen - expected) ** 2 / expected).sum())
    assert chi_squared < 50  # 23 degrees of freedom: 49.7 is exceeded once in a thousand times


def test_classes_may_be_chosen_and_split() -> None:
    data = identified(6, 10)
    train, test = split_classes(data[1], 6, 4)
    assert sorted(train + test) == [10 * label for label in range(10)]
    assert split_classes(data[1], 6, 4) == (train, test)
    assert split_classes(data[1], 6, 4, seed=1) != (train, test)
    batch = Episodes(data, 3, 1, 2, 50, classes=test)[0]
    assert set(batch.query_inputs[..., 1].unique().tolist()) == set(test)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Reading an item draws from every generator."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        self.reads += 1
        noise = torch.rand(3) + float(np.random.rand()) + random.random()
        return torch.full((3,), float(place)) + noise.double() / 10, place % 3


def test_augmentation_follows_from_the_number_too() -> None:
    one, two = Episodes(Noisy(), 2, 1, 1, 2), Episodes(Noisy(), 2, 1, 1, 2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    two[0]
    assert torch.equal(one[5].support_inputs, two[5].support_inputs)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_a_data_set_is_read_once_for_its_labels_or_not_at_all() -> None:
    data = Noisy()
    Episodes(data, 2, 1, 1, 2)
    assert data.reads == 12
    data = Noisy()
    episodes = Episodes(data, 2, 1, 1, 2, labels=[place % 3 for place in range(12)])
    assert data.reads == 0
    first = episodes[0]
    assert first.support_inputs.shape == (2, 2, 3)
    assert data.reads == 8


def test_tensors_and_their_data_set_are_the_same() -> None:
    data = identified(6, 5)
    for a, b in zip(Episodes(data, 3, 1, 2, 4)[2], Episodes(TensorDataset(*data), 3, 1, 2, 4)[2], strict=True):
        assert torch.equal(a, b)


def test_functions_are_drawn_by_number() -> None:
    def line(generator: torch.Generator) -> tuple[Tensor, ...]:
        slope, x = torch.rand((), generator=generator), torch.rand(5, 1, generator=generator)
        return x[:2], slope * x[:2], x[2:], slope * x[2:]

    one, two = (FunctionEpisodes(line, 3, seed=1) for _ in range(2))  # type: ignore[arg-type]
    two[0]
    assert torch.equal(one[4].query_inputs, two[4].query_inputs)
    assert len(one[4].query_inputs.unique()) == 9  # every task its own
    slopes = one[0].support_targets / one[0].support_inputs
    assert torch.allclose(slopes, slopes[:, :1].expand_as(slopes))


def test_tasks_move_to_a_device() -> None:
    moved = Episodes(identified(6, 5), 3, 1, 2, 4)[0].to("meta")
    assert isinstance(moved, TaskBatch)
    assert {part.device.type for part in moved} == {"meta"}


def small(**changes: Any) -> Episodes:
    inputs, labels = identified(4, 3)
    return Episodes(**{"data": (inputs, labels), "ways": 2, "shots": 1, "queries": 2, "tasks": 2, **changes})


class Ragged(Noisy):
    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.zeros(place + 1), place % 3


class Words(Noisy):
    def __getitem__(self, place: int) -> tuple[Any, int]:
        return "a", place % 3


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: small(ways=4), ConfigError, "4-way tasks need 4 classes, and there are 3"),
        (lambda: small(ways=3, classes=[0, 10]), ConfigError, "3-way tasks need 3 classes, and there are 2"),
        (lambda: small(shots=3), DataError, "class 0 has 4 examples, and a task needs 3 to learn from and 2 others"),
        (lambda: small(ways=0), ConfigError, "Episodes.ways must be an integer of at least 1, not 0"),
        (lambda: small(shots=0), ConfigError, "Episodes.shots must be"),
        (lambda: small(queries=0), ConfigError, "Episodes.queries must be"),
        (lambda: small(tasks=0), ConfigError, "Episodes.tasks must be"),
        (lambda: small(tasks=2.0), ConfigError, "Episodes.tasks must be"),
        (lambda: small(seed=-1), ConfigError, "Episodes.seed must be an integer of at least 0"),
        (lambda: small(classes=[0, 5]), DataError, "no example has the labels \\[5\\]; there are \\[0, 10, 20\\]"),
        (lambda: small(classes=[0, 0, 10]), ConfigError, "names a class twice"),
        (lambda: small(data=(torch.zeros(3, 1), torch.zeros(4).long())), DataError, "3 inputs and 4 labels"),
        (lambda: small(data=(torch.zeros(3, 1), torch.zeros(3))), DataError, "labels must be integers"),
        (lambda: small(data=(torch.zeros(3, 1), torch.zeros(3, 1).long())), DataError, "shape \\(3, 1\\)"),
        (lambda: small(data=(1, 2)), DataError, "two tensors, inputs and labels, or a data set"),
        (lambda: small(data=3), DataError, "with __getitem__ and __len__, not int"),
        (lambda: small(labels=[1]), ConfigError, "labels= is for data sets"),
        (lambda: small(data=Noisy(), labels=[1, 2]), DataError, "12 inputs and 2 labels"),
        (lambda: small(data=Ragged())[0], DataError, "cannot be stacked"),
        (lambda: small(data=Words())[0], DataError, "must be tensors or numbers; they are str"),
        (lambda: small()[-1], IndexError, "numbered from 0"),
        (lambda: split_classes([0, 1, 2], 2, 2), ConfigError, "4 classes are asked for, and there are 3"),
        (lambda: split_classes([0, 1, 2]), ConfigError, "say how many classes each set is to have"),
        (lambda: split_classes([0, 1, 2], 0), ConfigError, "counts must be an integer of at least 1"),
        (lambda: FunctionEpisodes(lambda g: (torch.zeros(1),), 2)[0], DataError, "must return four tensors"),  # type: ignore[arg-type, return-value]
        (lambda: FunctionEpisodes(uneven, 8)[0], DataError, "draw as many examples for each"),
        (lambda: FunctionEpisodes(uneven, 0), ConfigError, "FunctionEpisodes.tasks must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(made: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made()


def uneven(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.zeros(int(torch.randint(1, 4, (), generator=generator)), 1)
    return x, x, x, x
