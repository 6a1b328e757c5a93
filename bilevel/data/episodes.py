"""Few-shot tasks, drawn from labelled data or from a distribution of functions; every batch has a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from bilevel.data.generators import Generators
from bilevel.errors import ConfigError, DataError

__all__ = ["Episodes", "FunctionEpisodes", "TaskBatch", "TaskSource", "split_classes"]


class TaskBatch(NamedTuple):
    """M tasks, stacked: what each is learned from, and what it is then judged by.

    Attributes:
        support_inputs: ``(M, n, …)``.
        support_targets: ``(M, n, …)``; classes are numbered from 0 within each task.
        query_inputs: ``(M, m, …)``.
        query_targets: ``(M, m, …)``.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor

    def to(self, device: torch.device | str) -> TaskBatch:
        """Returns the tasks on a device."""
        return TaskBatch(*(part.to(device) for part in self))


class TaskSource(Protocol):
    """Batches of tasks by their numbers, 0, 1, 2, …: the same number, the same tasks. A list of batches is one."""

    def __getitem__(self, number: int, /) -> TaskBatch:
        """Returns a batch."""


class _Numbered:
    """Keeps the batches drawn last: whoever asks for a number again gets the same object."""

    kept = 2

    def __init__(self) -> None:
        self._recent: dict[int, TaskBatch] = {}

    def __getitem__(self, number: int) -> TaskBatch:
        """Returns a batch of tasks.

        Raises:
            IndexError: A negative number.
            DataError: The data could not be read, or not put together.
        """
        if number < 0:
            raise IndexError(f"batches of tasks are numbered from 0; there is no number {number}")
        if number not in self._recent:
            batch = self._draw(number)
            while len(self._recent) >= self.kept:
                del self._recent[next(iter(self._recent))]
            self._recent[number] = batch
        return self._recent[number]

    def __iter__(self) -> Iterator[TaskBatch]:
        """Yields the batches 0, 1, 2, … without end."""
        number = 0
        while True:
            yield self[number]
            number += 1

    def _draw(self, number: int) -> TaskBatch:
        raise NotImplementedError


