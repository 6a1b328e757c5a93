"""Interleaved timings: who is timed when, and what is said of the numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "median", "ratio", "rotated", "timed"]


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of the ratios of neighbouring timings, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def rotated(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yields the order of every round: each begins one place further, and every other one runs backwards."""
    for number in range(rounds):
        place = number % max(1, len(names))
        order = [*names[place:], *names[:place]]
        yield order[::-1] if number % 2 else order


def timed(step: Callable[[], object], wait: Callable[[], object], steps: int, *, cpu_time: bool = False) -> float:
    """Returns the seconds that a step takes, in the mean over ``steps``.

    Args:
        step: What is timed.
        wait: Returns when everything that was started is done.
        steps: How often.
        cpu_time: Processor time of the whole process: steadier where others use the machine too.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    wait()
    started = clock()
    for _ in range(steps):
        step()
    wait()
    return (clock() - started) / steps


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> Ratio:
    """Returns the ratio of two that were timed in the same rounds."""
    found = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    if len(found) < 2:
        return Ratio(found[0], found[0], found[0])
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Ratio(middle, low, high)
