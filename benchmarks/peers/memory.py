"""Peak memory of one step, above what stands before it."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["keep_memory", "peak_bytes", "peak_resident"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_memory() -> None:
    """Lets glibc keep freed memory.

    Whether it gives a tensor of some megabytes back to the kernel, and takes it again at the next step, depends on how
    the heap happens to lie: whole processes are a fifth faster or slower for it, whatever the library.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, 1 << 30)


def peak_bytes(step: Callable[[], object]) -> int:
    """Returns the largest sum of torch's allocations alive at once while ``step`` runs, above that at its start.

    On a GPU by the caching allocator's own count of bytes in use; on the CPU from the profiler's record of every
    allocation and release, which is exact for small steps too. Memory that does not come from torch's allocator
    (oneDNN's scratch space, JAX) is not in it: see :func:`peak_resident`.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def peak_resident(step: Callable[[], object]) -> tuple[int, int] | None:
    """Returns the rise of the resident memory while ``step`` runs, and its uncertainty, in bytes.

    The free pages of the C heap are given back first, and the kernel's high-water mark is set to what is resident then
    (``5`` into ``/proc/self/clear_refs``). The kernel counts in batches for each core, hence the uncertainty. None
    where there is no such file.
    """
    if not CLEAR.exists():
        return None
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    CLEAR.write_text("5")
    before = _status("VmRSS")
    step()
    uncertain = 2**20
    return max(0, _status("VmHWM") - before), uncertain


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
