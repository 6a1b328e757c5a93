"""What a process holds: tensors, graphs, the C heap, Python's heap, resident memory. And what of it may change."""

from __future__ import annotations

import ctypes
import gc
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import psutil  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["Reading", "Verdict", "follow", "judge"]

# glibc's smallest block has 32 bytes: less than half of one a step is no leak of the C heap. What malloc keeps aside
# for its threads counts as used, and fills up over some hundred steps.
HEAP_LIMIT, HEAP_SLACK = 16.0, 65536
# Every object that stays takes a block of Python's heap; its free lists of tuples and frames fill up slowly.
BLOCKS_LIMIT, BLOCKS_SLACK = 0.5, 400
# A plain torch loop's slopes are up to 12 bytes a step over 2,000 steps; over 100 a single page is 41.
RESIDENT_LIMIT, ENOUGH_FOR_RESIDENT = 50.0, 1000


@dataclass(frozen=True)
class Reading:
    """What the process holds after so many steps; before the cyclic collector runs, where nothing else is said.

    Attributes:
        step: Steps taken.
        tensors: Tensors that Python holds.
        tensor_bytes: Bytes of their storages, each once.
        nodes: Nodes of autograd's graphs, reachable from these tensors or held by Python.
        cyclic_tensors: How many of the tensors only the cyclic collector freed.
        cyclic_bytes: Bytes of the C heap that only the cyclic collector freed.
        heap: Bytes in use on the C heap, where tensors' data and autograd's graphs are; after collection. -1 without
            glibc.
        blocks: Blocks in use on Python's own heap, after collection.
        resident: Bytes of resident memory, after collection, without the free pages that glibc can give back.
    """

    step: int
    tensors: int
    tensor_bytes: int
    nodes: int
    cyclic_tensors: int
    cyclic_bytes: int
    heap: int
    blocks: int
    resident: int


@dataclass(frozen=True)
class Verdict:
    """What a run's readings say.

    Attributes:
        tensors: Live tensors at the end.
        nodes: Live graph nodes at the end.
        cyclic_tensors: Tensors a step that only the cyclic collector frees.
        heap_slope: Bytes a step by which the C heap grows (least squares).
        blocks_slope: Blocks a step by which Python's heap grows.
        resident_slope: Bytes a step by which the resident memory grows.
        faults: What grows, in words; empty where nothing does.
    """

    tensors: int
    nodes: int
    cyclic_tensors: float
    heap_slope: float
    blocks_slope: float
    resident_slope: float
    faults: tuple[str, ...]


def follow(make: Callable[[], Callable[[], object]], *, warm_up: int, steps: int, every: int) -> list[Reading]:
    """Takes steps, and reads what the process holds, with the cyclic collector off between the readings.

    Args:
        make: Returns what takes a step.
        warm_up: Steps before the first reading.
        steps: Steps after it.
        every: Steps between readings: a multiple of the data's period, after which a constant state is the same.
    """
    # Numbers in an array, for a list of readings would itself take blocks.
    rows = array("q")
    with _collector_off():
        step = make()
        for _ in range(warm_up):
            step()
        _read(0)
        rows.extend(_read(0))
        for number in range(1, steps + 1):
            step()
            if number % every == 0:
                rows.extend(_read(number))
    width = len(fields(Reading))
    return [Reading(*rows[start : start + width]) for start in range(0, len(rows), width)]


def judge(readings: Sequence[Reading]) -> Verdict:
    """Judges a run's readings.

    The live tensors, their bytes and the graphs' nodes must be the same in all of them, and no tensor or memory of the
    C heap may wait for the cyclic collector. The slopes of both heaps must be below that of a leak of one block a step,
    and that of the resident memory (in runs of 1,000 steps and more) below 50 bytes.
    """
    last, count = readings[-1], readings[-1].step
    slopes = {name: _slope(readings, name) for name in ("heap", "blocks", "resident")}
    cyclic = {name: sum(getattr(r, name) for r in readings[1:]) / count for name in ("cyclic_tensors", "cyclic_bytes")}
    faults = []
    for name in ("tensors", "tensor_bytes", "nodes"):
        values = [getattr(reading, name) for reading in readings]
        if len(set(values)) > 1:
            faults.append(f"{name} {values[0]:,} → {values[-1]:,} (from {min(values):,} to {max(values):,})")
    if cyclic["cyclic_tensors"] or cyclic["cyclic_bytes"] > HEAP_LIMIT:
        held = f"{cyclic['cyclic_tensors']:.2g} tensors, {cyclic['cyclic_bytes']:,.0f} bytes"
        faults.append(f"reference cycles hold {held} a step")
    if slopes["heap"] * count > HEAP_LIMIT * count + HEAP_SLACK:
        faults.append(f"the C heap grows by {slopes['heap']:,.0f} bytes a step")
    if slopes["blocks"] * count > BLOCKS_LIMIT * count + BLOCKS_SLACK:
        faults.append(f"Python's heap grows by {slopes['blocks']:.1f} blocks a step")
    if count >= ENOUGH_FOR_RESIDENT and slopes["resident"] > RESIDENT_LIMIT:
        faults.append(f"the resident memory grows by {slopes['resident']:,.0f} bytes a step")
    return Verdict(
        last.tensors,
        last.nodes,
        cyclic["cyclic_tensors"],
        slopes["heap"],
        slopes["blocks"],
        slopes["resident"],
        tuple(faults),
    )


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    try:
        library.mallinfo2.restype = _MallInfo
        library.malloc_trim.argtypes = (ctypes.c_size_t,)
    except AttributeError:
        return None
    return library


_GLIBC = _glibc()
_PROCESS = psutil.Process()


def _read(step: int) -> tuple[int, ...]:
    tensors, tensor_bytes, nodes = _count()
    before = _heap()
    cyclic = gc.collect()
    cyclic_tensors = tensors - _count()[0] if cyclic else 0
    heap, blocks = _heap(), sys.getallocatedblocks()
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)
    resident = int(_PROCESS.memory_info().rss)
    # What collecting frees of its own accord (free lists) is no cycle.
    freed = before - heap if cyclic else 0
    return step, tensors, tensor_bytes, nodes, cyclic_tensors, freed, heap, blocks, resident


def _heap() -> int:
    if _GLIBC is None:
        return -1
    info = _GLIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _count() -> tuple[int, int, int]:
    """Returns the number of live tensors, the bytes of their storages, and the number of their graphs' nodes."""
    objects = gc.get_objects()
    tensors = [found for found in objects if issubclass(type(found), Tensor)]
    roots = [found for found in objects if issubclass(type(found), Node)]
    del objects
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    stack = roots + [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions if child is not None)
    return len(tensors), sum(storages.values()), len(seen)


def _slope(readings: Sequence[Reading], name: str) -> float:
    xs, ys = [r.step for r in readings], [getattr(r, name) for r in readings]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return float(sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Sets what exists aside, so that counting walks over what the body makes only, and turns the collector off."""
    was_on, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_on:
            gc.enable()
