"""Batches of a Betty program: what a loss is given, in which order, and when an epoch ends."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import bilevel
from bilevel.errors import CheckpointError, DataError
from bilevel.interop.betty import Env
from bilevel.interop.betty.data import share

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # when Betty is imported

OURS, BETTY = "bilevel.interop.betty", "betty"


def play(
    root: str, loader: Any, iterations: int, *, seed: int = 0, train: Any = True, env: Any = None, **inner: Any
) -> Any:
    """Builds a program on either library's classes and runs it; returns the lower problem, which tells what it saw.

    Args:
        root: Where the names are imported from.
        loader: Data of the lower problem.
        iterations: How many.
        seed: Of the order of our data.
        train: Whether to run at all.
        env: An env.
        inner: ``config``: fields of the lower ``Config``; ``methods``: more methods of its class.
    """
    parts = [importlib.import_module(f"{root}.{part}") for part in ("configs", "engine", "problems")]
    if root == BETTY:
        importlib.import_module("betty.logging.logger_base").get_logger().setLevel(50)
    configs, engines, problems = parts

    def outer_step(self: Any, batch: Any) -> torch.Tensor:
        return (self.inner.module.weight - 1.0).square().sum()

    def inner_step(self: Any, batch: Any) -> torch.Tensor:
        return (self.module.weight - self.outer.module.weight).square().sum() / 2

    def remember(self: Any) -> None:
        self.seen.append(plain(self.cur_batch))

    def ended(self: Any) -> None:
        self.epochs.append((self.count, len(self.seen)))

    made = []
    for name, step in (("outer", outer_step), ("inner", inner_step)):
        module = nn.Linear(1, 1, bias=False).double()
        low = name == "inner"
        methods = {"param_callback": remember, "epoch_callback": ended, **inner.get("methods", {})} if low else {}
        kind = type(name.title(), (problems.ImplicitProblem,), {"training_step": step, **methods})
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        config = configs.Config(**(inner.get("config", {}) if low else {}))
        problem = kind(name, config, module, sgd, train_data_loader=loader if low else [(torch.zeros(1),)])
        problem.seen, problem.epochs = [], []
        made.append(problem)
    outer, low = made
    dependencies = {"u2l": {outer: [low]}, "l2u": {low: [outer]}}
    more = {"settings": bilevel.EngineConfig(progress=False, seed=seed)} if root == OURS else {}
    engine = engines.Engine(
        made, configs.EngineConfig(train_iters=iterations, strategy="cpu"), dependencies, env, **more
    )
    low.driver_of = engine
    if train:
        engine.run()
    return low


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, (dict, UserDict)):
        return {"kind": type(batch).__name__, **{key: plain(value) for key, value in batch.items()}}
    if isinstance(batch, (tuple, list)):
        return (type(batch).__name__, *map(plain, batch))
    return batch


def pairs(count: int, start: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor([start + n, start + n]), torch.tensor([-start - n])) for n in range(count)]


def numbers(size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(size))), batch_size=2, **options)


# --- what a loss is given ---------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: pairs(3),
    "lists": lambda: [list(batch) for batch in pairs(3)],
    "dicts": lambda: [{"x": x, "y": y, "name": "a"} for x, y in pairs(3)],
    "tensors": lambda: [torch.arange(6.0).reshape(3, 2) + n for n in range(2)],
    "texts": lambda: [("a", torch.ones(1)), ("b", torch.ones(1))],
    "loader": lambda: numbers(5),
    "two loaders": lambda: (pairs(3), numbers(10)),
    "three loaders": lambda: (pairs(2), pairs(5, 10.0), [{"x": torch.ones(1)}]),
    "one loader in a tuple": lambda: (pairs(3),),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("config", [{}, {"unroll_steps": 3}], ids=["one-step", "three-steps"])
def test_batches_and_the_ends_of_epochs_are_betty_s(kind: str, config: dict[str, Any]) -> None:
    """Where nothing is shuffled the order is the same too."""
    pytest.importorskip("betty")
    ours, theirs = (play(root, LOADERS[kind](), 12, config=config) for root in (OURS, BETTY))
    assert ours.seen == theirs.seen
    assert len(ours.seen) == 12
    # ours is called with the first batch of the epoch at hand, theirs before it is drawn: in the same step
    assert [count for count, _ in ours.epochs] == [count for count, _ in theirs.epochs]
    assert ours.epochs
    assert ours.epoch_counter == theirs.epoch_counter


@pytest.mark.parametrize("kind", ["tuples", "two loaders"])
def test_epochs_end_at_betty_s_steps_within_accumulations(kind: str) -> None:
    pytest.importorskip("betty")
    config = {"gradient_accumulation": 2, "unroll_steps": 2, "warmup_steps": 1}
    ours, theirs = (play(root, LOADERS[kind](), 14, config=config) for root in (OURS, BETTY))
    assert [count for count, _ in ours.epochs] == [count for count, _ in theirs.epochs]
    assert ours.seen == theirs.seen


def test_a_mapping_that_is_no_dict_keeps_its_keys() -> None:
    """As tokenisers return; Betty hands on the keys alone."""
    seen = play(OURS, [UserDict(ids=torch.tensor([1, 2]), text="a")], 2).seen
    assert seen == [{"kind": "dict", "ids": [1, 2], "text": "a"}] * 2


def test_an_unsuitable_batch_is_told() -> None:
    with pytest.raises(DataError, match=r"batch of problem 'inner'.*not tensor\(3\.\)"):
        play(OURS, [torch.tensor(3.0)], 2)


# --- the order --------------------------------------------------------------------------------------------------------


def order(seed: int, torch_seed: int, loader: Any = None) -> list[float]:
    torch.manual_seed(torch_seed)
    seen = play(OURS, loader or numbers(10, shuffle=True), 15, seed=seed).seen
    return [number for _, part in seen for number in part]


def test_the_order_of_a_shuffled_loader_follows_from_the_seed_alone() -> None:
    first = order(0, 1)
    assert first == order(0, 2)
    assert first != order(1, 1)
    epochs = [first[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "in a tuple"])
def test_a_loader_s_own_generator_is_seeded_too(together: bool) -> None:
    orders = []
    for state in (1, 2):
        loader = numbers(10, shuffle=True, generator=torch.Generator().manual_seed(state))
        seen = play(OURS, (loader, pairs(2)) if together else loader, 8).seen
        orders.append(seen)
    assert orders[0] == orders[1]


def shuffled_loaders() -> Any:
    """With generators of their own: what draws the order is the user's object, which no checkpoint holds."""
    first = numbers(10, shuffle=True, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(torch.arange(6.0))
    second = DataLoader(dataset, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(2)))
    return first, second


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 12])
@pytest.mark.parametrize("kind", ["one", "two", "own"])
def test_resumed_data_goes_on_where_it_stood(kind: str, stop: int, tmp_path: Path) -> None:
    def loader() -> Any:
        if kind == "one":
            return numbers(10, shuffle=True)
        return shuffled_loaders() if kind == "own" else (numbers(10, shuffle=True), numbers(6, shuffle=True))

    whole = play(OURS, loader(), 16)
    first = play(OURS, loader(), 16, train=False)
    first.driver_of.run(stop)
    first.driver_of.save(tmp_path / "state")
    second = play(OURS, loader(), 16, train=False)
    second.driver_of.load(tmp_path / "state")
    second.driver_of.run()
    assert first.seen + second.seen == whole.seen
    assert [count for count, _ in first.epochs + second.epochs] == [count for count, _ in whole.epochs]
    first.driver_of.load(tmp_path / "state")  # whose generators have gone on
    del first.seen[:]
    first.driver_of.run()
    assert first.seen == second.seen