class Episodes(_Numbered):
    """N-way k-shot tasks over labelled data, in batches of M.

    A task has ``ways`` different classes, relabelled ``0 … ways − 1``, and of each of them ``shots`` examples to learn
    from and ``queries`` others to be judged by. Every class and every example is equally likely, no class and no
    example occurs twice within a task, and examples stand class after class.

    ``episodes[i]`` follows from the seed and ``i`` alone, so that nothing needs to be saved to go on from there. The
    last batches are kept: do not change their tensors in place.

    Args:
        data: Inputs and labels as two tensors ``(n, …)`` and ``(n,)``, or a map-style data set whose items are
            ``(input, label)``. Items are read when a task has them; torch's, NumPy's and Python's random numbers that
            reading draws (augmentation) follow from the seed and the batch's number too.
        ways: N, the classes of a task.
        shots: k, the examples of a class to learn from.
        queries: The examples of a class to be judged by.
        tasks: M, the tasks of a batch.
        classes: The labels to draw from, all by default; see :func:`split_classes`.
        labels: The labels of a data set; None to read every item once.
        seed: Of what is drawn.

    Raises:
        ConfigError: More ways than classes, or a number below 1.
        DataError: A class with fewer than ``shots + queries`` examples, inputs and labels of different lengths, labels
            that are no integers, a class that no example has.

    Example:
        >>> import torch
        >>> images, labels = torch.randn(60, 8, 8), torch.arange(60) % 6
        >>> episodes = Episodes((images, labels), ways=3, shots=1, queries=4, tasks=2)
        >>> tasks = episodes[0]
        >>> tasks.support_inputs.shape, tasks.support_targets
        (torch.Size([2, 3, 8, 8]), tensor([[0, 1, 2],
                [0, 1, 2]]))
        >>> tasks.query_inputs.shape
        torch.Size([2, 12, 8, 8])
    """

    def __init__(
        self,
        data: tuple[Tensor, Tensor] | Dataset[Any],
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        *,
        classes: Iterable[int] | None = None,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries), ("tasks", tasks)):
            _check_count("Episodes", name, value, 1)
        _check_count("Episodes", "seed", seed, 0)
        self.ways, self.shots, self.queries, self.tasks, self.seed = ways, shots, queries, tasks, seed
        self._inputs, self._dataset, numbers = _labelled(data, labels)
        present = np.unique(numbers)
        self.classes = _chosen(present, classes)
        """The labels that tasks are drawn from."""
        if ways > len(self.classes):
            raise ConfigError(
                f"Episodes: {ways}-way tasks need {ways} classes, and there are {len(self.classes)} to draw from: "
                "lower ways, or give more classes"
            )
        self._members = [np.flatnonzero(numbers == label) for label in self.classes]
        for label, members in zip(self.classes, self._members, strict=True):
            if len(members) < shots + queries:
                raise DataError(
                    f"Episodes: class {label} has {len(members)} examples, and a task needs {shots} to learn from and "
                    f"{queries} others to be judged by: lower shots or queries, or leave the class out with classes="
                )

    def shared_classes(self, other: object) -> tuple[int, ...]:
        """Returns the classes that other episodes over the same examples (the same object) draw from too."""
        if not isinstance(other, Episodes) or self._inputs is not other._inputs or self._dataset is not other._dataset:
            return ()
        return tuple(sorted({*self.classes} & {*other.classes}))

    def _draw(self, number: int) -> TaskBatch:
        generator = np.random.default_rng((self.seed, number))
        places = np.stack([self._sample(generator) for _ in range(self.tasks)])
        support, query = places[..., : self.shots], places[..., self.shots :]
        return TaskBatch(*self._read(support, query, number))

    def _sample(self, generator: np.random.Generator) -> Any:
        """Draws the places of one task's examples, ``(ways, shots + queries)``."""
        size = self.shots + self.queries
        chosen = generator.choice(len(self._members), self.ways, replace=False)
        return np.stack([generator.choice(self._members[one], size, replace=False) for one in chosen])

    def _read(self, support: Any, query: Any, number: int) -> Iterator[Tensor]:
        with Generators.seeded(_seed(self.seed, number)).installed():
            for places in (support, query):
                flat = torch.from_numpy(places.reshape(self.tasks, -1))
                inputs = self._gather(flat)
                targets = torch.arange(self.ways).repeat_interleave(places.shape[-1])
                yield inputs
                yield targets.expand(self.tasks, -1).to(inputs.device)

    def _gather(self, places: Tensor) -> Tensor:
        if self._inputs is not None:
            return self._inputs[places]
        assert self._dataset is not None
        items = [self._dataset[place][0] for place in places.flatten().tolist()]
        try:
            stacked = default_collate(items)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"Episodes: the inputs of the data set cannot be stacked: {error}. Let its items be tensors of one "
                "shape, or numbers"
            ) from error
        if not isinstance(stacked, Tensor):
            raise DataError(
                f"Episodes: the data set's inputs must be tensors or numbers; they are {type(items[0]).__name__}"
            )
        return stacked.reshape(*places.shape, *stacked.shape[1:])

    def __repr__(self) -> str:
        """Says what a task is."""
        return (
            f"Episodes(ways={self.ways}, shots={self.shots}, queries={self.queries}, tasks={self.tasks}, "
            f"classes={len(self.classes)}, seed={self.seed})"
        )


