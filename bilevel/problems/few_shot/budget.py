"""How many tasks to evaluate together: chosen by measurement, within a budget of memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.errors import ConfigError

__all__ = ["Chunking", "Need", "Peak", "Trial", "choose", "free_memory", "measured_peak", "timed"]

SHARE = 0.5
"""Of the free memory, what is taken where no budget is given."""
REPEATS, LEAST_SECONDS = 3, 0.05
"""A time is measured so often at least, and until this much has been spent on it."""
SLOWER = 1.3
"""Larger chunks are not tried once two sizes in turn took this many times the best's time for a task."""
EQUAL = 1.1
"""Of sizes that take up to this many times the best's time the smallest is taken: it takes least memory, and times
differ by as much from one measurement to the next."""


@dataclass(frozen=True)
class Trial:
    """What a chunk size was found to cost.

    Attributes:
        size: Tasks in the chunk.
        seconds: Time of one task's share of an outer step, as far as it depends on the chunk.
        peak: Bytes that are held at most, beside parameters and displacements: by a chunk, and by the graphs that the
            method keeps.
    """

    size: int
    seconds: float
    peak: int


@dataclass(frozen=True)
class Chunking:
    """Which chunk size was chosen, and why.

    Attributes:
        size: Tasks in a chunk.
        budget: The bytes that a chunk may take.
        trials: What was measured; empty where the choice comes from a file.
    """

    size: int
    budget: int
    trials: tuple[Trial, ...] = ()

    def __str__(self) -> str:
        """Lists what was measured."""
        lines = [f"chunks of {self.size} tasks, for a budget of {self.budget / 2**20:.0f} MiB"]
        lines += [
            f"  {trial.size:4d} tasks: {1e3 * trial.seconds:.3g} ms a task, {trial.peak / 2**20:.1f} MiB a chunk"
            for trial in self.trials
        ]
        return "\n".join(lines)


@dataclass
class Peak:
    """Memory of a measured body.

    Attributes:
        peak: The most bytes that were held at once, beside what was there before.
        held: What was held when the body ended.
    """

    peak: int = 0
    held: int = 0


@dataclass(frozen=True)
class Need:
    """The memory of a chunk size, in bytes.

    Attributes:
        chunk: What a chunk takes.
        total: That, and what is kept beside it.
    """

    chunk: int
    total: int


def choose(
    count: int,
    budget: int,
    cost: Callable[[int], Need],
    run: Callable[[int], float],
    given: bool,
    name: str,
) -> Chunking:
    """Returns the chunk size of about the least time a task among those that stay in the budget, the smallest of such.

    Sizes 1, 2, 4, … and M are tried, from below, while a chunk's memory, as far as it follows from those before, is in
    the budget; and are taken where all of their own is.

    Args:
        count: M.
        budget: Bytes.
        cost: Returns the memory of a size.
        run: Returns the time of a chunk of a size.
        given: Whether the budget is the user's.
        name: Whose budget, for messages.

    Raises:
        ConfigError: Chunks of a single task take more than the budget.
    """
    sizes = [*(1 << power for power in range(count.bit_length()) if 1 << power < count), count]
    needs: dict[int, int] = {}
    trials: list[Trial] = []
    for size in sizes:
        if _expected(needs, size) > budget:
            break
        need = cost(size)
        if need.total > budget:
            if not trials:
                raise _too_little(budget, need.total, given, name)
            break
        needs[size] = need.chunk
        trials.append(Trial(size, run(size) / size, need.total))
        limit = SLOWER * min(trial.seconds for trial in trials)
        if len(trials) > 1 and all(trial.seconds > limit for trial in trials[-2:]):
            break
    limit = EQUAL * min(trial.seconds for trial in trials)
    best = next(trial for trial in trials if trial.seconds <= limit)
    return Chunking(best.size, budget, tuple(trials))


def _expected(needs: Mapping[int, int], size: int) -> float:
    """Returns the memory of a size by a straight line through the last one that is known and the one before, or zero.

    What takes less: a single task goes another way, which may take less than a line through larger ones says.
    """
    (before, low), (last, high) = [(0, 0), (0, 0), *needs.items()][-2:]
    return high + (size - last) * min((high - low) / max(1, last - before), high / max(1, last))


def _too_little(budget: int, least: int, given: bool, name: str) -> ConfigError:
    what, remedy = ("memory_budget", "raise it") if given else ("half of the free memory", "give memory_budget more")
    return ConfigError(
        f"{name}: {what} is {budget / 2**20:.1f} MiB, and tasks one by one take {least / 2**20:.1f} MiB: {remedy}, or "
        "take a smaller network, fewer examples a task, or a method that keeps no graphs (Unrolled(memory='replay'))"
    )


def timed(body: Callable[[], object], device: torch.device) -> float:
    """Returns the least seconds that a body took, after a first run that is not counted.

    The least, since what else a machine does makes every run longer, and none shorter.
    """
    wait = _waits(device)
    body()
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < LEAST_SECONDS:
        wait()
        started = time.perf_counter()
        body()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _waits(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device)
    return lambda: module.synchronize(device)


@contextmanager
def measured_peak(device: torch.device, limit: int | None = None) -> Iterator[Peak]:
    """Measures the memory of tensors that the body makes.

    On CUDA by the allocator's own count. Elsewhere by following every tensor that an operation returns, and ending the
    body as soon as they exceed a limit; what kernels take for themselves is not seen.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device) - before
        found.held = torch.cuda.memory_allocated(device) - before
        return
    meter = _Meter(limit)
    try:
        with meter:
            yield found
    except _LimitReachedError:
        pass
    found.peak, found.held = meter.peak, meter.held


class _LimitReachedError(Exception):
    pass


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, and notes when they are gone."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._limit = limit
        self._sizes: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {id(part.untyped_storage()) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and id(part.untyped_storage()) not in known:
                self._add(part.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size, weakref.ref(storage, lambda _: self._remove(key))
        self.held += size
        self.peak = max(self.peak, self.held)
        if self._limit is not None and self.held > self._limit:
            raise _LimitReachedError

    def _remove(self, key: int) -> None:
        size, _ = self._sizes.pop(key)
        self.held -= size


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device.

    Raises:
        ConfigError: That cannot be found out.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        known = [value for value in (_available(), _group_limit()) if value is not None]
        if known:
            return min(known)
    raise ConfigError(f"how much memory is free on {device} is not known: give Adaptation(memory_budget=bytes)")


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _group_limit() -> int | None:
    """What a control group (a container) may still take."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            folder.joinpath(f"memory.{what}").read_text(encoding="ascii").strip() for what in ("max", "current")
        )
        return None if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return None