def test_looking_at_the_next_batch_ends_no_epoch() -> None:
    """``hypergradient()`` looks ahead, at the first batch of the next epoch here."""
    for loader, steps in ((numbers(6), 3), ((numbers(6), pairs(2)), 3)):
        low = play(OURS, loader, 12, train=False)
        low.driver_of.run(steps)
        low.driver_of.hypergradient()
        assert low.epochs == []
        low.driver_of.run(1)
        assert [count for count, _ in low.epochs] == [steps + 1]


def test_an_epoch_that_ends_in_a_failed_iteration_ends_again() -> None:
    def ended(self: Any) -> None:
        self.epochs.append((self.count, len(self.seen)))
        if len(self.epochs) == 1:
            raise OSError("no disk")

    for loader in (numbers(6), (numbers(6), pairs(2))):
        low = play(OURS, loader, 12, train=False, methods={"epoch_callback": ended})
        low.driver_of.run(3)
        with pytest.raises(OSError, match="no disk"):
            low.driver_of.train_step()
        assert (low.count, low.driver_of.global_step) == (3, 3)
        low.driver_of.run(1)
        assert [count for count, _ in low.epochs] == [4, 4]
        assert low.seen == play(OURS, loader, 4).seen


# --- data that ends ---------------------------------------------------------------------------------------------------


def test_an_iterator_that_ends_is_told_and_leaves_the_iteration_undone() -> None:
    low = play(OURS, iter(pairs(3)), 10, train=False)
    with pytest.raises(DataError, match="data of problem 'inner' was an iterator and has ended"):
        low.driver_of.run()
    assert (low.count, low.driver_of.global_step) == (3, 3)
    assert len(low.seen) == 3


def test_an_iterator_in_a_tuple_that_ends_is_told() -> None:
    low = play(OURS, (pairs(2), iter(pairs(3))), 10, train=False)
    with pytest.raises(DataError, match="was an iterator and has ended"):
        low.driver_of.run()
    assert low.driver_of.global_step == 3


def test_the_position_of_an_iterator_cannot_be_restored(tmp_path: Path) -> None:
    low = play(OURS, iter(pairs(9)), 5, train=False)
    low.driver_of.run(2)
    low.driver_of.save(tmp_path / "state")
    other = play(OURS, iter(pairs(9)), 5, train=False)
    with pytest.raises(CheckpointError, match="is an iterator: its position cannot be restored"):
        other.driver_of.load(tmp_path / "state")