class FunctionEpisodes(_Numbered):
    """Tasks from a distribution of functions, in batches of M.

    ``episodes[i]`` follows from the seed and ``i`` alone.

    Args:
        draw: Draws one task with the generator that it is given: ``(support_inputs, support_targets, query_inputs,
            query_targets)``, of the same shapes every time.
        tasks: M, the tasks of a batch.
        seed: Of what is drawn.

    Raises:
        ConfigError: A number that makes no sense.
        DataError: Later, tasks of different shapes, or what is no task.

    Example:
        >>> def sinusoid(generator):
        ...     height, shift = 0.1 + 4.9 * torch.rand((), generator=generator), torch.rand((), generator=generator)
        ...     x = 10 * torch.rand(20, 1, generator=generator) - 5
        ...     y = height * (x - torch.pi * shift).sin()
        ...     return x[:10], y[:10], x[10:], y[10:]
        >>> FunctionEpisodes(sinusoid, tasks=4)[0].query_targets.shape
        torch.Size([4, 10, 1])
    """

    def __init__(
        self, draw: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor, Tensor]], tasks: int, *, seed: int = 0
    ) -> None:
        super().__init__()
        _check_count("FunctionEpisodes", "tasks", tasks, 1)
        _check_count("FunctionEpisodes", "seed", seed, 0)
        self.draw, self.tasks, self.seed = draw, tasks, seed

    def _draw(self, number: int) -> TaskBatch:
        drawn = [self.draw(torch.Generator().manual_seed(_seed(self.seed, number, task))) for task in range(self.tasks)]
        for parts in drawn:
            if len(parts) != len(TaskBatch._fields) or not all(isinstance(part, Tensor) for part in parts):
                raise DataError(f"FunctionEpisodes: draw must return four tensors, {', '.join(TaskBatch._fields)}")
            if [part.shape for part in parts] != [part.shape for part in drawn[0]]:
                raise DataError(
                    f"FunctionEpisodes: the tasks of a batch have the shapes {[tuple(part.shape) for part in parts]} "
                    f"and {[tuple(part.shape) for part in drawn[0]]}: draw as many examples for each"
                )
        return TaskBatch(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def __repr__(self) -> str:
        """Says what is drawn."""
        return f"FunctionEpisodes({getattr(self.draw, '__name__', self.draw)}, tasks={self.tasks}, seed={self.seed})"


def split_classes(labels: Sequence[int] | Tensor, *counts: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Returns disjoint sets of classes: as many of the first set, of the second, …, drawn at random.

    Args:
        labels: The labels of all examples.
        counts: How many classes each set has.
        seed: Of the order.

    Raises:
        ConfigError: More classes are asked for than there are, or no set of them.

    Example:
        >>> split_classes([0, 0, 1, 1, 2, 2, 3, 3], 2, 1, 1)
        ((0, 2), (1,), (3,))
    """
    present = np.unique(_numbers(labels))
    if not counts:
        raise ConfigError("split_classes: say how many classes each set is to have: split_classes(labels, 60, 20, 20)")
    for count in counts:
        _check_count("split_classes", "counts", count, 1)
    if sum(counts) > len(present):
        raise ConfigError(f"split_classes: {sum(counts)} classes are asked for, and there are {len(present)}")
    order = np.random.default_rng(seed).permutation(present)
    sets = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    return tuple(tuple(sorted(part.tolist())) for part in sets)


def _labelled(
    data: tuple[Tensor, Tensor] | Dataset[Any], labels: Sequence[int] | Tensor | None
) -> tuple[Tensor | None, Any, Any]:
    """Returns inputs or a data set, and its labels as numbers."""
    if isinstance(data, tuple | list):
        parts: Sequence[object] = data
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
            raise DataError("Episodes: data must be two tensors, inputs and labels, or a data set")
        if labels is not None:
            raise ConfigError("Episodes: labels= is for data sets; two tensors bring their own")
        inputs, dataset, numbers = data[0], None, _numbers(data[1])
        count = len(inputs)
    else:
        sized: Any = data
        if not (hasattr(type(sized), "__getitem__") and hasattr(type(sized), "__len__")):
            raise DataError(
                f"Episodes: data must be two tensors or a data set with __getitem__ and __len__, not "
                f"{type(data).__name__}"
            )
        count = len(sized)
        inputs, dataset = None, sized
        numbers = _numbers([int(sized[place][1]) for place in range(count)] if labels is None else labels)
    if len(numbers) != count:
        raise DataError(f"Episodes: there are {count} inputs and {len(numbers)} labels")
    return inputs, dataset, numbers


def _numbers(labels: Sequence[int] | Tensor) -> Any:
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"labels must be integers, one an example; they have shape {array.shape} and are {array.dtype}")
    return array


def _chosen(present: Any, classes: Iterable[int] | None) -> tuple[int, ...]:
    known = [int(label) for label in present]
    if classes is None:
        return tuple(known)
    chosen = [int(label) for label in classes]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"Episodes.classes names a class twice: {chosen}")
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise DataError(f"Episodes.classes: no example has the labels {unknown[:8]}; there are {known[:20]}")
    return tuple(chosen)


def _seed(*numbers: int) -> int:
    """Returns a seed that no other numbers are likely to have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_count(owner: str, field: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{owner}.{field} must be an integer of at least {minimum}, not {value!r}")