@pytest.mark.parametrize("loader", [[], ([],), (pairs(2), [])], ids=["list", "tuple of one", "second of two"])
def test_a_loader_without_batches_is_told(loader: Any) -> None:
    with pytest.raises(DataError, match="yields no"):
        play(OURS, loader, 3)


# --- get_batch --------------------------------------------------------------------------------------------------------


def drawing(self: Any) -> tuple[float, int]:
    """Draws from torch's generator, and looks at the count."""
    return float(torch.randint(10**9, ())), self.count


def test_get_batch_is_called_once_an_iteration_at_betty_s_counts() -> None:
    pytest.importorskip("betty")
    told = []
    for root in (OURS, BETTY):
        calls: list[Any] = []

        def get_batch(self: Any, calls: list[Any] = calls) -> Any:
            calls.append(("batch", self.count))
            return (torch.zeros(1),)

        def start(self: Any, calls: list[Any] = calls) -> None:
            calls.append(("start", self.count))

        methods = {"get_batch": get_batch, "on_inner_loop_start": start}
        play(root, None, 6, methods=methods, config={"unroll_steps": 2})
        told.append(calls)
    assert told[0] == told[1]
    assert told[0][:3] == [("start", 0), ("batch", 1), ("batch", 2)]


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_batches_drawn_at_random_go_on_after_loading(stop: int, tmp_path: Path) -> None:
    made = []
    for _ in range(3):
        torch.manual_seed(5)
        made.append(play(OURS, None, 9, train=False, methods={"get_batch": drawing}))
    whole, first, second = made
    torch.manual_seed(7)
    whole.driver_of.run()
    torch.manual_seed(7)
    first.driver_of.run(stop)
    first.driver_of.save(tmp_path / "state")
    torch.manual_seed(8)
    second.driver_of.load(tmp_path / "state")
    second.driver_of.run()
    assert first.seen + second.seen == whole.seen
    assert len({number for _, number, _ in whole.seen}) == 9


def test_a_get_batch_that_fails_leaves_the_iteration_undone_and_is_asked_again() -> None:
    calls: list[int] = []

    def get_batch(self: Any) -> Any:
        calls.append(self.count)
        if len(calls) == 4:
            torch.rand(3)
            raise OSError("the network")
        return drawing(self)

    torch.manual_seed(3)
    low = play(OURS, None, 8, train=False, methods={"get_batch": get_batch})
    torch.manual_seed(4)
    low.driver_of.run(3)
    with pytest.raises(OSError, match="the network"):
        low.driver_of.train_step()
    assert (low.count, low.driver_of.global_step) == (3, 3)
    low.driver_of.run(3)
    assert calls == [1, 2, 3, 4, 4, 5, 6]
    whole = play(OURS, None, 6, train=False, methods={"get_batch": drawing})
    torch.manual_seed(4)
    whole.driver_of.run()
    assert low.seen == whole.seen


def test_get_batch_may_take_from_the_env_and_from_the_loaders() -> None:
    class Tasks(Env):
        train_data_loader = pairs(3)

        def initialize(self) -> None:
            self.tasks = iter(self.train_data_loader * 3)

    def from_env(self: Any) -> Any:
        return next(self.env.tasks)

    def from_loaders(self: Any) -> Any:
        return ("mine", self.get_batch_single_loader(0))

    expected = play(OURS, pairs(3), 7).seen
    assert play(OURS, None, 7, env=Tasks(), methods={"get_batch": from_env}).seen == expected
    low = play(OURS, pairs(3), 7, methods={"get_batch": from_loaders})
    assert low.seen == [("tuple", "mine", batch) for batch in expected]
    assert ([count for count, _ in low.epochs], low.epoch_counter) == ([4, 7], [2])


# --- shares of data-parallel processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5, 7])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_disjoint_equally_long_and_whole_rounds(count: int, size: int) -> None:
    lists = [list(share(list(range(count)), rank, size)) for rank in range(size)]
    loader = DataLoader(TensorDataset(torch.arange(float(2 * count))), batch_size=2)
    loaders = [[int(x[0]) // 2 for (x,) in share(loader, rank, size)] for rank in range(size)]
    assert lists == loaders
    whole = count // size * size
    assert [number for round_ in zip(*lists, strict=True) for number in round_] == list(range(whole))
    assert [len(share(loader, rank, size)) for rank in range(size)] == [count // size] * size


def test_shuffled_shares_are_of_one_order() -> None:
    loader = numbers(12, shuffle=True)
    parts = []
    for rank in (0, 1):
        torch.manual_seed(3)
        parts.append([x.tolist() for (x,) in share(loader, rank, 2)])
    together = [number for part in parts for batch in part for number in batch]
    assert sorted(together) == list(range(12))
    assert together != list(range(12))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1)


@pytest.mark.parametrize("loader", [iter(pairs(2)), DataLoader(Stream()), {"a": 1}.values()])
def test_what_has_no_shares_is_refused(loader: Any) -> None:
    with pytest.raises(DataError, match="use a DataLoader with batches over a data set with indices, or get_batch"):
        share(loader, 0, 2)
